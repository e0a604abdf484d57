"""From features in the axis names of the written map to channel groups."""

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from math import prod

from ..channels import ChannelGroup, Member
from .index import Feature


def tokens(layout: str) -> list[str]:
    """Axis names of a layout, in order."""
    return layout.replace("(", " ").replace(")", " ").split()


def fits(layout: str, shape: tuple[int, ...], sizes: Mapping[str, int]) -> bool:
    """Whether a tensor of this shape can have the layout; axes without a size may be of any."""
    dims = re.findall(r"\([^)]*\)|\S+", layout)
    if len(dims) != len(shape):
        return False
    for dim, length in zip(dims, shape, strict=True):
        names = tokens(dim)
        known = prod(int(name) if name.isdigit() else sizes.get(name, 1) for name in names)
        free = any(not name.isdigit() and name not in sizes for name in names)
        if (length % known if free else length != known) or length == 0:
            return False
    return True


def group_of(
    name: str, axis: str, layer: int | None, blocks: int, size: int, features: Sequence[Feature],
    names: Mapping[str, str], parent: str | None = None,
) -> ChannelGroup:  # fmt: skip
    """The group that moves the axis which `names` maps to `c`, in every feature that has it."""
    moved = next(token for token, role in names.items() if role == "c")
    members = [
        Member(one.tensor, relabel(one.layout, names), one.role, one.span)
        for one in features
        if moved in tokens(one.layout)
    ]
    return ChannelGroup(name, axis, layer, blocks, size, tuple(members), parent)


def relabel(layout: str, names: Mapping[str, str]) -> str:
    """A layout with its axes named block and channel; neighbours that stay together become one axis."""
    taken = {"b", "c"}

    def fresh(name: str) -> str:
        while name in taken:
            name += "0"
        taken.add(name)
        return name

    dims = []
    for dim in re.findall(r"\([^)]*\)|\S+", layout):
        if dim == "1":
            dims.append(dim)
            continue
        inside: list[str] = []
        for together, run in groupby(tokens(dim), lambda token: token not in names):
            rest = list(run)
            inside += [fresh(rest[0] if len(rest) == 1 else "u")] if together else [names[token] for token in rest]
        dims.append(inside[0] if len(inside) == 1 else f"({' '.join(inside)})")
    return " ".join(dims)


def layer_of(path: str) -> int | None:
    """The index of the layer in a module's path."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", path)
    return int(found[1]) if found else None
