"""A width report: its rows, what they share, and the files that hold both."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import checkpoint
from ..config import check_format_version
from ..errors import CardError, CheckpointError
from ..sums import renew_sums
from .card_header import CARD_NAME
from .markdown import plain
from .results import FORMAT_VERSION, RESULTS_NAME
from .width_plots import quality_curve
from .width_rows import check_width_rows, metrics_caption, width_table
from .width_section import check_width_settings, measured_how, update_card_with_widths, width_section

TABLE_NAME = "widths.md"
PLOTS = {"parameters": "widths_parameters.png", "latency": "widths_latency.png"}
_CAPTIONS = {"parameters": "Quality against parameters", "latency": "Quality against the time of a forward pass"}
_REPORT = "widths"


@dataclass(frozen=True)
class WidthReport:
    """What `width_report` measured.

    Attributes:
        rows: One for the full model, and for each width one per kind of cut and seed: `width`, `kind` (`full`, `plain`,
            `compensated`, `random`, `random-compensated`), `seed`, `spec`, `parameters`, `bytes`, `share` (of the full
            model's parameters), `metrics`, `latency` (one entry per batch size), and `stock` (whether a stock config
            states the widths). A metric that is not finite is None.
        settings: What they share, as written to `results.json`.
    """

    rows: list[dict[str, Any]]
    settings: dict[str, Any]

    def to_markdown(self) -> str:
        """Cost and quality as a Markdown table, a line per width and a column per kind of cut, and how measured."""
        caption = f"{plain(metrics_caption(self.rows))}."
        parts = [caption, width_table(self.rows), *measured_how(self.rows, self.settings)]
        return "\n\n".join(part for part in parts if part) + "\n"

    def plots(self) -> dict[str, bytes]:
        """PNG files by name: quality against parameters, and against time where it was measured."""
        timed = any(row["latency"] for row in self.rows)
        drawn = {"parameters": quality_curve(self.rows, "parameters")}
        if timed:
            drawn["latency"] = quality_curve(self.rows, "latency")
        return {PLOTS[against]: picture for against, picture in drawn.items()}

    def save(self, save_directory: str | os.PathLike[str]) -> Path:
        """Write `results.json`, the table and the plots into a folder; an earlier report there is replaced.

        Returns:
            The folder.

        Raises:
            CheckpointError: The folder holds results of something else, or cannot be written.
        """
        folder = check_report_folder(save_directory)
        content = {
            "format_version": FORMAT_VERSION,
            "report": _REPORT,
            "rows": self.rows,
            "settings": self.settings,
        }
        checkpoint.write_json(folder / RESULTS_NAME, content)
        checkpoint.write_text(folder / TABLE_NAME, self.to_markdown())
        self._write_plots(folder)
        return folder

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "WidthReport":
        """Read a report that `save` wrote.

        Raises:
            CheckpointError: `results.json` is missing, damaged, of something else, or from a newer version.
        """
        path = Path(folder) / RESULTS_NAME
        stored = checkpoint.read_json(path)
        if not is_report(stored):
            raise CheckpointError(
                f"{path} is no width report. Accepted: what WidthReport.save or `hf-spp curve` wrote. Check the path."
            )
        check_format_version(stored.get("format_version"), RESULTS_NAME)
        rows, settings = stored.get("rows"), stored.get("settings")
        if not isinstance(rows, list) or not all(isinstance(one, dict) for one in (*rows, settings)):
            raise CheckpointError(f"{path} cannot be used: rows or settings are missing. Measure again.")
        try:
            check_width_rows(rows)
            check_width_settings(settings)
        except CardError as error:
            raise CheckpointError(f"{path} cannot be used: {error}") from error
        return cls(rows, settings)

    def add_to_card(self, folder: str | os.PathLike[str]) -> Path:
        """Write the section "Widths", with its plots beside it, into the card of a checkpoint.

        Everything else in the card stays as it is; an earlier section is replaced.

        Args:
            folder: Folder of the checkpoint and its `README.md`.

        Returns:
            Path of the card.

        Raises:
            CheckpointError: There is no card, or it cannot be written.
            CardError: The markers of the section are damaged.
        """
        folder = Path(folder)
        path = folder / CARD_NAME
        if not path.is_file():
            raise CheckpointError(
                f"Folder '{folder}' has no {CARD_NAME} to write the widths into. Accepted: a checkpoint with a card. "
                "Write one first (hf-spp card)."
            )
        drawn = self.plots()
        plots = {_CAPTIONS[against]: name for against, name in PLOTS.items() if name in drawn}
        text = update_card_with_widths(checkpoint.read_text(path), width_section(self.rows, self.settings, plots))
        self._write_plots(folder, drawn)
        checkpoint.write_text(path, text)
        renew_sums(folder, [CARD_NAME, *PLOTS.values()])
        return path

    def _write_plots(self, folder: Path, drawn: Mapping[str, bytes] | None = None) -> None:
        drawn = self.plots() if drawn is None else drawn
        for name in PLOTS.values():
            if name in drawn:
                checkpoint.write_bytes(folder / name, drawn[name])
            else:
                checkpoint.remove_file(folder / name)


def check_report_folder(folder: str | os.PathLike[str]) -> Path:
    """Refuse a folder whose `results.json` is not of a width report, such as that of a comparison.

    Raises:
        CheckpointError: It is.
    """
    path = Path(folder) / RESULTS_NAME
    if Path(folder).exists() and not Path(folder).is_dir():
        raise CheckpointError(f"{folder} is a file; a folder of results is written there. Give another path.")
    if path.exists() and not is_report(checkpoint.read_json(path)):
        raise CheckpointError(
            f"{path} holds results of something else than a width report. Give another folder, or move the file away."
        )
    return Path(folder)


def is_report(stored: Any) -> bool:
    """Whether what was read from a `results.json` is a width report."""
    return isinstance(stored, dict) and stored.get("report") == _REPORT
