"""Files: the only place of the package that reads or writes them.

Every write goes to a temporary name beside the target and is renamed, so a crash leaves the old file or the new one,
never a part of either. Only safetensors and JSON are read, and every read is validated.
"""

import hashlib
import json
import math
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as deserialize_tensors
from safetensors.torch import save as serialize_tensors

from .errors import CheckpointError, SPPError

PathLike = str | os.PathLike[str]

_PIECE = 1 << 20
_LARGEST_JSON = 1 << 28
_DEEPEST_JSON = 64
_LONGEST_INTEGER = 300


@contextmanager
def writing(path: PathLike) -> Iterator[Any]:
    """Write a file in the block through a temporary file beside it; it is synced and renamed when the block ends well.

    Raises:
        CheckpointError: The folder cannot be written.
    """
    target = Path(path)
    temporary = beside(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        sync_names(target.parent)
    except OSError as error:
        if isinstance(error, SPPError):
            raise
        raise CheckpointError(
            f"{target} cannot be written ({error.strerror or error}). Give a folder that exists and is writable."
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_bytes(path: PathLike, data: bytes) -> Path:
    """Write `data` to `path` through a temporary file beside it and a rename.

    Raises:
        CheckpointError: The folder cannot be written.
    """
    with writing(path) as file:
        file.write(data)
    return Path(path)


def remove_file(path: PathLike) -> None:
    """Remove a file if it is there.

    Raises:
        CheckpointError: It cannot be removed.
    """
    try:
        Path(path).unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be removed ({error.strerror or error}). Check its permissions."
        ) from error


def write_text(path: PathLike, text: str) -> Path:
    """Write `text` as UTF-8, atomically."""
    return write_bytes(path, text.encode())


def write_json(path: PathLike, value: Any) -> Path:
    """Write `value` as indented JSON with sorted keys, atomically."""
    return write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def read_text(path: PathLike) -> str:
    """Read a UTF-8 text file.

    Raises:
        CheckpointError: The file is missing or is no UTF-8 text.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as text: {error}. Check the path.") from error


def read_json(path: PathLike, *, finite: bool = True) -> Any:
    """Read a JSON file.

    Args:
        path: The file.
        finite: Whether NaN and infinity, which Python writes and JSON does not have, are refused.

    Raises:
        CheckpointError: The file is missing or is no JSON.
    """
    if Path(path).is_file() and Path(path).stat().st_size > _LARGEST_JSON:
        raise CheckpointError(f"{path} holds {Path(path).stat().st_size:,} bytes, more than a JSON file needs.")
    return parse_json(read_text(path), str(path), finite=finite)


def parse_json(text: str | bytes, name: str, *, finite: bool = True) -> Any:
    """Parse JSON from outside: no name twice, no deep nesting, only numbers and texts that every use can take.

    Args:
        text: The JSON, bytes in UTF-8.
        name: What to call it in an error.
        finite: Whether NaN and infinity are refused.

    Raises:
        CheckpointError: It is no such JSON.
    """
    special = _refuse if finite else float
    try:
        value = json.loads(
            text if isinstance(text, str) else text.decode(),
            object_pairs_hook=_unique,
            parse_constant=special,
            parse_float=_finite if finite else float,
            parse_int=_short_integer,
        )
        _check_json(value)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} is no valid JSON ({error}). Save it again with save_pretrained.") from error
    return value


def read_bytes(path: PathLike) -> bytes:
    """Read a file whole.

    Raises:
        CheckpointError: The file is missing or cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}. Check the path.") from error


def read_into(path: PathLike, start: int, out: memoryview) -> None:
    """Fill a buffer with a file's bytes from `start` on.

    Raises:
        CheckpointError: The file is missing, too short, or cannot be read.
    """
    filled = 0
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(start)
            while filled < len(out) and (count := file.readinto(out[filled:])):
                filled += count
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}. Check the path.") from error
    if filled < len(out):
        raise CheckpointError(
            f"{path} ends at byte {start + filled}, and {start + len(out)} are needed. Download or save it again."
        )


def read_pieces(path: PathLike) -> Iterator[bytes]:
    """Read a file piece by piece.

    Raises:
        CheckpointError: The file is missing or cannot be read.
    """
    try:
        with open(path, "rb") as file:
            while piece := file.read(_PIECE):
                yield piece
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}. Check the path.") from error


def sha256_of(path: PathLike) -> str:
    """The SHA-256 sum of a file, hexadecimal.

    Raises:
        CheckpointError: The file cannot be read.
    """
    digest = hashlib.sha256()
    for piece in read_pieces(path):
        digest.update(piece)
    return digest.hexdigest()


def pack_tensors(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """Tensors and string metadata as the bytes of one safetensors file, the same bytes for the same values."""
    dense = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data: bytes = serialize_tensors(dense, metadata=dict(metadata))
    # The library writes the metadata in any order.
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(metadata.items()))
    packed = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    packed += b" " * (-len(packed) % 8)
    return len(packed).to_bytes(8, "little") + packed + data[8 + length :]


def unpack_tensors(data: bytes, name: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Every tensor of a safetensors file's bytes, and its metadata.

    Args:
        data: The file's bytes.
        name: What to call it in an error.

    Raises:
        CheckpointError: The bytes are no safetensors file.
    """
    try:
        tensors = deserialize_tensors(data)
        length = int.from_bytes(data[:8], "little")
        header = parse_json(data[8 : 8 + length], f"The header of {name}")
    # torch has no name for some types of the format, and no room for some shapes without elements.
    except (SafetensorError, ValueError, LookupError, RuntimeError) as error:
        raise CheckpointError(
            f"{name} is no readable safetensors file ({error}). Download or save it again."
        ) from error
    return tensors, dict(header.get("__metadata__") or {})


def copy_file(source: PathLike, target: PathLike) -> Path:
    """Copy a file's bytes, atomically and piece by piece."""
    with writing(target) as file:
        for piece in read_pieces(source):
            file.write(piece)
    return Path(target)


def copy_missing(files: Mapping[str, Path], folder: Path) -> None:
    """Copy files into a folder, by their path inside it, where it has none of that name."""
    for name, path in files.items():
        if not (folder / name).exists():
            copy_file(path, folder / name)


def inside(folder: PathLike, name: str) -> Path:
    """A file of a folder, links followed; those of the Hugging Face cache lead to blobs of the repository or of all.

    Raises:
        CheckpointError: The file is a link that leaves the folder.
    """
    home, path = Path(folder).resolve(), (Path(folder) / name).resolve()
    repository = next((one.parent for one in home.parents if one.name == "snapshots"), None)
    homes = [home] if repository is None else [home, repository / "blobs", repository.parent / "blobs"]
    if not any(path.is_relative_to(one) for one in homes):
        raise CheckpointError(
            f"{name} in {folder} is a link to {path}, outside of the folder. Accepted: files of the folder itself. "
            "Copy the file there."
        )
    return path


def beside(path: Path) -> Path:
    """A hidden name beside a file or folder, for what is to take its place."""
    return path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"


def sync_names(folder: Path) -> None:
    """Wait until the names in a folder are on the disk; Windows cannot be asked for that."""
    if os.name != "nt":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands there twice")
    return found


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no number of JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:40]} is too large")
    return value


def _short_integer(digits: str) -> int:
    if len(digits) > _LONGEST_INTEGER:
        raise ValueError(f"a number has {len(digits):,} digits")
    return int(digits)


def _check_json(value: Any) -> None:
    """Refuse values that are nested too deep, and texts that UTF-8 cannot hold."""
    waiting = [(value, 1)]
    while waiting:
        one, depth = waiting.pop()
        if depth > _DEEPEST_JSON:
            raise ValueError(f"it is nested more than {_DEEPEST_JSON} levels deep")
        if isinstance(one, str):
            one.encode()
        elif isinstance(one, dict):
            waiting.extend((part, depth + 1) for pair in one.items() for part in pair)
        elif isinstance(one, list):
            waiting.extend((part, depth + 1) for part in one)
