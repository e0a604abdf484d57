"""The metric `taylor`: how much each sample's loss changes, to first order, when a channel is zeroed."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .channels import ChannelGroup, Member
from .errors import CalibrationError
from .forward import output_tensors, run_model
from .watch import Owners, Point, is_idle_expert, module_hooks, point_of, token_mask, unpadded, watched_members

_UNSPLITTABLE = (
    "Metric 'taylor' needs the loss of each sample, and a batch of {size} cannot be split: {reason}. Give batches of "
    "one sample."
)


class TaylorWatch:
    """Squared first-order changes of each sample's loss when a channel is zeroed.

    What a module reads or writes is multiplied with a gate of one, whose gradient is that change. Where a module
    computes with its parameters itself, as experts do, it is the sum of `w * dloss/dw` over the weights that read the
    channel, or write it, one sample at a time.

    Args:
        model: The model.
        groups: The groups to watch.
        seed: Seed of the target of models without logits.
    """

    def __init__(self, model: PreTrainedModel, groups: Iterable[ChannelGroup], seed: int) -> None:
        self.model, self.seed, self._owners = model, seed, Owners(model)
        self._members = {group: _gated_members(self._owners, group) for group in groups}
        members = {member for gated in self._members.values() for member in gated}
        self._points = {point_of(member) for member in members if self._owners.are_plain(member.tensor)}
        inner = sorted({member.tensor for member in members if point_of(member) not in self._points})
        self._weights = {name: model.get_parameter(name) for name in inner}
        self._squares: dict[str, Tensor] = {}
        self._seen: set[str] = set()
        self._samples = 0
        # Whether several samples may run at once, because every feature's first dimension is the sample.
        self._together: bool | None = None
        # Of the run that is going on: its samples, the gates, and the lengths of the features' first dimensions.
        self._size = 1
        self._gates: list[tuple[Point, Tensor]] = []
        self._lengths: set[int] = set()

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Watch every run of the model inside the block."""
        wanted = {name: parameter.requires_grad for name, parameter in self._weights.items()}
        try:
            for parameter in self._weights.values():
                parameter.requires_grad_(True)
            with module_hooks(self._owners, self._points, self._see):
                yield
        finally:
            for name, parameter in self._weights.items():
                parameter.requires_grad_(wanted[name])

    def run(self, batch: Mapping[str, Any]) -> None:
        """Run the model on a batch, forward and backward, and add up the squared changes.

        Raises:
            CalibrationError: The batch has to be split into its samples and cannot be.
        """
        size = _batch_size(self.model, batch)
        if size == 1:
            self._run(batch, 1)
            return
        if self._together is None:
            self._together = not self._weights and self._first_lengths(_sample(batch, 0, size)) == {1}
        if self._together:
            self._together = self._run(batch, size)
        if not self._together:
            for index in range(size):
                self._run_sample(batch, index, size)

    def _run_sample(self, batch: Mapping[str, Any], index: int, size: int) -> None:
        sample = _sample(batch, index, size)
        try:
            self._run(sample, 1)
        except CalibrationError:
            raise
        except Exception as error:  # whatever a forward raises only means that this is no sample
            self._first_lengths(batch)  # unless the batch does not run either, for a reason of its own
            raise CalibrationError(_UNSPLITTABLE.format(size=size, reason=error)) from error

    @torch.no_grad()
    def _first_lengths(self, batch: Mapping[str, Any]) -> set[int]:
        self._start(1)
        run_model(self.model, batch)
        return self._lengths

    def _start(self, size: int) -> None:
        self._size, self._gates, self._lengths = size, [], set()

    def _see(self, point: Point, features: Tensor) -> Tensor:
        self._lengths.add(features.shape[0])
        ones = [1] * (features.dim() - 2)
        shape = (features.shape[-1],) if self._size == 1 else (features.shape[0], *ones, features.shape[-1])
        gate = features.new_ones(shape, requires_grad=True)
        self._gates.append((point, gate))
        return features * gate

    def _run(self, batch: Mapping[str, Any], size: int) -> bool:
        """Run samples together; false, and nothing added, if their features cannot be told apart."""
        self._start(size)
        with torch.enable_grad():
            output = run_model(self.model, batch)
            if size > 1 and self._lengths != {size}:
                return False
            loss = self._loss(output, token_mask(self.model, batch), size)
            leaves = [*(gate for _, gate in self._gates), *self._weights.values()]
            found = (
                torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else (None,) * len(leaves)
            )
        at_gates, at_weights = found[: len(self._gates)], found[len(self._gates) :]
        changes: dict[Point, Tensor] = {}
        for (point, gate), gradient in zip(self._gates, at_gates, strict=True):
            if gradient is not None:
                change = gradient.double().reshape(size, gate.shape[-1]).cpu()
                changes[point] = changes[point] + change if point in changes else change
        gradients = {n: g for n, g in zip(self._weights, at_weights, strict=True) if g is not None}
        self._gates = []
        self._seen |= {point.tensor for point in changes}
        for group, members in self._members.items():
            parts = []
            for member in members:
                if member.tensor in gradients:
                    weights = self._weights[member.tensor].detach()
                    change = _change(weights, gradients[member.tensor], member.dim, member.stacked).unsqueeze(0)
                    parts.append(member.take_channels(change, group).sum(-1))
                elif point_of(member) in changes:
                    parts.append(member.take_channels(changes[point_of(member)], group).sum(-1))
            if parts:
                squares = torch.stack(parts).sum(0).square().sum(0)
                self._squares[group.name] = self._squares.get(group.name, torch.zeros(())) + squares
        self._samples += size
        return True

    def _loss(self, output: Any, mask: Tensor | None, size: int) -> Tensor:
        """The sum over samples of a loss, so that every sample's gates see its own gradient at full size."""
        tensors = output_tensors(output)
        if "loss" in tensors:
            return tensors["loss"] * size
        if "logits" in tensors and tensors["logits"].shape[-1] > 1:
            logits = unpadded(tensors["logits"], mask)
            logits = logits if logits.dtype == torch.float64 else logits.float()
            return nn.functional.cross_entropy(logits, logits.detach().argmax(-1), reduction="sum")
        generator, total = torch.Generator().manual_seed(self.seed + self._samples), torch.zeros(())
        for target in (unpadded(tensor, mask) for tensor in tensors.values() if tensor.dim() > 0):
            direction = torch.randn(target.shape, generator=generator).to(target)
            total = total.to(target) + (target * direction).sum()
        return total

    def scores(self, group: ChannelGroup) -> Tensor:
        """Scores of a group's channels, `[blocks, size]`.

        Raises:
            CalibrationError: No gradient reached the group.
        """
        if group.name not in self._squares:
            if is_idle_expert(group, self._seen):
                return torch.zeros(group.blocks, group.size, dtype=torch.float64)
            raise CalibrationError(
                f"No gradient reached group {group.name} on the calibration data. Give batches that run this part of "
                "the model, leave it out by SPPConfig(towers=...), or use metric 'activation'."
            )
        return (self._squares[group.name] / max(self._samples, 1)).sqrt()


def _gated_members(owners: Owners, group: ChannelGroup) -> tuple[Member, ...]:
    """The members whose gates, or weights, say what zeroing a channel changes."""
    watched = watched_members(group)
    if watched[0].role == "consumer" or owners.are_plain(watched[0].tensor):
        return watched
    # What a gate behind them would scale as well.
    biases = [member for member in group.members if member.role == "producer" and not member.is_matrix]
    return (*watched, *biases)


def _change(weights: Tensor, gradient: Tensor, dim: int, stacked: bool) -> Tensor:
    """Sum of `w * dloss/dw` over every dimension but `dim`, `[length]`, or `[entries, length]` of stacked matrices."""
    if stacked:
        pairs = zip(weights, gradient, strict=True)
        return torch.stack([_change(own, slope, dim - 1, False) for own, slope in pairs])
    other = [index for index in range(weights.dim()) if index != dim]
    product = weights.double() * gradient.double()
    return (product.sum(other) if other else product).cpu()


def _batch_size(model: PreTrainedModel, batch: Mapping[str, Any]) -> int:
    """How many samples a batch holds, by the model's main argument, or the grids of images if that is their patches."""
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor) and value.dim() > 0}
    if not tensors:
        return 1
    name = getattr(model, "main_input_name", "")
    main = tensors[name] if isinstance(name, str) and name in tensors else next(iter(tensors.values()))
    grids = [value for name, value in tensors.items() if "grid" in name]
    return len(grids[0] if grids and main.is_floating_point() else main)


def _sample(batch: Mapping[str, Any], index: int, size: int) -> dict[str, Any]:
    """One sample of a batch, as a batch.

    Raises:
        CalibrationError: An entry holds neither one value for each sample nor one for all.
    """

    def take(name: str, value: Any) -> Any:
        if isinstance(value, (list, tuple)) and all(isinstance(one, Tensor) and len(one) == size for one in value):
            return type(value)(take(name, one) for one in value)
        if not isinstance(value, (list, tuple)) and not (isinstance(value, Tensor) and value.dim() > 0):
            return value
        if len(value) not in (1, size):
            raise CalibrationError(_UNSPLITTABLE.format(size=size, reason=f"{name} has {len(value)} entries"))
        return value[index : index + 1] if len(value) == size else value

    return {name: take(name, value) for name, value in batch.items()}
