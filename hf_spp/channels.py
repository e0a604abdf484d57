"""The data model: which tensor dimensions must move together.

A channel group is the unit of everything in this package. Scores, orders, gathers and slices are verbs over its
members, so an architecture is only a list of groups, and a verb never knows an architecture.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

Role = Literal["producer", "consumer", "other"]


@dataclass(frozen=True)
class Member:
    """One tensor of a channel group, and where the group's channels lie in it.

    Attributes:
        tensor: Name of the parameter or buffer in the model, as `named_parameters` gives it.
        pattern: Layout of the tensor in einops notation, with `b` the block and `c` the channel axis; every other name
            is an axis that stays. `"(b c) i"` are the rows of a projection split in heads, `"o (b r c)"` the columns of
            an output projection whose `r` query heads share one key-value head, and `"b (t c) i"` the rows of experts
            that are stacked in a first dimension, gate and up rows fused.
        role: Whether channels are output features of a module (producer), input features (consumer), or neither.
        span: For fused tensors, the part of the moved dimension that the pattern describes: `start:stop` out of every
            so many entries, `(start, stop, every)`. With `every` the whole length that is one block of a stack, with a
            smaller one the query rows of each head where q, k and v alternate.
    """

    tensor: str
    pattern: str
    role: Role = "other"
    span: tuple[int, int, int] | None = None

    @cached_property
    def axes(self) -> tuple[tuple[str, ...], ...]:
        """Axis names of each dimension of the tensor."""
        return _parse(self.pattern)

    @cached_property
    def dim(self) -> int:
        """The dimension that the group moves."""
        return next(index for index, names in enumerate(self.axes) if "c" in names)

    @cached_property
    def stacked(self) -> bool:
        """Whether blocks lie in the first dimension and channels in another one, as in experts."""
        return self.dim != 0 and self.axes[0][0] == "b"

    @property
    def is_matrix(self) -> bool:
        """Whether the tensor has a dimension beside the moved one and the blocks, so that its channels have a norm."""
        return len(self.axes) - self.stacked > 1

    def view(self, tensor: Tensor, group: "ChannelGroup") -> Tensor:
        """View the member's tensor as `[blocks, size, ...]`, without a copy where strides allow."""
        if self.span is not None:
            start, stop, every = self.span
            shape = (*tensor.shape[: self.dim], -1, every, *tensor.shape[self.dim + 1 :])
            tensor = tensor.view(shape).narrow(self.dim + 1, start, stop - start).flatten(self.dim, self.dim + 1)
        rest = [name for names in self.axes for name in names if name not in "bc"]
        return _arrange(tensor, self.pattern, " ".join(rest), group.blocks, group.size)

    def take_channels(self, values: Tensor, group: "ChannelGroup") -> Tensor:
        """Take per-channel values as `[..., blocks, size, units]`.

        Args:
            values: Values of the moved dimension, `[..., length]`, or of stacked blocks, `[..., entries, length]`.
            group: The group that the member belongs to.
        """
        if not self.stacked:
            return values[..., self.positions(values.shape[-1], group)]
        taken = values[..., self.positions(values.shape[-1], group)[0]]
        return rearrange(taken, "... (b n) c u -> ... b c (n u)", b=group.blocks)

    def positions(self, length: int, group: "ChannelGroup") -> Tensor:
        """Where each channel lies along the moved dimension of the given length: `[blocks, size, units]`, int64.

        Where blocks are stacked each has the same positions, and the first dimension is 1.
        """
        return _positions(self.axes[self.dim], self.span, length, group.blocks, group.size)


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that move together, in every tensor that holds them.

    Channels are ordered inside each of `blocks` equal blocks and never cross a block border: in-head rows have one
    block per head, heads themselves form one block.

    Attributes:
        name: Unique and stable name: the owning module's path below the base model, and the axis.
        axis: `qk`, `vo`, `heads`, `ffn`, `experts` or `hidden`.
        layer: Index of the layer, None for groups that span layers.
        blocks: Number of blocks.
        size: Channels in each block.
        members: Every tensor dimension that moves.
        parent: Name of the group whose channels are this group's blocks, when those can move as well.
        owners: Paths of the modules whose code counts the channels; none where the group comes from a file.
    """

    name: str
    axis: str
    layer: int | None
    blocks: int
    size: int
    members: tuple[Member, ...]
    parent: str | None = None
    owners: tuple[str, ...] = field(default=(), compare=False)

    @property
    def channels(self) -> int:
        """Number of channels in all blocks."""
        return self.blocks * self.size

    @property
    def scored_members(self) -> tuple[Member, ...]:
        """The members whose weights say how salient a channel is: matrices; biases and norms only follow."""
        return tuple(member for member in self.members if member.is_matrix)


@dataclass(frozen=True)
class Refusal:
    """An axis that may not move somewhere in the model, and why."""

    axis: str
    where: str
    reason: str


@dataclass(frozen=True)
class ChannelMap:
    """The resolved map of a model: its channel groups, and what may not move and why.

    Iterating gives the groups, blocks before the groups that move those blocks.
    """

    groups: tuple[ChannelGroup, ...]
    refused: tuple[Refusal, ...] = ()
    by_name: Mapping[str, ChannelGroup] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        ordered = sorted(self.groups, key=lambda group: group.parent is None)
        object.__setattr__(self, "groups", tuple(ordered))
        object.__setattr__(self, "by_name", {group.name: group for group in ordered})

    def __iter__(self) -> Iterator[ChannelGroup]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def axes(self) -> tuple[str, ...]:
        """Axes that have at least one group, in the order of first appearance."""
        return tuple(dict.fromkeys(group.axis for group in self.groups))

    @property
    def towers(self) -> tuple[str, ...]:
        """Parts of the model that hold groups, by the first step of their path: encoder, decoder, vision_tower, …."""
        return tuple(dict.fromkeys(group.name.partition(".")[0] for group in self.groups if "." in group.name))

    def shapes_differ(self, other: "ChannelMap") -> bool:
        """Whether a group of the same name has other blocks or another size there."""
        both = self.by_name.keys() & other.by_name.keys()
        shapes = ([(one.by_name[name].blocks, one.by_name[name].size) for name in both] for one in (self, other))
        return next(shapes) != next(shapes)

    def select(self, axes: Iterable[str], towers: Iterable[str] | None = None) -> "ChannelMap":
        """The part of the map that concerns the given axes, in the whole model or the modules below the given paths."""
        axes, prefixes = tuple(axes), None if towers is None else tuple(f"{tower}." for tower in towers)

        def chosen(axis: str, place: str) -> bool:
            return axis in axes and (prefixes is None or f"{place}.".startswith(prefixes))

        return ChannelMap(
            tuple(group for group in self.groups if chosen(group.axis, group.name)),
            tuple(refusal for refusal in self.refused if chosen(refusal.axis, refusal.where)),
        )


# Layers of one shape share these, and a model has few shapes.
@lru_cache(maxsize=256)
def _positions(
    names: tuple[str, ...], span: tuple[int, int, int] | None, length: int, blocks: int, size: int
) -> Tensor:
    places = torch.arange(length)
    if span is not None:
        places = places.view(-1, span[2])[:, span[0] : span[1]].flatten()
    units = " ".join(name for name in names if name not in "bc")
    return _arrange(places, f"({' '.join(names)})", f"({units})", blocks, size)


def _arrange(tensor: Tensor, pattern: str, rest: str, blocks: int, size: int) -> Tensor:
    sizes = {name: count for name, count in (("b", blocks), ("c", size)) if name in _names(pattern)}
    block = "b" if "b" in sizes else "1"
    view: Tensor = rearrange(tensor, f"{pattern} -> {block} c {rest}", **sizes)
    return view


@cache
def _names(pattern: str) -> frozenset[str]:
    return frozenset(pattern.replace("(", " ").replace(")", " ").split())


@cache
def _parse(pattern: str) -> tuple[tuple[str, ...], ...]:
    dims: list[tuple[str, ...]] = []
    inside: list[str] | None = None
    for token in pattern.replace("(", " ( ").replace(")", " ) ").split():
        if token == "(":
            inside = []
        elif token == ")":
            dims.append(tuple(inside or ()))
            inside = None
        elif inside is None:
            dims.append((token,))
        else:
            inside.append(token)
    return tuple(dims)
