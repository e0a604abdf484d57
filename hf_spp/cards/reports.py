"""Cards of folders: a reordered checkpoint, results of a comparison, or both, become the folder's `README.md`."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from transformers.utils import logging

from .. import checkpoint
from ..errors import CardError, CheckpointError
from ..hub import find_files
from ..orders_file import ORDERS_NAME
from ..reordering import Reordering
from ..sums import renew_sums
from .card_header import CARD_NAME, name_of, read_header, split_card
from .markdown import plain
from .model_card import TAGS, CardContent, license_of, render_card, task_of_class, update_card_with_evaluation
from .published_card import is_own_card
from .result_rows import Row, unique
from .results import RESULTS_NAME, ComparisonResults, load_results
from .width_section import keep_widths

logger = logging.get_logger(__name__)

CHECKPOINT_NAME = "checkpoint"
SALIENCY_PLOT = "saliency.png"
PLOTS = {"Accuracy by method": "accuracy.png", "Saliency of the channels, by axis and layer": SALIENCY_PLOT}

# The data sets of the presets on the Hub.
_DATASET_IDS = {
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "flowers102": "nelorth/oxford-flowers",
    "fashion-mnist": "zalando-datasets/fashion_mnist",
    "mnist-5k": "ylecun/mnist",
}
_TRAINER_FILES = ("training_args.bin", "trainer_state.json")


def write_card(
    folder: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str] | None = None,
    name: str | None = None,
    rows: Sequence[Row] = (),
    fine_tuned: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write the card of a folder that holds a reordered checkpoint, results of a comparison, or both.

    The reordering is read from the folder or from its subfolder `checkpoint`, results and plots from the folder. What
    an earlier card of hf_spp says in its header and title is kept. A card that somebody else wrote gets the results as
    a section of its own.

    Args:
        folder: Folder of `spp_orders.safetensors`, `results.json` and plots, as far as it has them.
        source: Folder or Hub id of the model that was reordered, whose card gives license, language and task.
        name: Title of a new card, without `-spp`; None takes the folder's of a fine-tuned model, or else the source's.
        rows: Results of the checkpoint as it is, for a folder without results of a comparison.
        fine_tuned: Whether the checkpoint was trained after its reordering; a folder with the Trainer's files was.
        overwrite: Whether a card that somebody else wrote may be replaced.

    Returns:
        Path of the card.

    Raises:
        CheckpointError: The folder holds neither, or a file is damaged.
        CardError: The earlier card is damaged, or somebody else's and there are no results to add.
    """
    folder = Path(folder)
    path = folder / CARD_NAME
    home = next((home for home in (folder, folder / CHECKPOINT_NAME) if (home / ORDERS_NAME).is_file()), None)
    results = load_results(folder) if (folder / RESULTS_NAME).is_file() else None
    results = results if results and results.rows else None
    if home is None and results is None:
        raise CheckpointError(
            f"Folder '{folder}' holds neither {ORDERS_NAME} nor {RESULTS_NAME}, so there is nothing to write a card "
            "about. Accepted: a folder of `hf-spp reorder`, `compare` or `demo`. Check the path."
        )
    earlier = checkpoint.read_text(path) if path.is_file() else None
    theirs = earlier is not None and not is_own_card(earlier)
    if home is not None and (overwrite or not theirs):
        evaluation = _evaluation(results) if results else {"rows": rows, "measured": True} if rows else {}
        content = _content(folder, home, None if theirs else earlier, evaluation, source, name, fine_tuned)
        checkpoint.write_text(path, keep_widths(str(render_card(content)), earlier or ""))
        renew_sums(folder, [CARD_NAME])
        return path
    if results is None:
        raise CardError(
            f"'{path}' was not written by hf_spp. Accepted: no card, or one of hf_spp's. Move it away, or allow it to "
            "be replaced (--overwrite)."
        )
    evaluation = _evaluation(results)
    name = f"Comparison on {_short(results.settings['model'])}"
    text = update_card_with_evaluation(earlier or f"# {plain(name)}\n", model_name=name, fine_tuned=False, **evaluation)
    return checkpoint.write_text(path, text)


def _content(
    folder: Path,
    home: Path,
    earlier: str | None,
    evaluation: dict[str, Any],
    source: str | os.PathLike[str] | None,
    name: str | None,
    fine_tuned: bool,
) -> CardContent:
    summary = Reordering.from_pretrained(home).summary()
    text = (None if source is None else _source_card(source)) or earlier or _card_in(home) or ""
    metadata = read_header(split_card(text)[0])
    base = _hub_id(source) or _hub_id(metadata.get("base_model"))
    own = read_header(split_card(earlier or "")[0])
    # A model that was trained since is another than its source, and may solve another task.
    named = name or (folder.resolve() if fine_tuned else source or base or folder.resolve())
    title = f"{_short(named).removesuffix('-spp')}-spp"
    stated = (own if fine_tuned else metadata).get("pipeline_tag")
    known = stated if isinstance(stated, str) and stated else task_of_class(summary["model_class"])
    task = evaluation.pop("task", known)
    used = [row["dataset"].partition(":")[0] for row in evaluation.get("rows", ())]
    return CardContent(
        model_name=name_of({}, earlier) if earlier else title,
        summary=summary,
        folder="." if home == folder else CHECKPOINT_NAME,
        base_model=base,
        license=license_of(text),
        language=[code for code in _listed(metadata.get("language")) if isinstance(code, str)],
        tags=[str(tag) for tag in _listed(own.get("tags")) if tag not in TAGS],
        datasets=unique(
            name
            for name in (*_listed(own.get("datasets")), *(_DATASET_IDS.get(name, name) for name in used))
            if isinstance(name, str) and "/" in name
        ),
        pipeline_tag=task,
        plots={caption: name for caption, name in PLOTS.items() if (folder / name).is_file()},
        fine_tuned=fine_tuned or any((home / name).exists() for name in _TRAINER_FILES),
        **evaluation,
    )


def _evaluation(results: ComparisonResults) -> dict[str, Any]:
    """What the results say about how they were measured."""
    kind = next((one["kind"] for one in results.settings["datasets"].values() if one.get("kind")), None)
    if kind is None or results.settings.get("model") is None:
        raise CheckpointError(
            f"{RESULTS_NAME} in '{results.output_dir}' does not say which model and what kind of data were compared. "
            "Accepted: what compare_methods wrote. Compare again."
        )
    shared = {name: results.settings.get(name) for name in ("model", "seed", "recipe", "training_arguments")}
    shared["recipe"] = {name: value for name, value in (shared["recipe"] or {}).items() if value is not None}
    return {
        "rows": results.rows,
        "task": f"{kind}-classification",
        "method": checkpoint_method(results) or "spp",
        "settings": {**shared, "left_out": results.left_out},
    }


def checkpoint_method(results: ComparisonResults) -> str | None:
    """Which of the compared methods the checkpoint beside the results shows, None if none reorders by saliency."""
    methods = [row["method"] for row in results.rows]
    return next((method for method in ("spp", "spp-raffm") if method in methods), None)


def _source_card(source: str | os.PathLike[str]) -> str | None:
    path = find_files(source, [CARD_NAME]).get(CARD_NAME)
    try:
        if path is None:
            return None
        text = checkpoint.read_text(path)
        read_header(split_card(text)[0])
    except (CardError, CheckpointError) as error:
        logger.warning(f"The card of {os.fspath(source)} is not carried over: {error}")
        return None
    return text


def _card_in(folder: Path) -> str | None:
    path = folder / CARD_NAME
    return checkpoint.read_text(path) if path.is_file() else None


def _hub_id(value: Any) -> str | None:
    """The value, or the first of its list, if it is a Hub id and no folder here."""
    name = value[0] if isinstance(value, list) and value else value
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return None if name is None or Path(name).exists() else str(name)


def _short(name: object) -> str:
    return str(name).rstrip("/").rsplit("/", 1)[-1]


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list) else [value]
