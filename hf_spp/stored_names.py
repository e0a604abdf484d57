"""How the tensors of a checkpoint's files relate to those of the model in memory.

transformers renames and converts while it loads: a hundred stored experts become one tensor, one fused projection
three. The relation is found on a model without values, and serves both ways: to read the part of a checkpoint that a
part of the model needs, and to carry a gather of the model's tensors over to the files.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ._compat import converted
from .apply import Indices
from .errors import CheckpointError, UnsupportedModelError
from .layouts import Cell, Layout, Positions, Read, Traced, as_tensor, layout_of


@dataclass(frozen=True)
class Gather:
    """How the new values of a stored tensor come about.

    Attributes:
        source: The stored tensor that they are taken from; another one where experts change places.
        dims: Gather index of each moved dimension, as `apply.gather_tensors` takes them.
    """

    source: str
    dims: Mapping[int, Tensor]


@dataclass(frozen=True)
class StoredNames:
    """The relation between the tensors of a model in memory and those of a checkpoint's files.

    Attributes:
        layouts: What each tensor of the model is made of, by its name; tied ones under every name that a file has.
        shared: The name of a tied tensor, by its further names.
        unused: Stored tensors that the model does not take.
        missing: Tensors of the model that no stored tensor makes.
    """

    layouts: Mapping[str, Layout]
    shared: Mapping[str, str]
    unused: tuple[str, ...]
    missing: tuple[str, ...]

    def layout(self, name: str) -> Layout:
        """What a tensor of the model is made of, by any of its names.

        Raises:
            CheckpointError: The files do not hold it.
        """
        first = self.shared.get(name, name)
        for one in (first, *(alias for alias, owner in self.shared.items() if owner == first)):
            if one in self.layouts:
                return self.layouts[one]
        raise CheckpointError(
            f"The checkpoint's files do not hold {name}, which the model needs. The files may be damaged or belong to "
            "another class; download or save the model again."
        )

    def reads(self, name: str, dims: Mapping[int, Positions]) -> list[Read]:
        """What must be read of the files to have chosen positions of a tensor of the model; see `Layout.reads`."""
        return self.layout(name).reads(dims)

    @cached_property
    def places(self) -> dict[str, list[tuple[str, Cell]]]:
        """Of each stored tensor that is used, the blocks of the model's tensors that it makes."""
        found: dict[str, list[tuple[str, Cell]]] = {}
        for name, layout in self.layouts.items():
            for cell, piece in layout.pieces.items():
                found.setdefault(piece.source, []).append((name, cell))
        return found

    def gather(self, stored: str, indices: Indices) -> Gather:
        """Carry a gather of the model's tensors over to one stored tensor.

        Args:
            stored: Name of the stored tensor.
            indices: Gather index of each moved dimension, by name and dimension, as `apply.gather_tensors` takes them.

        Returns:
            Where its new values come from: from itself without an index where it stays as it is.

        Raises:
            UnsupportedModelError: Channels would cross from one stored tensor to another within a dimension.
        """
        parts = [
            (self.layouts[name], cell, indices.get(self.shared.get(name, name), {}))
            for name, cell in self.places.get(stored, ())
        ]
        if not any(dims for _, _, dims in parts):
            return Gather(stored, {})
        found = [_carried(layout, cell, dims) for layout, cell, dims in parts]
        sources = {source for source, _ in found}
        if len(sources) > 1:
            raise _crossing(stored, sources)
        dims = {dim: _merged(stored, [index[dim] for _, index in found]) for dim in found[0][1]}
        return Gather(sources.pop(), {dim: index for dim, index in dims.items() if not _stays(index)})


def stored_names(model: PreTrainedModel, shapes: Mapping[str, Sequence[int]]) -> StoredNames:
    """Find out how stored tensors become a model's.

    Args:
        model: The model, with or without values; it stays as it is.
        shapes: Shape of every stored tensor, by its name in the files.

    Raises:
        UnsupportedModelError: A conversion is not known.
        CheckpointError: Stored tensors do not fit the model.
    """
    try:
        made, unused = converted(model, {name: Traced(Layout.of(name, shape)) for name, shape in shapes.items()})
    except (ValueError, IndexError, KeyError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"The stored weights cannot be converted into {type(model).__name__}: {error!r}. Accepted: whole "
            "safetensors weights that fit config.json. Download or save the model again."
        ) from error
    own = model.state_dict()
    layouts = {name: layout_of(one) for name, one in made.items() if name in own}
    for name, layout in layouts.items():
        if layout.shape != tuple(own[name].shape):
            raise CheckpointError(
                f"{', '.join(layout.sources[:3])} make a tensor {list(layout.shape)}, and {name} of "
                f"{type(model).__name__} is {list(own[name].shape)}. The weights do not fit config.json; download or "
                "save the model again."
            )
    shared = shared_names(model)
    held = {shared.get(name, name) for name in layouts}
    missing = tuple(name for name in own if shared.get(name, name) not in held)
    return StoredNames(layouts, shared, tuple(unused), missing)


def shared_names(model: PreTrainedModel) -> dict[str, str]:
    """The first name of each tied tensor, by its further names."""
    first: dict[int, str] = {}
    named: Iterable[tuple[str, Tensor]] = (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    )
    found = ((name, first.setdefault(id(one), name)) for name, one in named)
    return {name: owner for name, owner in found if name != owner}


def _carried(layout: Layout, cell: Cell, dims: Mapping[int, Tensor]) -> tuple[str, dict[int, Tensor]]:
    """What one piece of a gathered tensor takes its values from, and from which places by dimension; -1 outside it."""
    piece = layout.pieces[cell]
    spans = [layout.span(dim, at) for dim, at in enumerate(cell)]
    wanted: dict[int, Positions] = dict(enumerate(spans))
    wanted.update({dim: index[..., spans[dim].start : spans[dim].stop] for dim, index in dims.items()})
    reads = layout.reads(wanted)
    if len(reads) != 1 or reads[0].dims != tuple(axis.dims for axis in piece.axes):
        raise _crossing(piece.source, {read.source for read in reads})
    found: dict[int, Tensor] = {}
    for axis in piece.axes:
        if len(axis.dims) != 1:
            continue
        stored = axis.dims[0]
        positions = as_tensor(reads[0].index.get(stored, range(piece.shape[stored])))
        index = torch.full((*positions.shape[:-1], piece.shape[stored]), -1)
        index[..., as_tensor(axis.index)] = positions
        if index.dim() == 2:
            if piece.axes[0].dims != (0,) or len(index) != piece.shape[0]:
                raise _crossing(piece.source, {reads[0].source})
            # One row for each new entry; a gather has one for each old entry.
            index = index[as_tensor(wanted[0]).argsort()]
        found[stored] = index
    return reads[0].source, found


def _merged(stored: str, parts: Sequence[Tensor]) -> Tensor:
    """One index of a stored dimension from those of the blocks that it makes; what none of them takes stays."""
    merged = torch.arange(parts[0].shape[-1]).expand(parts[0].shape).clone()
    known = torch.zeros_like(merged, dtype=torch.bool)
    for part in parts:
        if part.shape != merged.shape or bool(((part != merged) & known & (part >= 0)).any()):
            raise _crossing(stored, {stored})
        merged = torch.where(part >= 0, part, merged)
        known |= part >= 0
    if not torch.equal(merged.sort(-1).values, torch.arange(merged.shape[-1]).expand(merged.shape)):
        raise _crossing(stored, {stored})
    return merged


def _stays(index: Tensor) -> bool:
    return bool((index == torch.arange(index.shape[-1])).all())


def _crossing(stored: str, sources: Iterable[str]) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"Channels of {stored} would cross between parts of the checkpoint's files ({', '.join(sorted(sources))}) that "
        "are joined in memory. Reorder this model in memory, with apply_spp."
    )
