"""Reordered checkpoints: save what is cut out of one, and measure what its widths are worth."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import checkpoint, folders
from ..architectures import channel_groups
from ..cards.card_header import CARD_NAME
from ..cards.width_results import WidthReport
from ..errors import SubnetworkError
from ..loading import companion_files, quiet_transformers, without_notes
from ..subnetworks import record
from ..subnetworks.widths import cut_of
from .measurement import width_report
from .named_data import NamedData

RECORD_NAME = record.RECORD_NAME


@dataclass(frozen=True)
class SavedSlice:
    """A sub-network in a folder of its own.

    Attributes:
        folder: The folder.
        model_class: Class of both models.
        parameters: Number of weights before and after.
        bytes: Their memory before and after.
        cuts: For each axis that was cut: how many groups, channels in each block before, fewest and most after.
        compensated: How many projections were refitted.
        reason: Why stock transformers does not load it; None where it does.
    """

    folder: Path
    model_class: str
    parameters: tuple[int, int]
    bytes: tuple[int, int]
    cuts: dict[str, tuple[int, int, int, int]]
    compensated: int
    reason: str | None


def save_slice(
    model: Any,
    small: Any,
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    overwrite: bool = False,
) -> SavedSlice:
    """Write a sub-network as a checkpoint of its own, with the tokenizer, processor and license of its source.

    The folder appears whole or not at all.

    Args:
        model: The model that it was cut out of.
        small: The sub-network.
        source: Folder or Hub id of the reordered checkpoint.
        target: Folder to make.
        overwrite: Whether a folder with content may be replaced.

    Raises:
        SubnetworkError: Nothing was cut.
        CheckpointError: `target` may not be replaced, or cannot be written.
    """
    found = record.record_of(small)
    if found is None or not found.widths:
        raise SubnetworkError(
            f"These widths keep every channel of {type(model).__name__}, so nothing would be cut. Accepted: a width "
            "below the model's own, which is rounded to a whole head and to multiples of 8 neurons. Give a smaller one."
        )
    beside = companion_files(source)
    with folders.replacing_folder(target, overwrite=overwrite) as folder:
        # What is said about the slice names the folder that it is built in.
        with quiet_transformers(bars=False), without_notes(record.__name__):
            small.save_pretrained(folder)
        checkpoint.copy_missing(beside, folder)
    weights = [list(one.parameters()) for one in (model, small)]
    counts = [sum(one.numel() for one in each) for each in weights]
    sizes = [sum(one.numel() * one.element_size() for one in each) for each in weights]
    return SavedSlice(
        Path(target),
        type(small).__name__,
        (counts[0], counts[1]),
        (sizes[0], sizes[1]),
        _cuts(model, found),
        sum(not name.endswith("bias") for name in found.compensated),
        found.reason,
    )


def measure_checkpoint(
    source: str | os.PathLike[str],
    model: Any,
    data: NamedData,
    shares: Sequence[float],
    output_dir: Path,
    *,
    calibration_samples: int,
    batch_size: int = 16,
    latency_runs: int = 10,
) -> tuple[WidthReport, Path | None]:
    """Measure the widths of a reordered checkpoint on a named data set, and add them to its card.

    Args:
        source: Folder or Hub id of the checkpoint; the card of a folder gets a section.
        model: What it holds.
        data: What it is measured and compensated on.
        shares: Shares of the neurons and heads of every layer.
        output_dir: Folder of the results.
        calibration_samples: Examples to compensate on; 0 for none.
        batch_size: Examples in a batch, which is also timed.
        latency_runs: As for `width_report`.

    Returns:
        The report, and the path of the card that shows it, if any.

    Raises:
        SPPError: Whatever `width_report` raises.
    """
    report = width_report(
        model,
        data.evaluation_batches(model, batch_size),
        shares,
        calibration=data.calibration_batches(calibration_samples) or None,
        latency_runs=latency_runs,
        dataset_name=data.name,
        output_dir=output_dir,
    )
    has_card = (Path(source) / CARD_NAME).is_file()
    return report, report.add_to_card(source) if has_card else None


def _cuts(model: Any, found: record.SubnetworkRecord) -> dict[str, tuple[int, int, int, int]]:
    groups = channel_groups(model)
    cuts: dict[str, tuple[int, int, int, int]] = {}
    for name in dict.fromkeys(cut_of(groups.by_name[name]) for name in found.widths):
        own = [group for group in groups if cut_of(group) == name]
        kept = [found.widths.get(group.name, group.size) for group in own]
        cuts[name] = (len(own), max(group.size for group in own), min(kept), max(kept))
    return cuts
