"""The tensors of a checkpoint, one in memory at a time: as the model has them, or as files have them in a new order."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from itertools import pairwise, zip_longest
from typing import Any, cast

import torch
from torch import Tensor

from .apply import gather_tensors
from .layouts import Layout, Positions, Read
from .saliency import check_finite, has_large_entries
from .stored_checkpoint import StoredCheckpoint
from .stored_names import Gather
from .tensor_bytes import advise, copy_pieces, open_tensors, pieces_of, read_tensor

Progress = Callable[[int, int], None]


class TensorStream:
    """The stored tensors of a checkpoint, read one at a time, and account of how far that has come.

    Args:
        origin: The checkpoint.
        stack: Closes the files.
        progress: Called with bytes done and bytes in all.
    """

    def __init__(self, origin: StoredCheckpoint, stack: ExitStack, progress: Progress | None) -> None:
        self.origin, self.tensors, self.homes = origin, origin.weights.tensors, origin.weights.files
        self.scored: Collection[str] = ()
        self._stack, self._progress = stack, progress
        self._open: dict[str, FileIO] = {}
        # Memory that is used again and again spares the system the making of new pages, which costs as much as reading.
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._done, self._total = 0, sum(one.nbytes for one in origin.stored.values())

    def expect(self, more: int) -> None:
        """Note that more bytes than those of the result will be gone through."""
        self._total += more
        self.advance(0)

    def advance(self, count: int) -> None:
        """Note that bytes are done."""
        self._done += count
        if self._progress is not None:
            self._progress(self._done, self._total)

    def file(self, tensor: str) -> FileIO:
        """The open file that holds a tensor."""
        name = self.homes[tensor]
        if name not in self._open:
            self._open[name] = self._stack.enter_context(open_tensors(self.origin.folder / name))
        return self._open[name]

    def announce(self, tensor: str) -> None:
        """Let the system fetch a tensor's bytes while something else is computed."""
        one = self.tensors[tensor]
        advise(self.file(tensor).fileno(), one.start, one.nbytes, "WILLNEED")

    def read(self, name: str, *, rows: range | None = None, raw: bool = False) -> Tensor:
        """A stored tensor, or some rows of it; valid until the next is read."""
        tensor = self.tensors[name]
        if self._memory.numel() < tensor.nbytes:
            self._memory = torch.empty(0, dtype=torch.uint8)
            self._memory = torch.empty(tensor.nbytes, dtype=torch.uint8)
        return read_tensor(self.file(name), tensor, rows=rows, raw=raw, memory=self._memory)

    def live(self, layout: Layout, dims: Mapping[int, Positions]) -> Tensor:
        """A tensor of the model, or a block of it, put together from stored ones; valid until the next is read."""
        reads = layout.reads(dims)
        if len(reads) == 1:
            return self._block(reads[0])
        whole: Tensor | None = None
        for read in reads:
            values = self._block(read)
            if whole is None:
                shape = [len(dims.get(dim, range(size))) for dim, size in enumerate(layout.shape)]
                whole = torch.empty(shape, dtype=values.dtype)
            target = whole
            for dim, places in enumerate(read.places):
                target = target.narrow(dim, int(places[0]), len(places))
            target.copy_(values)
        return cast(Tensor, whole)

    def _block(self, read: Read) -> Tensor:
        index = dict(read.index)
        rows = index.pop(0, None)
        contiguous = isinstance(rows, range) and rows.step == 1
        values = self.read(read.source, rows=cast(range, rows) if contiguous else None)
        self.advance(values.numel() * values.element_size())
        if rows is not None and not contiguous:
            index[0] = rows
        for dim, positions in index.items():
            values = values.index_select(dim, torch.as_tensor(positions))
        order = [dim for dims in read.dims for dim in dims]
        return values.permute(order).reshape([len(places) for places in read.places]).contiguous()

    def new(self, names: Sequence[str], indices: Mapping[str, Mapping[int, Tensor]]) -> Iterator[memoryview]:
        """The bytes of stored tensors in the new order, one after another.

        Raises:
            NonFiniteWeightsError: One holds NaN or infinity, and was not found to be finite before.
        """
        for name, after in zip_longest(names, names[1:]):
            yield from self._gathered(name, self.origin.names.gather(name, indices), after)

    def _gathered(self, name: str, gather: Gather, after: str | None) -> Iterator[memoryview]:
        source = self.tensors[gather.source]
        unchecked = name not in self.scored and source.dtype in ("F64", "F32", "F16", "BF16")
        if gather.dims or unchecked:
            values = self.read(gather.source, raw=True)
            if unchecked:
                check_finite({name: values.view(source.torch_dtype)})
            gather_tensors({name: values}, {name: gather.dims})
            pieces = pieces_of(values)
        else:
            pieces = copy_pieces(self.file(gather.source), source)
        if after is not None:
            self.announce(after)
        for piece in pieces:
            yield piece
            self.advance(len(piece))


class LiveTensors(Mapping[str, Any]):
    """The model's tensors by name, read from files when they are asked for; large stacks entry by entry.

    Args:
        files: The files.
        order: The names in the order in which they will be asked for.
    """

    def __init__(self, files: TensorStream, order: Sequence[str]) -> None:
        self._files, self._names = files, files.origin.names
        self._next = dict(pairwise(order))

    def __getitem__(self, name: str) -> Any:
        layout = self._names.layout(name)
        size = self._files.tensors[layout.sources[0]].itemsize
        stack = _Stack(self._files, layout, size)
        if has_large_entries(stack):
            return stack
        values = self._files.live(layout, {})
        if name in self._next:
            self._files.announce(self._names.layout(self._next[name]).sources[0])
        return values

    def __iter__(self) -> Iterator[str]:
        return iter(self._names.layouts)

    def __len__(self) -> int:
        return len(self._names.layouts)


@dataclass(frozen=True)
class _Stack:
    """A tensor of the model of which one entry of the first dimension is read at a time."""

    files: TensorStream
    layout: Layout
    itemsize: int

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.layout.shape)

    def element_size(self) -> int:
        return self.itemsize

    def __iter__(self) -> Iterator[Tensor]:
        return (self.files.live(self.layout, {0: range(at, at + 1)})[0] for at in range(self.layout.shape[0]))
