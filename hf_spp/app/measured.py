"""Measured quality of widths, from what `hf-spp curve` left: its results, or the section in the checkpoint's card."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import checkpoint
from ..cards.card_header import CARD_NAME
from ..cards.card_sections import find_section
from ..cards.markdown import unescaped
from ..cards.result_rows import unique
from ..cards.results import RESULTS_NAME
from ..cards.width_results import WidthReport, is_report
from ..cards.width_rows import metrics_caption, width_cells
from ..cards.width_section import WIDTHS_END, WIDTHS_START, measured_how
from ..errors import AppError, SPPError
from ..subnetworks.spec import SubnetworkSpec

_SHARE = re.compile(r"(\d+(?:\.\d+)?) %")
_COLUMN = re.compile(r"(?<!\\)\|")


@dataclass(frozen=True)
class MeasuredWidths:
    """What is known of the quality of a checkpoint's widths.

    Attributes:
        caption: What a cell of quality holds.
        header: Names of the columns.
        body: A line of cells for each width.
        widths: Channels that each group keeps, for each line; None where it does not say.
        source: Where it was read.
        how: How it was measured.
        dataset: Name of the data.
    """

    caption: str
    header: tuple[str, ...]
    body: tuple[tuple[str, ...], ...]
    widths: tuple[Mapping[str, int] | None, ...]
    source: str
    how: str
    dataset: str | None

    def line_of(self, widths: Mapping[str, int]) -> int | None:
        """The line that was measured at just these widths, None if none was."""
        return next((number for number, one in enumerate(self.widths) if one == widths), None)


def find_measured(
    model: Any,
    name: str,
    folder: Path,
    places: Sequence[str | os.PathLike[str]],
    given: str | os.PathLike[str] | None = None,
) -> MeasuredWidths | None:
    """Read what was measured of a checkpoint, None if nothing was.

    Args:
        model: Its model.
        name: What the user calls it, a folder or a Hub id.
        folder: Its folder.
        places: Folders in which results of this checkpoint may lie.
        given: The folder of results that the user named.

    Raises:
        AppError: The results there are of another model.
        CheckpointError: There are none there, or they are damaged.
    """
    if given is not None:
        report = WidthReport.load(given)
        if not _is_of(report, model, name):
            raise AppError(
                f"{Path(given) / RESULTS_NAME} was measured on {report.settings.get('model')} "
                f"({report.rows[0]['parameters']:,} parameters), which is not this checkpoint. Accepted: what "
                "`hf-spp curve` wrote for it. Give that folder, or leave --widths out."
            )
        return _from_report(report, model, Path(given))
    for place in map(Path, places):
        if (place / RESULTS_NAME).is_file() and is_report(checkpoint.read_json(place / RESULTS_NAME)):
            report = WidthReport.load(place)
            if _is_of(report, model, name):
                return _from_report(report, model, place)
    return _from_card(folder / CARD_NAME, model)


def _is_of(report: WidthReport, model: Any, name: str) -> bool:
    settings, full = report.settings, report.rows[0]
    return (
        settings.get("model_class") == type(model).__name__
        and full["parameters"] == sum(one.numel() for one in model.parameters())
        and Path(str(settings.get("model"))).name == Path(name).name
    )


def _from_report(report: WidthReport, model: Any, folder: Path) -> MeasuredWidths:
    header, body, _ = width_cells(report.rows)
    specs = {row["width"]: row["spec"] for row in report.rows}
    names = unique(row["width"] for row in report.rows)
    widths = tuple({} if specs[name] is None else SubnetworkSpec.from_dict(specs[name]).widths(model) for name in names)
    settings, data = report.settings, f" of {report.settings['dataset']}" if report.settings.get("dataset") else ""
    return MeasuredWidths(
        f"{metrics_caption(report.rows)}, on {settings['samples']:,} examples{data}.",
        tuple(header),
        tuple(map(tuple, body)),
        widths,
        str(folder / RESULTS_NAME),
        measured_how(report.rows, settings)[0],
        settings.get("dataset"),
    )


def _from_card(path: Path, model: Any) -> MeasuredWidths | None:
    """The table in the card, whose widths are known where they are shares."""
    text = checkpoint.read_text(path) if path.is_file() else ""
    place = find_section(text, WIDTHS_START, WIDTHS_END)
    if place is None:
        return None
    lines = [line.strip() for line in text[place[0] : place[1]].splitlines()]
    table = [tuple(_cells(line)) for line in lines if line.startswith("|") and line.endswith("|")]
    if len(table) < 3 or len({len(line) for line in table}) > 1:
        return None
    introduction = next((line for line in lines if line and not line.startswith(("<", "#", "|", "!"))), "")
    caption = unescaped(introduction)
    widths = tuple(_widths_of(line[0], model) for line in table[2:])
    return MeasuredWidths(caption, table[0], tuple(table[2:]), widths, str(path), "", None)


def _cells(line: str) -> list[str]:
    return [unescaped(cell.strip()) for cell in _COLUMN.split(line[1:-1])]


def _widths_of(name: str, model: Any) -> Mapping[str, int] | None:
    if name == "full":
        return {}
    found = _SHARE.fullmatch(name)
    try:
        return SubnetworkSpec.uniform(model, float(found[1]) / 100).widths(model) if found else None
    except SPPError:
        return None
