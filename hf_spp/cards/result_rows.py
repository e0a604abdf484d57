"""Result rows: what a row must hold, and the Markdown tables made of rows."""

import re
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from ..errors import CardError
from .markdown import Markdown, plain

Row = Mapping[str, Any]

METHODS = {
    "original": "Original",
    "pruning-rank": "Pruning-Rank",
    "random": "Random order",
    "spp-raffm": "SPP (RaFFM)",
    "spp": "SPP",
}
METRICS = {"accuracy": "Accuracy", "f1": "F1"}


def check_rows(rows: Sequence[Row]) -> None:
    """Check result rows: known method, fractions in [0, 1], and no two rows that could not be told apart.

    Raises:
        CardError: A row is malformed or repeated.
    """
    seen = set()
    slugs: dict[str, str] = {}
    for number, row in enumerate(rows):
        check_row(row, number)
        identity = (row["dataset"], row["method"], row.get("seed"), model_label(row))
        if identity in seen:
            raise CardError(
                f"Row {number} of the results repeats data set, method, seed and model {identity}. "
                "Accepted: one row for each. Keep one of them, or record the seeds they were made with."
            )
        seen.add(identity)
        slug = dataset_slug(row["dataset"])
        if slugs.setdefault(slug, row["dataset"]) != row["dataset"]:
            raise CardError(
                f"Data sets {slugs[slug]!r} and {row['dataset']!r} in the results share the identifier {slug!r}. "
                "Accepted: names that differ in letters or digits. Rename one."
            )


def check_row(row: Row, number: int) -> None:
    """Check one result row: known method, fractions in [0, 1], and every other value of its kind.

    Raises:
        CardError: The row is malformed.
    """
    where = f"row {number} of the results"
    needed = ("dataset", "method", *(() if row.get("metrics") else METRICS))
    if missing := [key for key in needed if key not in row]:
        raise CardError(
            f"Row {number} of the results lacks {', '.join(missing)}. Accepted: rows with dataset, method, "
            "accuracy and f1, or metrics of other names. Add what is missing or evaluate again."
        )
    check_line(f"dataset in {where}", row["dataset"])
    check_method(row["method"], where)
    for key, (is_sound, accepted) in _OTHER_KEYS.items():
        if row.get(key) is not None and not is_sound(row[key]):
            raise CardError(
                f"{key} {row[key]!r} in {where} is of another kind. Accepted: {accepted}. Leave it out, or evaluate "
                "again."
            )
    for metric in METRICS:
        if metric in row:
            _check_fraction(metric, row[metric], where)
    metrics = row.get("metrics", {})
    if not isinstance(metrics, Mapping):
        raise CardError(f"metrics {metrics!r} in {where} is no mapping. Accepted: metrics by name. Leave them out.")
    for metric, value in metrics.items():
        check_line(f"metric in {where}", metric)
        if not is_number(value):
            raise CardError(f"{metric} {value!r} in {where} is no finite number. Leave it out, or evaluate again.")


def check_line(name: str, value: object) -> None:
    """Refuse what is no single line of text.

    Raises:
        CardError: `value` is empty, has a line break, or is no string.
    """
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise CardError(
            f"{name} {value!r} in the card is no line of text. Accepted: a non-empty string of printable characters, "
            "without line breaks. Shorten it to one line."
        )


def check_method(method: object, where: str) -> None:
    """Refuse a method that is not in `METHODS`.

    Raises:
        CardError: The method is unknown.
    """
    if not isinstance(method, str) or method not in METHODS:
        raise CardError(
            f"method {method!r} in {where} is unknown. Accepted: {', '.join(METHODS)}. Use one of these names."
        )


def is_number(value: object) -> bool:
    """Whether a value is a number that a float holds, and no truth value."""
    # Comparing is exact: a whole number may be too large for a float.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_count(value: object) -> bool:
    """Whether a value is a whole number from 0 up that a float holds, and no truth value."""
    return isinstance(value, int) and is_number(value) and value >= 0


def is_texts(value: object) -> bool:
    """Whether a value holds texts by name."""
    return isinstance(value, Mapping) and all(isinstance(one, str) for one in (*value, *value.values()))


def _is_parameters(value: object) -> bool:
    return isinstance(value, Mapping) and all(is_count(value.get(name)) for name in ("trainable", "total"))


# What a row may say besides its data set, its method and its metrics: whether it is sound, in code and in words.
_OTHER_KEYS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "seed": (is_count, "a whole number"),
    "model": (lambda value: isinstance(value, str), "a Hub id or a path"),
    "versions": (is_texts, "versions by name of the package"),
    "parameters": (_is_parameters, "the counts 'trainable' and 'total'"),
    "train_samples": (is_count, "a whole number"),
    "eval_samples": (is_count, "a whole number"),
    "seconds": (is_number, "a number"),
    "max_abs_diff": (is_number, "a number"),
    "relative_diff": (is_number, "a number"),
}


def _check_fraction(metric: str, value: Any, where: str) -> None:
    if not is_number(value) or not 0 <= value <= 1:
        raise CardError(
            f"{metric} {value!r} in {where} is no fraction. Accepted: a number from 0 to 1. Divide percentages by 100."
        )


def dataset_slug(dataset: str) -> str:
    """Identifier of a data set in a model-index: its name in lower case, without spaces.

    Raises:
        CardError: Nothing is left of the name.
    """
    slug = re.sub(r"[^a-z0-9._/-]+", "-", dataset.lower()).strip("-./_")
    if not slug:
        raise CardError(
            f"dataset {dataset!r} in the results gives no identifier. Accepted: a name with Latin letters or digits. "
            "Rename the data set."
        )
    return slug


def model_label(row: Row) -> str | None:
    """Model of a row as a card may show it: a Hub id, or of a local path only the last part."""
    model = row.get("model")
    if model is None:
        return None
    try:
        validate_repo_id(model)
    except HFValidationError:
        return re.split(r"[/\\]", str(model).rstrip("/\\"))[-1]
    return str(model)


def results_table(rows: Sequence[Row]) -> Markdown:
    """The results as a Markdown table; see `results_cells`."""
    header, body, labels = results_cells(rows)
    return markdown_table(header, body, left=labels)


def results_cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]], int]:
    """Accuracy / macro F1 in percent: one line per method, one column per data set.

    Rows that hold other metrics only are left out; `runs_table` shows those.

    Several seeds of one method become mean ± standard deviation. Several models get a column of their own.

    Returns:
        The header, the lines, and how many columns say what a line is about.

    Raises:
        CardError: A row is malformed or repeated, or there is none.
    """
    check_rows(rows)
    rows = [row for row in rows if all(metric in row for metric in METRICS)]
    if not rows:
        raise CardError("rows in results_table hold no accuracy and F1. Accepted: at least one row. Evaluate first.")
    datasets = unique(row["dataset"] for row in rows)
    models = unique(model_label(row) for row in rows)
    header = [*(["Model"] if len(models) > 1 else []), "Method", *datasets]
    body = []
    for model in models:
        for method, label in METHODS.items():
            of_method = [row for row in rows if model_label(row) == model and row["method"] == method]
            if of_method:
                cells = [_score_cell([row for row in of_method if row["dataset"] == dataset]) for dataset in datasets]
                body.append([*([model or "–"] if len(models) > 1 else []), label, *cells])
    return header, body, len(header) - len(datasets)


def runs_table(rows: Sequence[Row]) -> Markdown:
    """Markdown table of what else is known of each run, without the columns that no row fills."""

    def parameters(row: Row) -> str | None:
        counts = row.get("parameters")
        return f"{counts['trainable']:,} of {counts['total']:,}" if counts else None

    def shown(key: str, show: Callable[[Any], str]) -> Callable[[Row], str | None]:
        return lambda row: None if row.get(key) is None else show(row[key])

    columns: dict[str, Callable[[Row], str | None]] = {
        "Seed": shown("seed", str),
        "Training examples": shown("train_samples", "{:,}".format),
        "Evaluation examples": shown("eval_samples", "{:,}".format),
        "Trained parameters": parameters,
        "Seconds": shown("seconds", "{:.1f}".format),
        "Outputs moved by (max)": shown("max_abs_diff", science),
        "… relative to their scale": shown("relative_diff", science),
    }

    def other(metric: str) -> Callable[[Row], str | None]:
        return lambda row: f"{row['metrics'][metric]:.4g}" if metric in row.get("metrics", {}) else None

    columns |= {metric: other(metric) for metric in unique(name for row in rows for name in row.get("metrics", {}))}
    filled = {name: cell for name, cell in columns.items() if any(cell(row) is not None for row in rows)}
    if not filled:
        return Markdown()
    body = [[row["dataset"], METHODS[row["method"]], *(cell(row) or "–" for cell in filled.values())] for row in rows]
    return markdown_table(["Data set", "Method", *filled], body, left=2)


def markdown_table(header: Sequence[object], body: Sequence[Sequence[object]], *, left: int) -> Markdown:
    """Markdown table whose first `left` columns are flush left, the others flush right."""
    rule = [":---"] * left + ["---:"] * (len(header) - left)
    lines: list[Sequence[str]] = [[plain(cell) for cell in header], rule]
    lines += [[plain(cell) for cell in line] for line in body]
    return Markdown("\n".join("| " + " | ".join(line) + " |" for line in lines))


def science(value: float) -> str:
    """A small number with two digits."""
    return f"{value:.1e}" if value else "0"


def unique(values: Iterable[Any]) -> list[Any]:
    """The values without repetitions, in order of first appearance."""
    # A header that somebody else wrote may list what has no hash.
    return list({repr(value): value for value in values}.values())


def _score_cell(rows: Sequence[Row]) -> str:
    return " / ".join(_mean_percent([row[metric] for row in rows]) for metric in METRICS) if rows else "–"


def _mean_percent(fractions: Sequence[float]) -> str:
    mean = f"{100 * statistics.fmean(fractions):.2f}"
    return mean if len(fractions) == 1 else f"{mean} ± {100 * statistics.stdev(fractions):.2f}"
