"""Evaluation results as `.eval_results/*.yaml`, from which the Hub fills the leaderboards of benchmarks.

An entry is one value of one task of a benchmark: a data set of the Hub that states its tasks in its `eval.yaml`. Which
task a data set of ours is cannot be found out from its name, so it must be given; without it there is no entry.
"""

import datetime
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from ..errors import CardError
from .result_rows import METRICS, Row, check_line, check_method, check_rows
from .yaml_text import read_yaml, write_yaml

ENTRIES_NAME = ".eval_results/hf_spp.yaml"
_OURS = "hf_spp: "


@dataclass(frozen=True)
class Benchmark:
    """The task of a benchmark on the Hub that a data set of result rows is.

    Attributes:
        dataset_id: Hub id of the benchmark's data set.
        task_id: Id of the task in the data set's `eval.yaml`.
        metric: The metric of a row that the benchmark ranks by.
        revision: Commit of the data set.

    Raises:
        CardError: An id is none, or a value is no line of text.
    """

    dataset_id: str
    task_id: str
    metric: str = "accuracy"
    revision: str | None = None

    def __post_init__(self) -> None:
        for name in ("dataset_id", "task_id", "metric"):
            check_line(f"{name} of a benchmark", getattr(self, name))
        if self.revision is not None:
            check_line("revision of a benchmark", self.revision)
        try:
            validate_repo_id(self.dataset_id)
        except HFValidationError as error:
            raise CardError(
                f"dataset_id {self.dataset_id!r} of a benchmark is no Hub id. Accepted: 'name' or 'owner/name'. Give "
                "the id on the Hub."
            ) from error


@dataclass(frozen=True)
class EvalFiles:
    """What is to be written of evaluation results.

    Attributes:
        files: Text by path inside the repository; None means that the file goes. Files that stay are not named.
        left_out: Data sets and methods without an entry, with the reason.
    """

    files: Mapping[str, str | None]
    left_out: Mapping[str, str]


def eval_result_files(
    rows: Sequence[Row],
    existing: Mapping[str, str],
    *,
    benchmarks: Mapping[str, Benchmark],
    method: str = "spp",
    date: datetime.date | None = None,
) -> EvalFiles:
    """The files under `.eval_results/` that a repository needs for result rows.

    All entries go into one file of this package's own. Its earlier entries, known by their notes, are replaced; what
    others wrote there stays byte for byte, and their files are not touched.

    Args:
        rows: Result rows. Several seeds of one data set become their mean.
        existing: Text of the repository's files by path; only this package's own is read.
        benchmarks: The benchmark that each data set of the rows is, by its name in the rows.
        method: Method of the checkpoint in the repository; rows of others are no results of it.
        date: When the evaluation ran; the Hub takes that of the commit where None.

    Raises:
        CardError: A row is malformed, or what others wrote into the file cannot be told from this package's.
    """
    check_rows(rows)
    check_method(method, "method")
    left_out: dict[str, str] = {}
    own: dict[str, list[Row]] = {}
    for row in rows:
        if row["method"] != method:
            left_out[f"{row['dataset']} ({row['method']})"] = f"the checkpoint is of the method {method}"
        elif row["dataset"] not in benchmarks:
            left_out[row["dataset"]] = "no task of a benchmark on the Hub is given for it"
        elif _value(row, benchmarks[row["dataset"]].metric) is None:
            left_out[row["dataset"]] = f"it was measured without {benchmarks[row['dataset']].metric}"
        else:
            own.setdefault(row["dataset"], []).append(row)
    entries = [_entry(benchmarks[dataset], measured, method, date) for dataset, measured in own.items()]
    _check_distinct(entries)
    before = existing.get(ENTRIES_NAME, "")
    text = _theirs(before)
    if entries:
        text += "\n" * bool(text and not text.endswith("\n")) + "".join(map(_written, entries))
    if text == before:
        return EvalFiles({}, left_out)
    return EvalFiles({ENTRIES_NAME: text if text.strip() else None}, left_out)


def _value(row: Row, metric: str) -> float | None:
    return row.get(metric) if metric in METRICS else row.get("metrics", {}).get(metric)


def _entry(benchmark: Benchmark, rows: Sequence[Row], method: str, date: datetime.date | None) -> EvalResultEntry:
    values = [float(value) for row in rows if (value := _value(row, benchmark.metric)) is not None]
    notes = f"{_OURS}{benchmark.metric}, method {method}"
    return EvalResultEntry(
        dataset_id=benchmark.dataset_id,
        task_id=benchmark.task_id,
        value=statistics.fmean(values),
        dataset_revision=benchmark.revision,
        date=None if date is None else date.isoformat(),
        notes=notes if len(values) == 1 else f"{notes}, mean of {len(values)} runs",
    )


def _check_distinct(entries: Sequence[EvalResultEntry]) -> None:
    tasks = [(entry.dataset_id, entry.task_id) for entry in entries]
    for task in tasks:
        if tasks.count(task) > 1:
            raise CardError(
                f"benchmarks names {task[0]} with task {task[1]} for several data sets of the rows. Accepted: one data "
                "set for each task. Keep the one that the benchmark means."
            )


def _written(entry: EvalResultEntry) -> str:
    return write_yaml(eval_result_entries_to_yaml([entry])) + "\n"


def _theirs(text: str) -> str:
    """The text of a file without this package's entries.

    Raises:
        CardError: It is no YAML list, or of a form in which entries cannot be taken out one by one.
    """
    try:
        entries = read_yaml(text)
    except CardError as error:
        raise CardError(f"{ENTRIES_NAME} is no YAML: {error}. Repair the file, or remove it.") from error
    head, *chunks = re.split(r"^(?=-\s)", text, flags=re.MULTILINE)
    listed = [] if entries is None else entries
    try:
        sound = read_yaml(head) is None and [read_yaml(chunk) for chunk in chunks] == [[entry] for entry in listed]
    except (CardError, TypeError):  # of which the second says that it is no list
        sound = False
    if not sound:
        raise CardError(
            f"{ENTRIES_NAME} is no list whose entries each begin a line with '- ', so nothing in it can be replaced "
            "safely. Move what others wrote there to a file of another name."
        )
    kept = (_comments(chunk) if _is_ours(entry) else chunk for chunk, entry in zip(chunks, listed, strict=True))
    return head + "".join(kept)


def _comments(chunk: str) -> str:
    """The comments at the margin that end an entry; they belong to what follows it."""
    lines = chunk.splitlines(keepends=True)
    first = next((place for place, line in enumerate(lines) if line.startswith("#")), len(lines))
    return "".join(lines[first:])


def _is_ours(entry: Any) -> bool:
    notes = entry.get("notes") if isinstance(entry, dict) else None
    # A token was made for what it stands beside, by somebody else.
    return isinstance(notes, str) and notes.startswith(_OURS) and "verifyToken" not in entry
