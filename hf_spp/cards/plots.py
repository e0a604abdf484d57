"""Plots of results and of saliency, as PNG bytes. No display, no disk, no global state of matplotlib."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..errors import CardError, NonFiniteWeightsError, SPPConfigError
from .result_rows import METHODS, Row, check_rows, model_label

Curve = NDArray[np.float64]

# Okabe and Ito's palette: told apart with every common form of colour blindness, and in print by lightness.
COLORS = {
    "original": "#6e6e6e",
    "pruning-rank": "#d55e00",
    "random": "#e69f00",
    "spp-raffm": "#56b4e9",
    "spp": "#0072b2",
}
_DPI = 200
_WIDTH = 8.3
INK = "#222222"
FAINT = "#d9d9d9"
# The bright end of viridis is unreadable on white.
_DEPTH = LinearSegmentedColormap.from_list("depth", colormaps["viridis"](np.linspace(0.0, 0.88, 256)))
_RESOLUTION = 400
_PANELS_PER_LINE = 3


class GroupLike(Protocol):
    """What a plot needs to know of a channel group."""

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def axis(self) -> str: ...  # noqa: D102

    @property
    def layer(self) -> int | None: ...  # noqa: D102

    @property
    def blocks(self) -> int: ...  # noqa: D102

    @property
    def size(self) -> int: ...  # noqa: D102


def method_bars(rows: Sequence[Row]) -> bytes:
    """Draw accuracy as grouped bars: data sets side by side, one bar per method, labelled in percent.

    Several seeds of one method become their mean with a bar of one standard deviation.

    Args:
        rows: Result rows as in `results.json`; accuracy is a fraction.

    Returns:
        A PNG file, 1660 pixels wide.

    Raises:
        CardError: A row is malformed or repeated, or there is none.
    """
    check_rows(rows)
    if not rows:
        raise CardError("rows [] in method_bars hold no result. Accepted: at least one row. Evaluate first.")
    clusters: dict[str, dict[str, list[float]]] = {}
    several_models = len({model_label(row) for row in rows}) > 1
    for row in rows:
        name = f"{row['dataset']}\n{model_label(row) or '–'}" if several_models else row["dataset"]
        clusters.setdefault(name, {}).setdefault(row["method"], []).append(100 * row["accuracy"])
    methods = [method for method in METHODS if any(method in cluster for cluster in clusters.values())]

    figure = new_figure(3.6)
    axes = figure.add_subplot()
    width = 0.8 / max(len(methods), 3)
    font_size = min(9.0, 95 / (len(methods) * len(clusters)) + 3.0)
    for number, method in enumerate(methods):
        places = [place for place, cluster in enumerate(clusters.values()) if method in cluster]
        values = [clusters[name][method] for place, name in enumerate(clusters) if place in places]
        means = [float(np.mean(value)) for value in values]
        spreads = [float(np.std(value, ddof=1)) if len(value) > 1 else 0.0 for value in values]
        at = [place + (number - (len(methods) - 1) / 2) * width for place in places]
        axes.bar(at, means, width * 0.92, color=COLORS[method], label=METHODS[method], zorder=2)
        for x, mean, spread in zip(at, means, spreads, strict=True):
            if spread:
                axes.errorbar(x, mean, spread, color=INK, linewidth=1, capsize=2.5, zorder=3)
            label = axes.text(x, mean + spread + 1.2, f"{mean:.1f}", ha="center", fontsize=font_size, color=INK)
            label.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
    style_axes(axes)
    axes.set_xticks(range(len(clusters)), list(clusters), fontsize=10 if len(clusters) < 6 else 8, parse_math=False)
    axes.tick_params(axis="x", length=0)
    margin = 0.55 if len(clusters) > 1 else 0.9
    axes.set_xlim(-margin, len(clusters) - 1 + margin)
    axes.set_ylim(0, 108)
    axes.set_yticks(range(0, 101, 20))
    axes.yaxis.set_major_formatter(PercentFormatter(decimals=0))
    axes.set_ylabel("Accuracy", fontsize=10, color=INK)
    axes.grid(axis="y", color=FAINT, linewidth=0.7, zorder=0)
    figure.legend(
        loc="outside upper center", ncols=len(methods), frameon=False, fontsize=10, handlelength=1.0, handleheight=1.0
    )
    return as_png(figure)


def saliency_spectrum(scores: Mapping[str, Tensor], groups: Sequence[GroupLike]) -> bytes:
    """Draw how fast saliency falls: one panel per axis, one line per layer, coloured by depth.

    Channels are sorted inside their block, most salient first; the sorted scores are averaged over the blocks of a
    group, and over the groups that share axis and layer (experts, or encoder and decoder), and divided by their
    maximum. A flat line means that no channel matters more than another; a steep one that a prefix holds most.

    Args:
        scores: Saliency per group name, `[blocks, size]`, float, unit-free, not negative, on any device.
        groups: The groups to draw.

    Returns:
        A PNG file, 1660 pixels wide.

    Raises:
        SPPConfigError: There is no group, a group has no scores, or scores of another shape.
        NonFiniteWeightsError: A score is NaN or infinite.
    """
    if not groups:
        raise SPPConfigError("groups [] in saliency_spectrum are empty. Accepted: at least one group. Resolve the map.")
    panels: dict[str, dict[int | None, list[Curve]]] = {}
    for group in groups:
        panels.setdefault(group.axis, {}).setdefault(group.layer, []).append(_curve(scores, group))
    depths = [layer for panel in panels.values() for layer in panel if layer is not None]
    norm = Normalize(min(depths, default=0), max(depths, default=0))
    columns = 2 if len(panels) == 4 else min(len(panels), _PANELS_PER_LINE)
    lines = math.ceil(len(panels) / columns)

    figure = new_figure(0.5 + 2.7 * lines)
    drawn = []
    for number, (axis, panel) in enumerate(panels.items()):
        axes = figure.add_subplot(lines, columns, number + 1)
        drawn.append(axes)
        for layer, curves in sorted(panel.items(), key=lambda item: -1 if item[0] is None else item[0]):
            curve = np.mean(curves, axis=0)
            color = INK if layer is None else _DEPTH(norm(layer))
            axes.plot(
                np.linspace(0, 1, _RESOLUTION), curve / (curve.max() or 1.0), color=color, linewidth=1.3, alpha=0.9
            )
        style_axes(axes)
        axes.set_title(axis, fontsize=11, color=INK, loc="left", fontweight="bold")
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.03)
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
        axes.grid(color=FAINT, linewidth=0.6, zorder=0)
        if number % columns:
            axes.tick_params(axis="y", labelleft=False)
        else:
            axes.set_ylabel("Saliency / largest", fontsize=10, color=INK)
        if number + columns >= len(panels):
            axes.set_xlabel("Channels, most salient first", fontsize=10, color=INK)
    if len(set(depths)) > 1:
        bar = figure.colorbar(ScalarMappable(norm, _DEPTH), ax=drawn, aspect=30, pad=0.015)
        bar.set_label("Layer", fontsize=10, color=INK)
        bar.locator = MaxNLocator(nbins=8, integer=True)
        bar.update_ticks()
        bar.ax.tick_params(labelsize=9, length=2, colors=INK)
        bar.outline.set_visible(False)
    return as_png(figure)


def _curve(scores: Mapping[str, Tensor], group: GroupLike) -> Curve:
    """Sorted scores of a group, averaged over its blocks, at evenly spaced ranks."""
    if group.name not in scores:
        raise SPPConfigError(
            f"Group {group.name!r} in saliency_spectrum has no scores. Accepted: scores for every group drawn. "
            f"Score it, or leave it out of groups."
        )
    values = scores[group.name]
    if tuple(values.shape) != (group.blocks, group.size):
        raise SPPConfigError(
            f"Scores of group {group.name!r} in saliency_spectrum have shape {list(values.shape)}. "
            f"Accepted: [blocks, size] = [{group.blocks}, {group.size}]. Reshape them."
        )
    array = values.detach().double().cpu().numpy()
    if not np.isfinite(array).all():
        raise NonFiniteWeightsError(
            f"Scores of group {group.name!r} in saliency_spectrum hold NaN or infinity. Accepted: finite scores. "
            f"Look for the weight they come from."
        )
    falling = -np.sort(-array, axis=1)
    curve: Curve = falling.mean(axis=0)
    return np.interp(np.linspace(0, 1, _RESOLUTION), np.linspace(0, 1, group.size), curve)


def new_figure(height: float) -> Figure:
    """An empty figure, as wide as a card, of a height in inches."""
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08, wspace=0.05, hspace=0.06)
    return Figure(figsize=(_WIDTH, height), dpi=_DPI, layout=layout, facecolor="white")


def style_axes(axes: Axes) -> None:
    """Give axes the look of all plots."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#888888")
    axes.tick_params(labelsize=9, length=3, colors=INK)
    axes.set_axisbelow(True)


def as_png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG."""
    drawn, buffer = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=_DPI)
    picture = Image.open(drawn).convert("RGB")
    # A palette makes the many blended colours of thin lines a third of the size, with no difference to be seen.
    picture.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
