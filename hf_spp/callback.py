"""`SPPCallback`: reorders inside a stock `Trainer`. It decides when; how is `apply_spp`'s."""

import base64
import hashlib
import inspect
import random
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler, ExportableState
from transformers.utils import logging

from . import checkpoint
from ._compat import accept_checkpoint_names
from .apply import named_tensors
from .cards.model_card import CardContent, render_card, task_of_class, update_card_with_evaluation
from .config import SPPConfig
from .errors import CallbackError
from .reordering import Reordering, history_of, remember
from .transform import apply_spp

logger = logging.get_logger(__name__)

CARD_NAME = "README.md"
_SAMPLE = 256


class SPPCallback(TrainerCallback, ExportableState):
    """Put a model's channels in order when training begins, and keep the orders with every checkpoint.

    The reordering happens once, before the first step, and is proved equal as by `apply_spp`. Every checkpoint folder
    gets `spp_config.json` and `spp_orders.safetensors`; a resumed run takes the orders from the checkpoint and does not
    reorder again. Evaluation results go into the card `README.md` of the output folder.

    Args:
        config: What to reorder and how; None means `SPPConfig()`.
        calibration: Dict batches for the metrics `activation` and `taylor`; None takes batches of the training set, in
            an order of their own, so that training sees the same batches as without the callback.
        example_inputs: Forward arguments for the proof; None builds them from the model's config.

    Attributes:
        reordering: What was done, None before training began.
    """

    def __init__(
        self,
        config: SPPConfig | None = None,
        *,
        calibration: Iterable[Mapping[str, Any]] | None = None,
        example_inputs: Mapping[str, Any] | None = None,
    ) -> None:
        self.config = SPPConfig() if config is None else config
        self.calibration = calibration
        self.example_inputs = example_inputs
        self.reordering: Reordering | None = None
        self._evaluations: dict[str, dict[str, float]] = {}
        self._ended = False
        self._model: PreTrainedModel | None = None

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Make a later resume load every weight of a checkpoint."""
        if isinstance(kwargs.get("model"), PreTrainedModel):
            accept_checkpoint_names(kwargs["model"])

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Reorder the model, or take up the reordering of the checkpoint that is resumed."""
        model = kwargs["model"]
        handler = _calling_handler()
        _check_alone(self, handler)
        _check_whole_weights(args)
        if state.global_step > 0:
            self.reordering, fingerprint = _stored_reordering(state)
            _check_resumed(model, fingerprint)
            remember(model, (self.reordering.digest,))
            logger.info("The resumed model is already in order; nothing is moved.")
            return
        if self.reordering is not None and (history_of(model) or ())[-1:] == (self.reordering.digest,):
            logger.info("This callback has reordered the model before; nothing is moved.")
            return
        self._evaluations, self._ended = {}, False
        calibration = self.calibration
        if calibration is None and self.config.needs_calibration:
            calibration = _training_batches(kwargs["train_dataloader"], self.config.seed)
        with _untouched_rng():
            self.reordering = apply_spp(model, self.config, calibration=calibration, example_inputs=self.example_inputs)
        logger.info(str(self.reordering))
        if handler is not None and state.is_world_process_zero:
            logs = _logged(self.reordering)
            state.log_history.append({**logs, "step": state.global_step})
            handler.on_log(args, state, control, logs)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the config and the orders into the checkpoint's folder."""
        if self.reordering is not None and state.is_world_process_zero:
            self.reordering.save_pretrained(_folder(args) / f"checkpoint-{state.global_step}")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Remember the model, whose weights `state` takes a fingerprint of when a checkpoint is written."""
        self._model = kwargs["model"]

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep the evaluation's results for the card; after training, write them into it at once."""
        dataset, results = _evaluated(kwargs["metrics"], kwargs.get("eval_dataloader"))
        self._evaluations[dataset] = results
        if self._ended:
            self._write_card(args, state, kwargs["model"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the orders and the card into the output folder."""
        self._ended = True
        if self.reordering is not None and state.is_world_process_zero:
            self.reordering.save_pretrained(_folder(args))
        self._write_card(args, state, kwargs["model"])

    def _write_card(self, args: TrainingArguments, state: TrainerState, model: PreTrainedModel) -> None:
        if self.reordering is None or not state.is_world_process_zero:
            return
        path, task = _folder(args) / CARD_NAME, task_of_class(type(model).__name__)
        rows = [
            {"dataset": dataset, "method": "spp", "seed": args.seed, "metrics": metrics}
            for dataset, metrics in self._evaluations.items()
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

    def state(self) -> dict[str, Any]:
        """What `trainer_state.json` keeps of this callback, so that a resumed run finds its orders."""
        packed = fingerprint = None
        if self.reordering is not None and self._model is not None:
            packed = base64.b64encode(zlib.compress(self.reordering.to_bytes())).decode()
            fingerprint = _fingerprint(self._model)
        return {"args": {}, "attributes": {"packed_reordering": packed, "fingerprint": fingerprint}}


def _folder(args: TrainingArguments) -> Path:
    return Path(str(args.output_dir))


def _calling_handler() -> CallbackHandler | None:
    """The handler that is calling the callback.

    Trainer hands a callback neither itself nor its handler, and only the handler reaches the other callbacks, such as
    TensorBoard's, that show what is logged.
    """
    frame = inspect.currentframe()
    for _ in range(3):
        frame = frame.f_back if frame is not None else None
        if frame is not None and isinstance(frame.f_locals.get("self"), CallbackHandler):
            handler: CallbackHandler = frame.f_locals["self"]
            return handler
    return None


def _check_alone(callback: SPPCallback, handler: CallbackHandler | None) -> None:
    count = 1 if handler is None else sum(isinstance(other, SPPCallback) for other in handler.callbacks)
    if count > 1:
        raise CallbackError(
            f"The Trainer has {count} SPPCallbacks; one is accepted, because each would undo the order of the others. "
            "Remove the others with trainer.remove_callback."
        )


def _check_whole_weights(args: TrainingArguments) -> None:
    if args.deepspeed or args.fsdp:
        raise CallbackError(
            "The Trainer shards weights (DeepSpeed or FSDP), which SPPCallback does not move. "
            "Call apply_spp(model) before building the Trainer, and leave the callback out."
        )


def _stored_reordering(state: TrainerState) -> tuple[Reordering, str]:
    callbacks: Any = state.stateful_callbacks
    stored = callbacks.get(SPPCallback.__name__)
    attributes = stored.get("attributes", {}) if isinstance(stored, dict) else {}
    packed = attributes.get("packed_reordering")
    if packed is None:
        raise CallbackError(
            f"Training resumes at step {state.global_step} from a checkpoint that SPPCallback took no part in, so its "
            "optimizer state is in the original order. Resume without the callback, or start from the weights alone."
        )
    try:
        data = zlib.decompress(base64.b64decode(packed, validate=True))
    except (ValueError, zlib.error) as error:
        raise CallbackError(
            f"The reordering in trainer_state.json is damaged ({error}). Resume from an earlier checkpoint."
        ) from error
    return Reordering.from_bytes(data), str(attributes.get("fingerprint"))


def _fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 over a sample of every weight."""
    total = hashlib.sha256()
    for tensor in named_tensors(model).values():
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, flat.numel() // _SAMPLE)].to("cpu", torch.float64)
        total.update(sample.numpy().tobytes())
    return total.hexdigest()


def _check_resumed(model: PreTrainedModel, fingerprint: str) -> None:
    if _fingerprint(model) != fingerprint:
        raise CallbackError(
            f"The resumed {type(model).__name__} does not hold the weights of its checkpoint, so its channels are not "
            "in the stored order: the Trainer did not load all of them. Pass the callback when the Trainer is built "
            "(callbacks=[SPPCallback(...)]), and the same dtype as in the first run."
        )


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
