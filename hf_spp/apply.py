"""The only code that writes weights: gather each tensor once, in place."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

Indices = Mapping[str, Mapping[int, Tensor]]

# Columns are gathered a piece at a time, so that both copies of a piece stay in the processor's cache.
_PIECE_BYTES = 1 << 20


@torch.no_grad()
def gather_tensors(tensors: Mapping[str, Tensor], indices: Indices) -> None:
    """Move channels of tensors in place; if anything fails midway, all tensors are as before.

    At most one copy of the largest tensor is held beside the tensors themselves.

    Args:
        tensors: Tensors by name; those without an index stay as they are.
        indices: Gather index of each moved dimension, `[length]`, int64, by tensor and dimension.
    """
    done: list[str] = []
    try:
        for name, dims in indices.items():
            _gather(tensors[name], dims)
            done.append(name)
    except BaseException:
        for name in done:
            _gather(tensors[name], _invert(indices[name]))
        raise


def invert_indices(indices: Indices) -> dict[str, dict[int, Tensor]]:
    """The indices that bring every tensor back, bit for bit."""
    return {name: _invert(dims) for name, dims in indices.items()}


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a model by name, shared ones under their first name; writing to them writes there."""
    tensors = {name: parameter.data for name, parameter in model.named_parameters()}
    return {**tensors, **dict(model.named_buffers())}


def gather_model(model: nn.Module, indices: Indices) -> None:
    """Move channels of a model's parameters and buffers in place, and of gradients that lie beside them.

    Args:
        model: The model to write to.
        indices: Gather index of each moved dimension, by tensor name and dimension.
    """
    gradients = {f"{name}.grad": p.grad for name, p in model.named_parameters() if p.grad is not None}
    moves = {**indices, **{f"{name}.grad": dims for name, dims in indices.items() if f"{name}.grad" in gradients}}
    gather_tensors({**named_tensors(model), **gradients}, moves)


def _invert(dims: Mapping[int, Tensor]) -> dict[int, Tensor]:
    return {dim: index.argsort() for dim, index in dims.items()}


def _gather(tensor: Tensor, dims: Mapping[int, Tensor]) -> None:
    (first, index), *rest = [(dim, dims[dim].to(tensor.device)) for dim in sorted(dims)]
    if not rest and first == tensor.dim() - 1 > 0 and tensor.is_contiguous():
        _gather_columns(tensor.view(-1, tensor.shape[-1]), index)
        return
    moved = tensor.index_select(first, index)
    for dim, index in rest:
        if dim == tensor.dim() - 1:
            _gather_columns(moved.view(-1, moved.shape[-1]), index)
        else:
            moved = moved.index_select(dim, index)
    tensor.copy_(moved)


def _gather_columns(matrix: Tensor, index: Tensor) -> None:
    """Gather the columns of a contiguous matrix in place, some rows at a time."""
    rows = max(1, _PIECE_BYTES // (matrix.shape[1] * matrix.element_size()))
    pieces = torch.split(matrix, rows)
    done = 0
    try:
        for piece in pieces:
            piece.copy_(piece.gather(1, index.expand(piece.shape[0], -1)))
            done += 1
    except BaseException:
        inverse = index.argsort()
        for piece in pieces[:done]:
            piece.copy_(piece.gather(1, inverse.expand(piece.shape[0], -1)))
        raise
