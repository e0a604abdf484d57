"""`SPPCallback`: reorders inside a stock `Trainer`. It decides when; how is `apply_spp`'s."""

import base64
import hashlib
import inspect
import random
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler, ExportableState
from transformers.trainer_utils import has_length
from transformers.utils import logging

from . import checkpoint
from ._compat import accept_checkpoint_names
from .apply import carry, invert_indices
from .cards.model_card import CardContent, render_card, task_of_class, update_card_with_evaluation
from .channels import ChannelMap
from .config import SPPConfig
from .errors import CallbackError, SPPConfigError
from .optimizers import check_movable, inner_optimizer
from .orders_file import ORDERS_NAME
from .permutation import kendall_tau
from .proof import Witness
from .reordering import Reordering, history_of, remember
from .schedule import Schedule, Strategy
from .structure import inner_model, is_sharded, tuner_layers
from .training import AdapterOrder, Copy, OrderedSaving, is_saved_with_adapter, moves_along, restore_orders
from .transform import carry_out, plan, prepare

logger = logging.get_logger(__name__)

CARD_NAME = "README.md"
_SAMPLE = 256


class SPPCallback(TrainerCallback, ExportableState):
    """Keep a model's channels in order while a stock `Trainer` trains it, without changing how it trains.

    A reordering happens between two steps and is proved equal as by `apply_spp`. The optimizer's state, adapters and
    registered copies move along, so the losses are those of a run without the callback. Later reorderings compose with
    earlier ones: `reordering.undo(model)` always gives the original order.

    Every saved model has `spp_config.json` and `spp_orders.safetensors` beside it, from the moment it is written. A
    resumed run takes up the orders of its checkpoint. Evaluation results go into the card `README.md` of the output
    folder.

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

    Attributes:
        reordering: From the original order to that of the model now, None before the first reordering.
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
        self.schedule = Schedule(strategy, every, min_change)
        if adapters not in ("original", "reordered"):
            raise SPPConfigError(f"adapters={adapters!r} is unknown. Give 'original' or 'reordered'.")
        self.calibration = calibration
        self.example_inputs = example_inputs
        self.adapters: AdapterOrder = adapters
        self.reordering: Reordering | None = None
        self.given_before: dict[str, int] = {}
        """What an earlier object of this callback had been given, if Trainer built this one from a checkpoint."""
        self._copies: list[Copy] = []
        self._results: dict[str, dict[str, float]] = {}
        self._evaluations = 0
        self._ended = False
        self._running: tuple[TrainingArguments, TrainerState, Any] | None = None
        self._prepared: tuple[ChannelMap, SPPConfig] | None = None
        self._inputs = example_inputs

    def register_copy(self, copy: Copy) -> None:
        """Let a copy of the weights, such as their exponential moving average, move with the model.

        Args:
            copy: A copy of the model or torch's `AveragedModel` of one, a dict of tensors by parameter name, or a list
                of tensors in the order of `model.parameters()`, all or the trained ones.
        """
        self._copies.append(copy)

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Make a later resume load every weight of a checkpoint."""
        _check_alone(self, _calling_handler())
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
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        _check_alone(self, _calling_handler())
        _check_set_up(model)
        self.schedule.check(args, state, has_length(kwargs["train_dataloader"]))
        if self.schedule.strategy != "train_begin":
            check_movable(optimizer)
        self._check_given()
        moves_along(model, optimizer, self._copies, {})
        model.save_pretrained = OrderedSaving(model, lambda: self.reordering, self.adapters)
        self._running, self._prepared, self._ended = (args, state, model), None, False
        self._inputs = self.example_inputs
        entries: Any = state.stateful_callbacks
        stored = entries.get(type(self).__name__) if state.global_step > 0 else None
        # Trainer counts on an entry, which a checkpoint made without the callback has not.
        entries.setdefault(type(self).__name__, {})
        if stored is not None:
            self._resume(args, state, model, stored)
        elif self.reordering is None or (history_of(model) or ())[-1:] != (self.reordering.digest,):
            self.reordering, self._results, self._evaluations = None, {}, 0
        if self.schedule.strategy == "train_begin" and self.reordering is None:
            self._reorder(args, state, control, **kwargs)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Reorder if it is time: the step is done, its gradients are gone, and nothing is evaluated or saved yet."""
        evaluated = self.schedule.is_evaluated(args, state, control)
        self._evaluations += evaluated
        if self.schedule.is_due(state, self._evaluations if evaluated else None):
            self._reorder(args, state, control, **kwargs)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep the evaluation's results for the card; after training, write them into it at once."""
        dataset, results = _evaluated(kwargs["metrics"], kwargs.get("eval_dataloader"))
        self._results[dataset] = results
        if self._ended:
            self._write_card(args, state, kwargs["model"])

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Lay the orders beside the weights that a push takes from the output folder."""
        if self.reordering is not None and state.is_world_process_zero and not self._is_portable(kwargs["model"]):
            self.reordering.save_pretrained(_folder(args))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up the orders of the best model if it was loaded, and write orders and card into the output folder."""
        model = kwargs["model"]
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._take_up_best(args, model, kwargs["optimizer"], Path(state.best_model_checkpoint))
        if self.schedule.strategy == "train_end":
            self._reorder(args, state, control, **kwargs)
        self._ended, self._running = True, None
        if self.reordering is None:
            logger.warning(f"SPPCallback(strategy={self.schedule.strategy!r}) has never reordered the model.")
        elif state.is_world_process_zero and not self._is_portable(model):
            self.reordering.save_pretrained(_folder(args))
        self._write_card(args, state, model)

    def state(self) -> dict[str, Any]:
        """What `trainer_state.json` keeps of this callback, so that a resumed run finds its orders.

        Trainer asks for it while it writes a checkpoint, after the weights and before anything is pushed, so the orders
        are written beside them here.
        """
        stored: dict[str, Any] = {"evaluations": self._evaluations, "adapters": self.adapters, "orders": None}
        if self.reordering is not None and self._running is not None:
            args, state, model = self._running
            stored["orders"] = base64.b64encode(zlib.compress(self.reordering.to_bytes())).decode()
            stored["fingerprint"] = None if is_sharded(model) else fingerprint(model)
            if (folder := _checkpoint_folder(args, state)).is_dir():
                self.reordering.save_pretrained(folder)
        schedule = {"strategy": self.schedule.strategy, "every": self.schedule.every}
        return {
            "args": {
                "config": self.config.to_dict(),
                **schedule,
                "min_change": self.schedule.min_change,
                "adapters": self.adapters,
            },
            "attributes": {"stored": stored, "given_before": self._given()},
        }

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

    def _is_portable(self, model: Any) -> bool:
        """Whether what is saved is an adapter of the original base model, to which no orders belong."""
        return self.adapters == "original" and bool(tuner_layers(model))

    def _write_card(self, args: TrainingArguments, state: TrainerState, model: PreTrainedModel) -> None:
        if self.reordering is None or not state.is_world_process_zero:
            return
        path, task = _folder(args) / CARD_NAME, task_of_class(type(model).__name__)
        rows = [
            {"dataset": dataset, "method": "spp", "seed": args.seed, "metrics": metrics}
            for dataset, metrics in self._results.items()
        ]
        name = (args.hub_model_id or _folder(args).resolve().name).split("/")[-1]
        if path.exists():
            if rows:
                text = checkpoint.read_text(path)
                text = update_card_with_evaluation(text, rows, task=task, model_name=name)
                checkpoint.write_text(path, text)
            return
        base = model.config._name_or_path
        content = CardContent(
            model_name=name,
            summary=self.reordering.summary(),
            base_model=base if base and not Path(base).exists() else None,
            pipeline_tag=task,
            rows=rows,
            fine_tuned=True,
        )
        checkpoint.write_text(path, str(render_card(content)))

    def _reorder(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the model in order with all that goes with it, unless the order has hardly moved."""
        model, optimizer, calibration = kwargs["model"], kwargs["optimizer"], self.calibration
        if calibration is None and self.config.needs_calibration:
            calibration = _training_batches(kwargs["train_dataloader"], self.config.seed)
        with _untouched_rng():
            if self._prepared is None:
                self._prepared = prepare(model, self.config, calibration)
            planned = plan(model, *self._prepared, calibration, together=True)
            tau = None
            if self.schedule.min_change is not None and self.reordering is not None:
                tau = kendall_tau(planned.orders)
                if (1 - tau) / 2 < self.schedule.min_change:
                    _log(args, state, control, {"spp_kendall_tau": tau})
                    return
            witness = None
            if planned.config.verify:
                witness = Witness(model, self._inputs, planned.config.seed, planned.groups)
                # Inputs that were built once serve again.
                self._inputs = witness.inputs
            done = carry_out(model, planned, witness, partial(moves_along, model, optimizer, self._copies))
        logs = _logged(done) | ({} if tau is None else {"spp_kendall_tau": tau})
        if self.reordering is not None:
            done = self.reordering.then(done)
            remember(model, (*(history_of(model) or ())[:-2], done.digest))
        self.reordering = done
        remember(inner_optimizer(optimizer), (done.digest,))
        logger.info(str(done))
        _log(args, state, control, logs)

    def _log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float]
    ) -> None:
        handler = _calling_handler()
        if handler is not None and state.is_world_process_zero:
            state.log_history.append({**logs, "step": state.global_step})
            handler.on_log(args, state, control, logs)

    def _resume(self, args: TrainingArguments, state: TrainerState, model: Any, stored: Any) -> None:
        """Take up the orders that the resumed checkpoint's model was in."""
        try:
            found = stored["attributes"]["stored"]
            self._evaluations, packed, adapters = int(found["evaluations"]), found["orders"], found["adapters"]
        except (KeyError, TypeError, ValueError) as error:
            raise CallbackError(
                f"The state of SPPCallback in trainer_state.json is damaged ({error!r}). "
                "Resume from an earlier checkpoint."
            ) from error
        if packed is None:
            return
        reordering = _unpacked(packed)
        if tuner_layers(model):
            # Trainer loads adapters alone; the base model is what the user gave.
            self._bring_base(model, reordering)
            if adapters == "original" and not _loads_as_saved(args, model):
                restore_orders(model, reordering, only=is_saved_with_adapter)
        self.reordering = reordering
        if found.get("fingerprint") is not None and fingerprint(model) != found["fingerprint"]:
            raise CallbackError(
                f"The resumed {type(model).__name__} does not hold the weights of its checkpoint, so its channels are "
                "not in the stored order: the Trainer did not load all of them. Pass the callback when the Trainer is "
                "built (callbacks=[SPPCallback(...)]), and the same dtype and base model as in the first run."
            )
        remember(model, (reordering.digest,))
        logger.info(f"The resumed model is in the order of step {state.global_step}'s checkpoint.")

    def _take_up_best(self, args: TrainingArguments, model: Any, optimizer: Any, folder: Path) -> None:
        """Follow Trainer, which has loaded the weights of the best checkpoint and left all else as it is."""
        latest = self.reordering
        best = Reordering.from_pretrained(folder) if (folder / ORDERS_NAME).is_file() else None
        if args.deepspeed:
            optimizer = None  # its state is loaded with the weights
        for one, backwards in ((latest, True), (best, False)):
            if one is not None and (latest is None or best is None or latest.digest != best.digest):
                indices = one.indices(model)
                carry(moves_along(model, optimizer, self._copies, invert_indices(indices) if backwards else indices))
        if tuner_layers(model):
            self._bring_base(model, best)
            if best is not None and self.adapters == "original" and not _loads_as_saved(args, model):
                restore_orders(model, best, only=is_saved_with_adapter)
        self.reordering = best
        remember(model, () if best is None else (best.digest,))
        if optimizer is not None:
            remember(inner_optimizer(optimizer), () if best is None else (best.digest,))

    def _bring_base(self, model: Any, target: Reordering | None) -> None:
        """Bring the base model of adapters from the order that it is in to another one."""
        digest = (history_of(model) or (None,))[-1]
        if digest == (None if target is None else target.digest):
            return
        if digest is not None:
            if self.reordering is None or self.reordering.digest != digest:
                raise CallbackError(
                    f"The base model of the adapters, a {type(inner_model(model)).__name__}, is in an order that this "
                    "callback did not make. Load the base model again."
                )
            restore_orders(model, self.reordering, backwards=True, only=lambda name: not is_saved_with_adapter(name))
        if target is not None:
            restore_orders(model, target, only=lambda name: not is_saved_with_adapter(name))


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


def _check_alone(callback: SPPCallback, handler: CallbackHandler | None) -> None:
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


def _unpacked(text: Any) -> Reordering:
    try:
        data = zlib.decompress(base64.b64decode(text, validate=True))
    except (TypeError, ValueError, zlib.error) as error:
        raise CallbackError(
            f"The reordering in trainer_state.json is damaged ({error}). Resume from an earlier checkpoint."
        ) from error
    return Reordering.from_bytes(data)


def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 over a sample of every weight."""
    total = hashlib.sha256()
    inner = inner_model(model)
    for tensor in (*inner.parameters(), *inner.buffers()):
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, flat.numel() // _SAMPLE)].to("cpu", torch.float64)
        total.update(sample.numpy().tobytes())
    return total.hexdigest()


def _training_batches(loader: DataLoader[Any], seed: int) -> Iterable[Mapping[str, Any]]:
    """Batches of the training set in a fixed order of their own; the Trainer's own loader is not advanced."""
    if isinstance(loader.dataset, IterableDataset):
        raise CallbackError(
            "The training set is an IterableDataset, whose examples cannot be read twice. "
            "Pass SPPCallback(config, calibration=<dict batches>)."
        )
    size = loader.batch_size or getattr(loader, "total_batch_size", None) or 8
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(loader.dataset, size, shuffle=True, generator=generator, collate_fn=loader.collate_fn)


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


def _evaluated(metrics: Mapping[str, Any], loader: DataLoader[Any] | None) -> tuple[str, dict[str, float]]:
    """Name of the data set that was evaluated, and its metrics without the prefix and the run's timings."""
    results = {}
    for key, value in metrics.items():
        name = key.partition("_")[2]
        if name and isinstance(value, (int, float)) and not re.search(r"runtime|_per_second|^time$|preparation", name):
            results[name] = float(value)
    info = getattr(getattr(loader, "dataset", None), "info", None)
    return getattr(info, "dataset_name", None) or "evaluation set", results


def _logged(reordering: Reordering) -> dict[str, float]:
    summary = reordering.summary()
    logs = {f"spp_moved_{axis}": float(count["moved"]) for axis, count in summary["axes"].items()}
    if reordering.proof is not None:
        logs["spp_max_abs_diff"] = reordering.proof.max_abs_diff
        logs["spp_relative_diff"] = reordering.proof.relative_diff
    return logs
