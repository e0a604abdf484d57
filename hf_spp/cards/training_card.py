"""The card of a model in training: written when it ends, brought up to date with every later evaluation."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from .. import checkpoint
from ..reordering import Reordering
from .model_card import CardContent, render_card, task_of_class, update_card_with_evaluation

CARD_NAME = "README.md"


def evaluation_results(metrics: Mapping[str, Any], loader: Any) -> tuple[str, dict[str, float]]:
    """Name of the data set that was evaluated, and its metrics without the prefix and the run's timings."""
    results = {}
    for key, value in metrics.items():
        name = key.partition("_")[2]
        if name and isinstance(value, (int, float)) and not re.search(r"runtime|_per_second|^time$|preparation", name):
            results[name] = float(value)
    info = getattr(getattr(loader, "dataset", None), "info", None)
    return getattr(info, "dataset_name", None) or "evaluation set", results


def write_training_card(
    folder: Path,
    name: str,
    model: PreTrainedModel,
    reordering: Reordering,
    results: Mapping[str, Mapping[str, float]],
    seed: int,
) -> None:
    """Write the card of a run into its folder, or the evaluation's results into the card that is there.

    Args:
        folder: The run's output folder.
        name: The model's name, or its id on the Hub.
        model: The model.
        reordering: What it went through.
        results: Metrics of each data set that was evaluated.
        seed: Seed of the run.
    """
    path, task, name = folder / CARD_NAME, task_of_class(reordering.model_class), name.split("/")[-1]
    rows = [
        {"dataset": dataset, "method": "spp", "seed": seed, "metrics": dict(metrics)}
        for dataset, metrics in results.items()
    ]
    if path.exists():
        if rows:
            text = update_card_with_evaluation(checkpoint.read_text(path), rows, task=task, model_name=name)
            checkpoint.write_text(path, text)
        return
    base = getattr(getattr(model, "config", None), "_name_or_path", None)
    content = CardContent(
        model_name=name,
        summary=reordering.summary(),
        base_model=base if base and not Path(base).exists() else None,
        pipeline_tag=task,
        rows=rows,
        fine_tuned=True,
    )
    checkpoint.write_text(path, str(render_card(content)))
