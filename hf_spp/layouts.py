"""Where the values of a tensor in memory lie in the tensors of a checkpoint's files.

transformers stacks, joins, cuts and turns tensors while it loads them. Its own code does so here to `Traced` tensors,
which hold no values and keep account of positions. So a gather of the tensor in memory can be carried over to files
without loading either.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, product
from typing import Any

import torch
from torch import Tensor

from .errors import UnsupportedModelError

Positions = range | Tensor
Cell = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Axis:
    """What one dimension of a piece is in the stored tensor.

    Attributes:
        dims: Dimensions of the stored tensor; none where pieces are stacked, several where they were flattened.
        index: The positions that the piece takes along them, in its own order.
    """

    dims: tuple[int, ...]
    index: Positions


@dataclass(frozen=True, slots=True)
class Piece:
    """A block of a tensor in memory, all of it from one stored tensor.

    Attributes:
        source: Name of the stored tensor.
        shape: Shape of the stored tensor.
        axes: What each dimension of the block is there.
    """

    source: str
    shape: tuple[int, ...]
    axes: tuple[Axis, ...]


@dataclass(frozen=True, slots=True)
class Read:
    """Values of one stored tensor that make a block of a wanted result.

    Attributes:
        source: Name of the stored tensor.
        index: Wanted positions by dimension of the stored tensor, `[length]`; dimensions that are left out are wanted
            whole. `[entries, length]` where every entry of the result's first dimension wants positions of its own.
        dims: The stored dimensions of each dimension of the block; none where it is a single entry of a stack.
        places: Positions of the block in the result, by dimension of the result.
    """

    source: str
    index: Mapping[int, Positions]
    dims: tuple[tuple[int, ...], ...]
    places: tuple[Positions, ...]


@dataclass(frozen=True)
class Layout:
    """A tensor in memory as a grid of pieces of stored tensors.

    Attributes:
        shape: Shape of the tensor in memory.
        cuts: Where the blocks of the grid begin, by dimension.
        pieces: The piece at each cell of the grid.
    """

    shape: tuple[int, ...]
    cuts: tuple[tuple[int, ...], ...]
    pieces: Mapping[Cell, Piece]

    @classmethod
    def of(cls, name: str, shape: Sequence[int]) -> "Layout":
        """The layout of a stored tensor that is taken as it is."""
        axes = tuple(Axis((dim,), range(size)) for dim, size in enumerate(shape))
        return cls(tuple(shape), ((0,),) * len(axes), {(0,) * len(axes): Piece(name, tuple(shape), axes)})

    @property
    def sources(self) -> tuple[str, ...]:
        """The stored tensors that it is made of."""
        return tuple(dict.fromkeys(piece.source for piece in self.pieces.values()))

    def span(self, dim: int, cell: int) -> range:
        """The positions of a column of the grid along a dimension."""
        cuts = self.cuts[dim]
        return range(cuts[cell], cuts[cell + 1] if cell + 1 < len(cuts) else self.shape[dim])

    def reads(self, dims: Mapping[int, Positions]) -> list[Read]:
        """What must be read of the stored tensors to have chosen positions of this one.

        Args:
            dims: Wanted positions by dimension, `[length]`, or `[entries, length]` where each entry of this tensor's
                first dimension has positions of its own. Dimensions that are left out are wanted whole.

        Raises:
            UnsupportedModelError: Positions were flattened with other dimensions, or entries share a stored tensor in
                which they lie in different blocks.
        """
        wanted = [dims.get(dim, range(size)) for dim, size in enumerate(self.shape)]
        entries = {dim: one for dim, one in enumerate(wanted) if isinstance(one, Tensor) and one.dim() == 2}
        found = []
        for first, rows in self._hits(0, wanted[0]) if wanted else []:
            chosen = _take(wanted[0], rows)
            hits = [[(first, rows)]]
            for dim in range(1, len(wanted)):
                if dim in entries:
                    own = entries[dim][as_tensor(chosen)]
                    wanted[dim] = own[0] if len(own) == 1 else own
                hits.append(self._hits(dim, wanted[dim]))
            for combination in product(*hits):
                found.append(self._read(combination, wanted))
        return found if wanted else [Read(next(iter(self.pieces.values())).source, {}, (), ())]

    def _hits(self, dim: int, wanted: Positions) -> list[tuple[int, Positions]]:
        """The columns of the grid that wanted positions lie in, and which of the wanted positions those are."""
        if not len(wanted):
            return []
        cuts = self.cuts[dim]
        if isinstance(wanted, Tensor) and wanted.dim() == 2:
            low, high = (bisect_right(cuts, int(end)) - 1 for end in (wanted.min(), wanted.max()))
            if low != high:
                raise UnsupportedModelError(
                    f"Channels of {self.sources[0]} cross from one tensor of the checkpoint's files to another, each "
                    "entry in its own way. Reorder this model in memory, with apply_spp."
                )
            return [(low, range(wanted.shape[1]))]
        low, high = (bisect_right(cuts, int(end)) - 1 for end in _ends(wanted))
        if low == high:
            return [(low, range(len(wanted)))]
        if isinstance(wanted, range) and wanted.step == 1:
            spans = [(cell, self.span(dim, cell)) for cell in range(low, high + 1)]
            return [
                (cell, range(max(s.start, wanted.start) - wanted.start, min(s.stop, wanted.stop) - wanted.start))
                for cell, s in spans
            ]
        cells = torch.bucketize(as_tensor(wanted), torch.tensor(cuts), right=True) - 1
        return [(cell, (cells == cell).nonzero().flatten()) for cell in sorted(set(cells.tolist()))]

    def _read(self, combination: Sequence[tuple[int, Positions]], wanted: Sequence[Positions]) -> Read:
        piece = self.pieces[tuple(cell for cell, _ in combination)]
        index: dict[int, Positions] = {}
        for dim, (cell, rows) in enumerate(combination):
            axis, inside = piece.axes[dim], _shift(_take(wanted[dim], rows), -self.cuts[dim][cell])
            positions = _take(axis.index, inside)
            if len(axis.dims) == 1 and not _is_whole(positions, piece.shape[axis.dims[0]]):
                index[axis.dims[0]] = positions
            elif len(axis.dims) > 1 and not _is_whole(positions, math.prod(piece.shape[d] for d in axis.dims)):
                raise UnsupportedModelError(
                    f"{piece.source} {list(piece.shape)} is flattened while it is loaded, so channels of its dimension "
                    f"{dim} in memory have no place of their own in the file. Load the model whole."
                )
        return Read(
            piece.source, index, tuple(axis.dims for axis in piece.axes), tuple(rows for _, rows in combination)
        )

    def narrow(self, dim: int, start: int, stop: int) -> "Layout":
        """The positions from `start` to `stop` of a dimension."""
        kept = [cell for cell in range(len(self.cuts[dim])) if _overlap(self.span(dim, cell), start, stop)]
        pieces = {}
        for key, piece in self.pieces.items():
            if key[dim] in kept:
                span, axis = self.span(dim, key[dim]), piece.axes[dim]
                index = axis.index[max(start, span.start) - span.start : min(stop, span.stop) - span.start]
                axes = (*piece.axes[:dim], Axis(axis.dims, index), *piece.axes[dim + 1 :])
                place = (*key[:dim], key[dim] - kept[0], *key[dim + 1 :])
                pieces[place] = Piece(piece.source, piece.shape, axes)
        cuts = tuple(max(0, self.cuts[dim][cell] - start) for cell in kept)
        return Layout(
            (*self.shape[:dim], stop - start, *self.shape[dim + 1 :]),
            (*self.cuts[:dim], cuts, *self.cuts[dim + 1 :]),
            pieces,
        )

    def transposed(self, first: int, second: int) -> "Layout":
        """Two dimensions exchanged."""
        order = list(range(len(self.shape)))
        order[first], order[second] = second, first
        return self.permuted(order)

    def permuted(self, order: Sequence[int]) -> "Layout":
        """Dimensions in another order."""
        pieces = {
            tuple(key[dim] for dim in order): Piece(one.source, one.shape, tuple(one.axes[dim] for dim in order))
            for key, one in self.pieces.items()
        }
        return Layout(tuple(self.shape[dim] for dim in order), tuple(self.cuts[dim] for dim in order), pieces)


def stacked(layouts: Sequence[Layout], dim: int) -> Layout:
    """Tensors of one shape along a new dimension."""
    _check_grids(layouts)
    first = layouts[0]
    pieces = {
        (*key[:dim], place, *key[dim:]): Piece(
            piece.source, piece.shape, (*piece.axes[:dim], Axis((), range(1)), *piece.axes[dim:])
        )
        for place, layout in enumerate(layouts)
        for key, piece in layout.pieces.items()
    }
    shape = (*first.shape[:dim], len(layouts), *first.shape[dim:])
    return Layout(shape, (*first.cuts[:dim], tuple(range(len(layouts))), *first.cuts[dim:]), pieces)


def joined(layouts: Sequence[Layout], dim: int) -> Layout:
    """Tensors one after another along a dimension."""
    _check_grids(layouts, but=dim)
    first = layouts[0]
    lengths = list(accumulate((layout.shape[dim] for layout in layouts), initial=0))
    cells = list(accumulate((len(layout.cuts[dim]) for layout in layouts), initial=0))
    pieces = {
        (*key[:dim], key[dim] + cells[place], *key[dim + 1 :]): piece
        for place, layout in enumerate(layouts)
        for key, piece in layout.pieces.items()
    }
    cuts = tuple(lengths[place] + cut for place, layout in enumerate(layouts) for cut in layout.cuts[dim])
    shape = (*first.shape[:dim], lengths[-1], *first.shape[dim + 1 :])
    return Layout(shape, (*first.cuts[:dim], cuts, *first.cuts[dim + 1 :]), pieces)


@dataclass(frozen=True)
class _Unfolded:
    """A single piece whose dimensions are divided: each dimension of the tensor is one of some stored positions' grid.

    Attributes:
        piece: The piece; its axes' positions are grids.
        order: Of each dimension of the tensor, the axis of the piece and the dimension of its grid.
    """

    piece: Piece
    order: tuple[tuple[int, int], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(as_tensor(self.piece.axes[axis].index).shape[place]) for axis, place in self.order)

    def transposed(self, first: int, second: int) -> "_Unfolded":
        order = list(self.order)
        order[first], order[second] = order[second], order[first]
        return _Unfolded(self.piece, tuple(order))

    def reshaped(self, shape: Sequence[int]) -> "_Unfolded":
        axes: list[Axis] = []
        order: list[tuple[int, int]] = []
        done = 0
        for count, sizes in _matched(self.shape, shape, self.piece):
            group = self.order[done : done + count]
            done += count
            order += [(len(axes), place) for place in range(len(sizes))]
            axes.append(self._regrouped(group, sizes))
        return _Unfolded(Piece(self.piece.source, self.piece.shape, tuple(axes)), tuple(order))

    def _regrouped(self, group: Sequence[tuple[int, int]], sizes: Sequence[int]) -> Axis:
        named = tuple(dict.fromkeys(axis for axis, _ in group))
        index = as_tensor(self.piece.axes[named[0]].index)
        if len(named) == 1 and len(group) == index.dim():
            axis = self.piece.axes[named[0]]
            if list(index.shape) == list(sizes) and [place for _, place in group] == list(range(index.dim())):
                return axis
            return Axis(axis.dims, index.permute([place for _, place in group]).reshape(list(sizes)))
        dims = tuple(dim for axis in named for dim in self.piece.axes[axis].dims)
        whole = all(
            _is_whole(self.piece.axes[axis].index, math.prod(self.piece.shape[d] for d in self.piece.axes[axis].dims))
            for axis in named
        )
        if not whole or not dims or dims != tuple(range(dims[0], dims[0] + len(dims))) or len(sizes) != 1:
            raise _refused(f"a reshape to {list(sizes)}", self.piece)
        return Axis(dims, range(sizes[0]))

    def folded(self) -> "Layout | _Unfolded":
        if any(as_tensor(axis.index).dim() != 1 for axis in self.piece.axes):
            return self
        axes = tuple(self.piece.axes[axis] for axis, _ in self.order)
        return Layout(
            self.shape, ((0,),) * len(axes), {(0,) * len(axes): Piece(self.piece.source, self.piece.shape, axes)}
        )


class Traced(Tensor):
    """A tensor without values that keeps account of where its values lie in files, through what is done to it."""

    origin: "Layout | _Unfolded"

    @staticmethod
    def __new__(cls, layout: "Layout | _Unfolded") -> "Traced":
        """Trace a tensor of a layout."""
        traced: Traced = Tensor._make_subclass(cls, torch.empty(layout.shape, device="meta"))
        traced.origin = layout
        return traced

    def __init__(self, layout: "Layout | _Unfolded") -> None:
        super().__init__()

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        handler = _HANDLERS.get(func.__name__)
        if handler is not None:
            made = handler(*args, **(kwargs or {}))
            return [cls(one) for one in made] if isinstance(made, list) else cls(made)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            first = next(one for one in args if isinstance(one, Traced))
            raise _refused(f"{func.__name__}()", _any_piece(first.origin))
        return result


def layout_of(traced: Tensor) -> Layout:
    """The layout of a traced tensor.

    Raises:
        UnsupportedModelError: Its dimensions are no positions along dimensions of stored tensors.
    """
    layout = traced.origin if isinstance(traced, Traced) else None
    if not isinstance(layout, Layout):
        name = "A tensor" if layout is None else layout.piece.source
        raise UnsupportedModelError(f"{name} becomes, while it is loaded, a tensor that no file holds in pieces.")
    return layout


def _stack(tensors: Sequence[Traced], dim: int = 0) -> Layout:
    layouts = [layout_of(one) for one in tensors]
    return stacked(layouts, dim % (len(layouts[0].shape) + 1))


def _cat(tensors: Sequence[Traced], dim: int = 0) -> Layout:
    layouts = [layout_of(one) for one in tensors]
    return joined(layouts, dim % len(layouts[0].shape))


def _chunk(tensor: Traced, chunks: int, dim: int = 0) -> list[Layout]:
    return _split(tensor, math.ceil(tensor.shape[dim] / chunks), dim)


def _split(tensor: Traced, sizes: int | Sequence[int], dim: int = 0) -> list[Layout]:
    layout = layout_of(tensor)
    dim %= len(layout.shape)
    length = layout.shape[dim]
    stops = [*range(sizes, length, sizes), length] if isinstance(sizes, int) else list(accumulate(sizes))
    return [layout.narrow(dim, start, stop) for start, stop in zip([0, *stops], stops, strict=False)]


def _transpose(tensor: Traced, dim0: int, dim1: int) -> "Layout | _Unfolded":
    count = tensor.dim()
    return tensor.origin.transposed(dim0 % count, dim1 % count)


def _reshape(tensor: Traced, *shape: Any) -> "Layout | _Unfolded":
    sizes = list(shape[0] if len(shape) == 1 and isinstance(shape[0], Sequence) else shape)
    if not all(isinstance(size, int) for size in sizes):
        raise _refused("a view as another type", _any_piece(tensor.origin))
    if -1 in sizes:
        sizes[sizes.index(-1)] = tensor.numel() // math.prod(size for size in sizes if size != -1)
    layout = tensor.origin
    if list(layout.shape) == sizes:
        return layout
    if isinstance(layout, Layout):
        piece = _any_piece(layout)
        if len(layout.pieces) > 1 or any(not axis.dims for axis in piece.axes):
            raise _refused(f"a reshape to {sizes}", piece)
        layout = _Unfolded(piece, tuple((axis, 0) for axis in range(len(piece.axes))))
    return layout.reshaped(sizes).folded()


def _same(tensor: Traced) -> "Layout | _Unfolded":
    return tensor.origin


_HANDLERS: Mapping[str, Callable[..., Any]] = {
    "stack": _stack,
    "cat": _cat,
    "chunk": _chunk,
    "split": _split,
    "transpose": _transpose,
    "reshape": _reshape,
    "view": _reshape,
    "contiguous": _same,
}


def _matched(old: Sequence[int], new: Sequence[int], piece: Piece) -> list[tuple[int, list[int]]]:
    """How many old dimensions, one after another, make which new ones."""
    found: list[tuple[int, list[int]]] = []
    sizes, place = list(new), 0
    while place < len(old):
        count, taken = 1, [sizes.pop(0)] if sizes else []
        while taken and math.prod(old[place : place + count]) != math.prod(taken):
            if math.prod(old[place : place + count]) < math.prod(taken) and place + count < len(old):
                count += 1
            elif math.prod(old[place : place + count]) > math.prod(taken) and sizes:
                taken.append(sizes.pop(0))
            else:
                taken = []
        if not taken:
            raise _refused(f"a reshape from {list(old)} to {list(new)}", piece)
        found.append((count, taken))
        place += count
    if sizes:
        raise _refused(f"a reshape from {list(old)} to {list(new)}", piece)
    return found


def _check_grids(layouts: Sequence[Layout], but: int | None = None) -> None:
    first = layouts[0]
    for one in layouts[1:]:
        for dim in range(max(len(first.shape), len(one.shape))):
            if dim != but and (one.shape[dim : dim + 1], one.cuts[dim : dim + 1]) != (
                first.shape[dim : dim + 1],
                first.cuts[dim : dim + 1],
            ):
                raise UnsupportedModelError(
                    f"{first.sources[0]} {list(first.shape)} and {one.sources[0]} {list(one.shape)} are merged while "
                    "they are loaded and do not fit each other. The checkpoint may be damaged or quantized."
                )


def _refused(what: str, piece: Piece) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"transformers converts {piece.source} {list(piece.shape)} while loading by {what}, which is not known here. "
        "Reorder this model in memory, with apply_spp, and report the architecture."
    )


def _any_piece(layout: "Layout | _Unfolded") -> Piece:
    return layout.piece if isinstance(layout, _Unfolded) else next(iter(layout.pieces.values()))


def _overlap(span: range, start: int, stop: int) -> bool:
    return max(span.start, start) < min(span.stop, stop)


def _ends(positions: Positions) -> tuple[int, int]:
    """The smallest and largest of some positions."""
    if isinstance(positions, range):
        return min(positions[0], positions[-1]), max(positions[0], positions[-1])
    return int(positions.min()), int(positions.max())


def as_tensor(positions: Positions) -> Tensor:
    """Positions as an index, int64."""
    return positions if isinstance(positions, Tensor) else torch.arange(positions.start, positions.stop, positions.step)


def _take(positions: Positions, chosen: Positions) -> Positions:
    """Some of the positions; of positions by entry, those columns."""
    if isinstance(positions, Tensor) and positions.dim() == 2:
        return positions if _is_whole(chosen, positions.shape[1]) else positions[:, as_tensor(chosen)]
    if isinstance(chosen, range) and chosen.step > 0:
        return positions[chosen.start : chosen.stop : chosen.step]
    if isinstance(positions, range) and positions == range(len(positions)):
        return chosen
    return as_tensor(positions)[as_tensor(chosen)]


def _shift(positions: Positions, by: int) -> Positions:
    if by == 0:
        return positions
    if isinstance(positions, range):
        return range(positions.start + by, positions.stop + by, positions.step)
    return positions + by


def _is_whole(positions: Positions, size: int) -> bool:
    """Whether positions are all of a dimension in its own order."""
    if isinstance(positions, range):
        return positions == range(size)
    return positions.dim() == 1 and len(positions) == size and bool((positions == torch.arange(size)).all())
