"""Plots of a width report: quality against parameters and against time, as PNG bytes."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from ..errors import CardError
from .plots import COLORS, FAINT, INK, as_png, new_figure, style_axes
from .result_rows import unique
from .width_rows import KINDS, METRIC_NAMES, PERCENT, Row, metric_values, metrics_of

Against = Literal["parameters", "latency"]

# The color tells the order of the channels; a dashed line with hollow marks says that nothing was done after the cut.
_ORDERS = {"compensated": "spp", "plain": "spp", "random-compensated": "random", "random": "random"}
_MARKS = {"spp": "o", "random": "s"}
_MOST_PANELS = 3
# Names of widths up to this length are written beside their points.
_SHORT = 8
# Values that span more than this are drawn on a logarithmic scale, if none is zero or below.
_WIDE = 20.0
# Up to this span such a scale has marks between the powers of ten.
_DECADES = 1000.0
_UNITS = ((1e9, "billion"), (1e6, "million"), (1e3, "thousand"), (1.0, ""))


@dataclass(frozen=True)
class _Point:
    """One place on a line: a cost with its range, and a quality with its standard deviation."""

    cost: float
    costs: tuple[float, float]
    quality: float
    deviation: float
    width: str


def quality_curve(rows: Sequence[Row], against: Against) -> bytes:
    """Draw what a width costs in quality: a line per kind of cut, up to the full model.

    Several seeds of one kind become their mean with a bar of one standard deviation. Times are medians, with a bar from
    the shortest to the longest run. There is a panel for each metric, where accuracy stands for F1 too, and for each
    batch size.

    Args:
        rows: Rows of a width report.
        against: What lies on the horizontal axis, `parameters` or `latency`.

    Returns:
        A PNG file, 1660 pixels wide.

    Raises:
        CardError: There is no row of a cut, or none with a latency.
    """
    panels = _panels(rows, against)
    kinds = [kind for kind in _ORDERS if any(row["kind"] == kind for row in rows)]
    if not panels or not kinds:
        raise CardError(
            f"rows in quality_curve hold nothing to draw against {against}. Accepted: rows of a width report with at "
            "least one width and one metric. Measure first."
        )
    figure = new_figure(3.9 if len(panels) < _MOST_PANELS else 3.4)
    styles = _styles(kinds)
    for number, (metric, batch) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), number + 1)
        cost, label = _cost(rows, against, batch)
        for kind in reversed(kinds):
            _line(axes, _points(rows, kind, metric, cost), styles[kind])
        _name_widths(axes, _points(rows, kinds[0], metric, cost), styles[kinds[0]]["color"])
        for point in _points(rows, "full", metric, cost):
            axes.axhline(point.quality, color=COLORS["original"], linewidth=0.9, linestyle=":", zorder=1)
            axes.plot(point.cost, point.quality, **styles["full"])
        style_axes(axes)
        _scale(axes, rows, metric)
        axes.set_xlabel(label, fontsize=10, color=INK)
        if number == 0 or panels[number - 1][0] != metric:
            name = METRIC_NAMES.get(metric, metric)
            axes.set_ylabel(name[:1].upper() + name[1:], fontsize=10, color=INK, parse_math=False)
    for kind in kinds:
        axes.plot([], [], label=KINDS[kind], **styles[kind])
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside upper center",
        ncols=len(kinds),
        frameon=False,
        fontsize=10,
        handlelength=2.4,
    )
    return as_png(figure)


def _panels(rows: Sequence[Row], against: Against) -> list[tuple[str, int | None]]:
    """Which metric, and for times which batch size, each panel shows."""
    metrics = [name for name in metrics_of(rows) if metric_values(rows, name)]
    metrics = [name for name in metrics if not (name == "f1" and "accuracy" in metrics)]
    batches: list[int | None] = [None]
    if against == "latency":
        batches = unique(one["batch"] for row in rows for one in row["latency"])
    return [(metric, batch) for metric in metrics for batch in batches][:_MOST_PANELS]


def _styles(kinds: Sequence[str]) -> dict[str, dict[str, Any]]:
    """How each kind is drawn. Where one order has one line only, there is nothing to tell it from."""
    styles: dict[str, dict[str, Any]] = {
        "full": {"color": COLORS["original"], "linestyle": "none", "marker": "D", "markersize": 7, "zorder": 5}
    }
    for kind in kinds:
        order = _ORDERS[kind]
        plain = kind in ("plain", "random") and any(_ORDERS[other] == order for other in kinds if other != kind)
        styles[kind] = {
            "color": COLORS[order],
            "linestyle": "--" if plain else "-",
            "linewidth": 1.8,
            "marker": _MARKS[order],
            "markersize": 6,
            "markeredgewidth": 1.5,
            "markerfacecolor": "white" if plain else COLORS[order],
            "zorder": 3,
        }
    return styles


Cost = Callable[[Row], tuple[float, float, float]]


def _cost(rows: Sequence[Row], against: Against, batch: int | None) -> tuple[Cost, str]:
    """What a row costs, from and to, and what the axis of costs is called."""
    if against == "parameters":
        most = max(row["parameters"] for row in rows)
        size, name = next((size, name) for size, name in _UNITS if most >= size)
        return lambda row: (row["parameters"] / size,) * 3, f"Parameters, {name}" if name else "Parameters"

    def time(row: Row) -> tuple[float, float, float]:
        latency: Mapping[str, Any] = next(one for one in row["latency"] if one["batch"] == batch)
        low, high = latency["spread"]
        return latency["milliseconds"], low, high

    return time, f"Milliseconds for a batch of {batch}"


def _points(rows: Sequence[Row], kind: str, metric: str, cost: Cost) -> list[_Point]:
    """The points of one kind, each of one width; a line of cuts ends at the full model."""
    kinds = (kind, "full")
    points = []
    for width in unique(row["width"] for row in rows if row["kind"] in kinds):
        own = [row for row in rows if row["width"] == width and row["kind"] in kinds]
        if values := metric_values(own, metric):
            middle, low, high = cost(own[0])
            deviation = statistics.stdev(values) if len(values) > 1 else 0.0
            points.append(_Point(middle, (low, high), statistics.fmean(values), deviation, width))
    return sorted(points, key=lambda point: point.cost)


def _line(axes: Axes, points: Sequence[_Point], style: Mapping[str, Any]) -> None:
    axes.plot([point.cost for point in points], [point.quality for point in points], **style)
    for point in points:
        if point.deviation:
            axes.errorbar(
                point.cost,
                point.quality,
                point.deviation,
                color=style["color"],
                linewidth=1,
                capsize=2.5,
                zorder=2,
                linestyle="",
            )


def _name_widths(axes: Axes, points: Sequence[_Point], color: str) -> None:
    """Write widths beside their points, on the side that the line leaves free, and show the range of their costs."""
    falls = bool(points) and points[0].quality > points[-1].quality
    for point in points:
        low, high = point.costs
        if high > low:
            axes.plot([low, high], [point.quality] * 2, color=color, linewidth=4, alpha=0.25, zorder=2)
        if len(point.width) <= _SHORT:
            text = axes.annotate(
                point.width,
                (point.cost, point.quality),
                (0, -9 if falls else 9),
                textcoords="offset points",
                ha="center",
                va="top" if falls else "bottom",
                fontsize=9,
                color=INK,
                zorder=6,
                parse_math=False,
            )
            text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])


def _scale(axes: Axes, rows: Sequence[Row], metric: str) -> None:
    values = metric_values(rows, metric)
    axes.margins(x=0.07, y=0.12)
    axes.grid(color=FAINT, linewidth=0.6, zorder=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7))
    if metric in PERCENT:
        axes.set_ylim(0, 1.12 * max(values) or 1.0)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    elif min(values) > 0 and max(values) > _WIDE * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(
            LogLocator(subs=(1.0, 2.0, 5.0) if max(values) < _DECADES * min(values) else (1.0,))
        )
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
