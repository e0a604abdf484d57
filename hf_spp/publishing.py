"""Reordered checkpoints on the Hub: push one, pull one, and say what a repository holds."""

import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from transformers import PreTrainedModel
from transformers.utils import logging

from . import checkpoint, folders, hub
from .architectures import channel_groups
from .cards.card_header import CARD_NAME
from .cards.eval_entries import ENTRIES_NAME, Benchmark, eval_result_files
from .cards.published_card import has_own_section, is_own_card, published_card
from .cards.reports import PLOTS, write_card
from .cards.result_rows import METRICS, Row
from .cards.results import RESULTS_NAME, ComparisonResults
from .cards.width_results import WidthReport
from .config import CONFIG_NAME
from .conversion import write_checkpoint
from .errors import CardError, OrdersError, SPPConfigError, UnsupportedModelError
from .fetching import fetch_checkpoint
from .hub import Change, Head, Pushed
from .loading import load_config, meta_model
from .orders_file import ORDERS_NAME
from .permutation import check_orders
from .reordering import Reordering, history_of, total_of
from .structure import tuner_layers
from .subnetworks.prefix_layout import write_prefix_layout
from .sums import SUMS_NAME, check_sums, files_of, read_sums, write_list

logger = logging.get_logger(__name__)

Layout = Literal["stock", "prefix"]
Results = Mapping[str, Mapping[str, float]] | ComparisonResults
Evaluation = Results | WidthReport
# What a push of new weights makes void, where it does not bring the file anew.
_OF_WEIGHTS = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|spp_subnetwork\.json|spp_\w+/[^/]+"
)


def push_to_hub(
    repo_id: str,
    model: PreTrainedModel,
    reordering: Reordering,
    *,
    evaluation: Evaluation | Sequence[Evaluation] | None = None,
    benchmarks: Mapping[str, Benchmark] | None = None,
    processing_class: Any = None,
    fine_tuned: bool = False,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload a reordered model",
    layout: Layout = "stock",
    token: str | bool | None = None,
) -> Pushed:
    """Push a reordered model to the Hub: weights, orders, processor, card and the sums of all files, in one commit.

    Readers see the repository as it was or as it is now, nothing between. A push that is repeated, because its answer
    was lost or by another call, makes no second commit. A card that somebody else wrote stays and gets a section;
    results of others stay in any case.

    Args:
        repo_id: Id of the repository, which is made if absent.
        model: The reordered model, without adapters.
        reordering: What was done to it.
        evaluation: What the card shows: metrics of this model by data set, such as `{"cifar10": {"accuracy": 0.967}}`
            (fractions), the results of `compare_methods`, the report of `width_report`, or a report beside one of the
            others, in a list.
        benchmarks: By data set of the evaluation, the task of a benchmark on the Hub that it is; those results also
            become entries of `.eval_results/`, which fill the benchmark's leaderboard.
        processing_class: Tokenizer, image processor or processor, saved beside the model.
        fine_tuned: Whether the model was trained after its reordering, which the card then says.
        private: Whether a new repository is private; None leaves it to the account.
        revision: Branch, which is made if absent.
        create_pr: Whether to open a pull request.
        commit_message: Title of the commit or of the pull request.
        layout: `prefix` adds copies of the weights whose slices are not contiguous, about a third of their size, so
            that `load_subnetwork` of any width downloads little more than the slice.
        token: Hub token, `True` for the stored one.

    Returns:
        What became of it: where it is seen, the commit, how much was uploaded.

    Raises:
        HubError: The Hub refused, or could not be reached. The repository is then as it was.
        OrdersError: The reordering is not that of the model.
        UnsupportedModelError: The model holds adapters.
        CardError: A result is malformed.
    """
    if tuner_layers(model):
        raise UnsupportedModelError(
            f"{type(model).__name__} holds adapters. Accepted: a plain model. Merge them (merge_and_unload), or push "
            "them by their own push_to_hub."
        )
    check_belongs(model, reordering)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / repo_id.rpartition("/")[2]
        folder.mkdir()
        report, results = _told_apart(evaluation)
        rows = _lay_results(folder, results)
        write_checkpoint(folder, model, reordering, processing_class=processing_class, rows=rows, fine_tuned=fine_tuned)
        if report is not None:
            report.add_to_card(folder)
        shown = [*rows, *(results.rows if isinstance(results, ComparisonResults) else ())]
        options = _Options(commit_message, private, revision, create_pr, token)
        return _push(folder, repo_id, layout, options, lambda theirs: _entries(shown, theirs, benchmarks or {}))


def push_checkpoint(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload a reordered model",
    layout: Layout = "stock",
    token: str | bool | None = None,
) -> Pushed:
    """Push the folder of a reordered checkpoint to the Hub, in one commit; see `push_to_hub`.

    Every file goes but hidden ones and checkpoints of a training run. The folder stays as it is, but for the copies
    that `layout="prefix"` adds to it.

    Args:
        folder: The folder.
        repo_id: Id of the repository, which is made if absent.
        private: Whether a new repository is private; None leaves it to the account.
        revision: Branch, which is made if absent.
        create_pr: Whether to open a pull request.
        commit_message: Title of the commit or of the pull request.
        layout: `prefix` adds copies of the weights whose slices are not contiguous, about a third of their size, so
            that `load_subnetwork` of any width downloads little more than the slice.
        token: Hub token, `True` for the stored one.

    Raises:
        CheckpointError: The folder is no reordered checkpoint, or a file is damaged.
        OrdersError: The orders do not fit the model.
        HubError: The Hub refused, or could not be reached. The repository is then as it was.
    """
    options = _Options(commit_message, private, revision, create_pr, token)
    return _push(check_checkpoint(folder), repo_id, layout, options, lambda theirs: {})


@dataclass(frozen=True)
class _Options:
    """How a push is to be made; see `push_to_hub`."""

    message: str
    private: bool | None
    revision: str | None
    create_pr: bool
    token: str | bool | None


def _push(
    folder: Path,
    repo_id: str,
    layout: Layout,
    options: _Options,
    entries: Callable[[str], Mapping[str, str | None]],
) -> Pushed:
    if layout not in get_args(Layout):
        raise SPPConfigError(f"layout={layout!r} is unknown. Accepted: {', '.join(get_args(Layout))}. Correct it.")
    if layout == "prefix":
        write_prefix_layout(folder)
    files = files_of(folder)
    known = read_sums(folder / SUMS_NAME) if (folder / SUMS_NAME).is_file() else {}
    with tempfile.TemporaryDirectory() as scratch:
        staged, card = Path(scratch), _card_of(folder, Path(scratch))

        def prepare(head: Head) -> Change:
            texts: dict[str, str | None] = dict(entries(_text(head, ENTRIES_NAME) or ""))
            texts[CARD_NAME] = published_card(card, _text(head, CARD_NAME), repo_id=head.repo_id)
            written = {name: checkpoint.write_text(staged / name, text) for name, text in texts.items() if text}
            sums = {name: known.get(name) or checkpoint.sha256_of(path) for name, path in files.items()}
            sums[CARD_NAME] = checkpoint.sha256_of(written[CARD_NAME])
            pushed = {**files, **written, SUMS_NAME: write_list(staged, sums)}
            stale = {name for name in head.digests if _OF_WEIGHTS.fullmatch(name) and name not in pushed}
            return Change(pushed, frozenset(stale | {name for name, text in texts.items() if text is None}), sums)

        return hub.push_files(repo_id, prepare, **vars(options))


def pull(
    repo_id: str,
    target: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    overwrite: bool = False,
) -> Path:
    """Download a reordered checkpoint into a folder, every file compared with its sums.

    The folder appears whole or not at all. What was downloaded before a break is in the Hugging Face cache and not
    downloaded again.

    Args:
        repo_id: Id of the repository.
        target: Folder to make.
        revision: Branch, tag or commit.
        token: Hub token.
        overwrite: Whether a folder with content may be replaced.

    Raises:
        CheckpointError: `target` may not be replaced, or a file is damaged.
        HubError: The repository cannot be read.
    """
    folders.check_replaceable(target, overwrite=overwrite)
    source = fetch_checkpoint(repo_id, revision=revision, token=token, whole=True)
    with folders.replacing_folder(target, overwrite=overwrite) as folder:
        files = {path.relative_to(source).as_posix(): path for path in source.rglob("*") if path.is_file()}
        files.pop(".gitattributes", None)
        checkpoint.copy_missing(files, folder)
        check_checkpoint(folder)
    return Path(target)


def check_belongs(model: Any, reordering: Reordering) -> None:
    """Refuse a model together with a reordering that is not its own.

    Raises:
        OrdersError: The orders do not fit the model, or it is in another order.
    """
    reordering.indices(model)
    # Of a model that was loaded nothing is known.
    if history_of(model) is None:
        return
    total = total_of(model)
    if total is None or total.digest != reordering.digest:
        state = "in its original order" if total is None else "in another order than this reordering made"
        raise OrdersError(
            f"This {type(model).__name__} is {state}. Accepted: a model and the reordering from the original order to "
            "that of the model; of several, first.then(second). Give that one."
        )


def check_checkpoint(folder: str | os.PathLike[str]) -> Path:
    """Check the folder of a reordered checkpoint as far as that needs no weights: files, sums, and orders.

    Raises:
        CheckpointError: It is no reordered checkpoint, or a file is missing or damaged.
        OrdersError: The orders do not fit the model.
    """
    folder = fetch_checkpoint(folder, verify=False)
    if (folder / SUMS_NAME).is_file():
        check_sums(folder)
    check_orders(channel_groups(meta_model(load_config(folder))), Reordering.from_pretrained(folder).orders)
    return folder


def _card_of(folder: Path, scratch: Path) -> str:
    """The card of a folder; where it has none, or somebody else's that says nothing of the order, with one written."""
    path = folder / CARD_NAME
    text = checkpoint.read_text(path) if path.is_file() else None
    if text is not None and (is_own_card(text) or has_own_section(text)):
        return text
    for name in (CONFIG_NAME, ORDERS_NAME):
        checkpoint.copy_file(folder / name, scratch / name)
    return published_card(checkpoint.read_text(write_card(scratch)), text)


def _told_apart(
    evaluation: Evaluation | Sequence[Evaluation] | None,
) -> tuple[WidthReport | None, Results | None]:
    """The report of widths, and what was measured of the whole model."""
    given: list[Any] = list(evaluation) if isinstance(evaluation, list | tuple) else [evaluation]
    reports = [one for one in given if isinstance(one, WidthReport)]
    others = [one for one in given if not isinstance(one, WidthReport)]
    if len(reports) > 1 or len(others) > 1:
        raise CardError(
            f"evaluation holds {len(reports)} width reports and {len(others)} other results. Accepted: one of each at "
            "most. Put metrics of several data sets into one dict."
        )
    return next(iter(reports), None), next(iter(others), None)


def _lay_results(folder: Path, evaluation: Results | None) -> list[Row]:
    """Lay the results of a comparison into a folder, or give those of the model itself as rows."""
    if isinstance(evaluation, ComparisonResults):
        for name in (RESULTS_NAME, *PLOTS.values()):
            if (evaluation.output_dir / name).is_file():
                checkpoint.copy_file(evaluation.output_dir / name, folder / name)
        return []
    if evaluation is None:
        return []
    if not isinstance(evaluation, Mapping) or not all(isinstance(one, Mapping) for one in evaluation.values()):
        raise CardError(
            f"evaluation is a {type(evaluation).__name__}. Accepted: metrics by data set, such as {{'cifar10': "
            "{'accuracy': 0.967}}, the results of compare_methods, or the report of width_report. Give one of these."
        )
    return [_row(dataset, metrics) for dataset, metrics in evaluation.items()]


def _row(dataset: str, metrics: Mapping[str, float]) -> Row:
    """A row of the model itself; accuracy and F1 are shown as such where both are there."""
    both = {name: metrics[name] for name in METRICS if name in metrics}
    ours = both if len(both) == len(METRICS) else {}
    others = {name: value for name, value in metrics.items() if name not in ours}
    return {"dataset": dataset, "method": "spp", **ours, "metrics": others}


def _entries(rows: Sequence[Row], theirs: str, benchmarks: Mapping[str, Benchmark]) -> Mapping[str, str | None]:
    """The files of benchmark entries that change; data sets that are no benchmark have none."""
    found = eval_result_files(rows, {ENTRIES_NAME: theirs}, benchmarks=benchmarks)
    for name in benchmarks:
        if name in found.left_out:
            logger.warning(f"{name} becomes no entry of a benchmark: {found.left_out[name]}.")
    return found.files


def _text(head: Head, name: str) -> str | None:
    """The text of a repository's file, None where there is none."""
    data = head.read(name)
    try:
        return None if data is None else data.decode()
    except UnicodeDecodeError as error:
        raise CardError(
            f"{name} of the repository is no UTF-8 text ({error}). Repair it there, or remove it."
        ) from error
