"""Scores: how salient each channel of a group is, from weights alone or from calibration data.

Every metric is one definition over the group map. Weight metrics reduce the group's matrices; calibrated metrics watch
the activations of the modules that hold them.
"""

import math
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .channels import ChannelGroup
from .errors import NonFiniteWeightsError, SPPConfigError
from .processes import whole

# Weights are reduced some rows at a time, whose float64 copies take the same memory one after another: the system makes
# new memory more slowly than a CPU reduces.
_PIECE_BYTES = 8 << 20
# A stack with entries of this size is reduced entry by entry, so that it need not be held whole.
_LARGE_ENTRY_BYTES = 2 << 20


class Entries(Protocol):
    """A tensor of three or more dimensions, or what can be read of one entry by entry."""

    @property
    def shape(self) -> torch.Size:
        """Its shape."""

    def element_size(self) -> int:
        """Bytes of an element."""

    def __iter__(self) -> Iterator[Tensor]:
        """The entries of its first dimension."""


@torch.no_grad()
def weight_scores(
    groups: Iterable[ChannelGroup],
    tensors: Mapping[str, Tensor],
    metric: str | Callable[[ChannelGroup, Sequence[Tensor]], Tensor],
    seed: int = 0,
) -> dict[str, Tensor]:
    """Score channels from weights alone.

    With `l1` and `l2` a channel's score is the mean, over the group's matrices, of the norm of all weights that belong
    to the channel. For query and key rows of a head that is the paper's metric.

    Args:
        groups: The groups to score.
        tensors: Every member tensor by name.
        metric: `l1`, `l2`, `random`, or a callable that gets the group and its matrices, each viewed as
            `[blocks, size, ...]`, and returns `[blocks, size]`.
        seed: Seed of `random`; the draw of a group depends on its name and this alone.

    Returns:
        Scores by group name, `[blocks, size]`, float64 for the norms, on the CPU.

    Raises:
        NonFiniteWeightsError: A weight is NaN or infinite.
        SPPConfigError: A callable returned something else than `[blocks, size]` finite numbers.

    Reference:
        arXiv:2310.00247 for `l1` over query and key rows.
    """
    if metric == "random":
        return {group.name: _random_scores(group, seed) for group in groups}
    if callable(metric):
        return {group.name: _custom_scores(group, tensors, metric) for group in groups}
    groups, power = list(groups), {"l1": 1, "l2": 2}[metric]
    wanted: dict[str, dict[tuple[int, bool], None]] = {}
    for group in groups:
        for member in group.scored_members:
            wanted.setdefault(member.tensor, {})[member.dim, member.stacked] = None
    sums: dict[tuple[str, int, bool], Tensor] = {}
    # Each tensor is asked for once: to read it may be costly.
    for name, kinds in wanted.items():
        tensor = whole(tensors[name])
        for dim, stacked in kinds:
            sums[name, dim, stacked] = channel_sums(tensor, dim, power, stacked=stacked)
            if not bool(sums[name, dim, stacked].isfinite().all()):
                check_finite({name: tensors[name]})
        del tensor  # before the next is read
    scores = {}
    for group in groups:
        norms = []
        for member in group.scored_members:
            own = sums[member.tensor, member.dim, member.stacked]
            norms.append(member.take_channels(own, group).sum(-1) ** (1 / power))
        scores[group.name] = torch.stack(norms).mean(0)
    return scores


def channel_sums(tensor: Tensor | Entries, dim: int, power: int, *, stacked: bool = False) -> Tensor:
    """Sum of |w|^power over every dimension but `dim`, float64, on the CPU.

    Sums of float32 weights are exact in float64 unless they differ by many orders of magnitude, so they do not depend
    on the order of the weights, and a model that was put in order stays in order.

    Args:
        tensor: The weights.
        dim: The dimension whose channels are summed for.
        power: 1 or 2.
        stacked: Whether each entry of the first dimension has sums of its own.

    Returns:
        Sums `[length]`, or `[entries, length]` where they are stacked.
    """
    if stacked:
        return torch.stack([channel_sums(entry, dim - 1, power) for entry in tensor])
    dim %= len(tensor.shape)
    if has_large_entries(tensor):
        if dim == 0:
            return torch.stack([channel_sums(entry, 0, power).sum() for entry in tensor])
        return torch.stack([channel_sums(entry, dim - 1, power) for entry in tensor]).sum(0)
    if not isinstance(tensor, Tensor):
        tensor = torch.stack(list(tensor))
    last = dim == tensor.dim() - 1
    matrix = tensor.flatten(0, -2) if last else tensor.movedim(dim, 0).flatten(1)
    rows = max(1, _PIECE_BYTES // (8 * matrix.shape[1]))
    copies = matrix.new_empty((min(rows, len(matrix)), matrix.shape[1]), dtype=torch.float64)
    sums = matrix.new_zeros(matrix.shape[int(last)], dtype=torch.float64)
    for start in range(0, len(matrix), rows):
        part = matrix[start : start + rows]
        piece = copies[: len(part)].copy_(part)
        piece = piece.abs_() if power == 1 else piece.square_()
        if last:
            sums += piece.sum(0)
        else:
            sums[start : start + rows] = piece.sum(1)
    return sums.cpu()


def has_large_entries(tensor: Tensor | Entries) -> bool:
    """Whether a tensor is a stack whose entries are reduced one by one, so that it need not be held whole."""
    return len(tensor.shape) > 2 and math.prod(tensor.shape[1:]) * tensor.element_size() >= _LARGE_ENTRY_BYTES


def check_finite(tensors: Mapping[str, Tensor], seen: Collection[str] = ()) -> None:
    """Refuse weights that are NaN or infinite.

    Args:
        tensors: Weights by name.
        seen: Names of those that are known to be finite.

    Raises:
        NonFiniteWeightsError: A weight is NaN or infinite.
    """
    for name, tensor in tensors.items():
        place = None if name in seen else _first_not_finite(whole(tensor))
        if place is not None:
            raise _not_finite(name, place)


def _first_not_finite(values: Tensor | Entries) -> int | None:
    if not isinstance(values, Tensor):
        size, found = math.prod(values.shape[1:]), map(_first_not_finite, values)
        return next((entry * size + place for entry, place in enumerate(found) if place is not None), None)
    # A sum is cheap and finite unless a weight is not, or all are huge.
    if bool(values.sum().isfinite()):
        return None
    places = (~values.isfinite().flatten()).nonzero()
    return int(places[0]) if len(places) else None


def _not_finite(name: str, place: int) -> NonFiniteWeightsError:
    return NonFiniteWeightsError(
        f"Parameter {name} holds NaN or infinity, first at {place}; finite weights are needed to rank channels. "
        "Reload the checkpoint, or repair the weight."
    )


def _random_scores(group: ChannelGroup, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{group.name}".encode()))
    return torch.rand(group.blocks, group.size, generator=generator)


def _custom_scores(
    group: ChannelGroup, tensors: Mapping[str, Tensor], metric: Callable[[ChannelGroup, Sequence[Tensor]], Tensor]
) -> Tensor:
    scores = metric(group, [member.view(whole(tensors[member.tensor]), group) for member in group.scored_members])
    if not isinstance(scores, Tensor) or tuple(scores.shape) != (group.blocks, group.size):
        given = f"{list(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise SPPConfigError(
            f"The metric returned {given} for group {group.name}; a tensor [{group.blocks}, {group.size}] is needed."
        )
    if not bool(scores.isfinite().all()):
        raise SPPConfigError(f"The metric returned NaN or infinity for group {group.name}; finite scores are needed.")
    return scores.detach().cpu()
