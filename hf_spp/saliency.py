"""Scores: how salient each channel of a group is, from weights alone or from calibration data.

Every metric is one definition over the group map. Weight metrics reduce the group's matrices; calibrated metrics watch
the activations of the modules that hold them.
"""

import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from .channels import ChannelGroup
from .errors import NonFiniteWeightsError, SPPConfigError

# Weights are reduced some rows at a time, so that intermediate values stay in the processor's cache.
_PIECE_BYTES = 1 << 20
_RUN = 64


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
    power = {"l1": 1, "l2": 2}[metric]
    sums: dict[tuple[str, int], Tensor] = {}
    scores = {}
    for group in groups:
        norms = []
        for member in group.scored_members:
            key = (member.tensor, member.dim)
            if key not in sums:
                sums[key] = channel_sums(tensors[member.tensor], member.dim, power)
                _check_finite(member.tensor, sums[key])
            norms.append(member.view_channels(sums[key], group).sum(-1) ** (1 / power))
        scores[group.name] = torch.stack(norms).mean(0)
    return scores


def channel_sums(tensor: Tensor, dim: int, power: int) -> Tensor:
    """Sum of |w|^power over every dimension but `dim`, `[length]`, float64, on the CPU.

    At most 64 weights are added in the tensor's own precision, at least float32, and those sums in float64.
    """
    last = dim == tensor.dim() - 1
    matrix = tensor.flatten(0, -2) if last else tensor.movedim(dim, 0).flatten(1)
    run = math.gcd(matrix.shape[0 if last else 1], _RUN)
    rows = max(_PIECE_BYTES // (matrix.shape[1] * matrix.element_size()) // run, 1) * run
    sums = []
    for piece in torch.split(matrix, rows):
        exact = piece if piece.dtype == torch.float64 else piece.float()
        size = exact.abs() if power == 1 else exact.square()
        columns = size.shape[1]
        runs = size.reshape(-1, run, columns).sum(1) if last else size.reshape(-1, columns // run, run).sum(2)
        sums.append(runs.double().sum(0 if last else 1))
    return (torch.stack(sums).sum(0) if last else torch.cat(sums)).cpu()


def _check_finite(name: str, sums: Tensor) -> None:
    if not bool(sums.isfinite().all()):
        channel = int((~sums.isfinite()).nonzero()[0])
        raise NonFiniteWeightsError(
            f"Parameter {name} holds NaN or infinity at channel {channel}; finite weights are needed to rank "
            "channels. Reload the checkpoint, or repair the weight."
        )


def _random_scores(group: ChannelGroup, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{group.name}".encode()))
    return torch.rand(group.blocks, group.size, generator=generator)


def _custom_scores(
    group: ChannelGroup, tensors: Mapping[str, Tensor], metric: Callable[[ChannelGroup, Sequence[Tensor]], Tensor]
) -> Tensor:
    scores = metric(group, [member.view(tensors[member.tensor], group) for member in group.scored_members])
    if not isinstance(scores, Tensor) or tuple(scores.shape) != (group.blocks, group.size):
        given = f"{list(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise SPPConfigError(
            f"The metric returned {given} for group {group.name}; a tensor [{group.blocks}, {group.size}] is needed."
        )
    if not bool(scores.isfinite().all()):
        raise SPPConfigError(f"The metric returned NaN or infinity for group {group.name}; finite scores are needed.")
    return scores.detach().cpu()
