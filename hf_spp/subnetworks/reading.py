"""The parts of a checkpoint's weight files that a slice needs: planned, fetched from the Hub, and read."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import checkpoint, hub
from ..byte_ranges import Range, coalesced, kept_ranges, length_of
from ..layouts import Layout, Positions, Read, as_tensor
from ..stored_names import StoredNames
from ..tensor_files import StoredTensor
from .widths import Kept

# Runs with a smaller gap between them are read from disk in one go, in pieces of at most this size.
_GAP = 1 << 16
_PIECE = 1 << 22


@dataclass(frozen=True)
class ReadReport:
    """What building a slice reads.

    Attributes:
        slice_bytes: Bytes of the slice's weights, as they are stored.
        read_bytes: Bytes of the weight files that are read for it: headers, and what lies between needed bytes, too.
        fetched_bytes: How many of them come over the network, none where all are in the cache or on this machine.
        requests: How many requests that takes.
        whole_bytes: Bytes of all weight files.
    """

    slice_bytes: int
    read_bytes: int
    fetched_bytes: int
    requests: int
    whole_bytes: int

    def __str__(self) -> str:
        share = self.read_bytes / max(self.slice_bytes, 1)
        fetched = f", {_megabytes(self.fetched_bytes)} of them from the Hub in {self.requests} requests"
        return (
            f"{_megabytes(self.read_bytes)} of {_megabytes(self.whole_bytes)} are read for a slice of "
            f"{_megabytes(self.slice_bytes)} ({share:.2f} times its size){fetched if self.requests else ''}"
        )


@dataclass(frozen=True)
class LocalFile:
    """A weight file on this machine."""

    path: Path

    def covers(self, start: int, stop: int) -> bool:
        """Whether all bytes of a range can be read."""
        return True

    def read_into(self, start: int, out: memoryview) -> None:
        """Fill a buffer with the bytes from `start` on."""
        checkpoint.read_into(self.path, start, out)


WeightFile = LocalFile | hub.RemoteFile


@dataclass(frozen=True)
class Place:
    """Where a stored tensor can be read.

    Attributes:
        file: The file.
        tensor: The tensor in it.
        first: Which dimension of the stored tensor lies first there, None where it lies as it is.
    """

    file: WeightFile
    tensor: StoredTensor
    first: int | None = None

    def ranges(self, kept: Mapping[int, Tensor]) -> list[Range]:
        """The bytes of chosen places, ascending, by dimension of the stored tensor."""
        start = self.tensor.start
        found = kept_ranges(self.tensor.shape, self.tensor.itemsize, self._moved(kept))
        return [(start + one, start + other) for one, other in found]

    def read(self, kept: Mapping[int, Tensor]) -> Tensor:
        """Chosen places, ascending, by dimension of the stored tensor."""
        moved = self._moved(kept)
        shape = [len(moved[dim]) if dim in moved else length for dim, length in enumerate(self.tensor.shape)]
        values = torch.empty(shape, dtype=self.tensor.torch_dtype)
        if values.numel():
            data: Any = values.reshape(-1).view(torch.uint8).numpy()
            _read_runs(self.file, self.ranges(kept), memoryview(data))
        return values if self.first is None else values.movedim(0, self.first)

    def _moved(self, kept: Mapping[int, Tensor]) -> dict[int, Tensor]:
        if self.first is None:
            return dict(kept)
        return {0 if dim == self.first else dim + (dim < self.first): one for dim, one in kept.items()}


@dataclass(frozen=True)
class Weights:
    """The weight files of a checkpoint.

    Attributes:
        places: Where each stored tensor can be read, as it is first.
        sizes: Bytes of each file that holds weights as they are.
        request_bytes: What a request to the Hub costs, in bytes.
        opened: Ranges that were read to find out what the files hold.
    """

    places: Mapping[str, Sequence[Place]]
    sizes: Sequence[int]
    request_bytes: int = hub.REQUEST_BYTES
    opened: Mapping[hub.RemoteFile, Sequence[Range]] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every stored tensor."""
        return {name: places[0].tensor.shape for name, places in self.places.items()}

    def best(self, name: str, kept: Mapping[int, Tensor]) -> Place:
        """Where chosen places of a stored tensor are read with the least cost."""
        places = self.places[name]
        return places[0] if len(places) == 1 else min(places, key=lambda one: self._cost(one.ranges(kept)))

    def _cost(self, ranges: Sequence[Range]) -> int:
        joined = coalesced(ranges, self.request_bytes)
        return length_of(joined) + self.request_bytes * len(joined)


class PartialTensor:
    """A part of a tensor of a model, which is read when it is indexed with `...`, as those of open safetensors files.

    Args:
        weights: The files.
        layout: What the tensor is made of.
        dims: Places that stay, by dimension that gets shorter.

    Raises:
        UnsupportedModelError: The places have none of their own in the files, or torch has no such type.
    """

    def __init__(self, weights: Weights, layout: Layout, dims: Mapping[int, Tensor]) -> None:
        self.weights, self.reads = weights, layout.reads(dict(dims))
        self.shape = torch.Size(len(dims[dim]) if dim in dims else size for dim, size in enumerate(layout.shape))
        # Of a tensor without elements nothing is read.
        types = [weights.places[name][0].tensor.torch_dtype for name in layout.sources]
        self.dtype: torch.dtype = reduce(torch.promote_types, types)

    def is_floating_point(self) -> bool:
        """Whether its values are floating-point numbers."""
        return self.dtype.is_floating_point

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return prod(self.shape) * self.dtype.itemsize

    def ranges(self) -> Iterator[tuple[WeightFile, list[Range]]]:
        """The bytes that it is made of, file by file."""
        for one in self.reads:
            kept = _ascending(one)
            place = self.weights.best(one.source, kept)
            yield place.file, place.ranges(kept)

    def __getitem__(self, key: Any) -> Tensor:
        """The values, for the key `...`."""
        if key is not Ellipsis:
            raise TypeError(f"A part of a checkpoint is read whole, with [...]; {key!r} was asked for.")
        if len(self.reads) == 1:
            return self._block(self.reads[0]).contiguous()
        values = torch.empty(self.shape, dtype=self.dtype)
        for one in self.reads:
            spans = [_span(places) for places in one.places]
            if all(spans):
                values[tuple(slice(*span) for span in spans if span)] = self._block(one)
            else:
                values[torch.meshgrid(*map(as_tensor, one.places), indexing="ij")] = self._block(one)
        return values

    def _block(self, read: Read) -> Tensor:
        """The values of one stored tensor, as they lie in the model's."""
        kept = _ascending(read)
        values = self.weights.best(read.source, kept).read(kept)
        for dim, places in read.index.items():
            order = as_tensor(places).argsort()
            if not torch.equal(order, torch.arange(len(order))):
                values = values.index_select(dim, order.argsort())
        values = values.permute([dim for dims in read.dims for dim in dims])
        return values.reshape([len(places) for places in read.places])


def partial_tensors(weights: Weights, names: StoredNames, kept: Kept) -> dict[str, PartialTensor]:
    """The parts of a model's tensors that a cut keeps, by their name in the model.

    Args:
        weights: The files.
        names: How stored tensors become the model's.
        kept: Places that stay, by name and dimension of every tensor that gets shorter.

    Raises:
        UnsupportedModelError: The places of a tensor have none of their own in the files.
    """
    return {
        name: PartialTensor(weights, layout, kept.get(names.shared.get(name, name), {}))
        for name, layout in names.layouts.items()
    }


def plan_parts(
    parts: Mapping[str, PartialTensor], weights: Weights
) -> tuple[dict[WeightFile, list[Range]], ReadReport]:
    """Which ranges of which files some parts are made of, and what reading them takes.

    Args:
        parts: What `partial_tensors` gave, or some of it.
        weights: The files.
    """
    wanted: dict[WeightFile, list[Range]] = {file: list(ranges) for file, ranges in weights.opened.items()}
    for part in parts.values():
        for file, ranges in part.ranges():
            wanted.setdefault(file, []).extend(coalesced(ranges, _gap_of(file, weights)))
    read = fetched = requests = 0
    for file, ranges in wanted.items():
        wanted[file] = coalesced(ranges, _gap_of(file, weights))
        read += length_of(wanted[file])
        if isinstance(file, hub.RemoteFile):
            missing = hub.missing_ranges(file, wanted[file], weights.request_bytes)
            fetched, requests = fetched + length_of(missing), requests + len(missing)
    size = sum(part.nbytes for part in parts.values())
    return wanted, ReadReport(size, read, fetched, requests, sum(weights.sizes))


def fetch_parts(wanted: Mapping[WeightFile, Sequence[Range]], weights: Weights) -> None:
    """Bring what lies on the Hub into the cache.

    Raises:
        HubError: The Hub cannot be reached, or refuses.
    """
    remote = {file: ranges for file, ranges in wanted.items() if isinstance(file, hub.RemoteFile)}
    hub.fetch_ranges(remote, request_bytes=weights.request_bytes)


def _ascending(read: Read) -> dict[int, Tensor]:
    return {dim: as_tensor(places).sort().values for dim, places in read.index.items()}


def _span(places: Positions) -> Range | None:
    """Start and stop of places that follow one another, None where they do not."""
    index = as_tensor(places)
    return (int(index[0]), int(index[-1]) + 1) if bool((index.diff() == 1).all()) else None


def _gap_of(file: WeightFile, weights: Weights) -> int:
    return weights.request_bytes if isinstance(file, hub.RemoteFile) else _GAP


def _read_runs(file: WeightFile, runs: Sequence[Range], out: memoryview) -> None:
    """Fill a buffer with runs of a file, one after another."""
    filled = 0
    for first, last in _grouped(runs):
        start, stop = runs[first][0], runs[last][1]
        if first == last or not file.covers(start, stop):
            for run in runs[first : last + 1]:
                file.read_into(run[0], out[filled : filled + run[1] - run[0]])
                filled += run[1] - run[0]
            continue
        piece = memoryview(bytearray(stop - start))
        file.read_into(start, piece)
        for one, other in runs[first : last + 1]:
            out[filled : filled + other - one] = piece[one - start : other - start]
            filled += other - one


def _grouped(runs: Sequence[Range]) -> Iterator[tuple[int, int]]:
    """First and last of runs that are read in one go."""
    first = 0
    for index in range(1, len(runs) + 1):
        near = index < len(runs) and runs[index][0] - runs[index - 1][1] < _GAP
        if not near or runs[index][1] - runs[first][0] > _PIECE:
            yield first, index - 1
            first = index


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
