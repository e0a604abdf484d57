"""Files of Hub repositories, and of folders in their place."""

import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import huggingface_hub

from ..errors import CheckpointError
from .failures import explained


def resolve_file(
    repo_or_dir: str | os.PathLike[str],
    filename: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """Find one file of a checkpoint, in a local folder or in a Hub repository.

    A folder that exists wins over a repository of the same name. A repository's file comes from the Hugging Face
    cache when it is there, also without network (`HF_HUB_OFFLINE=1`).

    Args:
        repo_or_dir: A local folder, or a repository id such as `"user/model"`.
        filename: Path of the file inside the folder or repository, with forward slashes.
        revision: Branch, tag or commit of the repository. Not used for a local folder.
        token: Hub token, `True` for the stored one, `False` for none.
        cache_dir: Cache folder in place of the Hugging Face cache.

    Returns:
        Path of the file on this machine.

    Raises:
        CheckpointError: The local folder lacks the file, or the file name leaves the folder.
        HubError: The repository, revision or file does not exist, needs access rights, or cannot be reached.
    """
    inside = PurePosixPath(filename)
    if inside.is_absolute() or ".." in inside.parts or not inside.parts:
        raise CheckpointError(
            f"File name {filename!r} does not stay inside {os.fspath(repo_or_dir)!r}. "
            "Accepted: a relative path without '..'. Correct the name, or the index file that holds it."
        )
    folder = Path(repo_or_dir).expanduser()
    if folder.is_dir():
        return _file_in_folder(folder, filename)
    repo, cache = os.fspath(repo_or_dir), None if cache_dir is None else Path(cache_dir)
    with explained(repo, revision, f"file {filename!r}"):
        return Path(huggingface_hub.hf_hub_download(repo, filename, revision=revision, token=token, cache_dir=cache))


def _file_in_folder(folder: Path, filename: str) -> Path:
    path = folder / filename
    if path.is_file():
        return path
    found = sorted(entry.name for entry in folder.iterdir())
    listing = ", ".join(found[:8]) + (", …" if len(found) > 8 else "") if found else "nothing"
    raise CheckpointError(
        f"Folder '{folder}' has no file {filename!r}; it holds {listing}. Accepted: a folder written by "
        "save_pretrained. Check the path, or save the model there again."
    )


def find_files(
    repo_or_dir: str | os.PathLike[str],
    patterns: Sequence[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
) -> dict[str, Path]:
    """Find the files of a local folder or a Hub repository whose path inside it matches a glob pattern.

    Files of a repository that match are downloaded, or come from the Hugging Face cache.

    Args:
        repo_or_dir: A local folder, or a repository id such as `"user/model"`.
        patterns: Glob patterns; `*` does not cross a `/`.
        revision: Branch, tag or commit of the repository. Not used for a local folder.
        token: Hub token, `True` for the stored one, `False` for none.

    Returns:
        Path on this machine by path inside the folder or repository.

    Raises:
        HubError: The repository cannot be read.
    """
    folder = Path(repo_or_dir).expanduser()
    if not folder.is_dir():
        repo = os.fspath(repo_or_dir)
        with explained(repo, revision, "list of files"):
            downloaded = huggingface_hub.snapshot_download(
                repo, revision=revision, token=token, allow_patterns=list(patterns)
            )
        folder = Path(downloaded)
    found = (path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file())
    return {path.relative_to(folder).as_posix(): path for path in found}
