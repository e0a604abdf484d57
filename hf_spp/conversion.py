"""Whole checkpoints: write a reordered one, and check one that was written."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from . import checkpoint, folders
from .apply import invert_indices, named_tensors
from .architectures import channel_groups
from .cards.plots import saliency_spectrum
from .cards.reports import CHECKPOINT_NAME, SALIENCY_PLOT, checkpoint_method, write_card
from .cards.result_rows import Row
from .cards.results import ComparisonResults
from .config import SPPConfig
from .errors import OrdersError
from .fetching import fetch_checkpoint
from .hub import find_files
from .loading import companion_files, load_model, quiet_transformers
from .orders_file import ORDERS_NAME
from .proof import Proof, Witness, default_tolerance
from .reordering import Reordering, remember
from .saliency import weight_scores
from .sums import SUMS_NAME, write_sums
from .transform import apply_spp

# What the Hub takes well, and a machine reads in pieces.
SHARD_SIZE = "5GB"


def load_original(source: str | os.PathLike[str], dtype: str = "auto") -> PreTrainedModel:
    """Load a pretrained model with its channels in the original order; an earlier reordering is undone.

    Args:
        source: A folder or a Hub id.
        dtype: As for `load_model`.

    Raises:
        SPPError: Whatever `load_model` raises, or the earlier reordering does not fit.
    """
    model = load_model(source, dtype)
    if ORDERS_NAME in find_files(source, [ORDERS_NAME]):
        Reordering.from_pretrained(source).undo(model)
    return model


def load_reordered(
    repo_or_dir: str | os.PathLike[str],
    revision: str | None = None,
    verify: bool = True,
    *,
    token: str | bool | None = None,
    dtype: str = "auto",
) -> tuple[PreTrainedModel, Reordering]:
    """Load a reordered checkpoint with its reordering, which the model knows from then on.

    All files come from one commit of a repository, from the Hugging Face cache where they are there.

    Args:
        repo_or_dir: A folder, or a Hub id.
        revision: Branch, tag or commit of a repository.
        verify: Whether to compare every file that is read with `SHA256SUMS`. Whatever the answer, the orders must be
            permutations that fit the model, and the proof of equal function must be within its tolerance.
        token: Hub token, `True` for the stored one, `False` for none.
        dtype: `auto` keeps the checkpoint's; `float32`, `bfloat16`, `float16` or `float64`.

    Returns:
        The model, in evaluation mode, and what was done to it.

    Raises:
        CheckpointError: It holds no orders, or a file is missing, damaged, or from a newer version.
        OrdersError: An order is no permutation or belongs to another model, or the proof had failed.
        HubError: The repository cannot be read.
    """
    folder = fetch_checkpoint(repo_or_dir, revision=revision, token=token, verify=verify)
    reordering = Reordering.from_pretrained(folder)
    proof = reordering.proof
    if proof is not None and not proof.relative_diff <= (reordering.tolerance or 0.0):
        raise OrdersError(
            f"The outputs of {os.fspath(repo_or_dir)!r} had moved by {proof.relative_diff:.3g} of their scale when it "
            f"was reordered; up to {reordering.tolerance:.3g} is accepted. Reorder the original model again."
        )
    with quiet_transformers(bars=False):
        model = load_model(folder, dtype)
    reordering.indices(model)
    remember(model, (reordering,))
    if not Path(repo_or_dir).is_dir():
        model.name_or_path = model.config._name_or_path = os.fspath(repo_or_dir)
    return model, reordering


def save_reordered(
    model: PreTrainedModel,
    reordering: Reordering,
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    overwrite: bool = False,
) -> Path:
    """Write a reordered model as a stock checkpoint, with its orders and a card.

    The folder appears whole or not at all.

    Args:
        model: The reordered model.
        reordering: What was done to it.
        source: Folder or Hub id of the original; its tokenizer, processor and license files are copied, and its card's
            license, language and task are carried over.
        target: Folder to make.
        overwrite: Whether a folder with content may be replaced.

    Raises:
        CheckpointError: `target` may not be replaced, or cannot be written.
    """
    folders.check_replaceable(target, overwrite=overwrite)
    beside = companion_files(source)
    with folders.replacing_folder(target, overwrite=overwrite) as folder:
        write_checkpoint(folder, model, reordering, beside=beside, source=source)
    return Path(target)


def write_checkpoint(
    folder: Path,
    model: PreTrainedModel,
    reordering: Reordering,
    *,
    beside: Mapping[str, Path] | None = None,
    source: str | os.PathLike[str] | None = None,
    processing_class: Any = None,
    rows: Sequence[Row] = (),
    fine_tuned: bool = False,
) -> None:
    """Write everything that belongs to a reordered checkpoint into a new folder, at last the sums of all files.

    Args:
        folder: The folder, empty but for results that the card is to show.
        model: The reordered model.
        reordering: What was done to it.
        beside: Files to copy, by their path in the folder.
        source: Folder or Hub id of the original, for the card.
        processing_class: Tokenizer or processor to save.
        rows: Results of the model, for the card.
        fine_tuned: Whether the model was trained after its reordering.
    """
    with quiet_transformers():
        model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
        if processing_class is not None:
            processing_class.save_pretrained(folder)
    complete_checkpoint(folder, reordering, beside=beside, source=source, rows=rows, fine_tuned=fine_tuned)


def complete_checkpoint(
    folder: Path,
    reordering: Reordering,
    *,
    beside: Mapping[str, Path] | None = None,
    source: str | os.PathLike[str] | None = None,
    rows: Sequence[Row] = (),
    fine_tuned: bool = False,
    sums: Mapping[str, str] | None = None,
) -> None:
    """Write what belongs to a reordered checkpoint beside the weights, which lie in the folder; see `write_checkpoint`.

    Args:
        folder: The folder with the weights.
        reordering: What was done to them.
        beside: Files to copy, by their path in the folder.
        source: Folder or Hub id of the original, for the card.
        rows: Results of the model, for the card.
        fine_tuned: Whether the model was trained after its reordering.
        sums: SHA-256 sums of files that need not be read again for that.
    """
    checkpoint.copy_missing(beside or {}, folder)
    reordering.save_pretrained(folder)
    checkpoint.write_bytes(folder / SALIENCY_PLOT, saliency_spectrum(reordering.scores, reordering.groups.groups))
    write_card(folder, source=source, rows=rows, fine_tuned=fine_tuned)
    write_sums(folder, sums)


def finish_comparison(results: ComparisonResults, source: str | os.PathLike[str]) -> Path | None:
    """Leave the reordered checkpoint, with its own card, and the card of the comparison beside its results.

    Args:
        results: What `compare_methods` gave.
        source: Folder or Hub id of the compared model.

    Returns:
        Folder of the checkpoint: `checkpoint` in the folder of the results, the pretrained model as the method `spp`,
        else `spp-raffm`, reorders it. None where neither was compared.

    Raises:
        SPPError: Whatever loading, reordering and saving raise.
    """
    method, target = checkpoint_method(results), None
    if method is not None:
        config = SPPConfig.from_dict(results.settings["config"]) if method == "spp" else SPPConfig.raffm()
        model = load_original(source)
        reordering = apply_spp(model, config)
        target = save_reordered(model, reordering, source, results.output_dir / CHECKPOINT_NAME, overwrite=True)
    write_card(results.output_dir, source=source)
    return target


@dataclass(frozen=True)
class Verification:
    """What was found out about a reordered checkpoint.

    Attributes:
        reordering: The stored reordering; its files are whole and fit the model.
        proof: How far the outputs moved when it was undone.
        tolerance: Largest relative difference that is accepted.
        scores_match: Whether the stored scores are those of the weights; None where the metric needs more than weights.
        summed: Whether the checkpoint has sums, which all its files were compared with.
    """

    reordering: Reordering
    proof: Proof
    tolerance: float
    scores_match: bool | None
    summed: bool

    @property
    def equal(self) -> bool:
        """Whether the model computes the same in both orders."""
        return self.proof.relative_diff <= self.tolerance


def verify_checkpoint(
    source: str | os.PathLike[str], *, revision: str | None = None, token: str | bool | None = None
) -> Verification:
    """Check a reordered checkpoint: its files, that its orders fit, and that undoing them changes no output.

    Nothing is written; the order is undone in memory, in the precision that the reordering was proved in.

    Args:
        source: A folder or a Hub id.
        revision: Branch, tag or commit of a repository.
        token: Hub token.

    Raises:
        CheckpointError: A file is missing, damaged, or from a newer version.
        OrdersError: An order is no permutation, belongs to another model, or was not carried out on the weights. The
            last is known by the scores of `l1` and `l2` alone, which are computed again.
        ExampleInputsError: No inputs could be built to run the model on.
        HubError: The repository cannot be read.
    """
    folder = fetch_checkpoint(source, revision=revision, token=token, whole=True)
    reordering = Reordering.from_pretrained(folder)
    model = load_model(folder, reordering.dtype)
    summed = (folder / SUMS_NAME).is_file()
    undone = invert_indices(reordering.indices(model))
    moved = [group for group in channel_groups(model) if group.name in reordering.orders]
    witness = Witness(model, seed=reordering.config.seed, groups=moved)
    reordering.undo(model)
    scores_match = _scores_match(model, reordering)
    hidden = reordering.orders.get("hidden")
    proof = witness.compare(model, None if hidden is None else hidden.flatten().argsort(), undone)
    if scores_match is False:
        _check_moved(model, reordering, source)
    tolerance = reordering.config.tolerance or default_tolerance(model)
    return Verification(reordering, proof, tolerance, scores_match, summed)


def _check_moved(model: PreTrainedModel, reordering: Reordering, source: str | os.PathLike[str]) -> None:
    """Refuse orders whose scores are those of the weights as they lay before they were undone."""
    reordering.apply(model)
    if _scores_match(model, reordering):
        raise OrdersError(
            f"The weights of {os.fspath(source)!r} are in their original order, and {ORDERS_NAME} beside them says "
            "that they were reordered: the stored scores are those of the weights as they lie. Accepted: the model "
            "that apply_spp changed, and its orders. Save that model, or remove the orders."
        )


def _scores_match(model: PreTrainedModel, reordering: Reordering) -> bool | None:
    metric = reordering.config.metric
    if metric not in ("l1", "l2"):
        return None
    groups = [group for group in channel_groups(model) if group.name in reordering.scores]
    found: Mapping[str, Tensor] = weight_scores(groups, named_tensors(model), metric)
    return all(
        torch.allclose(found[name].float(), scores, rtol=1e-3, atol=0) for name, scores in reordering.scores.items()
    )
