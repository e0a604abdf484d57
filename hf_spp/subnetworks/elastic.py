"""`ElasticTrainer`: one training after which every width of a model is a good one."""

import random
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, ProgressCallback, Trainer, TrainerState, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from .._compat import accept_checkpoint_names
from ..architectures import channel_groups
from ..callback import SPPCallback
from ..errors import SPPConfigError, SubnetworkError
from ..structure import inner_model
from .costs import ParameterCount
from .distillation import distance, learnt_from
from .extraction import is_ordered, subnetwork_view
from .spec import SubnetworkSpec
from .widths import cut_of

Width: TypeAlias = float | SubnetworkSpec
Widths: TypeAlias = Sequence[Width] | Mapping[str, Width]

FULL = "full"


class ElasticTrainer(Trainer):
    """A `Trainer` with which one training gives good sub-networks of every width.

    Each step trains the full model on the labels, and the smallest and some random sub-networks on what the full model
    put out (the sandwich rule with in-place distillation). All of them live in the weights of the one model. The step
    follows the mean of their gradients, so that a learning rate keeps its meaning, and `loss` in the log is the mean
    of their losses; `loss_full` and `loss_width_0.5` are those of one. Which are drawn depends on `args.seed` and the
    number of the step alone, so a resumed run draws what the uninterrupted one would have drawn. Micro-batches of
    gradient accumulation count by their labels, also for models whose own loss leaves that out.

    The model should know its task, since sub-networks learn from it from the first step on, and be in order of
    saliency: fine-tune it, call `apply_spp`, and then train it so; or pass an `SPPCallback`. A step takes one forward
    and backward pass for each width. Outputs that are learnt from are logits (the Kullback-Leibler divergence,
    scaled by the squared temperature, where labels are not -100; the squared error for regressions) or, for models
    without them, the last hidden state (the squared error where tokens are not padded). Override `distillation_loss`
    for others, and pass `compute_loss_func=...` for another loss of the labels.

    An evaluation gives the metrics of the full model as usual, those of a sub-network as `eval_width_0.5_accuracy`,
    and the time of all of them. `metric_for_best_model` may be any of these.

    Args:
        model: The model, plain or for DistributedDataParallel; none with adapters.
        args: As for `Trainer`, without FSDP, DeepSpeed and tensor parallelism.
        widths: The sub-networks: fractions for `SubnetworkSpec.uniform`, or specs. In the log a fraction is called by
            its number and a spec by its place, `spec0`; a mapping gives other names.
        sampled: How many random ones of the widths but the smallest are trained in each step; all where there are no
            more.
        distillation: What part of a sub-network's loss is that of learning from the full model; the rest is that of
            the labels.
        temperature: What logits are divided by when they are learnt from.
        eval_widths: The widths that an evaluation goes through; None means all of `widths`.
        kwargs: As for `Trainer`.

    Attributes:
        widths: The specs in counts of channels, by name, from the smallest to the largest: what to give to
            `extract_subnetwork` afterwards.
        eval_widths: Those that are evaluated.

    Raises:
        SubnetworkError: A width does not fit the model, or the model cannot be cut while it is trained so.
        SPPConfigError: A value is not accepted.

    Reference:
        Universally slimmable networks and improved training techniques, arXiv:1903.05134.
    """

    # `compute_loss` does that for every pass.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: TrainingArguments | None = None,
        *,
        widths: Widths,
        sampled: int = 1,
        distillation: float = 1.0,
        temperature: float = 1.0,
        eval_widths: Widths | None = None,
        **kwargs: Any,
    ) -> None:
        _check_settings(sampled, distillation, temperature)
        self.sampled, self.distillation, self.temperature = sampled, distillation, temperature
        self._pass: _Pass | None = None
        self._losses = _Losses()
        super().__init__(model, args, **kwargs)
        _check_set_up(self)
        self.widths = _settle("widths", self.model, widths)
        self.eval_widths = self.widths if eval_widths is None else _settle("eval_widths", self.model, eval_widths)
        if not self.widths:
            raise SPPConfigError("widths is empty. Give fractions such as widths=[0.25, 0.5, 0.75].")
        for name in self.widths.keys() & self.eval_widths.keys():
            if self.widths[name] != self.eval_widths[name]:
                raise SPPConfigError(
                    f"{name!r} is one spec in widths and another in eval_widths. Give them as mappings, with a name "
                    "for each."
                )
        self._check_ordered()
        if isinstance(self.model, PreTrainedModel):
            accept_checkpoint_names(self.model)

    def _check_ordered(self) -> None:
        if any(isinstance(callback, SPPCallback) for callback in self.callback_handler.callbacks):
            return
        model: Any = self.model
        groups = channel_groups(model)
        cut = {name for spec in self.widths.values() for name in spec.widths(model, groups)}
        if not is_ordered(model, [groups.by_name[name] for name in sorted(cut)]):
            warnings.warn(
                f"{type(inner_model(model)).__name__} was not reordered along all axes that are cut, so every "
                "width begins with no better channels than random ones. Call apply_spp(model) before, or pass "
                "callbacks=[SPPCallback()].",
                stacklevel=3,
            )

    def drawn_widths(self, step: int) -> list[str]:
        """Names of the sub-networks that a step trains, the smallest last.

        Args:
            step: Number of the step, from 0.
        """
        smallest, *others = self.widths
        drawn = random.Random(f"{self.args.seed} {step}").sample(others, min(self.sampled, len(others)))
        return [*(name for name in reversed(others) if name in drawn), smallest]

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run the passes of all widths of a step, backward ones included, and return the mean of their losses."""
        inputs = self._prepare_inputs(inputs)
        names = [FULL, *self.drawn_widths(self.state.global_step)]
        self._pass = _Pass(len(names))
        losses = []
        try:
            for name in names:
                self._pass.name = name
                with ExitStack() as stack:
                    if name != names[-1]:
                        # Only the last pass makes the processes' gradients one, of the sum of all passes.
                        stack.enter_context(self.accelerator.no_sync(model=model))
                    if name != FULL:
                        stack.enter_context(subnetwork_view(self.model, self.widths[name], allow_unordered=True))
                    losses.append(super().training_step(model, inputs, num_items_in_batch))
                self._losses.add(self.state, name, losses[-1] * len(names))
        finally:
            self._pass = None
        return torch.stack(losses).sum()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss as for `Trainer`, and in a training step that of the current width, by its share in the step."""
        current = self._pass
        if current is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # The labels may be taken out of the inputs.
        given, items = dict(inputs), None
        if num_items_in_batch is not None:
            items = self._aligned_labels(given).ne(-100).sum()
        counted = None if items is None else items.clamp(min=1)
        loss, outputs = super().compute_loss(model, inputs, True, counted)
        if self.distillation > 0 and current.name == FULL:
            current.targets = {name: value.detach() for name, value in learnt_from(outputs).items()}
        elif self.distillation > 0:
            learnt = self.distillation_loss(outputs, current.targets, given)
            if items is not None and self.args.average_tokens_across_devices:
                # As for the loss of the labels: DistributedDataParallel divides by it again.
                learnt = learnt * self.accelerator.num_processes
            loss = learnt if self.distillation == 1 else loss.lerp(learnt.to(loss), self.distillation)
        # All that is computed here is a mean over this batch, which is one of several of the step.
        share = 1 / self.current_gradient_accumulation_steps if items is None else items / num_items_in_batch
        loss = loss * share / current.count
        return (loss, outputs) if return_outputs else loss

    def distillation_loss(
        self, outputs: Mapping[str, Any], targets: Mapping[str, Tensor], inputs: Mapping[str, Any]
    ) -> Tensor:
        """How far the outputs of a sub-network are from those of the full model, as a mean over a batch.

        Args:
            outputs: What the sub-network put out.
            targets: What the full model put out, detached, by the name of each output that is learnt from.
            inputs: Forward arguments, with the labels.

        Raises:
            SubnetworkError: An output has a shape that does not say what is to be learnt from it.
        """
        labels = self._aligned_labels(inputs)
        return distance(inner_model(self.model), outputs, targets, inputs, labels, self.temperature)

    def _aligned_labels(self, inputs: Mapping[str, Any]) -> Any:
        """The label of every place of the logits, None if they have none."""
        if "shift_labels" in inputs:
            return inputs["shift_labels"]
        labels = inputs.get("labels")
        if not isinstance(labels, Tensor):
            return None
        return functional.pad(labels[..., 1:], (0, 1), value=-100) if self._loss_shifts_labels else labels

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as `Trainer` does, with the loss of every width beside the mean of all."""
        if "loss" in logs and "learning_rate" in logs:
            logs.update(self._losses.means(self))
        super().log(logs, start_time)

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate the full model and each of the evaluated widths; predict with the full model alone."""
        settings = (description, prediction_loss_only, ignore_keys)
        output = super().evaluation_loop(dataloader, *settings, metric_key_prefix)
        if description == "Prediction":
            return output
        metrics: Any = output.metrics
        for name, spec in self.eval_widths.items():
            prefix = f"{metric_key_prefix}_width_{name}"
            self._end_progress_bar()
            with torch.no_grad(), subnetwork_view(self.model, spec, allow_unordered=True):
                found: Any = super().evaluation_loop(dataloader, *settings, prefix).metrics
            found.pop(f"{prefix}_model_preparation_time", None)
            metrics.update(found)
        return output

    def _end_progress_bar(self) -> None:
        """Let the next width count from 0."""
        bars: list[Any] = [one for one in self.callback_handler.callbacks if isinstance(one, ProgressCallback)]
        for bar in bars:
            bar.on_predict(self.args, self.state, self.control)


@dataclass
class _Pass:
    """What the passes of a step have in common, and whose turn it is."""

    count: int
    name: str = FULL
    targets: dict[str, Tensor] = field(default_factory=dict)


class _Losses:
    """Losses of the widths since they were last asked for, on the device that they were computed on."""

    def __init__(self) -> None:
        self._state: TrainerState | None = None
        self._sums: dict[str, dict[int, Tensor]] = {}

    def add(self, state: TrainerState, name: str, loss: Tensor) -> None:
        """Add the loss of a micro-batch; a training makes a new state when it begins."""
        if state is not self._state:
            self._state, self._sums = state, {}
        steps = self._sums.setdefault(name, {})
        steps[state.global_step] = steps.get(state.global_step, 0) + loss

    def means(self, trainer: ElasticTrainer) -> dict[str, float]:
        """The mean over steps and processes for each width that was trained, which begins a new count."""
        sums, self._sums = self._sums, {}
        found = {}
        for name in (name for name in (FULL, *trainer.widths) if name in sums):
            losses = trainer.accelerator.reduce(torch.stack([*sums[name].values()]), reduction="mean")
            if trainer.args.logging_nan_inf_filter:
                losses = losses[losses.isfinite()]
            if len(losses):
                found["loss_full" if name == FULL else f"loss_width_{name}"] = losses.mean().item()
        return found


def _check_settings(sampled: Any, distillation: Any, temperature: Any) -> None:
    if isinstance(sampled, bool) or not isinstance(sampled, int) or sampled < 0:
        raise SPPConfigError(f"sampled={sampled!r} is no count of widths. Give a whole number from 0.")
    if isinstance(distillation, bool) or not isinstance(distillation, (int, float)) or not 0 <= distillation <= 1:
        raise SPPConfigError(f"distillation={distillation!r} is no share. Give a number from 0.0 to 1.0.")
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)) or not temperature > 0:
        raise SPPConfigError(f"temperature={temperature!r} is no temperature. Give a number above 0.")


def _check_set_up(trainer: Trainer) -> None:
    """Refuse what keeps a model from being cut while it is trained, or takes a pass for a step."""
    spread = {
        "DeepSpeed": trainer.is_deepspeed_enabled,
        "FSDP": trainer.is_fsdp_enabled or trainer.is_fsdp_xla_enabled,
        "tensor or context parallelism": getattr(trainer.accelerator, "parallelism_config", None) is not None,
    }
    if used := [name for name, is_used in spread.items() if is_used]:
        raise SubnetworkError(
            f"ElasticTrainer was set up with {', '.join(used)}, which spreads weights or steps over processes in ways "
            "that sub-networks cannot be cut from. Train with DistributedDataParallel, or in one process."
        )
    if trainer.args.n_gpu > 1:
        raise SubnetworkError(
            f"Trainer would train copies of the model on {trainer.args.n_gpu} devices by DataParallel, which copies "
            "the full model. Launch a process for each with torchrun, or make one device visible."
        )
    optimizer = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    if "lomo" in optimizer or "layerwise" in optimizer:
        raise SPPConfigError(
            f"optim={optimizer!r} steps within every backward pass, and a step of ElasticTrainer has several. Give "
            "another one, such as 'adamw_torch'."
        )


def _settle(argument: str, model: Any, widths: Widths) -> dict[str, SubnetworkSpec]:
    """Specs in counts of channels by name, from the smallest to the largest, all of which the model can run at."""
    if isinstance(widths, str) or not isinstance(widths, (Sequence, Mapping)):
        raise SPPConfigError(f"{argument}={widths!r} is no list of widths. Give fractions such as [0.25, 0.5, 0.75].")
    given = widths.items() if isinstance(widths, Mapping) else [(None, width) for width in widths]
    groups, inner = channel_groups(model), inner_model(model)
    count = ParameterCount(inner, groups)
    settled: dict[str, SubnetworkSpec] = {}
    counts: dict[str, dict[str, int]] = {}
    for place, (given_name, width) in enumerate(given):
        spec = _spec_of(argument, model, width)
        name = given_name
        if name is None:
            name = f"spec{place}" if isinstance(width, SubnetworkSpec) else f"{width:g}"
        if not isinstance(name, str) or name in ("", FULL):
            raise SPPConfigError(f"{argument} has the name {name!r}. Give a string other than '' and {FULL!r}.")
        kept = spec.widths(model, groups)
        if not kept:
            raise SPPConfigError(
                f"{width!r} in {argument} keeps all channels of {type(inner).__name__}. Leave it out: the full model "
                "is always trained and evaluated."
            )
        if same := [other for other, one in counts.items() if one == kept or other == name]:
            raise SPPConfigError(
                f"{same[0]} and {name} in {argument} keep the same channels of {type(inner).__name__}, because widths "
                "are rounded. Leave one out, or give specs with a smaller multiple_of."
            )
        counts[name] = kept
        # Counts, because what fractions are rounded to depends on the device.
        whole = {group.name: group.size for group in groups if getattr(spec, cut_of(group)) is not None}
        settled[name] = spec.with_widths(groups, {**whole, **kept})
        with torch.no_grad(), subnetwork_view(model, settled[name], allow_unordered=True):
            pass
    return {name: settled[name] for name in sorted(settled, key=lambda name: count(counts[name]))}


def _spec_of(argument: str, model: Any, width: Any) -> SubnetworkSpec:
    if isinstance(width, SubnetworkSpec):
        return width
    if isinstance(width, bool) or not isinstance(width, (int, float)) or not 0 < width <= 1:
        raise SPPConfigError(
            f"{width!r} in {argument} is no width. Give a fraction above 0 and below 1 such as 0.5, or a "
            "SubnetworkSpec."
        )
    return SubnetworkSpec.uniform(model, width)
