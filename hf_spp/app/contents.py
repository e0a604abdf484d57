"""What the page shows of one checkpoint, computed without the page."""

import os
import statistics
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..architectures import channel_groups
from ..comparison.classification import load_classification_data
from ..comparison.presets import find_source
from ..conversion import load_reordered
from ..errors import AppError, SPPError
from ..fetching import fetch_checkpoint
from ..forward import evaluation_mode, place_inputs
from ..loading import quiet_transformers, without_notes
from ..reordering import Reordering
from ..subnetworks import SubnetworkSpec, extract_subnetwork, subnetwork_view
from ..subnetworks.costs import ParameterCount, count_flops, inputs_of, measure_latency, unit_of
from ..subnetworks.widths import cut_of
from .heat_map import HeatMap, heat_maps
from .measured import MeasuredWidths, find_measured
from .tasks import Comparison, Inputs, Task, find_task

CUTS = ("heads", "query_heads", "ffn")
EXAMPLES = 6
_LOOKED_AT = 64
# Forward passes are timed in turns, this many at least and at most, and no new turn begins after so many seconds.
_FEWEST, _MOST, _SECONDS = 3, 9, 0.6


@dataclass(frozen=True)
class Times:
    """Times of a forward pass of the full model and of a slice, taken in turns.

    Attributes:
        full: Milliseconds of the full model, one for each turn.
        small: Those of the slice, cut out as a model of its own.
        threads: Threads of torch.
        device: Where the models ran.
    """

    full: tuple[float, ...]
    small: tuple[float, ...]
    threads: int
    device: str

    @property
    def gain(self) -> float:
        """How many times as fast as the full model the slice is, by medians."""
        return statistics.median(self.full) / statistics.median(self.small)


class Contents:
    """What the page shows of one reordered checkpoint.

    A view changes the model while it is inside, so everything that runs the model waits for its turn.

    Args:
        model: The reordered model.
        reordering: Its orders and scores.
        name: What the user calls the checkpoint.
        task: How to ask it; None if the page cannot.
        reason: Why the page cannot ask it.
        measured: What is known of the quality of its widths.
        examples: What a user may begin with, one entry for each field of the task.

    Raises:
        AppError: Nothing of the model can be cut.
    """

    def __init__(
        self,
        model: Any,
        reordering: Reordering,
        name: str,
        *,
        task: Task | None = None,
        reason: str | None = None,
        measured: MeasuredWidths | None = None,
        examples: Sequence[Sequence[Any]] = (),
    ) -> None:
        self.model, self.reordering, self.name = model, reordering, name
        self.task, self.reason, self.measured, self.examples = task, reason, measured, examples
        self.groups = channel_groups(model)
        cut = SubnetworkSpec.uniform(model, 0.5)
        ordered = {cut_of(group) for group in self.groups if group.name in reordering.orders}
        self.cuts = tuple(one for one in CUTS if getattr(cut, one) is not None and one in ordered)
        if not self.cuts:
            raise AppError(
                f"Neither heads nor neurons of {name!r} are in order, so no width of it can be shown. Accepted: a "
                f"checkpoint that was reordered along heads or ffn; this one was along {', '.join(reordering.axes)}. "
                "Reorder the original model with `hf-spp reorder`."
            )
        self.maps: list[HeatMap] = heat_maps(reordering)
        self.parameters = ParameterCount(model, self.groups)
        self._lock = threading.Lock()
        self._flops: dict[Any, float] = {}
        self._asked: tuple[tuple[Inputs, ...], Any] | None = None
        self._sample = self._first_inputs()

    @classmethod
    def open(
        cls,
        source: str | os.PathLike[str],
        *,
        revision: str | None = None,
        widths: str | os.PathLike[str] | None = None,
        places: Sequence[str | os.PathLike[str]] = (),
        dataset: str | None = None,
        image_size: int | None = None,
    ) -> "Contents":
        """Load a checkpoint and everything that is known of it.

        Args:
            source: Folder or Hub id of a reordered checkpoint.
            revision: Branch, tag or commit of a repository.
            widths: Folder of the results of `hf-spp curve`.
            places: Folders in which they may lie, if `widths` is not given.
            dataset: Name of a data set whose held-out examples are offered.
            image_size: Side of images in pixels; None takes the checkpoint's own.

        Raises:
            SPPError: Whatever loading raises, or nothing of the model can be cut.
        """
        folder = fetch_checkpoint(source, revision=revision)
        model, reordering = load_reordered(folder, verify=False)
        measured = find_measured(model, os.fspath(source), folder, [folder, *places], widths)
        task, reason = None, None
        try:
            with quiet_transformers(bars=False):
                task = find_task(model, folder, image_size)
        except AppError as error:
            reason = str(error)
        examples: list[list[Any]] = []
        if dataset is not None and task is not None:
            examples = _examples(dataset, task)
        return cls(
            model,
            reordering,
            os.fspath(source),
            task=task,
            reason=reason,
            measured=measured,
            examples=examples,
        )

    @property
    def facts(self) -> str:
        """What the checkpoint is, in one line."""
        count = sum(one.numel() for one in self.model.parameters())
        proof = self.reordering.relative_diff
        parts = [
            type(self.model).__name__,
            f"{count:,} parameters",
            f"in order of {self.reordering.config.metric_name} saliency",
        ]
        if proof is not None:
            parts.append(f"reordering moved its outputs by {proof:.0e} of their scale")
        return " · ".join(parts)

    def spec(self, heads: float, neurons: float) -> SubnetworkSpec:
        """The slice with such shares of the heads and of the neurons of every layer, as far as they are in order."""
        by_heads, by_neurons = (SubnetworkSpec.uniform(self.model, float(share)) for share in (heads, neurons))
        chosen = {one: getattr(by_neurons if one == "ffn" else by_heads, one) for one in self.cuts}
        return SubnetworkSpec(**chosen)

    def widths(self, spec: SubnetworkSpec) -> dict[str, int]:
        """Channels that each group keeps, by name of the groups that are cut."""
        return spec.widths(self.model, self.groups)

    def what_stays(self, spec: SubnetworkSpec) -> str:
        """How many heads and neurons of each layer stay, in words."""
        widths, parts = self.widths(spec), []
        names = {one.cut: one.name for one in self.maps}
        for cut in self.cuts:
            own = [group for group in self.groups if cut_of(group) == cut]
            kept = [widths.get(group.name, group.size) for group in own]
            few, most = min(kept), max(kept)
            size = max(group.size for group in own)
            parts.append(f"{f'{few:,}' if few == most else f'{few:,}–{most:,}'} of {size:,} {names[cut]}")
        return f"{' and '.join(parts)} of each layer stay."

    def costs(self, spec: SubnetworkSpec, given: Sequence[Any] = ()) -> list[tuple[str, ...]]:
        """Lines of what the full model and a slice cost, and the slice's share.

        Args:
            spec: The slice.
            given: What the user gives, to count operations on.
        """
        inputs, widths = self._encoded(given)[0], self.widths(spec)
        with self._using():
            per, _ = unit_of(self.model, inputs)
            flops = [self._count(one, inputs) for one in ({}, widths)]
        counts = [self.parameters(one) for one in ({}, widths)]
        return [
            ("Parameters", *(f"{one:,}" for one in counts), _share(counts)),
            (f"FLOPs / {per}", *map(_large, flops), _share(flops)),
        ]

    def times(self, spec: SubnetworkSpec, given: Sequence[Any] = ()) -> Times:
        """Time forward passes of the full model and of the slice as a model of its own, in turns, on this machine.

        Args:
            spec: The slice.
            given: What the user gives, which both models are run on.
        """
        inputs = self._encoded(given)[0]
        with self._using():
            models = (self.model, extract_subnetwork(self.model, spec))
            placed = place_inputs(self.model, inputs)
            taken: tuple[list[float], list[float]] = ([], [])
            end = time.perf_counter() + _SECONDS
            while len(taken[0]) < _FEWEST or (len(taken[0]) < _MOST and time.perf_counter() < end):
                for model, own in zip(models, taken, strict=True):
                    found = measure_latency(model, placed, runs=1, warm_up=1)
                    own.append(found.milliseconds)
        return Times(tuple(taken[0]), tuple(taken[1]), found.threads, found.device)

    def predict(self, spec: SubnetworkSpec, given: Sequence[Any]) -> Comparison:
        """What the full model answers, and what it answers as a view of the slice's width.

        Args:
            spec: The slice.
            given: What the user gives, one for each field of the task.

        Raises:
            AppError: Something is missing in what is given, or the model cannot be asked.
        """
        if self.task is None:
            raise AppError(str(self.reason))
        runs = self.task.encode(*given)
        with self._using():
            try:
                if self._asked is None or not _alike(self._asked[0], runs):
                    self._asked = (runs, self.task.answer(self.model, runs))
                full = self._asked[1]
                with subnetwork_view(self.model, spec):
                    small = self.task.answer(self.model, runs)
            except SPPError:
                raise
            except Exception as error:  # whatever a model raises only means that it cannot answer this
                raise AppError(
                    f"{type(self.model).__name__} does not answer this: {' '.join(str(error).split())[:300]} Accepted: "
                    "what its processor prepares for it. Give something else."
                ) from error
        return self.task.compare(full, small)

    def _first_inputs(self) -> tuple[Inputs, ...]:
        """Forward arguments before the user gives any; a model that does not run on them cannot be asked."""
        if self.task is not None:
            try:
                runs = self.task.sample
                with self._using():
                    self.task.answer(self.model, runs)
                return runs
            except Exception as error:  # processor and model come from outside, and may not fit in any way
                self.task = None
                self.reason = (
                    f"The page cannot ask {type(self.model).__name__}: {' '.join(str(error).split())[:300]} The rest "
                    "of the page is about this model."
                )
        return (dict(inputs_of(self.model, self.groups, None)),)

    def _encoded(self, given: Sequence[Any]) -> tuple[Inputs, ...]:
        """Forward arguments of what the user gives, or the first ones while something is missing."""
        if self.task is not None and given:
            try:
                return self.task.encode(*given)
            except AppError:
                return self._sample
        return self._sample

    def _count(self, widths: Mapping[str, int], inputs: Inputs) -> float:
        shapes = tuple(tuple(value.shape) for value in inputs.values() if isinstance(value, Tensor))
        key = (tuple(sorted(widths.items())), shapes)
        if key not in self._flops:
            self._flops[key] = count_flops(self.model, self.groups, widths, inputs)
        return self._flops[key]

    @contextmanager
    def _using(self) -> Iterator[None]:
        """The model alone, in evaluation mode, without gradients and without notes on every slice."""
        quiet = quiet_transformers(bars=False), without_notes("hf_spp")
        with self._lock, torch.no_grad(), evaluation_mode(self.model), quiet[0], quiet[1]:
            yield


def _examples(dataset: str, task: Task) -> list[list[Any]]:
    """The first held-out examples of a data set, different classes first, as the fields of a task take them."""
    data = load_classification_data(dataset, *find_source(dataset))
    kinds = {field.kind for field in task.fields}
    if kinds != {data.kind}:
        raise AppError(
            f"Data set {dataset!r} holds {data.kind}s, and {task.name} of this model takes {' and '.join(kinds)}s. "
            "Accepted: data of the model's own kind. Name other data, or leave --dataset out."
        )
    rows = data.validation.select(range(min(_LOOKED_AT, len(data.validation))))
    order = sorted(range(len(rows)), key=_repetitions(rows[data.label_column]).__getitem__)
    found = [[rows[index][column] for column in data.input_columns] for index in order]
    if task.name == "feature-extraction" and len(data.input_columns) == 1:
        found = [[*one, *other] for one, other in zip(found[::2], found[1::2], strict=False)]
    count = len(task.fields)
    return [[*given, *[""] * count][:count] for given in found[:EXAMPLES]]


def _repetitions(labels: Sequence[int]) -> list[int]:
    """How often each label has come before."""
    seen: dict[int, int] = {}
    found = []
    for label in labels:
        found.append(seen.get(label, 0))
        seen[label] = found[-1] + 1
    return found


def _alike(one: tuple[Inputs, ...], other: tuple[Inputs, ...]) -> bool:
    def same(a: Any, b: Any) -> bool:
        return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else bool(a == b)

    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(same(a[name], b[name]) for name in a) for a, b in zip(one, other, strict=True)
    )


def _share(values: Sequence[float]) -> str:
    return f"{100 * values[1] / values[0]:.0f} %" if values[0] else "–"


def _large(value: float) -> str:
    size, unit = next(((size, unit) for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")) if value >= size), (1, ""))
    return f"{value / size:.3g} {unit}".strip()
