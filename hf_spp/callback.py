"""`SPPCallback`: reorders inside a stock `Trainer`. It decides when; how is `apply_spp`'s."""

import inspect
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler, ExportableState
from transformers.trainer_utils import has_length
from transformers.utils import logging

from ._compat import accept_checkpoint_names
from .cards.training_card import evaluation_results, training_card, write_training_card
from .config import SPPConfig
from .errors import CallbackError, SPPConfigError
from .optimizers import check_movable
from .reordering import Reordering, total_of
from .saving import AdapterOrder, OrderedSaving, fingerprint, names_beside_adapters, saves_portable
from .stored_state import StoredState, pack_text, read_state, stored_state
from .structure import inner_model, is_sharded, tuner_layers
from .timing import Schedule, Strategy
from .trainer_pushes import calling_trainer, prepare_push
from .training import Copy, LiveModel, TrainingBatches, digest_of

logger = logging.get_logger(__name__)


class SPPCallback(TrainerCallback, ExportableState):
    """Keep a model's channels in order while a stock `Trainer` trains it, without changing how it trains.

    A reordering happens between two steps and is proved equal as by `apply_spp`. The optimizer's state, adapters and
    registered copies move along, so without dropout the losses are those of a run without the callback; with it, masks
    meet other channels, as likely as before. Later reorderings compose with earlier ones: `reordering.undo(model)`
    gives the order that the model had in the beginning.

    A whole model is saved with `spp_config.json` and `spp_orders.safetensors` beside it, an adapter for the original
    base model. A resumed run takes up the orders of its checkpoint. Evaluation results go into the card `README.md` of
    the output folder.

    Args:
        config: What to reorder and how; None means `SPPConfig()`.
        strategy: When: `train_begin`, `train_end`, or again and again by `steps`, `epoch` or `evaluate` (right before
            evaluations).
        every: Every so many steps, epochs or evaluations.
        min_change: Skip a later reordering for which fewer than this share of channel pairs, `(1 - tau) / 2` with
            Kendall's tau, would change places; the tau is logged.
        calibration: Dict batches for the metrics `activation` and `taylor`; None takes batches of the training set, in
            an order of their own, so that training sees the same batches as without the callback.
        example_inputs: Forward arguments for the proof; None builds them from the model's config.
        adapters: How LoRA adapters are saved: `original` for the base model in its original order, on which anybody
            can load them, or `reordered` as they are, with the orders beside them.
    """

    def __init__(
        self,
        config: SPPConfig | Mapping[str, Any] | None = None,
        *,
        strategy: Strategy = "train_begin",
        every: int = 1,
        min_change: float | None = None,
        calibration: Iterable[Mapping[str, Any]] | None = None,
        example_inputs: Mapping[str, Any] | None = None,
        adapters: AdapterOrder = "original",
    ) -> None:
        # A Trainer that builds the callback anew from a checkpoint gives the settings as they were stored there.
        self.config = SPPConfig.from_dict(config) if isinstance(config, Mapping) else config or SPPConfig()
        if not isinstance(self.config, SPPConfig):
            raise SPPConfigError(f"config is {config!r}; an SPPConfig is needed. Give SPPConfig(metric='l1', …).")
        self.schedule = Schedule(strategy, every, min_change)
        if adapters not in get_args(AdapterOrder):
            raise SPPConfigError(f"adapters={adapters!r} is unknown. Give 'original' or 'reordered'.")
        if isinstance(calibration, Iterator) and not self.schedule.is_once:
            raise SPPConfigError(
                f"calibration is a {type(calibration).__name__}, which can be read once, and strategy={strategy!r} "
                "reads it again and again. Give a list of batches or a DataLoader."
            )
        self.calibration = calibration
        self.example_inputs = example_inputs
        self.adapters: AdapterOrder = adapters
        self.given_before: dict[str, int] = {}
        """What an earlier object of this callback had been given, if Trainer built this one from a checkpoint."""
        self._copies: list[Copy] = []
        self._live: LiveModel | None = None
        self._made: str | None = None
        self._running: tuple[TrainingArguments, TrainerState] | None = None
        self._results: dict[str, dict[str, float]] = {}
        self._evaluations = 0

    @property
    def reordering(self) -> Reordering | None:
        """From the original order to that of the model now, None before the first reordering."""
        return None if self._live is None else self._live.reordering

    def register_copy(self, copy: Copy) -> None:
        """Let a copy of the weights, such as their exponential moving average, move with the model.

        Args:
            copy: A copy of the model or torch's `AveragedModel` of one, a dict of tensors by parameter name, or a list
                of tensors in the order of `model.parameters()`, all or the trained ones.
        """
        if not isinstance(copy, (nn.Module, Mapping, Sequence)):
            raise CallbackError(
                f"A {type(copy).__name__} was registered as a copy. Give a copy of the model, a dict of tensors by "
                "name, or a list of tensors in the order of model.parameters()."
            )
        self._copies.append(copy)

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Make a later resume load every weight of a checkpoint."""
        _check_alone(_calling_handler())
        if isinstance(kwargs.get("model"), PreTrainedModel):
            accept_checkpoint_names(kwargs["model"])

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Take up the orders of the checkpoint that is resumed, or reorder the model if that is the strategy."""
        model, optimizer, loader = kwargs["model"], kwargs["optimizer"], kwargs["train_dataloader"]
        _check_alone(_calling_handler())
        _check_set_up(model)
        self._check_given()
        self.schedule.check(args, state, len(loader) if has_length(loader) else None)
        if self.schedule.strategy != "train_begin":
            check_movable(optimizer)
        if isinstance(model, PreTrainedModel):
            accept_checkpoint_names(model)
        calibration = self.calibration
        if calibration is None and self.config.needs_calibration:
            calibration = TrainingBatches(loader, self.config.seed)
        self._live = LiveModel(model, optimizer, self._copies, self.config, calibration, self.example_inputs)
        self._running = (args, state)
        for one in (inner_model(model), model):
            if hasattr(type(one), "save_pretrained"):
                one.save_pretrained = OrderedSaving(one, self.adapters)
        stored = stored_state(state.stateful_callbacks) if state.global_step > 0 else None
        entries: Any = state.stateful_callbacks
        # Trainer counts on an entry, which a checkpoint made without the callback has not.
        entries.setdefault(type(self).__name__, {})
        if self._made != digest_of(self.reordering):
            # Another model than the one that this callback had put in order.
            self._made, self._results = None, {}
        self._evaluations = 0
        if stored is not None:
            self._resume(args, state, stored)
        else:
            self._live.align_optimizer()
        if self.schedule.strategy == "train_begin" and self._made is None:
            self._reorder(args, state, control)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Reorder if it is time: the step is done, its gradients are gone, and nothing is evaluated or saved yet."""
        evaluated = self.schedule.is_evaluated(args, state, control)
        self._evaluations += evaluated
        if self.schedule.is_due(state, self._evaluations if evaluated else None):
            self._reorder(args, state, control)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep the evaluation's results for the card; after training, write them into it at once."""
        dataset, results = evaluation_results(kwargs["metrics"], kwargs.get("eval_dataloader"))
        self._results[dataset] = results
        if self._live is not None and self._running is None:
            self._write_card(args, state, kwargs["model"])

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the push be whole: weights beside their own orders, this package's part of the card, sums."""
        trainer, model = calling_trainer(), kwargs["model"]
        if trainer is not None and state.is_world_process_zero:
            prepare_push(trainer, _checkpoint_folder(args, state), lambda: self._card(args, model))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up the orders of the best model if it was loaded, and write orders and card into the output folder."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._take_up_best(args, Path(state.best_model_checkpoint))
        if self.schedule.strategy == "train_end":
            self._reorder(args, state, control)
        self._running = None
        if self.reordering is None:
            logger.warning(f"SPPCallback(strategy={self.schedule.strategy!r}) has never reordered the model.")
        self._write_orders(args, state, kwargs["model"])
        self._write_card(args, state, kwargs["model"])

    def state(self) -> dict[str, Any]:
        """What `trainer_state.json` keeps of this callback, so that a resumed run finds its orders.

        Trainer asks for it while it writes a checkpoint, after the weights and before anything is pushed, so the orders
        are written beside them here.
        """
        stored: dict[str, Any] = {}
        if self._live is not None and self._running is not None:
            args, state = self._running
            model, folder, reordering = self._live.model, _checkpoint_folder(args, state), self.reordering
            stored = {
                "step": state.global_step,
                "evaluations": self._evaluations,
                "adapters": self.adapters,
                "beside": names_beside_adapters(folder),
                "fingerprint": None if is_sharded(model) else fingerprint(model),
                "orders": None if reordering is None else pack_text(reordering.to_bytes()),
            }
            if reordering is not None and folder.is_dir() and not saves_portable(model, self.adapters):
                reordering.save_pretrained(folder)
        settings = {
            "config": self.config.to_dict(),
            "strategy": self.schedule.strategy,
            "every": self.schedule.every,
            "min_change": self.schedule.min_change,
            "adapters": self.adapters,
        }
        return {"args": settings, "attributes": {"stored": stored, "given_before": self._given()}}

    def _given(self) -> dict[str, int]:
        """What the callback was given that no checkpoint keeps."""
        given = {
            "calibration": int(self.calibration is not None),
            "example_inputs": int(self.example_inputs is not None),
            "metric": int(callable(self.config.metric)),
            "register_copy": len(self._copies),
        }
        return {name: count for name, count in given.items() if count}

    def _check_given(self) -> None:
        if self.given_before:
            raise CallbackError(
                "Trainer has built SPPCallback anew from the checkpoint, without what it had been given: "
                f"{', '.join(sorted(self.given_before))}. Set TrainingArguments(restore_callback_states_from_checkpoint"
                "=False); SPPCallback takes up its orders by itself."
            )

    def _reorder(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        if self._live is not None:
            with _untouched_rng():
                logs = self._live.reorder(self.schedule.min_change)
            self._made = digest_of(self.reordering)
            _log(args, state, control, logs)

    def _resume(self, args: TrainingArguments, state: TrainerState, stored: StoredState) -> None:
        """Take up the order that the resumed checkpoint's model was in."""
        if self._live is None:
            return
        loaded, model = stored.fingerprint, self._live.model
        if stored.step != state.global_step:
            if tuner_layers(model):
                raise CallbackError(
                    f"The checkpoint of step {state.global_step} was made without SPPCallback, in a run that went on "
                    f"from one of step {stored.step} made with it, so its adapters and their optimizer's state are in "
                    "different orders. Resume from a checkpoint that was made with the callback."
                )
            # The run without the callback has left the order as it was.
            loaded = None
        self._evaluations = stored.evaluations
        portable = stored.adapters == "original" and not _loads_as_saved(args, model)
        self._live.take_up(stored.reordering, loaded, portable=portable, beside=stored.beside)
        self._made = digest_of(self.reordering)
        logger.info(f"The resumed model is in the order of step {stored.step}'s checkpoint.")

    def _take_up_best(self, args: TrainingArguments, folder: Path) -> None:
        """Follow Trainer, which has loaded the weights of the best checkpoint and left all else as it is."""
        live, stored = self._live, read_state(folder)
        if live is None:
            return
        best = None if stored is None else stored.reordering
        # DeepSpeed has loaded the optimizer's state with the weights.
        live.bring_along(best, optimizer=not args.deepspeed)
        if stored is None:
            live.take_up(None, None, portable=False)
        else:
            portable = stored.adapters == "original" and not _loads_as_saved(args, live.model)
            live.take_up(best, stored.fingerprint, portable=portable, beside=stored.beside)
        self._made = digest_of(self.reordering)

    def _write_orders(self, args: TrainingArguments, state: TrainerState, model: Any) -> None:
        """Write the orders into the output folder; portable adapters have none, and weights there have their own."""
        reordering, folder = total_of(model), _folder(args)
        if reordering is None or not state.is_world_process_zero or saves_portable(model, self.adapters):
            return
        if not any(folder.glob("model*.safetensors")):
            reordering.save_pretrained(folder)

    def _write_card(self, args: TrainingArguments, state: TrainerState, model: PreTrainedModel) -> None:
        card = self._card(args, model)
        if card is not None and state.is_world_process_zero:
            write_training_card(_folder(args), card)

    def _card(self, args: TrainingArguments, model: PreTrainedModel) -> str | None:
        """The card of the model in training, None before the first reordering."""
        if self.reordering is None:
            return None
        name = args.hub_model_id or _folder(args).resolve().name
        return training_card(name, model, self.reordering, self._results, args.seed)


def _folder(args: TrainingArguments) -> Path:
    return Path(str(args.output_dir))


def _calling_handler() -> CallbackHandler | None:
    """The handler that is calling the callback.

    Trainer hands a callback neither itself nor its handler, and only the handler reaches the other callbacks, such as
    TensorBoard's, that show what is logged.
    """
    frame = inspect.currentframe()
    for _ in range(5):
        frame = frame.f_back if frame is not None else None
        if frame is not None and isinstance(frame.f_locals.get("self"), CallbackHandler):
            handler: CallbackHandler = frame.f_locals["self"]
            return handler
    return None


def _log(args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float]) -> None:
    """Put figures into the run's history, and show them to the other callbacks."""
    handler = _calling_handler()
    if handler is not None and state.is_world_process_zero:
        state.log_history.append({**logs, "step": state.global_step})
        # Otherwise the handler takes the step's loss for logged.
        due = control.should_log
        handler.on_log(args, state, control, logs)
        control.should_log = due


def _check_alone(handler: CallbackHandler | None) -> None:
    count = 1 if handler is None else sum(isinstance(other, SPPCallback) for other in handler.callbacks)
    if count > 1:
        raise CallbackError(
            f"The Trainer has {count} SPPCallbacks; one is accepted, because each would undo the order of the others. "
            "Remove the others with trainer.remove_callback."
        )


def _checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    """The folder of the checkpoint that is being written."""
    name = f"checkpoint-{state.global_step}"
    folder = _folder(args) / name
    if state.is_hyper_param_search and not folder.is_dir():
        # A trial writes into a folder of its own, whose name only Trainer knows.
        found = sorted(_folder(args).glob(f"*/{name}"), key=lambda path: path.stat().st_mtime)
        return found[-1] if found else folder
    return folder


def _loads_as_saved(args: TrainingArguments, model: Any) -> bool:
    """Whether a resumed run loads adapters from files of FSDP or DeepSpeed, which hold them as they were."""
    return bool(args.deepspeed) or is_sharded(model)


def _check_set_up(model: Any) -> None:
    if type(model).__name__ == "FullyShardedDataParallel":
        raise CallbackError(
            "FSDP version 1 flattens weights into one vector, which SPPCallback does not move. "
            "Set fsdp_config={'version': 2} in TrainingArguments, or call apply_spp(model) before building the Trainer."
        )


@contextmanager
def _untouched_rng() -> Iterator[None]:
    """Leave every global random state as it was, so that training draws the same numbers as without the callback."""
    python, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)
