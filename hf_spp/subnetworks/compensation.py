"""Compensation: refitting the projection behind cut channels, so that it writes what the uncut one wrote.

A projection is fitted by ridge least squares, in closed form, to what the uncut model's writes on unlabelled data,
layer after layer. It learns from two kinds of inputs alike: those of the kept channels in the uncut model, and those
that the already cut model gives it. The second alone would teach it the errors of earlier layers by heart, the first
alone would let them grow. The fit is pulled towards the weights that were there, so that little data changes little.

Errors count relative to what is written for a token. Transformers write far more for a few tokens, such as separators,
than for the others, and norms level that again before the next layer; unweighted, these few would be all that is
fitted.

Reference:
    Least-squares reconstruction behind pruned channels: He, Zhang and Sun, arXiv:1707.06168.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from ..channels import ChannelMap, Member
from ..errors import CalibrationError
from ..forward import evaluation_mode, fixed_rng, run_model, unfused
from ..products import InnerFlows
from ..watch import Owners, token_mask, unpadded
from .lockstep import SteppedRun, stopping
from .widths import Kept, Widths

logger = logging.get_logger(__name__)

# How strongly weights are pulled towards those before, as shares of the mean variance of what a projection reads.
RIDGES = (0.001, 0.01, 0.1, 1.0, 10.0)
# Running passes of all batches are held between two layers up to this size; beyond, batches run again for each layer.
_HELD_BYTES = 1 << 30
# What a suspended pass holds, in terms of the features that its next layer reads.
_HELD_TIMES = 6
# Added to the size of each target, as a share of their median, so that small ones do not count without limit.
_FLOOR = 0.1
_ROUTED = re.compile(r"(^|\.)experts\.")


class Gram:
    """Sums for a least-squares fit: products of features with themselves and with targets, weighted by token, float64.

    Memory is that of the sums, whatever the number of tokens. Half of the tokens of each batch go into one set of sums
    and half into another, so that a fit to the one can be judged by the other.
    """

    def __init__(self) -> None:
        self.halves = (_Sums(), _Sums())

    @property
    def tokens(self) -> int:
        """Tokens seen."""
        return sum(half.tokens for half in self.halves)

    def add(self, features: Tensor, targets: Tensor | None = None) -> None:
        """Add tokens: features `[..., tokens, features]`, and what is to be written for them, `[tokens, outputs]`.

        With targets, a token's weight is `1 / (|target|² + 0.1 median)`, the median being that of all `|target|²` here.
        """
        tokens = features.shape[-2]
        weights = exact(features.new_ones(tokens)) if targets is None else _weights(targets)
        for half, part in zip(self.halves, (slice(0, tokens // 2), slice(tokens // 2, None)), strict=True):
            half.add(features[..., part, :], None if targets is None else targets[part], weights[part])

    def all_sums(self) -> "tuple[_Sums, _Sums, _Sums]":
        """The sums of each half, and of both."""
        return (*self.halves, self.halves[0] + self.halves[1])


def exact(values: Tensor) -> Tensor:
    """Values in float64, on the CPU where the device has none."""
    return values.to("cpu" if values.device.type == "mps" else values.device, torch.float64)


def _weights(targets: Tensor) -> Tensor:
    """The weight of each token, `[tokens]`."""
    sizes = exact(targets).square().sum(-1)
    if not len(sizes):
        return sizes
    scales = sizes + _FLOOR * sizes.median()
    return 1 / scales.where(scales > 0, 1.0)


def _weighted_sum(values: Tensor, weights: Tensor) -> Tensor:
    return (exact(values) * weights.unsqueeze(-1)).sum(-2)


def _products(left: Tensor, right: Tensor, weights: Tensor, left_sum: Tensor, right_sum: Tensor) -> Tensor:
    """Sums over tokens of the products of two features, float64.

    The large matrix product is that of deviations from the mean, for which single precision is enough.
    """
    total = weights.sum()
    divisor = total.clamp_min(torch.finfo(torch.float64).tiny)
    left, right = (values if values.dtype == torch.float64 else values.float() for values in (left, right))
    left_mean, right_mean = (left_sum / divisor).to(left), (right_sum / divisor).to(right)
    scaled = (left - left_mean.unsqueeze(-2)) * weights.to(left).unsqueeze(-1)
    deviations = exact(scaled.mT @ (right - right_mean.unsqueeze(-2)))
    left_mean, right_mean = exact(left_mean).unsqueeze(-1), exact(right_mean).unsqueeze(-2)
    around = left_mean * right_sum.unsqueeze(-2) + left_sum.unsqueeze(-1) * right_mean
    return deviations + around - total * left_mean * right_mean


@dataclass
class _Sums:
    tokens: int = 0
    weights: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    products: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    sums: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    with_targets: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    target_sums: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))

    def add(self, features: Tensor, targets: Tensor | None, weights: Tensor) -> None:
        sums = _weighted_sum(features, weights)
        self.tokens += features.shape[-2]
        self.weights = self.weights + weights.sum()
        self.products = self.products + _products(features, features, weights, sums, sums)
        self.sums = self.sums + sums
        if targets is not None:
            target_sums = _weighted_sum(targets, weights)
            self.with_targets = self.with_targets + _products(features, targets, weights, sums, target_sums)
            self.target_sums = self.target_sums + target_sums

    def __add__(self, other: "_Sums") -> "_Sums":
        return _Sums(
            self.tokens + other.tokens,
            self.weights + other.weights,
            self.products + other.products,
            self.sums + other.sums,
            self.with_targets + other.with_targets,
            self.target_sums + other.target_sums,
        )


@dataclass(frozen=True)
class _Moments:
    """Weighted means over tokens of products of features, of features with targets, and of both themselves.

    Without an intercept the products are not centred, and the means are zero.
    """

    features: Tensor
    with_targets: Tensor
    mean: Tensor
    target_mean: Tensor

    @classmethod
    def of(cls, seen: _Sums, *, intercept: bool) -> "_Moments":
        """Moments of features and targets that were seen together."""
        total = seen.weights if seen.tokens else 1.0
        mean, target_mean = seen.sums / total, seen.target_sums / total
        if not intercept:
            mean, target_mean = torch.zeros_like(mean), torch.zeros_like(target_mean)
        return cls(
            seen.products / total - mean.unsqueeze(1) * mean,
            seen.with_targets / total - mean.unsqueeze(1) * target_mean,
            mean,
            target_mean,
        )

    @classmethod
    def of_uncut(cls, seen: _Sums, kept: Tensor, weight: Tensor, entry: int | None) -> "_Moments":
        """Moments of the kept features, and of what an uncut matrix `[features, outputs]` writes from all."""
        products = seen.products if entry is None else seen.products[entry]
        covariance = products / max(seen.tokens, 1)
        weight, kept = weight.to(covariance), kept.to(covariance.device)
        none, nothing = covariance.new_zeros(len(kept)), covariance.new_zeros(weight.shape[1])
        return cls(covariance[kept][:, kept], covariance[kept] @ weight, none, nothing)


@dataclass(frozen=True)
class Projection:
    """A projection behind cut channels.

    Attributes:
        tensor: Name of its weight.
        path: Path of its module.
        member: How the cut channels lie in it.
        kept: The inputs that it keeps.
        outputs: The outputs that it keeps, None for all.
        routed: Whether tokens are routed to it, so that the two models give it different ones.
    """

    tensor: str
    path: str
    member: Member
    kept: Tensor
    outputs: Tensor | None
    routed: bool


@torch.no_grad()
def compensate(
    model: Any,
    small: Any,
    groups: ChannelMap,
    widths: Widths,
    kept: Kept,
    batches: Sequence[Mapping[str, Any]],
    *,
    ridge: float | None = None,
    held_bytes: int = _HELD_BYTES,
) -> tuple[str, ...]:
    """Refit every projection of a cut model that reads channels of which some are gone, in place.

    Args:
        model: The uncut model.
        small: The cut model, with the same names.
        groups: Channel groups of the uncut model.
        widths: Channels kept in each block, by name of the groups that are cut.
        kept: Places that stay in each tensor of the uncut model.
        batches: Dict batches of forward arguments, without labels.
        ridge: Pull towards the plain slice, as a share of the mean variance of what a projection reads. None chooses
            one of `RIDGES` for each projection: fitted to half of the tokens, it is judged by the other half.
        held_bytes: How much of suspended passes may be held; more data than that runs again for each layer.

    Returns:
        Names of the tensors that were refitted.

    Raises:
        CalibrationError: There is no batch, or the model does not run on one.
    """
    projections = _projections(model, groups, widths, kept)
    if not batches:
        raise CalibrationError(
            "The calibration data holds no batch; compensation needs at least one. Give a non-empty iterable of dict "
            "batches, or compensate=False."
        )
    with ExitStack() as stack:
        for one in (model, small):
            stack.enter_context(evaluation_mode(one))
            stack.enter_context(unfused(one))
        stack.enter_context(fixed_rng(model, 0))
        calls = _calls(model, projections, batches[0])
        alone = [one for one in projections if one.routed or calls[one.path] > 1]
        in_turn = [one for one in projections if not one.routed and calls[one.path] == 1]
        order = list(calls)
        in_turn.sort(key=lambda one: order.index(one.path))
        changed = _fit_alone(model, small, alone, batches, ridge) if alone else []
        changed += _fit_in_turn(model, small, in_turn, batches, ridge, held_bytes)
    idle = [one.path for one in projections if not one.routed and not calls[one.path]]
    if idle:
        logger.warning(
            f"The calibration data reaches no {', '.join(idle[:3])}{', …' if len(idle) > 3 else ''}: there the slice "
            "is not compensated. Give batches that run this part of the model."
        )
    return tuple(dict.fromkeys(changed))


def _projections(model: Any, groups: ChannelMap, widths: Widths, kept: Kept) -> list[Projection]:
    found: dict[str, Projection] = {}
    owners = Owners(model)
    for group in groups:
        if group.name not in widths or group.axis not in ("ffn", "heads", "vo"):
            continue
        for member in group.members:
            if member.role == "consumer" and member.tensor in kept:
                routed = member.stacked or bool(_ROUTED.search(member.tensor))
                path = member.tensor.rpartition(".")[0]
                linear = isinstance(model.get_submodule(path), (nn.Linear, Conv1D))
                if member.stacked or (linear and owners.are_plain(member.tensor)):
                    dims = kept[member.tensor]
                    outputs = next((places for dim, places in dims.items() if dim != member.dim), None)
                    found[member.tensor] = Projection(member.tensor, path, member, dims[member.dim], outputs, routed)
                else:
                    kind = type(model.get_submodule(path)).__name__
                    logger.warning(f"{member.tensor} of a {kind} is cut and not compensated: it is no linear layer.")
    return list(found.values())


def _calls(model: Any, projections: Iterable[Projection], batch: Mapping[str, Any]) -> Counter[str]:
    """How often each projection runs in one forward pass, in the order of their first calls."""
    calls: Counter[str] = Counter()
    layers = {model.get_submodule(one.path): one.path for one in projections}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, path=path: calls.update([path]))
        for layer, path in layers.items()
    ]
    try:
        run_model(model, batch)
    except Exception as error:  # whatever a forward raises only means that the batch does not suit it
        raise CalibrationError(
            f"{type(model).__name__} does not run on the calibration batch with the arguments {sorted(batch)}: "
            f"{error}. Give dict batches of forward arguments."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _fit_in_turn(
    model: Any,
    small: Any,
    projections: Sequence[Projection],
    batches: Sequence[Mapping[str, Any]],
    ridge: float | None,
    held_bytes: int,
) -> list[str]:
    """Refit projections one after another, on what the uncut model gives them and what the one does that is cut."""
    paths = tuple(one.path for one in projections)
    runs = [(SteppedRun(model, batch), SteppedRun(small, batch)) for batch in batches]
    changed: list[str] = []
    try:
        with stopping(model, paths, behind=True), stopping(small, paths, behind=False):
            for stop, projection in enumerate(logging.tqdm(projections, desc="Compensating", leave=False)):
                gram = Gram()
                for uncut, cut in runs:
                    read, targets = uncut.reach(stop)
                    targets = _columns(targets, projection.outputs)
                    (features,) = cut.reach(stop)
                    for seen in (_columns(read, projection.kept), features):
                        gram.add(seen, targets)
                    if features.nbytes * len(runs) * _HELD_TIMES > held_bytes:
                        uncut.close()
                        cut.close()
                layer = small.get_submodule(projection.path)
                moments = [_Moments.of(sums, intercept=layer.bias is not None) for sums in gram.all_sums()]
                changed += _refit(layer, projection.path, moments, ridge)
    finally:
        for pair in runs:
            for run in pair:
                run.close()
    return changed


def _fit_alone(
    model: Any, small: Any, projections: Sequence[Projection], batches: Sequence[Mapping[str, Any]], ridge: float | None
) -> list[str]:
    """Refit projections on what the uncut model gives them: experts, and layers that run several times."""
    linear = {one.path: (one, Gram()) for one in projections if one.tensor.endswith(".weight")}
    stacked = [one for one in projections if one.path not in linear]
    inner = InnerFlows(Owners(model), [one.tensor for one in stacked], flow=Gram)
    mask: list[Tensor | None] = [None]

    def see(path: str, read: Tensor, written: Tensor) -> None:
        projection, gram = linear[path]
        features, targets = unpadded(read, mask[0]), unpadded(written, mask[0])
        gram.add(_columns(features, projection.kept), _columns(targets, projection.outputs))

    handles = [
        model.get_submodule(path).register_forward_hook(lambda _, args, written, path=path: see(path, args[0], written))
        for path in linear
    ]
    try:
        with inner.attached():
            for batch in logging.tqdm(batches, desc="Compensating (experts)", leave=False):
                mask[0] = inner.mask = token_mask(model, batch)
                run_model(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    changed = []
    for one in projections:
        if one.path in linear and linear[one.path][1].tokens:
            layer, gram = small.get_submodule(one.path), linear[one.path][1]
            moments = [_Moments.of(sums, intercept=layer.bias is not None) for sums in gram.all_sums()]
            changed += _refit(layer, one.path, moments, ridge)
        for entries, gram in inner.seen(one.member) if one in stacked else ():
            # Matrices of experts, `[neurons, outputs]`.
            cut, whole = (owner.get_parameter(one.tensor).movedim(one.member.dim, 1) for owner in (small, model))
            for place, entry in enumerate(entries):
                index = place if len(entries) > 1 else None
                moments = [
                    _Moments.of_uncut(sums, one.kept, _columns(whole[entry], one.outputs), index)
                    for sums in gram.all_sums()
                ]
                cut[entry].copy_(_fit(moments, exact(cut[entry]), ridge))
            changed.append(one.tensor)
    return changed


def _refit(layer: Any, path: str, moments: Sequence[_Moments], ridge: float | None) -> list[str]:
    """Write the weights, and the bias if there is one, that fit best; the names of what was written.

    Args:
        layer: The projection.
        path: Its path.
        moments: Those of each half of the data, and of all.
        ridge: How strongly the weights are pulled towards those before, None to choose.
    """
    weight = _inputs_first(layer, layer.weight)
    fitted = _fit(moments, exact(weight), ridge)
    weight.copy_(fitted)
    if layer.bias is None:
        return [f"{path}.weight"]
    layer.bias.copy_(moments[-1].target_mean - moments[-1].mean @ fitted)
    return [f"{path}.weight", f"{path}.bias"]


def _columns(values: Tensor, kept: Tensor | None) -> Tensor:
    """The kept ones of the last axis."""
    return values if kept is None else values.index_select(-1, kept.to(values.device))


def _inputs_first(layer: nn.Module, weight: Tensor) -> Tensor:
    """A view of a linear layer's weight as `[inputs, outputs]`."""
    return weight if isinstance(layer, Conv1D) else weight.T


def _fit(moments: Sequence[_Moments], before: Tensor, ridge: float | None) -> Tensor:
    """The weights `[features, outputs]` that fit the last moments best, pulled towards those before.

    Args:
        moments: Those of each half of the data, and of all.
        before: The weights before.
        ridge: The pull; None takes the one that fits the first half so that the second is met best.
    """
    first, second, both = moments
    if ridge is None:
        ridge = min(RIDGES, key=lambda one: _error(second, _solve(first, before, one)))
    return _solve(both, before, ridge)


def _error(moments: _Moments, weights: Tensor) -> float:
    """Mean squared distance to the targets, but for a constant."""
    return float(((moments.features @ weights - 2 * moments.with_targets) * weights).sum())


def _solve(moments: _Moments, before: Tensor, ridge: float) -> Tensor:
    """The weights `[features, outputs]` of the least squares, pulled towards those before.

    The ridge grows until the matrix is positive definite in float64.
    """
    covariance = moments.features
    scale = covariance.diagonal().mean().clamp_min(1e-30)
    missing = moments.with_targets - covariance @ before
    identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    while True:
        factor, failed = torch.linalg.cholesky_ex(covariance + ridge * scale * identity)
        if not bool(failed):
            return before + torch.cholesky_solve(missing, factor)
        ridge = max(10 * ridge, 1e-12)
