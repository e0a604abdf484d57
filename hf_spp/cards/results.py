"""Results of a comparison: rows, the settings they share, and the file that holds both."""

import copy
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import checkpoint
from ..config import SPPConfig, check_format_version
from ..errors import CardError, CheckpointError, SPPConfigError
from . import result_rows
from .markdown import plain

METHODS = tuple(result_rows.METHODS)
RESULTS_NAME = "results.json"
FORMAT_VERSION = 1
ROW_KEYS = frozenset(
    {
        "dataset",
        "method",
        "accuracy",
        "f1",
        "max_abs_diff",
        "relative_diff",
        "seconds",
        "seed",
        "versions",
        "parameters",
        "train_samples",
        "eval_samples",
        "model",
        "fingerprint",
    }
)

_COMPARED = ("model", "seed", "recipe", "config", "training_arguments")


@dataclass(frozen=True)
class ComparisonResults:
    """What `compare_methods` measured.

    Attributes:
        rows: One per data set and method; see `compare_methods`.
        settings: What they share, as written to `results.json`.
        output_dir: Folder of `results.json`, the table, the plots and the saved models.
    """

    rows: list[dict[str, Any]]
    settings: dict[str, Any]
    output_dir: Path

    @property
    def left_out(self) -> dict[str, str]:
        """Data sets that could not be had, with the reason."""
        return dict(self.settings["left_out"])

    def to_markdown(self) -> str:
        """Accuracy and macro F1 in percent, a line per method and a column per data set."""
        notes = [f"\nLeft out: **{plain(name)}** ({plain(reason)})\n" for name, reason in sorted(self.left_out.items())]
        return result_rows.results_table(self.rows).rstrip() + "\n" + "".join(notes)


@dataclass
class ResultsFile:
    """`results.json` of one folder: rows, and the settings they share."""

    folder: Path
    settings: dict[str, Any]
    rows: list[dict[str, Any]]

    @classmethod
    def open(cls, folder: Path, settings: dict[str, Any]) -> "ResultsFile":
        """Begin a comparison in a folder, or continue the one that lies there.

        Args:
            folder: Folder of `results.json`; it need not exist.
            settings: What all rows share, with the keys `datasets` and `left_out`.

        Raises:
            SPPConfigError: The folder holds results of other settings.
            CheckpointError: The file is damaged or written by a newer version.
        """
        path = folder / RESULTS_NAME
        settings = json.loads(json.dumps(settings, default=str))
        if not path.exists():
            return cls(folder, settings, [])
        rows, old = _read(path)
        changed = _differences({key: old.get(key) for key in _COMPARED}, {key: settings[key] for key in _COMPARED})
        if changed:
            raise _other_settings(path, changed)
        return cls(folder, {**settings, "datasets": old["datasets"]}, rows)

    @property
    def path(self) -> Path:
        """Where the file lies."""
        return self.folder / RESULTS_NAME

    def add_dataset(self, name: str, description: dict[str, Any]) -> None:
        """Note what a data set holds.

        Raises:
            SPPConfigError: Earlier rows were measured on other data of this name.
        """
        known = self.settings["datasets"].setdefault(name, description)
        if changed := _differences({name: known}, {name: description}):
            raise _other_settings(self.path, changed)

    def fingerprint(self, dataset: str, method: str, config: SPPConfig | None) -> str:
        """Digest of everything that decides the result of one run."""
        shared = {key: self.settings[key] for key in _COMPARED if key != "config"}
        parts = [shared, self.settings["datasets"][dataset], method, config and config.to_dict()]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def has(self, dataset: str, method: str, fingerprint: str) -> bool:
        """Whether this run is finished.

        Raises:
            SPPConfigError: It is, with other settings.
        """
        for row in self.rows:
            if (row["dataset"], row["method"]) == (dataset, method):
                if row["fingerprint"] != fingerprint:
                    raise _other_settings(self.path, [f"the settings of {method!r} on {dataset!r}"])
                return True
        return False

    def add_row(self, row: dict[str, Any]) -> None:
        """Take a finished run in, in place of an older one of the same data set and method, and write the file."""
        key = (row["dataset"], row["method"])
        rows = [other for other in self.rows if (other["dataset"], other["method"]) != key]
        names = list(dict.fromkeys(other["dataset"] for other in [*self.rows, row]))
        self.rows = sorted([*rows, row], key=lambda r: (names.index(r["dataset"]), METHODS.index(r["method"])))
        self.write()

    def write(self) -> None:
        """Write everything, atomically."""
        content = {"format_version": FORMAT_VERSION, "rows": self.rows, "settings": self.settings}
        checkpoint.write_json(self.path, content)

    def to_results(self) -> ComparisonResults:
        """A copy of what is known so far."""
        return ComparisonResults(copy.deepcopy(self.rows), copy.deepcopy(self.settings), self.folder)


def load_results(folder: str | os.PathLike[str]) -> ComparisonResults:
    """Read what `compare_methods` wrote into a folder.

    Raises:
        CheckpointError: `results.json` is missing, damaged or written by a newer version.
    """
    rows, settings = _read(Path(folder) / RESULTS_NAME)
    return ComparisonResults(rows, settings, Path(folder))


def _read(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    stored = checkpoint.read_json(path)
    if not isinstance(stored, dict):
        raise _damaged(path, "it holds no JSON object")
    check_format_version(stored.get("format_version"), RESULTS_NAME)
    rows, settings = stored.get("rows"), stored.get("settings")
    if not isinstance(rows, list) or not all(isinstance(row, dict) and row.keys() >= ROW_KEYS for row in rows):
        raise _damaged(path, f"its rows lack some of {sorted(ROW_KEYS)}")
    if not isinstance(settings, dict) or not all(
        isinstance(settings.get(key), dict) for key in ("datasets", "left_out")
    ):
        raise _damaged(path, "its settings lack 'datasets' or 'left_out'")
    try:
        for number, row in enumerate(rows):
            result_rows.check_row(row, number)
    except CardError as error:
        raise _damaged(path, str(error)) from error
    sound = (
        all(isinstance(one, dict) and isinstance(one.get("kind", ""), str) for one in settings["datasets"].values())
        and result_rows.is_texts(settings["left_out"])
        and isinstance(settings.get("model"), str | None)
        and all(isinstance(settings.get(key), dict | None) for key in ("recipe", "training_arguments"))
    )
    if not sound:
        raise _damaged(path, "its settings are of another kind")
    return rows, settings


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be used: {reason}. Accepted: what compare_methods wrote. "
        "Give another output_dir, or move the file away."
    )


def _other_settings(path: Path, changed: Sequence[str]) -> SPPConfigError:
    return SPPConfigError(
        f"{path} holds results of other settings: {'; '.join(changed)}. Accepted: the settings it was begun with, so "
        "that its rows stay comparable. Give another output_dir, or move the file away."
    )


def _differences(old: Any, new: Any, name: str = "") -> list[str]:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [f"{name} is {old!r} there and {new!r} now"]
    keys = sorted(old.keys() | new.keys())
    return [line for key in keys for line in _differences(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))]
