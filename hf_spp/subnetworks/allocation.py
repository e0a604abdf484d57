"""Where to cut: widths within a budget, by what each channel is worth for what it costs.

A squared score estimates how much the loss changes without the channel, so that scores of different layers compare. The
last channels of every group are taken away in the order of that change per parameter, until the budget is met.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from torch import Tensor

from ..channels import ChannelGroup
from .widths import Widths, cut_of, steps_of

_SHARES = 1024


def ranked_worth(group: ChannelGroup, order: Tensor, scores: Tensor) -> Tensor:
    """What the channel at each place is worth, summed over blocks: `[size]`.

    Args:
        group: The group.
        order: Its order, `[blocks, size]`.
        scores: Its scores in the original order, `[blocks, size]`.
    """
    return scores.double().gather(1, order).square().sum(0)


def allocate(
    groups: Sequence[ChannelGroup],
    worth: Mapping[str, Tensor],
    multiples: Mapping[str, int],
    price: Callable[[Widths], float],
    fits: Callable[[Widths], bool],
) -> dict[str, int] | None:
    """The widths that keep most of what channels are worth within a budget; None if even the smallest do not fit.

    Args:
        groups: The groups that may be cut.
        worth: What the channel at each place of a group is worth, `[size]`, by group.
        multiples: What widths are multiples of, by cut.
        price: The parameters that widths leave, which say what a channel costs.
        fits: Whether widths are within the budget; wider ones do not fit sooner.
    """
    whole = price({})
    cuts: list[tuple[float, str, int]] = []
    for group in groups:
        steps = steps_of(group, multiples.get(cut_of(group), 1))
        saved = (whole - price({group.name: steps[0]})) / max(group.size - steps[0], 1)
        density = float("inf")
        for low, high in pairwise(steps):
            # What stays longer is worth no less.
            density = min(density, float(worth[group.name][low:high].sum()) / (saved * (high - low)))
            cuts.append((density, group.name, low))
    cuts.sort(key=lambda cut: (cut[0], -cut[2]))

    def widths(count: int) -> dict[str, int]:
        found: dict[str, int] = {}
        for _, name, low in cuts[:count]:
            found[name] = min(low, found.get(name, low))
        return found

    return _first_that_fits(widths, fits, len(cuts))


def spread_evenly(
    groups: Sequence[ChannelGroup], multiples: Mapping[str, int], fits: Callable[[Widths], bool]
) -> dict[str, int] | None:
    """The widths that are the same share of every group within a budget; None if even the smallest do not fit."""

    def widths(count: int) -> dict[str, int]:
        found = {}
        for group in groups:
            steps = steps_of(group, multiples.get(cut_of(group), 1))
            share = group.size * (1 - count / _SHARES)
            width = max((step for step in steps if step <= share), default=steps[0])
            if width < group.size:
                found[group.name] = width
        return found

    return _first_that_fits(widths, fits, _SHARES)


def _first_that_fits(
    widths: Callable[[int], dict[str, int]], fits: Callable[[Widths], bool], last: int
) -> dict[str, int] | None:
    """The first widths up to a number that fit, if then all later ones do."""
    if not fits(widths(last)):
        return None
    low, high = 0, last
    while low < high:
        middle = (low + high) // 2
        if fits(widths(middle)):
            high = middle
        else:
            low = middle + 1
    return widths(low)
