"""Files of Hub repositories, and of folders in their place."""

import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import huggingface_hub
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]
from transformers.utils import logging

from ..errors import CheckpointError
from .failures import explained
from .retries import is_unreachable, retried

logger = logging.get_logger(__name__)


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
    check_inside(repo_or_dir, filename)
    folder = Path(repo_or_dir).expanduser()
    if folder.is_dir():
        return _file_in_folder(folder, filename)
    repo, cache = os.fspath(repo_or_dir), None if cache_dir is None else Path(cache_dir)
    with explained(repo, revision, f"file {filename!r}"):
        found = retried(
            lambda: huggingface_hub.hf_hub_download(repo, filename, revision=revision, token=token, cache_dir=cache)
        )
        return Path(found)


def check_inside(repo_or_dir: str | os.PathLike[str], filename: str) -> None:
    """Refuse a file name that leaves the folder or repository.

    Raises:
        CheckpointError: It is absolute, empty, or climbs out.
    """
    inside = PurePosixPath(filename)
    if inside.is_absolute() or ".." in inside.parts or not inside.parts:
        raise CheckpointError(
            f"File name {filename!r} does not stay inside {os.fspath(repo_or_dir)!r}. "
            "Accepted: a relative path without '..'. Correct the name, or the index file that holds it."
        )


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
            downloaded = retried(
                lambda: huggingface_hub.snapshot_download(
                    repo, revision=revision, token=token, allow_patterns=list(patterns)
                )
            )
        folder = Path(downloaded)
    found = (path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file())
    return {path.relative_to(folder).as_posix(): path for path in found}


def download_snapshot(
    repo_id: str,
    *,
    ignored: Sequence[str] = (),
    revision: str | None = None,
    token: str | bool | None = None,
) -> Path:
    """Download the files of a repository at one commit, as far as the Hugging Face cache lacks them.

    Without a way to the Hub the cached commit is used, and a warning says so; with `HF_HUB_OFFLINE=1` without one.

    Args:
        repo_id: Id of the repository.
        ignored: Glob patterns of files to leave out; `*` crosses a `/`.
        revision: Branch, tag or commit.
        token: Hub token, `True` for the stored one, `False` for none.

    Returns:
        The folder of the commit in the cache, named after it.

    Raises:
        HubError: The repository cannot be read.
    """

    def download(*, cached: bool) -> Path:
        folder = huggingface_hub.snapshot_download(
            repo_id, revision=revision, token=token, ignore_patterns=list(ignored), local_files_only=cached
        )
        return Path(folder)

    def download_whole() -> Path:
        info = HfApi(token=token).model_info(repo_id, revision=revision)
        folder = download(cached=False)
        names = [one.rfilename for one in info.siblings or ()]
        wanted = filter_repo_objects(names, ignore_patterns=list(ignored))
        # The client answers from the cache where the Hub fails, with an older commit or a part of this one.
        if folder.name != info.sha or not all((folder / name).is_file() for name in wanted):
            raise ConnectionError(f"commit {info.sha} did not arrive whole")
        return folder

    with explained(repo_id, revision, "files"):
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            return download(cached=True)
        try:
            return retried(download_whole)
        except Exception as error:  # only a Hub that cannot be reached has another answer
            if not is_unreachable(error):
                raise
            folder = download(cached=True)
            logger.warning(f"The Hub cannot be reached; {repo_id} is taken from the cache, at commit {folder.name}.")
            return folder


def download_again(repo_id: str, commit: str, filename: str, *, token: str | bool | None = None) -> None:
    """Replace a file of a commit in the Hugging Face cache by a fresh download.

    Raises:
        HubError: It cannot be downloaded.
    """
    with explained(repo_id, commit, f"file {filename!r}"):
        retried(
            lambda: huggingface_hub.hf_hub_download(
                repo_id, filename, revision=commit, token=token, force_download=True
            )
        )


def forget_file(path: Path) -> None:
    """Remove a damaged file from the Hugging Face cache, so that nobody loads it."""
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def list_files(
    repo_or_dir: str | os.PathLike[str], revision: str | None = None, token: str | bool | None = None
) -> list[str]:
    """Paths of all files of a local folder or a Hub repository.

    Args:
        repo_or_dir: A local folder, or a repository id such as `"user/model"`.
        revision: Branch, tag or commit of the repository. Not used for a local folder.
        token: Hub token, `True` for the stored one, `False` for none.

    Raises:
        HubError: The repository cannot be read.
    """
    folder = Path(repo_or_dir).expanduser()
    if folder.is_dir():
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    repo = os.fspath(repo_or_dir)
    with explained(repo, revision, "list of files"):
        return sorted(retried(lambda: huggingface_hub.list_repo_files(repo, revision=revision, token=token)))
