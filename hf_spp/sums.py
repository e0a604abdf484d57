"""`SHA256SUMS`: what every file of a checkpoint holds, in the format that `sha256sum --check` reads."""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath

from . import checkpoint
from .errors import CheckpointError

SUMS_NAME = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")
_LARGEST = 1 << 24
_OTHERS = re.compile(r"(.*/)?\.|_|runs/|(last-)?checkpoint(-\d+)?/")
# What common disks hold, in characters and in bytes.
_LONGEST_PATH, _LONGEST_NAME = 1000, 255


def write_sums(folder: str | os.PathLike[str], known: Mapping[str, str] | None = None) -> Path:
    """Write the sums of every file of a checkpoint beside them; see `files_of`.

    Args:
        folder: The folder.
        known: Sums that need not be taken again, by path inside the folder.

    Raises:
        CheckpointError: A file cannot be read, or has a name that the format cannot hold.
    """
    folder, known = Path(folder), known or {}
    return write_list(folder, {name: known.get(name) or _sum_of(folder, name) for name in files_of(folder)})


def write_list(folder: str | os.PathLike[str], sums: Mapping[str, str]) -> Path:
    """Write given sums, which may be of files that lie elsewhere.

    Raises:
        CheckpointError: A name does not fit into the format.
    """
    folder = Path(folder)
    _check_distinct(sums, folder)
    lines = [f"{sums[name]}  {_checked(name, folder)}\n" for name in sorted(sums)]
    return checkpoint.write_text(folder / SUMS_NAME, "".join(lines))


def renew_sums(folder: str | os.PathLike[str], names: Iterable[str]) -> None:
    """Bring the sums of files that were written or removed up to date, in a folder that has sums.

    Raises:
        CheckpointError: A file cannot be read, or the sums are damaged.
    """
    folder = Path(folder)
    if (folder / SUMS_NAME).is_file():
        sums = read_sums(folder / SUMS_NAME)
        for name in names:
            if (folder / name).is_file():
                sums[name] = _sum_of(folder, name)
            else:
                sums.pop(name, None)
        write_list(folder, sums)


def read_sums(path: str | os.PathLike[str]) -> dict[str, str]:
    """The SHA-256 sum of each file, hexadecimal, by its path inside the folder.

    Raises:
        CheckpointError: The file is missing, too large, or damaged, or a path does not stay inside the folder.
    """
    path = Path(path)
    if path.is_file() and path.stat().st_size > _LARGEST:
        raise CheckpointError(f"{path} holds {path.stat().st_size:,} bytes, more than a list of sums needs.")
    lines = checkpoint.read_text(path).split("\n")
    if lines.pop():
        raise CheckpointError(f"{path} ends within a line. Download the file again.")
    found: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        match = _LINE.fullmatch(line)
        if match is None or match[2] in found:
            raise CheckpointError(f"Line {number} of {path} is no sum of a file of its own. Download the file again.")
        found[_checked(match[2], path)] = match[1]
    _check_distinct(found, path)
    return found


def check_sums(folder: str | os.PathLike[str], names: Iterable[str] | None = None) -> tuple[str, ...]:
    """Compare files of a folder with its sums.

    Args:
        folder: The folder, which holds `SHA256SUMS`.
        names: The files to compare, by their path inside the folder; None means all that have a sum.

    Returns:
        The files that were compared.

    Raises:
        CheckpointError: A file is missing, has no sum, or holds something else.
    """
    folder = Path(folder)
    compared = tuple(read_sums(folder / SUMS_NAME)) if names is None else tuple(names)
    for name in differing(folder, compared):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} lacks {name}, which its {SUMS_NAME} names. Download the file again.")
        raise CheckpointError(
            f"{name} in {folder} is not the file that {SUMS_NAME} names: its bytes differ. Download it again; if "
            f"it was changed on purpose, remove {SUMS_NAME}, or save the checkpoint again."
        )
    return compared


def differing(folder: str | os.PathLike[str], names: Iterable[str]) -> list[str]:
    """The files of a folder that are missing or hold something else than its sums say.

    Raises:
        CheckpointError: A file has no sum, or the sums are missing or damaged.
    """
    folder = Path(folder)
    sums, found = read_sums(folder / SUMS_NAME), []
    for name in names:
        if name not in sums:
            raise CheckpointError(f"{SUMS_NAME} of {folder} has no sum of {name}. Save the checkpoint again.")
        if not (folder / name).is_file() or _sum_of(folder, name) != sums[name]:
            found.append(name)
    return found


def files_of(folder: str | os.PathLike[str]) -> dict[str, Path]:
    """The files that belong to a checkpoint, by their path inside its folder.

    Hidden files do not, nor logs and checkpoints of a training run, nor the sums themselves.
    """
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(Path(folder).rglob("*")) if path.is_file()}
    return {name: path for name, path in paths.items() if name != SUMS_NAME and not _OTHERS.match(name)}


def _sum_of(folder: Path, name: str) -> str:
    return checkpoint.sha256_of(checkpoint.inside(folder, name))


def _check_distinct(names: Iterable[str], where: Path) -> None:
    """Refuse names that differ in case alone, which are one file on many disks."""
    seen: dict[str, str] = {}
    for name in names:
        if (other := seen.setdefault(name.casefold(), name)) != name:
            raise CheckpointError(f"{other!r} and {name!r} in {where} are one file on many disks. Rename one of them.")


def _checked(name: str, where: Path) -> str:
    inside = PurePosixPath(name)
    plain = name.isprintable() and "\\" not in name and inside.as_posix() == name
    plain = plain and len(name) <= _LONGEST_PATH and all(len(part.encode()) <= _LONGEST_NAME for part in inside.parts)
    if not plain or inside.is_absolute() or ".." in inside.parts or PureWindowsPath(name).drive:
        raise CheckpointError(f"{name!r} in {where} is no plain path inside of the folder. Rename the file.")
    return name
