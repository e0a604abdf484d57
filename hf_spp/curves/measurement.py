"""`width_report`: cut a model to several widths, and measure what each costs and is worth."""

import copy
import gc
import os
import platform
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers.utils import logging

from ..architectures import channel_groups
from ..cards.result_rows import model_label, unique
from ..cards.width_results import WidthReport, check_report_folder
from ..config import SPPConfig
from ..errors import SPPConfigError
from ..forward import place_inputs
from ..loading import quiet_transformers
from ..reordering import total_of
from ..structure import inner_model
from ..subnetworks.costs import Latency, measure_latency
from ..subnetworks.extraction import extract_subnetwork, is_ordered
from ..subnetworks.record import record_of
from ..subnetworks.spec import SubnetworkSpec
from ..transform import apply_spp
from ..version import __version__
from .arguments import FULL, Specs, calibration_batches, check_count, named_specs, seeds_of, timed_inputs
from .quality import Batch, Metric, batch_length, default_metric, measured, read_batches

logger = logging.get_logger(__name__)

WARM_UP = 3


def width_report(
    model: Any,
    dataset: Any,
    specs: Specs,
    *,
    metric: Metric | None = None,
    calibration: Iterable[Batch] | None = None,
    collator: Callable[[list[Any]], Any] | None = None,
    batch_size: int = 16,
    example_inputs: Mapping[str, Any] | None = None,
    latency_batch_sizes: Sequence[int] | None = None,
    latency_runs: int = 10,
    random_control: bool | Sequence[int] = True,
    dataset_name: str | None = None,
    output_dir: str | os.PathLike[str] | None = None,
) -> WidthReport:
    """Cut a reordered model to several widths, and measure quality, size and time of each beside the full model.

    Every width is cut as it is and, with calibration data, compensated; and as a control once more from a copy of the
    model whose channels are in random order. Nothing is trained. The model stays as it is. Quality is the same on every
    run; times are not. While they are taken, in turns, the plain slices of all widths lie in memory.

    Args:
        model: The reordered model.
        dataset: An iterable of dict batches with labels, such as a DataLoader, or a `datasets.Dataset`. It is read
            once and held in memory.
        specs: Widths: specs, or fractions of the neurons and heads of every layer; by name, in a list, or one.
        metric: Function of a model and the list of batches that returns numbers by name, called in evaluation mode
            without gradients. None means accuracy and macro F1 for classifiers, perplexity for causal language models,
            and for models without a head the cosine of their mean hidden states to those of the full model.
        calibration: Dict batches of forward arguments to compensate on; labels are not used. Take other data than
            `dataset`.
        collator: Makes a batch of examples, for a `datasets.Dataset`; None takes transformers' default.
        batch_size: Examples in such a batch.
        example_inputs: Forward arguments to time; None takes the first batch of the data set.
        latency_batch_sizes: Batch sizes to time, made of the example inputs; None takes theirs.
        latency_runs: Timed forward passes for each width and batch size; 0 leaves times out.
        random_control: Whether to measure random orders too, or the seeds of several.
        dataset_name: What the report calls the data set.
        output_dir: Folder to write `results.json`, the table and the plots into; None writes nothing.

    Returns:
        The rows and what they share; `to_markdown()` and `save(folder)` show them.

    Raises:
        SubnetworkError: A spec does not fit the model, or there is none.
        DatasetError: The data set holds no batches that the model and the metric can use.
        CalibrationError: The calibration data is none that works.
        ExampleInputsError: The example inputs hold no tensor.
        SPPConfigError: Another argument is not accepted, or there is no metric for such a model.
        CheckpointError: The folder holds results of something else.
    """
    named = named_specs(model, specs)
    check_count("batch_size", batch_size, 1)
    check_count("latency_runs", latency_runs, 0)
    seeds = seeds_of(random_control)
    if output_dir is not None:
        check_report_folder(output_dir)
    if metric is not None and not callable(metric):
        raise SPPConfigError(
            f"metric={metric!r} is no function. Accepted: a function (model, batches) -> dict of numbers, or None for "
            "accuracy, perplexity or cosine."
        )
    batches = read_batches(dataset, collator, batch_size)
    calibrated = calibration_batches(calibration)
    timed = {}
    if latency_runs:
        timed = timed_inputs(model, batches[0] if example_inputs is None else example_inputs, latency_batch_sizes)
    cuts = _Cuts(model, named, batches, metric or default_metric(model, batches), calibrated, timed, latency_runs)
    if not cuts.ordered:
        logger.warning(
            f"{type(inner_model(model)).__name__} was not reordered along all axes that are cut, so its own order is "
            "no better than a random one. Call apply_spp(model) before, or load a reordered checkpoint."
        )
    report = WidthReport(cuts.rows(seeds), cuts.settings(seeds, dataset_name))
    if output_dir is not None:
        report.save(output_dir)
    return report


@dataclass(frozen=True)
class _Cuts:
    """The cuts of one model, and how each is measured."""

    model: Any
    specs: Mapping[str, SubnetworkSpec]
    batches: Sequence[Batch]
    metric: Metric
    calibration: Sequence[Batch] | None
    timed: Mapping[int, Mapping[str, Any]]
    runs: int

    def rows(self, seeds: Sequence[int]) -> list[dict[str, Any]]:
        """All rows: the full model, then width by width."""
        treatments = 1 if self.calibration is None else 2
        with _progress(bool(self.timed) + 1 + len(self.specs) * treatments * (1 + len(seeds))) as step:
            times = self._times(step) if self.timed else {}
            step(FULL)
            full = self._row(FULL, "full", None, None, self.model, times, None)
            found = list(self._cut(self.model, None, full, times, step))
            for seed in seeds:
                found += self._cut(self._shuffled(seed), seed, full, times, step)
                gc.collect()
        names = list(self.specs)
        return [full, *sorted(found, key=lambda row: names.index(row["width"]))]

    def _times(self, step: Callable[[str], None]) -> dict[str, list[dict[str, Any]]]:
        """Times of the full model and of every width, by name.

        They take turns, so that a machine that gets slower or faster meanwhile is so for all of them.
        """
        step("timing")
        models = {FULL: self.model}
        for name, spec in self.specs.items():
            models[name] = extract_subnetwork(self.model, spec, allow_unordered=True)
        placed = {size: place_inputs(inner_model(self.model), inputs) for size, inputs in self.timed.items()}
        taken: dict[tuple[str, int], list[Latency]] = {(name, size): [] for name in models for size in placed}
        for turn in range(self.runs):
            for (name, size), latencies in taken.items():
                warm_up = 1 if turn else WARM_UP
                latencies.append(measure_latency(inner_model(models[name]), placed[size], runs=1, warm_up=warm_up))
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in models}
        for (name, size), latencies in taken.items():
            milliseconds = [one.milliseconds for one in latencies]
            found[name].append(
                {
                    "batch": size,
                    "milliseconds": round(statistics.median(milliseconds), 4),
                    "spread": [round(min(milliseconds), 4), round(max(milliseconds), 4)],
                    "runs": len(latencies),
                    "threads": latencies[0].threads,
                    "device": latencies[0].device,
                }
            )
        return found

    def _cut(
        self,
        model: Any,
        seed: int | None,
        full: Mapping[str, Any],
        times: Mapping[str, list[dict[str, Any]]],
        step: Callable[[str], None],
    ) -> Iterator[dict[str, Any]]:
        """Rows of all widths of a model in one order."""
        treatments: dict[str, Sequence[Batch] | None] = {"plain" if seed is None else "random": None}
        if self.calibration is not None:
            treatments["compensated" if seed is None else "random-compensated"] = self.calibration
        for name, spec in self.specs.items():
            for kind, calibration in treatments.items():
                step(f"{name} · {kind}")
                small = extract_subnetwork(model, spec, calibration=calibration, allow_unordered=True)
                yield self._row(name, kind, seed, spec, small, times, full)
                del small

    def _shuffled(self, seed: int) -> Any:
        """A copy of the model with every axis that is cut in random order."""
        shuffled = copy.deepcopy(self.model)
        groups = channel_groups(shuffled)
        axes = unique(groups.by_name[name].axis for spec in self.specs.values() for name in spec.widths(self.model))
        if axes:
            apply_spp(shuffled, SPPConfig(axes=tuple(axes), metric="random", seed=seed, verify=False))
        return shuffled

    def _row(
        self,
        width: str,
        kind: str,
        seed: int | None,
        spec: SubnetworkSpec | None,
        model: Any,
        times: Mapping[str, list[dict[str, Any]]],
        full: Mapping[str, Any] | None,
    ) -> dict[str, Any]:
        parameters = list(inner_model(model).parameters())
        count, record = sum(one.numel() for one in parameters), record_of(model)
        return {
            "width": width,
            "kind": kind,
            "seed": seed,
            "spec": None if spec is None else spec.to_dict(),
            "parameters": count,
            "bytes": sum(one.numel() * one.element_size() for one in parameters),
            "share": 1.0 if full is None else round(count / full["parameters"], 6),
            "metrics": measured(self.metric, model, self.batches, full=full is None),
            "latency": times.get(width, []),
            "stock": record is None or record.reason is None,
        }

    @property
    def ordered(self) -> bool:
        """Whether the channels of all groups that are cut are known to be in order of saliency."""
        groups = channel_groups(self.model)
        names = unique(name for spec in self.specs.values() for name in spec.widths(self.model, groups))
        return is_ordered(self.model, [groups.by_name[name] for name in names])

    def settings(self, seeds: Sequence[int], dataset_name: str | None) -> dict[str, Any]:
        """What all rows share, as plain JSON types."""
        inner, reordering = inner_model(self.model), total_of(self.model)
        calibration = self.calibration or []
        return {
            "model": model_label({"model": str(getattr(inner, "name_or_path", ""))}) or type(inner).__name__,
            "model_class": type(inner).__name__,
            "dtype": str(next(inner.parameters()).dtype).removeprefix("torch."),
            "device": str(next(inner.parameters()).device),
            "threads": torch.get_num_threads(),
            "ordered": self.ordered,
            "saliency": None if reordering is None else reordering.config.metric_name,
            "dataset": dataset_name,
            "samples": sum(map(batch_length, self.batches)),
            "batches": len(self.batches),
            "metric": getattr(self.metric, "__name__", type(self.metric).__name__),
            "calibration_samples": sum(map(batch_length, calibration)),
            "calibration_batches": len(calibration),
            "random_seeds": list(seeds),
            "latency_batch_sizes": list(self.timed),
            "latency_runs": self.runs,
            "latency_warm_up": WARM_UP,
            "specs": {name: spec.to_dict() for name, spec in self.specs.items()},
            "versions": {
                "hf_spp": __version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar of all cuts on the standard error of a terminal or in a notebook; the function begins the next one.

    A notebook without ipywidgets would keep a picture of every step.
    """
    console = Console(stderr=True)
    bars = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )
    task = bars.add_task("", total=total, completed=-1)
    shown = console.is_terminal or (console.is_jupyter and find_spec("ipywidgets") is not None)
    with quiet_transformers(bars=False), bars if shown else nullcontext():
        yield lambda text: bars.update(task, description=text, advance=1)
        bars.update(task, completed=total)
