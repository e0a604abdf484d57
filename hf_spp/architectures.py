"""Resolving the written map against a live or meta-device model, completely, before anything is written.

Structure decides, never a class name: a pattern matches where the named children exist and their shapes fit, and a
module with a parameter that the pattern does not explain is refused with the reason.
"""

import inspect
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .channels import ChannelGroup, ChannelMap, Member, Refusal, Role
from .config import AXES
from .errors import UnsupportedArchitectureError, UnsupportedModelError
from .patterns import (
    ATTENTION_PATTERNS,
    CONCATENATED_READERS,
    CROSS_ATTENTION_REASON,
    FEED_FORWARD_PATTERNS,
    HEAD_DIM_ATTRIBUTES,
    HEAD_NORMS,
    HEAD_TABLES,
    HEADLESS_REASON,
    OUTPUT_LAYERS,
    ROTARY_REASON,
    AttentionPattern,
    FeedForwardPattern,
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def channel_groups(model: nn.Module) -> ChannelMap:
    """Resolve which channels of a model may move together.

    Reads names and shapes only, so a model on the meta device answers as well.

    Args:
        model: A transformers model, with or without a task head.

    Returns:
        The groups of every axis, and what may not move with the reason.

    Raises:
        UnsupportedModelError: `model` is no transformers model, or its weights are quantized.
        UnsupportedArchitectureError: No structure of the written map occurs in the model.
    """
    return _Resolver(_checked(model)).resolve()


def _checked(model: Any) -> PreTrainedModel:
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"A {type(model).__name__} was given; a transformers PreTrainedModel is needed. "
            "Unwrap it first (accelerator.unwrap_model, or the .module of a parallel wrapper)."
        )
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} holds quantized weights, whose packed rows cannot be moved. "
            "Reorder the unquantized checkpoint first and quantize the result."
        )
    return model


@dataclass(frozen=True)
class _Projection:
    """A linear map inside a unit, `span` being its part of a fused module's output features."""

    module: str
    transposed: bool
    bias: bool
    inputs: int
    outputs: int
    span: tuple[int, int] | None = None

    def produce(self, features: str) -> list[Member]:
        pattern = f"i {features}" if self.transposed else f"{features} i"
        members = [Member(f"{self.module}.weight", pattern, "producer", self.span)]
        if self.bias:
            members.append(Member(f"{self.module}.bias", features, "producer", self.span))
        return members

    def consume(self, features: str) -> list[Member]:
        pattern = f"{features} o" if self.transposed else f"o {features}"
        return [Member(f"{self.module}.weight", pattern, "consumer")]


@dataclass
class _Attention:
    path: str
    query: _Projection
    key: _Projection
    value: _Projection
    output: _Projection
    heads: int
    key_value_heads: int
    rotary: bool
    tables: list[Member]
    norms: list[Member]
    tie: str | None = None

    @property
    def repeats(self) -> int:
        return self.heads // self.key_value_heads


@dataclass
class _FeedForward:
    path: str
    inner: list[_Projection]
    output: _Projection


@dataclass
class _Resolver:
    model: PreTrainedModel
    refused: list[Refusal] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.modules = dict(self.model.named_modules())
        # A shared parameter has one name here, the first, so that it moves once.
        self.parameters: dict[str, nn.Parameter] = {}
        self.first_name: dict[int, str] = {}
        self.inside: dict[str, list[str]] = defaultdict(list)
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if self.first_name.setdefault(id(parameter), name) == name:
                self.parameters[name] = parameter
            if parameter.dtype not in DTYPES:
                raise UnsupportedModelError(
                    f"Parameter {name} of {type(self.model).__name__} has dtype {parameter.dtype}; float16, bfloat16, "
                    "float32 or float64 weights are needed. Reorder the unquantized checkpoint first and quantize the "
                    "result."
                )
            owner = name
            while owner:
                owner = owner.rpartition(".")[0]
                self.inside[owner].append(name)

    def resolve(self) -> ChannelMap:
        attentions = list(self._attentions())
        feed_forwards = list(self._feed_forwards())
        if not attentions and not feed_forwards:
            reasons = "".join(f" {refusal.where}: {refusal.reason}." for refusal in self.refused[:3])
            raise UnsupportedArchitectureError(
                f"model_type {self.model.config.model_type!r} ({type(self.model).__name__}) has no channel group: no "
                f"attention or feed-forward structure of the written map occurs in it.{reasons} "
                "`hf-spp architectures` lists what is supported."
            )
        self._tie_heads(attentions)
        groups = [group for unit in attentions for group in self._attention_groups(unit)]
        groups = _merge_ties(groups)
        groups += [self._feed_forward_group(unit) for unit in feed_forwards]
        if (hidden := self._hidden_group(attentions, feed_forwards)) is not None:
            groups.append(hidden)
        names = {group.name for group in groups if group.size > 1}
        # Modules that share their parameters make one group, under the first name.
        distinct: dict[tuple[str, int, frozenset[Member]], ChannelGroup] = {}
        for group in groups:
            if group.size > 1:
                group = self._finish(group, names)
                distinct.setdefault((group.axis, group.blocks, frozenset(group.members)), group)
        return ChannelMap(tuple(distinct.values()), _summarize(self.refused))

    def _finish(self, group: ChannelGroup, names: set[str]) -> ChannelGroup:
        members = {}
        for member in group.members:
            name = self.first_name[id(self._tensor(member.tensor))]
            canonical = Member(name, member.pattern, member.role, member.span)
            members[(name, member.pattern, member.span)] = canonical
        parent = group.parent if group.parent in names else None
        return ChannelGroup(
            group.name, group.axis, group.layer, group.blocks, group.size, tuple(members.values()), parent
        )

    def _tensor(self, name: str) -> torch.Tensor:
        path, _, leaf = name.rpartition(".")
        tensor: torch.Tensor = getattr(self.modules[path], leaf)
        return tensor

    def _refuse(self, axes: tuple[str, ...], where: str, reason: str) -> None:
        self.refused += [Refusal(axis, self._short(where), reason) for axis in axes]

    def _short(self, path: str) -> str:
        """The path below the base model, so that a model with and without a head has the same names."""
        return path.removeprefix(f"{self.model.base_model_prefix}.")

    def _child(self, path: str, relative: str) -> nn.Module | None:
        return self.modules.get(_join(path, relative))

    def _projection(self, path: str, relative: str) -> _Projection | None:
        module = self._child(path, relative)
        if not _is_linear(module):
            return None
        transposed = isinstance(module, Conv1D)
        outputs, inputs = reversed(module.weight.shape) if transposed else module.weight.shape
        return _Projection(_join(path, relative), transposed, module.bias is not None, inputs, outputs)

    def _projections(self, path: str, children: tuple[str, ...], axes: tuple[str, ...]) -> list[_Projection] | None:
        """The projections named `children`, None if one is missing or, with a refusal, no plain linear layer."""
        if self._child(path, children[0]) is None or any(self._child(path, child) is None for child in children):
            return None
        found = []
        for child in children:
            projection = self._projection(path, child)
            if projection is None:
                self._refuse(
                    axes, path, f"{child} is a {type(self._child(path, child)).__name__}, no plain linear layer"
                )
                return None
            found.append(projection)
        return found

    def _unexplained(self, path: str, children: tuple[str, ...], known: tuple[str, ...] = ()) -> str | None:
        """The first parameter of the modules that own `children` that is neither theirs nor among `known`."""
        owners = {_join(path, child).rpartition(".")[0] for child in children}
        explained = tuple(f"{_join(path, child)}.{leaf}." for child in children for leaf in ("weight", "bias"))
        explained += tuple(f"{_join(path, child)}." for child in known)
        for owner in owners:
            for name in self.inside[owner]:
                if not f"{name}.".startswith(explained):
                    return name
        return None

    # Attention

    def _attentions(self) -> Iterator[_Attention]:
        for path, module in self.modules.items():
            for pattern in ATTENTION_PATTERNS:
                if (unit := self._match_attention(path, module, pattern)) is not None:
                    yield unit
                    break

    def _match_attention(self, path: str, module: nn.Module, pattern: AttentionPattern) -> _Attention | None:
        axes = ("qk", "vo", "heads")
        found = self._projections(path, (*pattern.projections, pattern.output), axes)
        if found is None:
            return None
        *projections, output = found
        owner = self.modules[projections[0].module.rpartition(".")[0]]
        known = (*pattern.beside, *HEAD_TABLES, *HEAD_NORMS)
        if (extra := self._unexplained(path, (*pattern.projections, pattern.output), known)) is not None:
            self._refuse(axes, path, f"parameter {self._short(extra)} is not understood")
            return None
        if len(projections) == 1:
            if projections[0].outputs != 3 * output.inputs:
                self._refuse(axes, path, f"{pattern.projections[0]} does not stack q, k and v in equal parts")
                return None
            projections = _split_fused(projections[0])
        query, key, value = projections
        head_dim = _head_dim(owner)
        if head_dim is None:
            self._refuse(axes, path, f"the module states no head size ({', '.join(HEAD_DIM_ATTRIBUTES)})")
            return None
        if (reason := _misfit(query, key, value, output, head_dim)) is not None:
            self._refuse(axes, path, reason)
            return None
        tables = [
            Member(name, layout)
            for child, layout in HEAD_TABLES.items()
            if (name := _join(path, child)) in self.parameters
        ]
        norms = [Member(name, "c") for child in HEAD_NORMS if (name := _join(path, child)) in self.parameters]
        if any(self.parameters[norm.tensor].shape != (head_dim,) for norm in norms):
            self._refuse(axes, path, "the norm of q or k does not span one head")
            return None
        heads, key_value_heads = query.outputs // head_dim, key.outputs // head_dim
        return _Attention(path, query, key, value, output, heads, key_value_heads, _is_rotary(owner), tables, norms)

    def _tie_heads(self, attentions: list[_Attention]) -> None:
        """Tie the head order of every layer of a stack whose first layer's table serves them all, as in T5."""
        stacks = defaultdict(list)
        for unit in attentions:
            stacks[re.sub(r"\.\d+\.", ".*.", unit.path)].append(unit)
        for stack, units in stacks.items():
            with_table = [unit for unit in units if unit.tables]
            if with_table and len(with_table) < len(units):
                for unit in units:
                    unit.tie = stack

    def _attention_groups(self, unit: _Attention) -> Iterator[ChannelGroup]:
        layer, name = _layer(unit.path), self._short(unit.path)
        shared, repeats = unit.key_value_heads, unit.repeats
        dim = unit.key.outputs // shared
        heads = f"{self._short(unit.tie) if unit.tie else name}.heads"
        q, k, v, o = unit.query, unit.key, unit.value, unit.output
        whole = "(c u)"
        members = [*q.produce(whole), *k.produce(whole), *v.produce(whole), *o.consume(whole)]
        tables = [Member(m.tensor, m.pattern.replace("c", "(c u)") if repeats > 1 else m.pattern) for m in unit.tables]
        yield ChannelGroup(heads, "heads", None if unit.tie else layer, 1, shared, (*members, *tables))
        if repeats > 1:
            members = [*q.produce("(b c u)"), *o.consume("(b c u)")]
            tables = [Member(m.tensor, m.pattern.replace("c", "(b c)")) for m in unit.tables]
            yield ChannelGroup(
                f"{heads.removesuffix('.heads')}.query_heads", "heads", None if unit.tie else layer, shared, repeats,
                (*members, *tables), heads,
            )  # fmt: skip
        if unit.rotary:
            self._refuse(("qk",), unit.path, ROTARY_REASON)
        elif unit.norms:
            members = [*q.produce("(h c)"), *k.produce("(h c)"), *unit.norms]
            yield ChannelGroup(f"{name}.qk", "qk", layer, 1, dim, tuple(members))
        else:
            members = [*q.produce("(b r c)"), *k.produce("(b c)")]
            yield ChannelGroup(f"{name}.qk", "qk", layer, shared, dim, tuple(members), heads)
        members = [*v.produce("(b c)"), *o.consume("(b r c)")]
        yield ChannelGroup(f"{name}.vo", "vo", layer, shared, dim, tuple(members), heads)

    # Feed-forward

    def _feed_forwards(self) -> Iterator[_FeedForward]:
        for path in self.modules:
            for pattern in FEED_FORWARD_PATTERNS:
                if (unit := self._match_feed_forward(path, pattern)) is not None:
                    yield unit
                    break

    def _match_feed_forward(self, path: str, pattern: FeedForwardPattern) -> _FeedForward | None:
        found = self._projections(path, (*pattern.inner, pattern.output), ("ffn",))
        if found is None:
            return None
        *inner, output = found
        if any(one.outputs != output.inputs for one in inner):
            self._refuse(("ffn",), path, f"{pattern.output} does not read what {' and '.join(pattern.inner)} write")
            return None
        if (extra := self._unexplained(path, (*pattern.inner, pattern.output), pattern.beside)) is not None:
            self._refuse(("ffn",), path, f"parameter {self._short(extra)} is not understood")
            return None
        return _FeedForward(path, inner, output)

    def _feed_forward_group(self, unit: _FeedForward) -> ChannelGroup:
        members = [member for one in unit.inner for member in one.produce("c")] + unit.output.consume("c")
        name = f"{self._short(unit.path)}.ffn"
        return ChannelGroup(name, "ffn", _layer(unit.path), 1, unit.output.inputs, tuple(members))

    # Residual stream

    def _hidden_group(self, attentions: list[_Attention], feed_forwards: list[_FeedForward]) -> ChannelGroup | None:
        config = self.model.config
        heads = (child for name, child in self.model.named_children() if name in OUTPUT_LAYERS)
        if self.model.base_model is self.model and not any(map(_is_linear, heads)):
            self._refuse(("hidden",), type(self.model).__name__, HEADLESS_REASON)
            return None
        if getattr(config, "add_cross_attention", False) and not config.is_encoder_decoder:
            self._refuse(("hidden",), type(self.model).__name__, CROSS_ATTENTION_REASON)
            return None
        readers = [p for unit in attentions for p in (unit.query, unit.key, unit.value)]
        readers += [p for unit in feed_forwards for p in unit.inner]
        writers = [unit.output for unit in attentions] + [unit.output for unit in feed_forwards]
        sizes = {p.inputs for p in readers} | {p.outputs for p in writers}
        if len(sizes) != 1:
            self._refuse(("hidden",), type(self.model).__name__, f"the stream has several widths, {sorted(sizes)}")
            return None
        size = sizes.pop()
        members = [m for p in readers for m in p.consume("c")]
        members += [m for p in writers for m in p.produce("c")]
        known = {f"{p.module}.{leaf}" for p in (*readers, *writers) for leaf in ("weight", "bias")}
        known |= {m.tensor for unit in attentions for m in (*unit.tables, *unit.norms)}
        # The bias of an output layer may be tied to a parameter of another name.
        known |= {
            self.first_name[id(module.bias)]
            for path, module in self.modules.items()
            if path.rpartition(".")[2] in OUTPUT_LAYERS and _is_linear(module) and module.bias is not None
        }
        for name in self.parameters:
            if name in known:
                continue
            found = self._stream_members(name, size)
            if found is None:
                return None
            members += found
        for name, buffer in self.model.named_buffers():
            if buffer.is_floating_point() and size in buffer.shape:
                self._refuse(("hidden",), name, f"buffer of shape {list(buffer.shape)} is not understood")
                return None
        return ChannelGroup("hidden", "hidden", None, 1, size, tuple(members))

    def _stream_members(self, name: str, size: int) -> list[Member] | None:
        """Where a parameter outside attention and feed-forward holds the stream; None, with a refusal, if unclear."""
        path, _, leaf = name.rpartition(".")
        module, shape = self.modules[path], self.parameters[name].shape
        if _is_linear(module):
            return self._stream_linear(path, leaf, size)
        if isinstance(module, nn.Embedding):
            return [Member(name, "n c")] if shape[1] == size else []
        if size not in shape:
            return []
        roles: dict[int, Role] = {len(shape) - 1: "other"}
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            roles = {0: "producer", 1: "consumer"} if leaf == "weight" else {0: "producer"}
        dims = [dim for dim in roles if shape[dim] == size]
        if len(dims) != 1 or getattr(module, "groups", 1) != 1:
            self._refuse(("hidden",), path, f"parameter {leaf} of shape {list(shape)} is not understood")
            return None
        names = [f"i{index}" for index in range(len(shape))]
        names[dims[0]] = "c"
        return [Member(name, " ".join(names), roles[dims[0]])]

    def _stream_linear(self, path: str, leaf: str, size: int) -> list[Member] | None:
        projection = self._projection("", path)
        if projection is None:
            return []
        if _layer(path) is not None and size in (projection.inputs, projection.outputs):
            self._refuse(("hidden",), path, "a linear map inside a layer that no pattern explains")
            return None
        produced = projection.outputs == size and path.rpartition(".")[2] not in OUTPUT_LAYERS
        if leaf == "bias":
            return [Member(f"{path}.bias", "c", "producer")] if produced else []
        if projection.inputs == size:
            consumed = projection.consume("c")
        elif projection.inputs % size == 0:
            if path not in CONCATENATED_READERS.get(self.model.config.model_type, ()):
                self._refuse(("hidden",), path, f"its {projection.inputs} inputs are {size} channels several times")
                return None
            consumed = projection.consume("(n c)")
        else:
            consumed = []
        return [*consumed, *(m for m in projection.produce("c") if produced and m.is_matrix)]


def _is_linear(module: nn.Module | None) -> TypeGuard[nn.Linear]:
    """Whether a module is a plain linear map whose weight is its own parameter, no parametrization of others."""
    return isinstance(module, (nn.Linear, Conv1D)) and "weight" in module._parameters


def _join(path: str, relative: str) -> str:
    return f"{path}.{relative}" if path else relative


def _split_fused(fused: _Projection) -> list[_Projection]:
    part = fused.outputs // 3
    return [
        _Projection(fused.module, fused.transposed, fused.bias, fused.inputs, part, (index * part, (index + 1) * part))
        for index in range(3)
    ]


def _head_dim(owner: nn.Module) -> int | None:
    for attribute in HEAD_DIM_ATTRIBUTES:
        if isinstance(value := getattr(owner, attribute, None), int):
            return value
    return None


def _misfit(query: _Projection, key: _Projection, value: _Projection, output: _Projection, head_dim: int) -> str | None:
    """Why the projections are no multi-head attention, or None."""
    if query.outputs % head_dim or key.outputs % head_dim:
        return f"q and k have {query.outputs} and {key.outputs} rows, no multiples of the head size {head_dim}"
    if key.outputs != value.outputs or query.outputs != output.inputs or query.outputs % key.outputs:
        return (
            f"q, k, v have {query.outputs}, {key.outputs}, {value.outputs} rows and the output projection reads "
            f"{output.inputs}, which is neither multi-head nor grouped-query attention"
        )
    return None


def _is_rotary(owner: nn.Module) -> bool:
    """Whether the attention's forward rotates q and k: what it calls and takes says so, not what it is named."""
    code = inspect.unwrap(type(owner).forward).__code__
    return any("rotary" in name or "rope" in name for name in code.co_names) or (
        "position_embeddings" in code.co_varnames[: code.co_argcount]
    )


def _layer(path: str) -> int | None:
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", path)
    return int(found[1]) if found else None


def _merge_ties(groups: list[ChannelGroup]) -> list[ChannelGroup]:
    """Join groups of the same name, which tied layers share, into one with all their members."""
    merged: dict[str, ChannelGroup] = {}
    for group in groups:
        first = merged.get(group.name)
        members = group.members if first is None else (*first.members, *group.members)
        merged[group.name] = ChannelGroup(
            group.name, group.axis, group.layer, group.blocks, group.size, members, group.parent
        )
    return list(merged.values())


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
