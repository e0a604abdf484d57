"""Scores from calibration data: what flows through the channels when the model runs on a user's batches.

One pass over the data. A channel is watched where it is read, at the input of the layer that consumes it; query and key
rows, which no layer consumes, at the output of their projections. Memory does not grow with the data.
"""

from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.utils import logging

from .channels import ChannelGroup, Member
from .errors import CalibrationError
from .forward import evaluation_mode, fixed_rng, output_tensors, run_model
from .saliency import channel_sums

Point = tuple[str, bool]
"""A watched module, and whether at its input."""


def calibrated_scores(
    model: PreTrainedModel,
    groups: Iterable[ChannelGroup],
    batches: Iterable[Mapping[str, Any]],
    metric: str,
    *,
    max_batches: int | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Score channels by running the model on calibration data, in evaluation mode.

    `activation`: root mean square of the channel's activation times the L2 norm of the weights that read it; for query
    and key rows the product of both activations' root mean squares, their share in the attention logits.
    `taylor`: root mean square, over samples, of the first-order change of the loss when the channel is zeroed,
    `sum over tokens of activation * dloss/dactivation`. The loss is the model's own if the batch has labels; otherwise
    cross-entropy with the model's own most likely outputs or, for a model without logits, a seeded random projection
    of its outputs.

    Args:
        model: The model; parameters and gradients stay untouched, frozen models work.
        groups: The groups to score.
        batches: Any iterable of dict batches of forward arguments: a DataLoader, a list, a generator.
        metric: `activation` or `taylor`.
        max_batches: Read at most this many batches; None reads all.
        seed: Seed of the random projection.

    Returns:
        Scores by group name, `[blocks, size]`, float64, on the CPU.

    Raises:
        CalibrationError: There is no batch, a batch is no mapping, or the model does not run on it.

    Reference:
        Activation times weight norm: Sun et al., Wanda, arXiv:2306.11695. First-order Taylor: Molchanov et al.,
        arXiv:1906.10771, with gates as in Michel et al., arXiv:1905.10650.
    """
    if not isinstance(batches, Iterable):
        raise CalibrationError(
            f"The calibration data is a {type(batches).__name__}; an iterable of dict batches of forward arguments is "
            "needed. Give a DataLoader or a list of batches."
        )
    groups = tuple(groups)
    watch: _Watch = _ActivationWatch() if metric == "activation" else _TaylorWatch(groups, seed)
    points = {point for group in groups for point in map(_point, _watched(group))}
    total = max_batches
    if isinstance(batches, Sized):
        total = len(batches) if max_batches is None else min(len(batches), max_batches)
    count = 0
    # A DataLoader draws the seed of its workers from the global generator, and some models draw in evaluation mode.
    with evaluation_mode(model), _hooks(model, points, watch), fixed_rng(model, seed):
        for batch in logging.tqdm(
            islice(batches, max_batches), total=total, desc=f"Calibrating ({metric})", leave=False
        ):
            _check_batch(batch)
            try:
                watch.run(model, batch)
            except Exception as error:  # whatever a forward raises only means that the batch does not suit it
                raise CalibrationError(
                    f"{type(model).__name__} does not run on calibration batch {count} with the arguments "
                    f"{sorted(batch)}: {error}. Give dict batches of forward arguments."
                ) from error
            count += 1
    if count == 0:
        raise CalibrationError(
            f"The calibration data holds no batch; metric {metric!r} needs at least one. Give a non-empty iterable of "
            "dict batches (a generator that was read before is empty)."
        )
    scores = {group.name: watch.scores(model, group) for group in groups}
    for name, values in scores.items():
        if not bool(values.isfinite().all()):
            raise CalibrationError(
                f"Metric {metric!r} is NaN or infinite for group {name}. Check the weights and the calibration data "
                "for such values, or run the model in float32."
            )
    return scores


def _watched(group: ChannelGroup) -> tuple[Member, ...]:
    matrices = group.scored_members
    return tuple(m for m in matrices if m.role == "consumer") or tuple(m for m in matrices if m.role == "producer")


def _point(member: Member) -> Point:
    return member.tensor.rpartition(".")[0], member.role == "consumer"


def _check_batch(batch: Any) -> None:
    if not isinstance(batch, Mapping):
        raise CalibrationError(
            f"A calibration batch is a {type(batch).__name__}; a dict of forward arguments is needed. "
            "Use a DataLoader whose collator returns dicts."
        )


@contextmanager
def _hooks(model: nn.Module, points: set[Point], watch: "_Watch") -> Iterator[None]:
    handles: list[RemovableHandle] = []
    for path, at_input in sorted(points):
        module, point = model.get_submodule(path), (path, at_input)
        if at_input:
            handles.append(
                module.register_forward_pre_hook(
                    lambda _, args, point=point: (watch.see(point, args[0]), *args[1:]), prepend=False
                )
            )
        else:
            handles.append(module.register_forward_hook(lambda _, args, output, point=point: watch.see(point, output)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Watch(Protocol):
    """Collects what flows through the watched points."""

    def see(self, point: Point, features: Tensor) -> Tensor: ...

    def run(self, model: PreTrainedModel, batch: Mapping[str, Any]) -> None: ...

    def scores(self, model: PreTrainedModel, group: ChannelGroup) -> Tensor: ...


def _token_mask(model: PreTrainedModel, batch: Mapping[str, Any]) -> Tensor | None:
    """Which tokens are no padding, `[batch, tokens]`, as far as the batch says.

    In an encoder-decoder the mask is the encoder's only, and lengths cannot tell the two streams apart.
    """
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or model.config.is_encoder_decoder:
        return None
    return mask.bool()


def _tokens(features: Tensor, mask: Tensor | None) -> Tensor:
    """Features of every token that is no padding, `[tokens, features]`."""
    if mask is not None and features.shape[:-1] == mask.shape:
        return features[mask.to(features.device)]
    return features.reshape(-1, features.shape[-1])


@dataclass
class _ActivationWatch:
    """Sum of squared activations per feature, over every token that is no padding."""

    squares: dict[Point, Tensor] = field(default_factory=dict)
    tokens: dict[Point, int] = field(default_factory=dict)
    mask: Tensor | None = None

    def see(self, point: Point, features: Tensor) -> Tensor:
        seen = _tokens(features.detach(), self.mask).double()
        self.squares[point] = self.squares.get(point, 0) + seen.square().sum(0).cpu()
        self.tokens[point] = self.tokens.get(point, 0) + seen.shape[0]
        return features

    @torch.no_grad()
    def run(self, model: PreTrainedModel, batch: Mapping[str, Any]) -> None:
        self.mask = _token_mask(model, batch)
        run_model(model, batch)

    def scores(self, model: PreTrainedModel, group: ChannelGroup) -> Tensor:
        energies = []
        for member in _watched(group):
            point = _point(member)
            energy = self.squares[point] / max(self.tokens[point], 1)
            if member.role == "consumer":
                energy = energy * channel_sums(model.get_parameter(member.tensor).detach(), member.dim, power=2)
            energies.append(member.take_channels(energy, group).sum(-1).sqrt())
        stacked = torch.stack(energies)
        return stacked.mean(0) if _watched(group)[0].role == "consumer" else stacked.prod(0)


@dataclass
class _TaylorWatch:
    """Squared first-order change of each sample's loss when a channel is zeroed."""

    groups: tuple[ChannelGroup, ...]
    seed: int
    squares: dict[str, Tensor] = field(default_factory=dict)
    samples: int = 0
    gates: list[tuple[Point, Tensor]] = field(default_factory=list)

    def see(self, point: Point, features: Tensor) -> Tensor:
        gate = features.new_ones(features.shape[0], *[1] * (features.dim() - 2), features.shape[-1], requires_grad=True)
        self.gates.append((point, gate))
        return features * gate

    def run(self, model: PreTrainedModel, batch: Mapping[str, Any]) -> None:
        self.gates = []
        with torch.enable_grad():
            loss = self._loss(run_model(model, batch), _token_mask(model, batch))
            found = torch.autograd.grad(loss, [gate for _, gate in self.gates], allow_unused=True)
        changes: dict[Point, Tensor] = {}
        for (point, gate), gradient in zip(self.gates, found, strict=True):
            if gradient is not None:
                change = gradient.double().reshape(gate.shape[0], gate.shape[-1]).cpu()
                changes[point] = changes[point] + change if point in changes else change
        self.gates = []
        for group in self.groups:
            watched = [(member, changes[_point(member)]) for member in _watched(group) if _point(member) in changes]
            if watched:
                parts = [member.take_channels(one, group).sum(-1) for member, one in watched]
                squares = torch.stack(parts).sum(0).square().sum(0)
                self.squares[group.name] = self.squares.get(group.name, torch.zeros(())) + squares
        self.samples += max((gate.shape[0] for gate in changes.values()), default=0)

    def _loss(self, output: Any, mask: Tensor | None) -> Tensor:
        """The sum over samples of a loss, so that every sample's gates see its own gradient at full size."""
        tensors = output_tensors(output)
        batch = next(value.shape[0] for value in tensors.values() if value.dim() > 0)
        if "loss" in tensors:
            return tensors["loss"] * batch
        if "logits" in tensors:
            logits = _tokens(tensors["logits"], mask)
            logits = logits if logits.dtype == torch.float64 else logits.float()
            return nn.functional.cross_entropy(logits, logits.detach().argmax(-1), reduction="sum")
        target = _tokens(next(iter(tensors.values())), mask)
        generator = torch.Generator().manual_seed(self.seed + self.samples)
        direction = torch.randn(target.shape, generator=generator).to(target)
        return (target * direction).sum()

    def scores(self, model: PreTrainedModel, group: ChannelGroup) -> Tensor:
        if group.name not in self.squares:
            raise CalibrationError(
                f"No gradient reached group {group.name} on the calibration data. Give batches that run this part of "
                "the model, or use metric 'activation'."
            )
        return (self.squares[group.name] / max(self.samples, 1)).sqrt()
