"""The data of safetensors files, read tensor by tensor and written as it comes."""

import ctypes
import hashlib
import math
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import FileIO
from typing import Any

import torch
from torch import Tensor

from . import checkpoint
from .checkpoint import PathLike
from .errors import CheckpointError
from .tensor_files import StoredTensor

_PIECE = 16 << 20
# What glibc calls the size from which memory comes from the system itself.
_MMAP_THRESHOLD, _LARGE = -3, 1 << 20
_AHEAD = 128 << 20
# Larger writes can take a file system several times as long.
_WRITTEN = 256 << 10


@contextmanager
def open_tensors(path: PathLike) -> Iterator[FileIO]:
    """A safetensors file, open for reading its data in the block.

    Raises:
        CheckpointError: The file is missing or cannot be read.
    """
    try:
        file = FileIO(os.fspath(path))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}. Check the path.") from error
    with file:
        yield file


def read_tensor(
    file: FileIO,
    tensor: StoredTensor,
    *,
    rows: range | None = None,
    raw: bool = False,
    memory: Tensor | None = None,
) -> Tensor:
    """Read one tensor of an open safetensors file.

    Args:
        file: The file, opened for reading bytes.
        tensor: The tensor.
        rows: The part of its first dimension to read, one after another; None means all.
        raw: Whether to give its elements as integers of the same size, which every type of whole bytes can be.
        memory: Bytes to read it into, uint8, at least as many as it has; None takes new memory, which costs more.

    Raises:
        CheckpointError: The file ends too early.
        UnsupportedModelError: torch has no such type.
    """
    dtype = tensor.raw_dtype if raw else tensor.torch_dtype
    shape = tensor.shape if rows is None else (len(rows), *tensor.shape[1:])
    if memory is None:
        values = torch.empty(shape, dtype=dtype)
    else:
        values = memory[: math.prod(shape) * tensor.itemsize].view(dtype).view(shape)
    before = 0 if rows is None else rows.start * math.prod(tensor.shape[1:]) * tensor.itemsize
    file.seek(tensor.start + before)
    _read_into(file, memoryview(_bytes_of(values)), tensor.name)
    return values


def copy_pieces(file: FileIO, tensor: StoredTensor) -> Iterator[memoryview]:
    """The bytes of one tensor of an open safetensors file, piece by piece; a piece is valid until the next one.

    Raises:
        CheckpointError: The file ends too early.
    """
    piece = memoryview(bytearray(min(_PIECE, tensor.nbytes)))
    file.seek(tensor.start)
    for start in range(0, tensor.nbytes, _PIECE):
        part = piece[: min(_PIECE, tensor.nbytes - start)]
        _read_into(file, part, tensor.name)
        yield part


def pieces_of(values: Tensor) -> Iterator[memoryview]:
    """The bytes of a contiguous tensor, piece by piece."""
    data = memoryview(_bytes_of(values))
    return (data[start : start + _PIECE] for start in range(0, len(data), _PIECE))


def write_tensors(path: PathLike, head: bytes, data: Iterable[memoryview]) -> str:
    """Write a safetensors file piece by piece, atomically.

    Args:
        path: The file to make.
        head: What `pack_header` gave.
        data: The bytes of all tensors, in the order of the header. Each piece is written before the next is asked for.

    Returns:
        The file's SHA-256 sum, hexadecimal.

    Raises:
        CheckpointError: The file cannot be written.
    """
    digest, count = hashlib.sha256(head), 0
    # The other thread must not keep a piece, and the tensor that it is a part of, longer than it needs it.
    waiting: list[memoryview] = []
    with checkpoint.writing(path) as file, ThreadPoolExecutor(1) as beside:
        file.write(head)
        for piece in data:
            waiting.append(piece)
            summed = beside.submit(lambda: digest.update(waiting.pop()))
            for start in range(0, len(piece), _WRITTEN):
                file.write(piece[start : start + _WRITTEN])
            summed.result()
            count += len(piece)
            del piece
            if count >= _AHEAD:
                file.flush()
                # Begins to bring what was written to the disk, so that the end need not wait for all of it.
                advise(file.fileno(), 0, 0, "DONTNEED")
                count = 0
    return digest.hexdigest()


def advise(descriptor: int, start: int, count: int, what: str) -> None:
    """Tell the system how a part of a file will be used, where it wants to know; a count of 0 is to its end."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, start, count, getattr(os, f"POSIX_FADV_{what}"))


def return_large_memory() -> None:
    """Let this process give large pieces of memory back to the system as soon as they are free.

    Otherwise glibc takes more and more of them from the heaps of its threads, which only grow.
    """
    library: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(library, "mallopt"):
        library.mallopt(_MMAP_THRESHOLD, _LARGE)


def _read_into(file: FileIO, target: memoryview, name: str) -> None:
    while len(target):
        count = file.readinto(target)
        if not count:
            raise CheckpointError(f"The file ends within tensor {name}. Download or save it again.")
        target = target[count:]


def _bytes_of(values: Tensor) -> Any:
    return values.reshape(-1).view(torch.uint8).numpy()
