"""One run of a comparison: load a model, change it by a method, fine-tune it, evaluate it."""

import gc
import platform
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from torch import Tensor
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.utils import logging

from .. import folders
from ..architectures import channel_groups
from ..baselines import pruning_rank
from ..cards.reports import write_card
from ..channels import ChannelGroup
from ..config import SPPConfig
from ..errors import NonFiniteWeightsError
from ..forward import evaluation_mode, run_model
from ..loading import quiet_transformers
from ..reordering import Reordering
from ..transform import apply_spp
from ..version import __version__
from .classification import ClassificationTask
from .metrics import classification_metrics

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Spectrum:
    """Saliency of a reordering, with the groups it belongs to."""

    scores: Mapping[str, Tensor]
    groups: tuple[ChannelGroup, ...]

    @classmethod
    def of(cls, model: PreTrainedModel, reordering: Reordering) -> "Spectrum":
        """Join a reordering's scores with the model's map."""
        scores = reordering.scores
        return cls(scores, tuple(group for group in channel_groups(model) if group.name in scores))


@dataclass(frozen=True)
class MethodRun:
    """One method on one data set.

    Attributes:
        task: Data and pretrained model.
        method: Name of the method.
        config: What a reordering method does; None for the others.
        args: Arguments of the fine-tuning, with the run's seed.
        kept: Folder for the fine-tuned checkpoint; None keeps none.
    """

    task: ClassificationTask
    method: str
    config: SPPConfig | None
    args: TrainingArguments
    kept: Path | None

    def execute(self, progress: "RunProgress") -> tuple[dict[str, Any], Spectrum | None]:
        """Load, change, fine-tune and evaluate; every global generator is afterwards as before.

        Returns:
            The result row but for `model` and `fingerprint`, and the saliency if the method computes one.

        Raises:
            NonFiniteWeightsError: The model computes NaN or infinity.
        """
        data, started = self.task.data, time.perf_counter()
        line = progress.begin(f"{data.name} · {self.method}")
        with isolated_generators(self.args.seed):
            with quiet_transformers(bars=False):
                model = self.task.load_model()
            reordering, change = self._change(model)
            spectrum = None if reordering is None else Spectrum.of(model, reordering)
            parameters = {
                "total": sum(parameter.numel() for parameter in model.parameters()),
                "trainable": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
            }
            scores = self._fine_tune(model, line)
            if self.kept is not None:
                self._save(model, reordering, self.kept)
        del model
        _free_memory()
        line.finish(f"{100 * scores['accuracy']:.1f} %")
        logger.info("%s, %s: accuracy %.4f, F1 %.4f", data.name, self.method, scores["accuracy"], scores["f1"])
        row = {
            "dataset": data.name,
            "method": self.method,
            **scores,
            **change,
            "seconds": round(time.perf_counter() - started, 2),
            "seed": self.args.seed,
            "versions": _versions(),
            "parameters": parameters,
            "train_samples": len(data.train),
            "eval_samples": len(data.validation),
        }
        return row, spectrum

    def _change(self, model: PreTrainedModel) -> tuple[Reordering | None, dict[str, float]]:
        inputs = self.task.example_inputs()
        before = _logits(model, inputs)
        reordering = None
        if self.method == "pruning-rank":
            pruning_rank(model)
        elif self.config is not None:
            reordering = _reorder(model, self.config, self.task, inputs)
        difference = float((_logits(model, inputs) - before).abs().max())
        scale = max(float(before.abs().max()), torch.finfo(before.dtype).tiny)
        return reordering, {"max_abs_diff": difference, "relative_diff": difference / scale}

    def _fine_tune(self, model: PreTrainedModel, line: "RunLine") -> dict[str, float]:
        trainer = Trainer(
            model=model,
            args=self.args,
            data_collator=self.task.collate,
            train_dataset=self.task.train,
            eval_dataset=self.task.validation,
            compute_metrics=classification_metrics,
            callbacks=[line],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        metrics = trainer.evaluate()
        return {"accuracy": metrics["eval_accuracy"], "f1": metrics["eval_f1"]}

    def _save(self, model: PreTrainedModel, reordering: Reordering | None, folder: Path) -> None:
        with quiet_transformers(bars=False), folders.replacing_folder(folder, overwrite=True) as unfinished:
            model.save_pretrained(unfinished)
            self.task.processor.save_pretrained(unfinished)
            if reordering is not None:
                reordering.save_pretrained(unfinished)
                write_card(unfinished, source=self.task.model, name=folder.name, fine_tuned=True)


def _reorder(model: PreTrainedModel, config: SPPConfig, task: ClassificationTask, inputs: dict[str, Any]) -> Reordering:
    calibration = task.calibration_batches() if config.needs_calibration else None
    return apply_spp(model, config, calibration=calibration, example_inputs=inputs)


def spectrum_of_task(task: ClassificationTask, config: SPPConfig, seed: int) -> Spectrum:
    """The saliency that a run of this seed and config computes, without fine-tuning."""
    with isolated_generators(seed), quiet_transformers(bars=False):
        model = task.load_model()
        return Spectrum.of(model, _reorder(model, config, task, task.example_inputs()))


@torch.no_grad()
def _logits(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    with evaluation_mode(model):
        logits: Tensor = run_model(model, inputs).logits
    if not logits.isfinite().all():
        raise NonFiniteWeightsError(
            f"The logits of {type(model).__name__} on the first validation examples hold NaN or infinity. "
            "Accepted: a model that computes finite numbers in float32. Check its weights, or load another."
        )
    return logits


def _versions() -> dict[str, str]:
    packages = {name: metadata.version(name) for name in ("torch", "transformers", "accelerate", "datasets")}
    return {"hf_spp": __version__, **packages, "python": platform.python_version()}


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def isolated_generators(seed: int) -> Iterator[None]:
    """Seed every global generator, and give the caller's state back at the end."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    set_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


class RunProgress:
    """A line per run on the terminal, with the Trainer's steps; silent where there is no terminal."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bars = Progress(*columns, TextColumn("{task.fields[result]}"), console=console)
        self._shown = self._bars if console.is_terminal else nullcontext()

    def __enter__(self) -> "RunProgress":
        self._shown.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._shown.__exit__(*error)

    def begin(self, description: str) -> "RunLine":
        """Start the line of a run."""
        return RunLine(self._bars, self._bars.add_task(description, total=None, result=""))


class RunLine(TrainerCallback):
    """One run's line: the Trainer's steps, then the result."""

    def __init__(self, bars: Progress, task: TaskID) -> None:
        self._bars, self._task = bars, task

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        """Show how many steps there are."""
        self._bars.update(self._task, total=state.max_steps, completed=0)

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        """Show the step."""
        self._bars.update(self._task, completed=state.global_step)

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        """Show that evaluation goes on."""
        self._bars.update(self._task, result="evaluating")

    def finish(self, result: str) -> None:
        """Show the result and stop the clock."""
        self._bars.update(self._task, result=result)
        self._bars.stop_task(self._task)
