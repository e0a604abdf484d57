"""Byte ranges: which bytes of a tensor a cut keeps, and which ranges are worth one read each."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from math import prod

import torch
from torch import Tensor

Range = tuple[int, int]


def kept_ranges(shape: Sequence[int], width: int, kept: Mapping[int, Tensor]) -> list[Range]:
    """Where the kept places of a tensor lie in its bytes.

    Args:
        shape: Shape of the whole tensor, stored row by row.
        width: Bytes of one element.
        kept: Places that stay, ascending, by dimension that gets shorter.

    Returns:
        Start and stop of each range, ascending. Their bytes one after the other are those of the cut tensor.
    """
    last = max(kept, default=-1)
    strides = [width * prod(shape[dim + 1 :]) for dim in range(len(shape))]
    starts = torch.zeros(1, dtype=torch.int64)
    for dim in range(last):
        places = kept[dim] if dim in kept else torch.arange(shape[dim])
        starts = (starts[:, None] + places * strides[dim]).flatten()
    if last < 0:
        return [(0, width * prod(shape))]
    places = kept[last]
    breaks = (places.diff() != 1).nonzero().flatten()
    first = places[torch.cat([breaks.new_zeros(1), breaks + 1])] * strides[last]
    end = (places[torch.cat([breaks, breaks.new_full((1,), len(places) - 1)])] + 1) * strides[last]
    begins, stops = ((starts[:, None] + one).flatten().tolist() for one in (first, end))
    return list(zip(begins, stops, strict=True))


def coalesced(ranges: Iterable[Range], gap: int) -> list[Range]:
    """Ascending ranges with those joined that overlap or have fewer than `gap` bytes between them; empty ones leave."""
    found: list[Range] = []
    for start, stop in sorted(ranges):
        if start == stop:
            continue
        if found and start - found[-1][1] < max(gap, 1):
            found[-1] = (found[-1][0], max(found[-1][1], stop))
        else:
            found.append((start, stop))
    return found


def missing(wanted: Iterable[Range], present: Iterable[Range]) -> list[Range]:
    """The parts of some ranges that others do not cover."""
    inside = coalesced(present, 0)
    borders = [(0, 0), *inside, (1 << 63, 1 << 63)]
    outside = [(before[1], after[0]) for before, after in pairwise(borders)]
    return [(max(a, start), min(b, stop)) for start, stop in wanted for a, b in outside if max(a, start) < min(b, stop)]


def divided(ranges: Iterable[Range], largest: int) -> list[Range]:
    """Ranges of at most `largest` bytes each that cover the same bytes."""
    return [(at, min(at + largest, stop)) for start, stop in ranges for at in range(start, stop, largest)]


def length_of(ranges: Iterable[Range]) -> int:
    """Bytes in all of some ranges that do not overlap."""
    return sum(stop - start for start, stop in ranges)
