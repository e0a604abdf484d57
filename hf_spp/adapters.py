"""Saved adapters: from the original base model to the reordered one and back, as files and as state dicts."""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from einops import EinopsError
from torch import Tensor

from . import checkpoint
from .apply import ADAPTER_PARTS, Dims, Move, adapter_dims, carry, invert_moves
from .channels import ChannelMap
from .errors import AdapterError, CheckpointError
from .permutation import Orders, gather_indices
from .structure import Part, part_of

Direction = Literal["to_reordered", "to_original"]
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def read_adapter(folder: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a saved adapter, and the metadata of their file.

    Raises:
        CheckpointError: The folder holds no adapter in safetensors, or it is damaged.
    """
    path = Path(folder) / ADAPTER_WEIGHTS
    if not path.is_file():
        raise CheckpointError(
            f"{folder} holds no {ADAPTER_WEIGHTS}. Give a folder that PeftModel.save_pretrained wrote, or a state dict."
        )
    return checkpoint.unpack_tensors(checkpoint.read_bytes(path), str(path))


def write_adapter(
    folder: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str], config: object
) -> None:
    """Write an adapter into a folder: its tensors with their file's metadata, and its config."""
    checkpoint.write_bytes(Path(folder) / ADAPTER_WEIGHTS, checkpoint.pack_tensors(tensors, metadata))
    checkpoint.write_json(Path(folder) / ADAPTER_CONFIG, config)


def remapped(
    tensors: Mapping[str, Tensor], groups: ChannelMap, orders: Orders, direction: Direction
) -> dict[str, Tensor]:
    """An adapter's tensors for the base model in the other order, exactly; the given ones stay as they are.

    Args:
        tensors: The adapter's tensors, by their names in PEFT's files or in a live model.
        groups: The groups of a reordering.
        orders: Its orders.
        direction: `to_reordered` for an adapter of the original base model, `to_original` for one of the reordered.

    Raises:
        AdapterError: The adapter is of another model than the orders, of a kind that is not known, or the direction is.
    """
    if direction not in ("to_reordered", "to_original"):
        raise AdapterError(f"direction={direction!r} is unknown. Give 'to_reordered' or 'to_original'.")
    parts = {name: part_of(name.removeprefix("base_model.model.")) for name in tensors}
    names = _names_in(groups, {part.tensor for part in parts.values()})
    _check_known(groups, {name: (part, names[part.tensor]) for name, part in parts.items()})
    rows = ("lora_embedding", "trainable_tokens")
    turned = {names[part.tensor] for part in parts.values() if (part.adapter or "").startswith(rows)}
    turned |= {tensor for tensor in names.values() if _is_turned(groups, tensor)}
    shapes: dict[str, list[int]] = {}
    for name, part in parts.items():
        base, shape = names[part.tensor], tensors[name].shape
        factor = (part.adapter or "").endswith(("_A", "_B")) and part.leaf == "weight"
        tokens = (part.adapter or "").startswith("trainable_tokens")
        if (factor or tokens) and len(shape) < 2:
            raise AdapterError(f"{name} is {list(shape)}; a matrix is needed. Save the adapter again with PEFT.")
        if part.adapter is None:
            shapes[base] = list(shape)
        elif tokens:
            shapes.setdefault(base, [0, 0])[1] = shape[1]
        elif factor:
            reads = part.adapter.endswith("_A")
            shapes.setdefault(base, [0, 0])[int(reads != (base in turned))] = shape[1 if reads else 0]
    indices = _indices(groups, orders, shapes)
    moves: dict[str, Move] = {}
    carried = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    for name, part in parts.items():
        dims: Dims = indices.get(names[part.tensor], {})
        if part.adapter is not None and dims:
            dims = adapter_dims(name, tuple(tensors[name].shape), dims, turned=names[part.tensor] in turned)
        if dims:
            moves[name] = (carried[name], dims)
    carry(moves if direction == "to_reordered" else invert_moves(moves))
    return carried


def _check_known(groups: ChannelMap, parts: Mapping[str, tuple[Part, str]]) -> None:
    """Refuse tensors of an adapter that belong to moved weights in a way that is not known."""
    members = {member.tensor for group in groups for member in group.members}
    modules = {name.rpartition(".")[0] for name in members}
    for name, (part, base) in parts.items():
        steps = base.split(".")
        around = {".".join(steps[:end]) for end in range(1, len(steps))}
        inside = base not in members and not modules.isdisjoint(around)
        if part.adapter is None:
            unknown = inside and steps[-1] not in ("weight", "bias")
        else:
            # What is tied to a moved weight has another name there.
            tied = base not in members and "hidden" in groups.axes
            unknown = inside or tied or (base in members and part.adapter not in ADAPTER_PARTS)
        if unknown:
            raise AdapterError(
                f"{name} belongs to {base}, around which channels move, in a way that is not known. Accepted: LoRA, "
                "DoRA and trainable tokens of weights that are not tied, and whole modules. Load the adapter on a "
                "model in its own order, merge it (merge_and_unload), and reorder the result."
            )


def _names_in(groups: ChannelMap, targets: Iterable[str]) -> dict[str, str]:
    """The name that each of an adapter's base tensors has in the orders' model, which may have another head."""
    members = {member.tensor for group in groups for member in group.members}
    firsts = {name.partition(".")[0] for name in members if "." in name}
    targets = tuple(targets)
    options = [{name: name for name in targets}, {name: name.partition(".")[2] or name for name in targets}]
    options += [{name: f"{first}.{name}" for name in targets} for first in sorted(firsts)]
    layers = {_layer(name) for name in members} - {""}

    def known(names: Mapping[str, str]) -> int:
        return sum(name in members or _layer(name) in layers for name in names.values())

    best = max(options, key=known)
    if known(best) == 0:
        raise AdapterError(
            f"The adapter adds to {', '.join(sorted(targets)[:3])}, …; the orders are of a model with "
            f"{', '.join(sorted(members)[:3])}, …. Use the orders of the adapter's base model."
        )
    return best


def _layer(name: str) -> str:
    """The path of the layer that a tensor belongs to, empty for one outside of layers."""
    found = re.match(r"(?:.*?\.)?\d+(?=\.)", name)
    return found[0] if found else ""


def _is_turned(groups: ChannelMap, tensor: str) -> bool:
    """Whether a weight is `[inputs, outputs]`: it writes what lies in its second dimension, or reads its first."""
    swapped = (("producer", 1), ("consumer", 0))
    return any(
        member.tensor == tensor and len(member.axes) == 2 and (member.role, member.dim) in swapped
        for group in groups
        for member in group.members
    )


def _indices(groups: ChannelMap, orders: Orders, shapes: Mapping[str, list[int]]) -> dict[str, dict[int, Tensor]]:
    """The gather index of each dimension of the tensors whose shapes are known."""
    known = [
        replace(group, members=tuple(member for member in group.members if member.tensor in shapes)) for group in groups
    ]
    for group in known:
        for member in group.members:
            try:
                member.positions(shapes[member.tensor][member.dim], group)
            except (EinopsError, RuntimeError, IndexError) as error:
                raise AdapterError(
                    f"The adapter adds to {member.tensor} as {shapes[member.tensor]}, which has not the {group.blocks} "
                    f"x {group.size} channels of {group.name} in the orders. Use the orders of its base model."
                ) from error
    return gather_indices(known, orders, {name: torch.Size(shape) for name, shape in shapes.items()})
