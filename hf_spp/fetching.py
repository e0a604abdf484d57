"""Reordered checkpoints from the Hub: one commit of a repository in the cache, every file as its author saved it."""

import os
from pathlib import Path

from transformers.utils import logging

from . import hub
from .config import CONFIG_NAME
from .errors import CheckpointError
from .loading import check_folder
from .orders_file import ORDERS_NAME
from .subnetworks.record import RECORD_NAME
from .sums import SUMS_NAME, check_sums, differing, read_sums

logger = logging.get_logger(__name__)

# What decides what a checkpoint computes must have a sum; other files that are read may have one.
_DECISIVE = ("*.safetensors", "*.safetensors.index.json", "config.json", "spp_*.json")
_READ = "*.json"
# Checkpoints of a run in training are models of their own.
_OTHER_MODELS = ("checkpoint-*/*", "last-checkpoint/*")
_NOT_LOADED = ("*/*", "*.bin", "*.h5", "*.msgpack", "*.onnx", "*.png")


def fetch_checkpoint(
    repo_or_dir: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    verify: bool = True,
    whole: bool = False,
) -> Path:
    """The folder of a reordered checkpoint: a local one, or one commit of a repository in the Hugging Face cache.

    Args:
        repo_or_dir: A folder or a Hub id.
        revision: Branch, tag or commit of a repository.
        token: Hub token.
        verify: Whether to compare the files with the checkpoint's `SHA256SUMS`, if it has such. A file of a repository
            that differs is downloaded once more.
        whole: Whether to fetch and compare all files, not only those that loading reads.

    Raises:
        CheckpointError: A folder does not exist, or a file is missing or damaged.
        HubError: The repository cannot be read.
    """
    check_folder(repo_or_dir)
    name = os.fspath(repo_or_dir)
    folder = Path(repo_or_dir).expanduser()
    repo_id = None if folder.is_dir() else name
    if repo_id is not None:
        ignored = _OTHER_MODELS if whole else _NOT_LOADED
        folder = hub.download_snapshot(repo_id, ignored=ignored, revision=revision, token=token)
    check_reordered(folder, name)
    summed = (folder / SUMS_NAME).is_file()
    if verify and not summed and repo_id is not None:
        logger.warning(f"{name} has no {SUMS_NAME}, so it is not known whether its files are as they were saved.")
    elif verify and summed:
        if repo_id is not None:
            _replace_damaged(repo_id, folder, token, whole=whole)
        check_sums(folder, _compared(folder, whole=whole))
    return folder


def check_reordered(folder: Path, name: str) -> None:
    """Refuse a folder that holds no reordered checkpoint.

    Args:
        folder: The folder.
        name: What its user calls it.

    Raises:
        CheckpointError: It holds no orders, or is a sub-network.
    """
    if (folder / RECORD_NAME).is_file():
        raise CheckpointError(
            f"{name!r} is a sub-network itself. Accepted: the reordered checkpoint that it was cut from, which every "
            "width is cut out of. Give that one, or load this one with load_subnetwork."
        )
    if not (folder / ORDERS_NAME).is_file() or not (folder / CONFIG_NAME).is_file():
        raise CheckpointError(
            f"{name!r} holds no {ORDERS_NAME}, so the order of its channels is not known. Accepted: a reordered "
            "checkpoint. Make one with `hf-spp reorder MODEL OUT`."
        )


def _compared(folder: Path, *, whole: bool) -> list[str]:
    """The files to compare: all that have a sum, or those of them that are read."""
    summed = read_sums(folder / SUMS_NAME)
    decisive = {path.name for pattern in _DECISIVE for path in folder.glob(pattern)}
    read = summed if whole else {path.name for path in folder.glob(_READ)} & summed.keys()
    return sorted({*decisive, *read})


def _replace_damaged(repo_id: str, folder: Path, token: str | bool | None, *, whole: bool) -> None:
    """Download files once more that did not arrive as they were saved; what is damaged again is not kept."""

    def damaged() -> list[str]:
        try:
            return differing(folder, _compared(folder, whole=whole))
        except CheckpointError:
            return [SUMS_NAME]

    if damaged():
        logger.info(f"Files of {repo_id} did not arrive as they were saved and are downloaded again.")
        hub.download_again(repo_id, folder.name, SUMS_NAME, token=token)
    for name in damaged():
        hub.download_again(repo_id, folder.name, name, token=token)
    for name in (again := damaged()):
        hub.forget_file(folder / name)
    if again:
        raise CheckpointError(
            f"{', '.join(again)} of {repo_id!r} arrived twice with other bytes than its {SUMS_NAME} says, and was "
            "removed from the cache. Accepted: files as they were pushed. Try again later, or tell the author."
        )
