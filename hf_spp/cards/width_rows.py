"""Rows of a width report: what a row holds, and the tables made of rows."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import CardError
from .markdown import Markdown
from .result_rows import is_count, is_number, markdown_table, unique

Row = Mapping[str, Any]

# What was measured: the full model, and cuts of it by the order of the channels and what was done after the cut.
KINDS = {
    "full": "Full model",
    "compensated": "Compensated",
    "plain": "Plain slice",
    "random-compensated": "Random order, compensated",
    "random": "Random order",
}
METRIC_NAMES = {
    "accuracy": "accuracy",
    "f1": "macro F1",
    "perplexity": "perplexity",
    "cosine": "cosine to the full model",
}
PERCENT = ("accuracy", "f1")


def check_width_rows(rows: Sequence[Row]) -> None:
    """Check rows of a width report: every value of its kind, and at least one cut among them.

    Raises:
        CardError: A row is malformed, or nothing was cut.
    """
    for number, row in enumerate(rows):
        if odd := [name for name, is_sound in _KINDS_OF_VALUES.items() if name not in row or not is_sound(row[name])]:
            raise CardError(
                f"Row {number} of the widths lacks {', '.join(odd)}, or has it of another kind. Accepted: rows of "
                "width_report. Measure again."
            )
    if len({tuple(one["batch"] for one in row["latency"]) for row in rows}) > 1:
        raise CardError("Widths were timed at different batch sizes. Accepted: rows of width_report. Measure again.")
    if not any(row["kind"] != "full" for row in rows):
        raise CardError("The widths hold no cut. Accepted: rows of width_report. Measure again.")


def _is_line(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and value.isprintable()


def _is_metrics(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        _is_line(name) and (number is None or is_number(number)) for name, number in value.items()
    )


def _is_latency(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(one, Mapping)
        and all(is_count(one.get(name)) for name in ("batch", "runs", "threads"))
        and is_number(one.get("milliseconds"))
        and isinstance(one.get("spread"), list | tuple)
        and len(one["spread"]) == 2
        and all(map(is_number, one["spread"]))
        and _is_line(one.get("device"))
        for one in value
    )


_KINDS_OF_VALUES: Mapping[str, Callable[[Any], bool]] = {
    "width": _is_line,
    "kind": lambda value: isinstance(value, str) and value in KINDS,
    "seed": lambda value: value is None or is_count(value),
    "spec": lambda value: value is None or isinstance(value, Mapping),
    "parameters": lambda value: is_count(value) and value > 0,
    "bytes": is_count,
    "share": is_number,
    "metrics": _is_metrics,
    "latency": _is_latency,
    "stock": lambda value: isinstance(value, bool),
}


def metrics_of(rows: Sequence[Row]) -> list[str]:
    """Names of all metrics, in order of first appearance."""
    return unique(name for row in rows for name in row["metrics"])


def metrics_caption(rows: Sequence[Row]) -> str:
    """What a cell of quality holds, in words."""
    names = metrics_of(rows)
    if names and all(name in PERCENT for name in names):
        return f"{_capital(' / '.join(METRIC_NAMES[name] for name in names))}, in percent"
    return _capital(" / ".join(f"{METRIC_NAMES.get(name, name)}{', %' * (name in PERCENT)}" for name in names))


def width_table(rows: Sequence[Row]) -> Markdown:
    """The rows as a Markdown table; see `width_cells`."""
    header, body, labels = width_cells(rows)
    return markdown_table(header, body, left=labels)


def width_cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]], int]:
    """Cost and quality: one line per width, one column of quality per kind of cut.

    Several seeds of one kind become mean ± standard deviation. The full model, of which nothing is cut, has its quality
    in the first of these columns.

    Returns:
        The header, the lines, and how many columns say what a line is about.
    """
    kinds = [kind for kind in KINDS if kind != "full" and any(row["kind"] == kind for row in rows)]
    metrics = metrics_of(rows)
    batches = unique(one["batch"] for row in rows for one in row["latency"])
    header = [
        "Width",
        "Parameters",
        "MB",
        *(f"ms, batch {batch}" for batch in batches),
        *(KINDS[kind] for kind in kinds),
    ]
    body = []
    for width in unique(row["width"] for row in rows):
        own = [row for row in rows if row["width"] == width]
        first = own[0]
        times = {one["batch"]: one for one in first["latency"]}
        of_kind = {kind: [row for row in own if row["kind"] == kind] for kind in kinds}
        if first["kind"] == "full":
            of_kind[kinds[0]] = own
        body.append(
            [
                width,
                f"{_short(first['parameters'])} ({100 * first['share']:.0f} %)",
                megabytes(first["bytes"]),
                *(_time(times[batch]) if batch in times else "–" for batch in batches),
                *(_quality(of_kind[kind], metrics) for kind in kinds),
            ]
        )
    return header, body, 1


def metric_values(rows: Sequence[Row], metric: str) -> list[float]:
    """The finite values of a metric."""
    return [row["metrics"][metric] for row in rows if row["metrics"].get(metric) is not None]


def _quality(rows: Sequence[Row], metrics: Sequence[str]) -> str:
    return " / ".join(_mean(metric, metric_values(rows, metric)) for metric in metrics) if rows else "–"


def _mean(metric: str, values: Sequence[float]) -> str:
    if not values:
        return "–"
    mean = show_metric(metric, statistics.fmean(values))
    return mean if len(values) == 1 else f"{mean} ± {show_metric(metric, statistics.stdev(values))}"


def show_metric(metric: str, value: float) -> str:
    """A value of a metric in few digits; accuracy and F1 in percent, without the sign."""
    if metric in PERCENT:
        return f"{100 * value:.2f}"
    if metric == "cosine":
        return f"{value:.4f}"
    if abs(value) >= 1e6:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _time(latency: Mapping[str, Any]) -> str:
    middle, low, high = (f"{float(f'{one:.3g}'):,g}" for one in (latency["milliseconds"], *latency["spread"]))
    return f"{middle} ({low}–{high})"


def megabytes(count: int) -> str:
    """Bytes in MB, without the unit."""
    return f"{count / 1e6:,.1f}" if count >= 1e6 else f"{count / 1e6:.2g}"


def _short(count: int) -> str:
    size, unit = next(
        ((size, unit) for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " K")) if count >= size), (1, "")
    )
    return f"{count / size:.1f}{unit}" if unit else str(count)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
