"""The card of a model in training: written when it ends, brought up to date with every later evaluation."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from .. import checkpoint
from ..reordering import Reordering
from .card_header import CARD_NAME
from .model_card import CardContent, render_card, task_of_class
from .published_card import is_own_card, published_card, renew_evaluation


def evaluation_results(metrics: Mapping[str, Any], loader: Any) -> tuple[str, dict[str, float]]:
    """Name of the data set that was evaluated, and its metrics without the prefix and the run's timings."""
    results = {}
    for key, value in metrics.items():
        name = key.partition("_")[2]
        if name and isinstance(value, (int, float)) and not re.search(r"runtime|_per_second|^time$|preparation", name):
            results[name] = float(value)
    info = getattr(getattr(loader, "dataset", None), "info", None)
    return getattr(info, "dataset_name", None) or "evaluation set", results


def training_card(
    name: str,
    model: PreTrainedModel,
    reordering: Reordering,
    results: Mapping[str, Mapping[str, float]],
    seed: int,
) -> str:
    """The card of a model in training.

    Args:
        name: The model's name, or its id on the Hub.
        model: The model.
        reordering: What it went through.
        results: Metrics of each data set that was evaluated.
        seed: Seed of the run.
    """
    base = getattr(getattr(model, "config", None), "_name_or_path", None)
    content = CardContent(
        model_name=name.split("/")[-1],
        repo_id=name if "/" in name else None,
        summary=reordering.summary(),
        base_model=base if base and not Path(base).exists() else None,
        pipeline_tag=task_of_class(reordering.model_class),
        rows=[
            {"dataset": dataset, "method": "spp", "seed": seed, "metrics": dict(metrics)}
            for dataset, metrics in results.items()
        ],
        fine_tuned=True,
    )
    return str(render_card(content))


def write_training_card(folder: Path, card_text: str) -> None:
    """Write the card of a run into its output folder.

    In an earlier card of the run only the evaluation changes; one of somebody else stays and gets a section.
    """
    path = folder / CARD_NAME
    theirs = checkpoint.read_text(path) if path.is_file() else None
    own = theirs is not None and is_own_card(theirs)
    checkpoint.write_text(path, renew_evaluation(card_text, theirs or "") if own else published_card(card_text, theirs))
