"""What safetensors files hold, tensor by tensor, without their data, which `tensor_bytes` reads and writes.

A header states where every tensor lies. Nothing of it is trusted: sizes, types, offsets and names are checked before a
byte of data is touched. `checkpoint` reads and writes small files whole.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from . import checkpoint
from .checkpoint import PathLike
from .errors import CheckpointError, UnsupportedModelError

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

LENGTH_BYTES = 8
LARGEST_HEADER = 100_000_000
_LARGEST_INDEX = 1 << 28
_LARGEST_FILE = 1 << 62
_MOST_DIMS = 32

# Bits of an element, and what torch calls it where it has it.
_DTYPES: Mapping[str, tuple[int, torch.dtype | None]] = {
    "BOOL": (8, torch.bool),
    "U8": (8, torch.uint8),
    "I8": (8, torch.int8),
    "F8_E4M3": (8, torch.float8_e4m3fn),
    "F8_E5M2": (8, torch.float8_e5m2),
    "F8_E8M0": (8, None),
    "F8_E4M3FNUZ": (8, None),
    "F8_E5M2FNUZ": (8, None),
    "F4": (4, None),
    "F6_E2M3": (6, None),
    "F6_E3M2": (6, None),
    "I16": (16, torch.int16),
    "U16": (16, torch.uint16),
    "F16": (16, torch.float16),
    "BF16": (16, torch.bfloat16),
    "I32": (32, torch.int32),
    "U32": (32, torch.uint32),
    "F32": (32, torch.float32),
    "C64": (64, torch.complex64),
    "F64": (64, torch.float64),
    "I64": (64, torch.int64),
    "U64": (64, torch.uint64),
}
_RAW = {8: torch.uint8, 16: torch.int16, 32: torch.int32, 64: torch.int64}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file.

    Attributes:
        name: Its name in the file.
        dtype: Its type as the format calls it, such as `BF16`.
        shape: Its shape.
        start: Where its bytes begin in the file.
        stop: Where they end.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """How many bytes it takes."""
        return self.stop - self.start

    @property
    def itemsize(self) -> int:
        """Bytes of an element.

        Raises:
            UnsupportedModelError: Elements are smaller than a byte.
        """
        return _bits(self) // 8

    @property
    def raw_dtype(self) -> torch.dtype:
        """An integer type of the same size, in which elements can be moved without a look at their values.

        Raises:
            UnsupportedModelError: Elements are smaller than a byte.
        """
        return _RAW[_bits(self)]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type in torch.

        Raises:
            UnsupportedModelError: torch has no such type.
        """
        dtype = _DTYPES[self.dtype][1]
        if dtype is None:
            raise UnsupportedModelError(
                f"Tensor {self.name} is of type {self.dtype}, whose values torch cannot read. Accepted: float weights. "
                "Reorder the unquantized checkpoint and quantize the result."
            )
        return dtype


@dataclass(frozen=True)
class Header:
    """What a safetensors file says about itself.

    Attributes:
        tensors: Its tensors by name, in the order of their data.
        metadata: Its metadata.
        length: Bytes before the data.
    """

    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]
    length: int


@dataclass(frozen=True)
class StoredWeights:
    """The weights of a checkpoint folder, in one file or in shards.

    Attributes:
        headers: What every file holds, by its path inside the folder.
        metadata: Metadata of the index, None where one file holds all.
    """

    headers: Mapping[str, Header]
    metadata: Mapping[str, Any] | None = None

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        """Every tensor by name."""
        return {name: one for header in self.headers.values() for name, one in header.tensors.items()}

    @property
    def files(self) -> dict[str, str]:
        """The file that holds each tensor."""
        return {name: file for file, header in self.headers.items() for name in header.tensors}


def header_length(start: bytes, size: int, name: str) -> int:
    """How many bytes of a safetensors file lie before its data, from its first eight.

    Raises:
        CheckpointError: The file cannot be a safetensors file.
    """
    length = int.from_bytes(start[:LENGTH_BYTES], "little")
    if len(start) < LENGTH_BYTES or not 2 <= length <= min(LARGEST_HEADER, size - LENGTH_BYTES):
        raise CheckpointError(
            f"{name} is no readable safetensors file: it holds {size:,} bytes and its header would take {length:,}. "
            "Download or save it again."
        )
    return LENGTH_BYTES + length


def parse_header(data: bytes, size: int, name: str) -> Header:
    """Read the header of a safetensors file.

    Args:
        data: The file's first bytes, at least `header_length` of them.
        size: Size of the whole file in bytes.
        name: What to call it in an error.

    Raises:
        CheckpointError: The header is damaged, or does not describe a file of this size.
    """
    length = header_length(data, size, name)
    if len(data) < length:
        raise CheckpointError(f"{name} ends within its header. Download or save it again.")
    header = checkpoint.parse_json(data[LENGTH_BYTES:length], f"The header of {name}")
    if not isinstance(header, dict):
        raise CheckpointError(f"The header of {name} is no JSON object. Download or save it again.")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"The metadata of {name} are no texts by name. Download or save the file again.")
    tensors = sorted(
        (_tensor(tensor, entry, length, name) for tensor, entry in header.items()),
        key=lambda one: (one.start, one.stop),
    )
    end = length
    for one in tensors:
        if one.start != end:
            raise CheckpointError(
                f"Tensor {one.name} of {name} begins at byte {one.start:,} and the one before ends at {end:,}; tensors "
                "lie one after another. Download or save the file again."
            )
        end = one.stop
    if end != size:
        raise CheckpointError(
            f"The tensors of {name} end at byte {end:,} and the file at {size:,}. Download or save it again."
        )
    return Header({one.name: one for one in tensors}, metadata, length)


def read_header(path: PathLike) -> Header:
    """Read the header of a local safetensors file.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(LENGTH_BYTES)
            rest = file.read(header_length(start, size, str(path)) - LENGTH_BYTES)
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}. Check the path.") from error
    return parse_header(start + rest, size, str(path))


def parse_index(value: Any, name: str) -> tuple[dict[str, str], dict[str, Any]]:
    """Check the index of a sharded checkpoint.

    Args:
        value: The parsed JSON.
        name: What to call it in an error.

    Returns:
        The file of each tensor, and the index's metadata.

    Raises:
        CheckpointError: The index is damaged, or names a file outside of the folder.
    """
    files = value.get("weight_map") if isinstance(value, dict) else None
    metadata = value.get("metadata", {}) if isinstance(value, dict) else None
    if not isinstance(files, dict) or not files or not isinstance(metadata, dict):
        raise CheckpointError(f"{name} holds no weight_map of tensors and files. Download or save it again.")
    for tensor, file in files.items():
        if not isinstance(file, str) or not _is_weights_name(file):
            raise CheckpointError(
                f"{name} says that {tensor} lies in {file!r}. Accepted: a .safetensors file inside of the folder. "
                "Download the checkpoint again, or correct the index."
            )
    return files, metadata


def check_index(files: Mapping[str, str], headers: Mapping[str, Header], name: str) -> None:
    """Check that an index and the files that it names hold the same tensors.

    Raises:
        CheckpointError: They do not.
    """
    held = {(tensor, file) for file, header in headers.items() for tensor in header.tensors}
    if odd := sorted(held ^ set(files.items())):
        tensor, file = odd[0]
        raise CheckpointError(
            f"{name} and the files disagree about {len(odd)} tensors, such as {tensor} in {file}. The checkpoint is "
            "damaged or mixed from two; download or save it again."
        )


def read_weights(folder: PathLike) -> StoredWeights:
    """Find out what the weights of a checkpoint folder are, without reading their values.

    One file wins over shards, as in transformers.

    Raises:
        CheckpointError: There are no safetensors weights, or files are damaged, lie elsewhere or disagree.
    """
    folder = Path(folder)
    if (folder / WEIGHTS_NAME).is_file():
        return StoredWeights({WEIGHTS_NAME: read_header(checkpoint.inside(folder, WEIGHTS_NAME))})
    path = folder / INDEX_NAME
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has neither {WEIGHTS_NAME} nor {INDEX_NAME}. Accepted: safetensors weights. Save the model "
            "there with save_pretrained."
        )
    if checkpoint.inside(folder, INDEX_NAME).stat().st_size > _LARGEST_INDEX:
        raise CheckpointError(f"{path} holds more than an index of shards needs. Download or save it again.")
    files, metadata = parse_index(checkpoint.read_json(path), str(path))
    headers = {file: read_header(checkpoint.inside(folder, file)) for file in dict.fromkeys(files.values())}
    check_index(files, headers, str(path))
    return StoredWeights(headers, metadata)


def pack_header(tensors: Sequence[StoredTensor], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a safetensors file before its data, for tensors in the given order."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for one in tensors:
        entries[one.name] = {
            "dtype": one.dtype,
            "shape": list(one.shape),
            "data_offsets": [end, end + one.nbytes],
        }
        end += one.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def _tensor(name: str, entry: Any, length: int, file: str) -> StoredTensor:
    known = isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}
    dtype, shape, offsets = (entry[key] for key in ("dtype", "shape", "data_offsets")) if known else ("", [], [])
    if (
        not (isinstance(dtype, str) and isinstance(shape, list) and isinstance(offsets, list))
        or dtype not in _DTYPES
        or len(shape) > _MOST_DIMS
        or len(offsets) != 2
        or not all(type(number) is int and 0 <= number < _LARGEST_FILE for number in (*shape, *offsets))
    ):
        raise CheckpointError(
            f"The header of {file} describes tensor {name[:80]!r} in a way that the format does not have. Download or "
            "save the file again."
        )
    bits = math.prod(shape) * _DTYPES[dtype][0]
    if bits % 8 or offsets[1] - offsets[0] != bits // 8:
        raise CheckpointError(
            f"Tensor {name} of {file} is {dtype} {shape} and takes the bytes {offsets[0]:,} to {offsets[1]:,}, which "
            "is another size. Download or save the file again."
        )
    return StoredTensor(name, dtype, tuple(shape), length + offsets[0], length + offsets[1])


def _bits(tensor: StoredTensor) -> int:
    bits = _DTYPES[tensor.dtype][0]
    if bits % 8:
        raise UnsupportedModelError(
            f"Tensor {tensor.name} is of type {tensor.dtype}, {bits} bits an element, which cannot be moved one by "
            "one. Accepted: float weights. Reorder the unquantized checkpoint and quantize the result."
        )
    return bits


def _is_weights_name(name: str) -> bool:
    path = PurePosixPath(name)
    plain = name.isprintable() and "\\" not in name and path.as_posix() == name and path.suffix == ".safetensors"
    return plain and not path.is_absolute() and ".." not in path.parts
