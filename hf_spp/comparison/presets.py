"""Comparisons that are ready to run: the source's experiment, and demos that install without the Hub."""

import dataclasses
import difflib
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from transformers.utils import logging

from .. import assets
from ..cards.results import ComparisonResults
from ..config import SPPConfig
from ..errors import AssetError, SPPConfigError
from .classification import DatasetSource, Recipe
from .evaluation import compare_methods, recipe_arguments

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Preset:
    """One comparison.

    Attributes:
        description: What it compares, in a line.
        model_name: What results call the model.
        model: Gives its Hub id or folder.
        datasets: Sources of the data sets by name; one that raises `AssetError` is left out by name.
        recipe: Splits and sizes.
        learning_rate: Of every fine-tuning; the other training arguments are the paper's.
        methods: What is compared.
        quick: Fields that differ in the quick variant.
        published: Results of the source, as far as it has any: `dataset`, `method`, `accuracy`, `f1` (fractions).
        source: Where they are published.
    """

    description: str
    model_name: str
    model: Callable[[], str | os.PathLike[str]]
    datasets: Mapping[str, DatasetSource]
    recipe: Recipe
    learning_rate: float
    methods: tuple[str, ...]
    quick: Mapping[str, Any]
    published: tuple[Mapping[str, Any], ...] = ()
    source: str | None = None


def _published(method: str, *percentages: tuple[str, float, float]) -> tuple[Mapping[str, Any], ...]:
    return tuple(
        MappingProxyType(
            {"dataset": dataset, "method": method, "accuracy": round(accuracy / 100, 4), "f1": round(f1 / 100, 4)}
        )
        for dataset, accuracy, f1 in percentages
    )


_VIT = "google/vit-base-patch16-224-in21k"
_METHODS = ("original", "pruning-rank", "spp-raffm", "spp")

_RAFFM_TABLE_1 = Preset(
    description="The source's experiment: ViT-base on CIFAR-10, CIFAR-100 and Flowers-102 from the Hub.",
    model_name=_VIT,
    model=lambda: _VIT,
    # Flowers-102 in this form trains on 7,169 images; the original split's 1,020 would leave 184 for 102 classes.
    datasets=MappingProxyType(
        {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100", "flowers102": "nelorth/oxford-flowers"}
    ),
    recipe=Recipe(),
    learning_rate=2e-4,
    methods=_METHODS,
    quick=MappingProxyType(
        {
            "datasets": {"cifar10": "uoft-cs/cifar10"},
            "recipe": Recipe(max_train_samples=320, max_eval_samples=320),
            "methods": ("original", "pruning-rank", "spp-raffm"),
        }
    ),
    published=(
        *_published("original", ("cifar10", 96.70, 96.26), ("cifar100", 84.50, 84.30), ("flowers102", 98.20, 97.85)),
        *_published(
            "pruning-rank", ("cifar10", 48.82, 46.53), ("cifar100", 15.40, 14.88), ("flowers102", 55.60, 54.70)
        ),
        *_published("spp-raffm", ("cifar10", 96.78, 96.53), ("cifar100", 85.20, 85.00), ("flowers102", 98.50, 98.10)),
    ),
    source="Yu, Muñoz and Jannesari, arXiv:2310.00247, table 1",
)

# The smallest set has 1,437 images to split: 30 % leave 1,000 to train on and 432 to evaluate on.
_DEMO_RECIPE = Recipe(
    validation_fraction=0.3, train_fraction=1.0, max_train_samples=1000, max_eval_samples=1000, image_size=56
)

_DEMO = Preset(
    description="DINOv2-small on three small image sets, from pinned packages; no Hub needed.",
    model_name="facebook/dinov2-small",
    model=assets.dinov2_small,
    datasets=assets.DEMO_DATASETS,
    recipe=_DEMO_RECIPE,
    learning_rate=5e-5,
    methods=_METHODS,
    quick=MappingProxyType(
        {
            "datasets": {"digits": assets.DEMO_DATASETS["digits"]},
            "methods": ("original", "pruning-rank", "spp"),
        }
    ),
)

_DEMO_TEXT = Preset(
    description="all-MiniLM-L6-v2 on the topics of Debian's fortunes, from pinned packages; no Hub needed.",
    model_name="sentence-transformers/all-MiniLM-L6-v2",
    model=assets.minilm,
    datasets=MappingProxyType({"fortunes": assets.fortunes}),
    recipe=Recipe(validation_fraction=0.2, train_fraction=1.0, max_length=64),
    learning_rate=3e-4,
    methods=_METHODS,
    quick=MappingProxyType({"datasets": {"fortunes": assets.fortunes}, "methods": ("original", "pruning-rank", "spp")}),
)

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {"raffm-table1": _RAFFM_TABLE_1, "demo": _DEMO, "demo-text": _DEMO_TEXT}
)


def find_source(name: str) -> tuple[DatasetSource, Recipe]:
    """Where a data set is loaded from that is named on the command line, and how it is split.

    That of a preset's data set comes with the preset's splits and image size; any other name is a Hub id or folder.
    """
    for preset in PRESETS.values():
        if name in preset.datasets:
            return preset.datasets[name], preset.recipe
    known = [own for preset in PRESETS.values() for own in preset.datasets]
    if "/" not in name and not Path(name).exists() and (near := difflib.get_close_matches(name, known, n=1)):
        logger.warning(f"Data set {name!r} is looked for on the Hub; built in is {near[0]!r}.")
    return name, Recipe()


def run_preset(
    preset: str | Preset,
    output_dir: str | os.PathLike[str],
    *,
    quick: bool = False,
    seed: int = 123,
    config: SPPConfig | None = None,
    save_models: bool | Collection[str] = False,
    training: Mapping[str, Any] = MappingProxyType({}),
) -> ComparisonResults:
    """Run a preset, or continue it where it was left.

    Args:
        preset: Key of `PRESETS`, or a preset of your own.
        output_dir: Folder of the results, as for `compare_methods`.
        quick: One data set and fewer runs.
        seed: Seed of every run.
        config: What `spp` does; None means `SPPConfig()`.
        save_models: Which fine-tuned checkpoints to keep, as for `compare_methods`.
        training: `TrainingArguments` that replace the preset's.

    Returns:
        The results; `left_out` names data sets that could not be fetched.

    Raises:
        SPPConfigError: The preset is unknown, or the folder holds results of other settings.
        AssetError: The model, or every data set, cannot be fetched.
    """
    if isinstance(preset, str) and preset not in PRESETS:
        raise SPPConfigError(
            f"preset {preset!r} in run_preset is unknown. Accepted: {', '.join(PRESETS)}. "
            "Use one of these, or name a model and data sets in compare_methods."
        )
    preset = PRESETS[preset] if isinstance(preset, str) else preset
    preset = dataclasses.replace(preset, **preset.quick) if quick else preset
    model = preset.model()
    datasets, left_out = _available(preset.datasets)
    if not datasets:
        raise AssetError(
            f"No data set of the comparison on {preset.model_name} could be fetched: "
            f"{'; '.join(f'{key}: {reason}' for key, reason in left_out.items())} "
            "Accepted: at least one. Connect to the network once, then run it again."
        )
    return compare_methods(
        model,
        datasets,
        preset.methods,
        recipe_arguments(**{"learning_rate": preset.learning_rate, **training}),
        recipe=preset.recipe,
        config=config,
        output_dir=output_dir,
        seed=seed,
        save_models=save_models,
        model_name=preset.model_name,
        left_out=left_out,
    )


def _available(sources: Mapping[str, DatasetSource]) -> tuple[dict[str, DatasetSource], dict[str, str]]:
    """Fetch what comes from packages; the names of what cannot be had, with the reason."""
    available: dict[str, DatasetSource] = {}
    left_out: dict[str, str] = {}
    for name, source in sources.items():
        try:
            available[name] = source() if callable(source) else source
        except AssetError as error:
            left_out[name] = " ".join(str(error).split())
    return available, left_out
