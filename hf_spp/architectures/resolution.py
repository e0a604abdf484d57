"""Resolving the written map against a live or meta-device model, completely, before anything is written.

Structure decides, never a class name: a pattern matches where the named children exist and their shapes fit, and a
module with a parameter that the pattern does not explain is refused with the reason.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..channels import ChannelGroup, ChannelMap, Member, Refusal
from ..config import AXES
from ..errors import UnsupportedArchitectureError, UnsupportedModelError
from ..structure import check_adapters, inner_model, plain_structure
from .attention import attention_units
from .feed_forward import feed_forward_units
from .index import ModelIndex
from .patterns import SHARED_REASON
from .registry import registered_patterns
from .stream import hidden_group
from .units import AttentionUnit, FeedForwardUnit, Misfit


def channel_groups(model: nn.Module) -> ChannelMap:
    """Resolve which channels of a model may move together.

    Reads names, shapes and code only, so a model on the meta device answers as well. Tensors have the names of the
    plain model, whatever adapters and shards training put around them.

    Args:
        model: A transformers model, with or without a task head, a PEFT model of one, or any module whose class is
            registered.

    Returns:
        The groups of every axis, and what may not move with the reason.

    Raises:
        UnsupportedModelError: `model` is no transformers model, or its weights are quantized.
        UnsupportedArchitectureError: No structure of the written map occurs in the model.
    """
    inner = _checked(inner_model(model))
    check_adapters(inner)
    with plain_structure(inner) as plain:
        return _resolve(ModelIndex(plain))


def _resolve(index: ModelIndex) -> ChannelMap:
    model = index.model
    attentions, misfits = attention_units(index)
    claimed = {feature.tensor for unit in attentions for feature in unit.features}
    feed_forwards, others = feed_forward_units(index, claimed)
    refused = _refusals(index, [*misfits, *others])
    if not attentions and not feed_forwards:
        reasons = [f" {refusal.where}: {refusal.reason}." for refusal in _summarize(refused)]
        raise UnsupportedArchitectureError(
            f"model_type {index.model_type!r} ({type(model).__name__}) has no channel group: no attention or "
            f"feed-forward structure of the written map occurs in it.{''.join([*dict.fromkeys(reasons)][:3])} "
            "`hf-spp architectures` lists what is supported; register_architecture adds more."
        )
    groups: list[ChannelGroup] = []
    for pattern in index.patterns:
        if pattern not in index.matched:
            raise UnsupportedArchitectureError(
                f"{pattern!r}, registered for {type(model).__name__}, fits no module: none has the children "
                f"{', '.join(pattern.children)}. Give names relative to the module that holds them."
            )
    units: list[AttentionUnit | FeedForwardUnit] = [*attentions, *feed_forwards]
    for unit in units:
        groups += [replace(group, owners=unit.owners) for group in unit.groups(index)]
        refused += [
            Refusal(axis, index.short(unit.path), reason) for axis, reason in {**unit.notes, **unit.refused}.items()
        ]
    hidden = hidden_group(index, units, [*misfits, *others])
    if isinstance(hidden, ChannelGroup):
        groups.append(hidden)
    else:
        refused.append(Refusal("hidden", index.short(hidden.path) or type(model).__name__, hidden.reason))
    groups, shared = _distinct(index, _merge_ties(groups))
    return ChannelMap(tuple(groups), _summarize([*refused, *shared]))


def _checked(model: Any) -> nn.Module:
    if not isinstance(model, PreTrainedModel) and not (
        isinstance(model, nn.Module) and registered_patterns(model) is not None
    ):
        raise UnsupportedModelError(
            f"A {type(model).__name__} was given; a transformers PreTrainedModel is needed, or a module whose class is "
            "registered. Unwrap it first (accelerator.unwrap_model, or the .module of a parallel wrapper), or call "
            f"register_architecture({type(model).__name__}, …)."
        )
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} holds quantized weights, whose packed rows cannot be moved. "
            "Reorder the unquantized checkpoint first and quantize the result."
        )
    return model


def _refusals(index: ModelIndex, misfits: Iterable[Misfit]) -> list[Refusal]:
    return [Refusal(axis, index.short(one.path), one.reason) for one in misfits for axis in one.axes]


def _merge_ties(groups: list[ChannelGroup]) -> list[ChannelGroup]:
    """Join groups of the same name, which tied layers share, into one with all their members."""
    merged: dict[str, ChannelGroup] = {}
    for group in groups:
        first = merged.get(group.name)
        members = group.members if first is None else (*first.members, *group.members)
        owners = group.owners if first is None else (*first.owners, *group.owners)
        merged[group.name] = replace(group, members=members, owners=owners)
    return list(merged.values())


def _distinct(index: ModelIndex, groups: list[ChannelGroup]) -> tuple[list[ChannelGroup], list[Refusal]]:
    """Groups under the first names of their tensors: one for modules that share all, none where they share some."""
    names = {group.name for group in groups if group.size > 1}
    distinct: dict[tuple[str, int, frozenset[Member]], ChannelGroup] = {}
    for group in groups:
        if group.size > 1:
            group = _finish(index, group, names)
            distinct.setdefault((group.axis, group.blocks, frozenset(group.members)), group)
    claims: dict[tuple[Any, ...], set[str]] = defaultdict(set)
    for group in distinct.values():
        for member in group.members:
            level = "inner" if group.parent in names else "outer"
            claims[(member.tensor, group.axis, level, member.dim, member.span)].add(group.name)
    clashing = {name for owners in claims.values() if len(owners) > 1 for name in owners}
    # Blocks whose own group is gone may still be moved inside.
    kept = [group for group in distinct.values() if group.name not in clashing]
    refused = [
        Refusal(distinct_group.axis, name.rpartition(".")[0], SHARED_REASON)
        for distinct_group in distinct.values()
        if (name := distinct_group.name) in clashing
    ]
    left = {group.name for group in kept}
    return [_finish(index, group, left) for group in kept], refused


def _finish(index: ModelIndex, group: ChannelGroup, names: set[str]) -> ChannelGroup:
    members = {}
    for member in group.members:
        name = index.first_name(member.tensor)
        members[(name, member.pattern, member.span)] = Member(name, member.pattern, member.role, member.span)
    parent = group.parent if group.parent in names else None
    return replace(group, members=tuple(members.values()), parent=parent)


def _summarize(refused: list[Refusal]) -> tuple[Refusal, ...]:
    """One refusal for all layers that share it."""
    return tuple(
        dict.fromkeys(
            Refusal(
                refusal.axis, *(re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", part) for part in (refusal.where, refusal.reason))
            )
            for refusal in sorted(refused, key=lambda refusal: AXES.index(refusal.axis))
        )
    )
