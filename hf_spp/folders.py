"""Whole folders: built beside their target and moved into place in one step, so that a kill leaves the old or the new.

One step replaces a folder where the system can exchange two names (Linux, macOS). Elsewhere the old folder is moved
aside first: a kill between the two steps leaves it whole under a hidden name beside the target.
"""

import ctypes
import errno
import glob
import os
import shutil
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from . import checkpoint
from .checkpoint import PathLike
from .errors import CheckpointError, SPPError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# A folder without a writer may be between its making and its locking for so long.
_ABANDONED_SECONDS = 60
_EXCHANGE = 2  # RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS
_AT_FDCWD = -100


@contextmanager
def replacing_folder(target: PathLike, *, overwrite: bool = False) -> Iterator[Path]:
    """Build a folder beside `target` and move it into place only when the block ends well.

    What an earlier process was killed over is removed first.

    Args:
        target: The folder to make.
        overwrite: Whether a non-empty folder at `target` may be replaced.

    Raises:
        CheckpointError: `target` is a file, or a folder with content and `overwrite` is false, or cannot be written.
    """
    folder = Path(os.path.realpath(target))
    check_replaceable(folder, overwrite=overwrite)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _built_beside(folder) as temporary:
            yield temporary
            place_folder(temporary, folder)
    except OSError as error:
        if isinstance(error, SPPError):
            raise
        raise CheckpointError(f"{folder} cannot be written ({error}). Give a folder that is writable.") from error


@contextmanager
def replacing_files(target: PathLike, last: Sequence[str], kind: Sequence[str] = ()) -> Iterator[Path]:
    """Build files and move them into a folder with other content, old and new ones never together.

    The files that give the others their meaning are taken away first and come last. In between the folder lacks them,
    so it is refused rather than misread.

    Args:
        target: The folder; made if absent.
        last: Names of the files that come last, in their order.
        kind: Glob patterns of files that replace each other, as shards do: where one of them is built, the others go.

    Raises:
        CheckpointError: The folder cannot be written.
    """
    folder = Path(os.path.realpath(target))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _built_beside(folder) as temporary:
            yield temporary
            _share(temporary)
            sync(temporary)
            built = {path.relative_to(temporary).as_posix() for path in temporary.rglob("*") if path.is_file()}
            for name in reversed(last):
                checkpoint.remove_file(folder / name)
            if _matching(temporary, kind):
                for name in _matching(folder, kind) - built:
                    checkpoint.remove_file(folder / name)
            for name in sorted(built, key=lambda one: last.index(one) if one in last else -1):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(temporary / name, folder / name)
            checkpoint.sync_names(folder)
    except OSError as error:
        if isinstance(error, SPPError):
            raise
        raise CheckpointError(f"{folder} cannot be written ({error}). Give a folder that is writable.") from error


def check_replaceable(target: PathLike, *, overwrite: bool = False) -> None:
    """Refuse early to write over a file, or over a folder with content unless `overwrite`.

    Raises:
        CheckpointError: `target` may not be replaced.
    """
    folder = Path(target)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; a folder is written there. Give another path.")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise CheckpointError(
            f"{folder} exists and is not empty. Give another folder, or overwrite it (overwrite=True, or --overwrite)."
        )


def place_folder(built: Path, folder: Path) -> None:
    """Move a folder that is whole to its place, in one step where the system can; what lay there is removed.

    Args:
        built: The folder, on the same file system.
        folder: Its place, which may hold an older folder.
    """
    _share(built)
    sync(built)
    if not folder.exists():
        os.replace(built, folder)
    elif not _exchange(built, folder):
        old = checkpoint.beside(folder).with_suffix(".old")
        os.replace(folder, old)
        try:
            os.replace(built, folder)
        except OSError:
            os.replace(old, folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    checkpoint.sync_names(folder.parent)
    shutil.rmtree(built, ignore_errors=True)


def sync(folder: Path) -> None:
    """Wait until every file of a folder is on the disk."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir():
            checkpoint.sync_names(path)
        else:
            with open(path, "rb") as file:
                os.fsync(file.fileno())


@contextmanager
def _built_beside(folder: Path) -> Iterator[Path]:
    """A folder for the block under a hidden name, which other processes know to be in use."""
    _remove_abandoned(folder)
    temporary = checkpoint.beside(folder)
    temporary.mkdir()
    held = lock(temporary)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if held is not None:
            os.close(held)


def _remove_abandoned(folder: Path) -> None:
    """Remove what processes that were killed had begun to build for a folder."""
    for path in folder.parent.glob(f".{glob.escape(folder.name)}.{'[0-9a-f]' * 8}.tmp"):
        with suppress(FileNotFoundError):
            if not path.is_dir() or time.time() - path.stat().st_mtime < _ABANDONED_SECONDS:
                continue
            held = lock(path)
            if held is not None:
                shutil.rmtree(path, ignore_errors=True)
                os.close(held)


def lock(folder: Path) -> int | None:
    """Hold a folder for this process as long as the descriptor is open; None if another does, or nobody can."""
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step; false where the system cannot."""
    names = os.fsencode(one), os.fsencode(other)
    library: Any = ctypes.CDLL(None, use_errno=True) if sys.platform != "win32" else None
    if hasattr(library, "renameat2"):
        failed = library.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _EXCHANGE)
    elif hasattr(library, "renamex_np"):
        failed = library.renamex_np(*names, _EXCHANGE)
    else:
        return False
    if not failed:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), os.fspath(other))


def _matching(folder: Path, patterns: Sequence[str]) -> set[str]:
    return {path.relative_to(folder).as_posix() for pattern in patterns for path in folder.glob(pattern)}


def _share(folder: Path) -> None:
    """Give files the folder's own permissions: safetensors writes weights for their owner alone."""
    mode = stat.S_IMODE(folder.stat().st_mode)
    for path in folder.rglob("*"):
        path.chmod(mode if path.is_dir() else mode & 0o666)
