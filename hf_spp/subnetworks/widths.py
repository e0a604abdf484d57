"""Widths: how many channels of each group stay, and which places of every tensor those are."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..channels import ChannelGroup, ChannelMap
from ..errors import SubnetworkError

Request = float | int | Sequence[float | int]
Widths = Mapping[str, int]
Kept = Mapping[str, Mapping[int, Tensor]]

# What can be asked for: the axes, and the query heads inside a group that shares a key-value head.
CUTS = ("qk", "vo", "heads", "query_heads", "ffn", "experts", "hidden")
# Widths that run fast: those of matrices, and none for what is counted in heads.
_MULTIPLE = {"qk": 8, "vo": 8, "ffn": 8, "hidden": 8}
_ACCELERATOR_MULTIPLE = {"qk": 8, "vo": 8, "ffn": 64, "hidden": 64}


def cut_of(group: ChannelGroup) -> str:
    """What a group's channels are called in a spec."""
    return "query_heads" if group.name.endswith(".query_heads") else group.axis


def default_multiple(cut: str, device: torch.device) -> int:
    """The number that widths of a cut should be multiples of on a device; that of no values counts as the CPU."""
    return (_MULTIPLE if device.type in ("cpu", "meta") else _ACCELERATOR_MULTIPLE).get(cut, 1)


def steps_of(group: ChannelGroup, multiple: int) -> list[int]:
    """The widths that a group may have: multiples, and its own."""
    return [*range(multiple, group.size, multiple), group.size]


def resolve_widths(
    groups: ChannelMap, requests: Mapping[str, Request], multiples: Mapping[str, int], where: str
) -> dict[str, int]:
    """Channels that each group keeps.

    Args:
        groups: The groups of the model.
        requests: What each cut asks for: a fraction (float) or a count (int) in each block, or one for each group.
        multiples: What a fraction is rounded to the nearest multiple of, by cut; all channels are a width as well.
        where: What to call the model in an error.

    Returns:
        Channels kept in each block, by name of the groups that are cut.

    Raises:
        SubnetworkError: A cut has no group here, a list has another length, or a width is not within the model's.
    """
    widths = {}
    for cut, request in requests.items():
        own = [group for group in groups if cut_of(group) == cut]
        if not own:
            raise SubnetworkError(_no_groups(groups, cut, where))
        each = list(request) if isinstance(request, Sequence) else [request] * len(own)
        if len(each) != len(own):
            raise SubnetworkError(
                f"{cut} is a list of {len(each)} widths, and {where} has {len(own)} groups of it, from {own[0].name} "
                f"to {own[-1].name}. Give one width for all, or a list of {len(own)}."
            )
        for group, one in zip(own, each, strict=True):
            width = _width(group, one, multiples.get(cut, 1), where)
            if width < group.size:
                widths[group.name] = width
    return widths


def _width(group: ChannelGroup, request: float | int, multiple: int, where: str) -> int:
    if isinstance(request, float):
        if not 0 < request <= 1:
            raise SubnetworkError(
                f"{cut_of(group)}={request} is no fraction above 0 and up to 1, asked for {group.name} of {where}. "
                "Give a fraction as a float such as 0.5, or a count as an int."
            )
        return min(steps_of(group, multiple), key=lambda step: (abs(step - request * group.size), -step))
    if not 1 <= request <= group.size:
        raise SubnetworkError(
            f"{cut_of(group)}={request} is asked for {group.name} of {where}, which has {group.size} channels"
            f"{' in each block' if group.blocks > 1 else ''}. Give a count from 1 to {group.size}, or a fraction."
        )
    return request


def _no_groups(groups: ChannelMap, cut: str, where: str) -> str:
    axis = "heads" if cut == "query_heads" else cut
    reasons = "; ".join(f"{one.where}: {one.reason}" for one in groups.refused if one.axis == axis)
    return (
        f"{cut} cannot be cut in {where}: {reasons or 'it has no such channels'}. What can be cut here: "
        f"{', '.join(dict.fromkeys(map(cut_of, groups)))}."
    )


def kept_places(
    groups: Iterable[ChannelGroup], widths: Widths, shapes: Mapping[str, Sequence[int]]
) -> dict[str, dict[int, Tensor]]:
    """Which places of every tensor stay: of each block of a group the first channels.

    Args:
        groups: The groups of the model.
        widths: Channels kept in each block, by name of the groups that are cut.
        shapes: Shape of every member tensor, by name.

    Returns:
        Per tensor and dimension that gets shorter the places that stay, ascending, int64.
    """
    masks: dict[str, dict[int, Tensor]] = {}
    for group in groups:
        width = widths.get(group.name, group.size)
        if width == group.size:
            continue
        for member in group.members:
            length = shapes[member.tensor][member.dim]
            # Blocks that are stacked lose the same places.
            gone = member.positions(length, group)[:, width:].flatten()
            dims = masks.setdefault(member.tensor, {})
            dims.setdefault(member.dim, torch.ones(length, dtype=torch.bool))[gone] = False
    return {name: {dim: mask.nonzero().flatten() for dim, mask in dims.items()} for name, dims in masks.items()}


def narrowed(tensor: Tensor, dims: Mapping[int, Tensor]) -> Tensor:
    """The kept places of a tensor: a view of it where each dimension keeps one run, otherwise joined runs.

    Gradients reach the tensor, also of several backward passes.
    """
    for dim, places in dims.items():
        runs = _runs(places)
        parts = [tensor.narrow(dim, start, length) for start, length in runs]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts, dim)
    return tensor


def _runs(places: Tensor) -> list[tuple[int, int]]:
    """Start and length of each run of consecutive places."""
    breaks = (places.diff() != 1).nonzero().flatten() + 1
    starts = [0, *breaks.tolist()]
    stops = [*breaks.tolist(), len(places)]
    return [(int(places[start]), stop - start) for start, stop in zip(starts, stops, strict=True)]
