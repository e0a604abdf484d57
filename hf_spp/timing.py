"""When a model in training is put in order."""

from dataclasses import dataclass
from typing import Literal, get_args

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from .errors import CallbackError, SPPConfigError

Strategy = Literal["train_begin", "epoch", "steps", "evaluate", "train_end"]


@dataclass(frozen=True)
class Schedule:
    """When a model in training is put in order: always between two steps, when there are no gradients.

    Attributes:
        strategy: `train_begin` and `train_end` once; `steps`, `epoch` and `evaluate` again and again, the last right
            before evaluations, so that what is evaluated and saved is in order.
        every: Every so many steps, epochs or evaluations.
        min_change: Skip a later reordering for which fewer than this share of channel pairs would change places.
    """

    strategy: Strategy = "train_begin"
    every: int = 1
    min_change: float | None = None

    def __post_init__(self) -> None:
        if self.strategy not in get_args(Strategy):
            raise SPPConfigError(f"strategy={self.strategy!r} is unknown. Known: {', '.join(get_args(Strategy))}.")
        if not isinstance(self.every, int) or isinstance(self.every, bool) or self.every < 1:
            raise SPPConfigError(f"every={self.every!r} is no positive whole number. Give one.")
        if self.every != 1 and self.is_once:
            raise SPPConfigError(
                f"every={self.every} with strategy={self.strategy!r}, which reorders once. Leave it out, or choose "
                "'steps', 'epoch' or 'evaluate'."
            )
        if self.min_change is None:
            return
        number = isinstance(self.min_change, (int, float)) and not isinstance(self.min_change, bool)
        if not number or not 0 <= self.min_change <= 1:
            raise SPPConfigError(f"min_change={self.min_change!r} is no share from 0 to 1. Give one, or None.")
        if self.is_once:
            raise SPPConfigError(
                f"min_change={self.min_change} with strategy={self.strategy!r}, which reorders once and never skips. "
                "Leave it out, or choose 'steps', 'epoch' or 'evaluate'."
            )

    @property
    def is_once(self) -> bool:
        """Whether there is one reordering at most."""
        return self.strategy in ("train_begin", "train_end")

    def check(self, args: TrainingArguments, state: TrainerState, batches: int | None) -> None:
        """Refuse a run in which the model would never be put in order.

        Args:
            args: The settings of the run.
            state: Its state when it begins.
            batches: How many batches an epoch has, None if that is not known.

        Raises:
            CallbackError: The run is too short, has no evaluations, or its epochs have no known end.
        """
        by_epoch = self.strategy == "epoch" or (
            self.strategy == "evaluate" and args.eval_strategy == IntervalStrategy.EPOCH
        )
        if by_epoch and batches is None:
            raise CallbackError(
                "The training set has no length, so nothing says in advance when an epoch ends. "
                "Give SPPCallback(strategy='steps', every=...)."
            )
        steps = max(1, -(-(batches or 1) // args.gradient_accumulation_steps))
        longest = {"steps": state.max_steps, "epoch": state.max_steps // steps}.get(self.strategy, self.every)
        if self.every > longest:
            raise CallbackError(
                f"SPPCallback(strategy={self.strategy!r}, every={self.every}) would never reorder in a run of "
                f"{longest} {'steps' if self.strategy == 'steps' else 'epochs'}. Give a smaller every."
            )
        if self.strategy == "evaluate" and args.eval_strategy == IntervalStrategy.NO:
            raise CallbackError(
                "SPPCallback(strategy='evaluate') reorders with every evaluation, and the run has none. "
                "Set TrainingArguments(eval_strategy=...), or choose 'steps' or 'epoch'."
            )

    def is_evaluated(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> bool:
        """Whether an evaluation follows the step that has just ended."""
        ended = _ended_epochs(state) is not None or state.global_step >= state.max_steps
        at_end = args.eval_strategy == IntervalStrategy.EPOCH and ended
        return control.should_evaluate or (at_end and args.eval_delay <= (state.epoch or 0))

    def is_due(self, state: TrainerState, evaluations: int | None) -> bool:
        """Whether to reorder after the step that has just ended.

        Args:
            state: The state of the run.
            evaluations: How many evaluations there were with the one that follows; None if none follows.
        """
        # An epoch's end is known at its last step, which a checkpoint of that step must not fall behind.
        counts = {"steps": state.global_step, "epoch": _ended_epochs(state), "evaluate": evaluations}
        count = counts.get(self.strategy)
        return count is not None and count % self.every == 0


def _ended_epochs(state: TrainerState) -> int | None:
    """How many epochs have ended with the last step, None within an epoch."""
    epoch = float(state.epoch or 0)
    return int(epoch) if epoch.is_integer() and epoch > 0 else None
