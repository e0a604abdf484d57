"""The only code that writes weights, shards of them through `processes`: gather each tensor once, in place, and vary
constant ones for a while.
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .errors import UnsupportedModelError
from .processes import AnyTensor, is_whole, local_part, values_of, whole, write_whole
from .structure import inner_model, is_sharded, part_of, plain_structure, reshard, tuner_layers

Dims = Mapping[int, Tensor]
Indices = Mapping[str, Dims]
Move = tuple[AnyTensor, Dims]
Moves = Mapping[str, Move]

# Tensors are gathered a piece at a time, and no more is held twice. The pieces of a tensor go through the same memory:
# the system makes new memory more slowly than a CPU gathers.
_PIECE_BYTES = 4 << 20
_ACCELERATOR_PIECE_BYTES = 64 << 20
# A constant as large as this is a mark, such as the value of a mask, and no weight.
_LARGEST_WEIGHT = 1e4
# Of each tensor of an adapter, whether it writes what its weight writes, or reads what that reads, and along which
# dimension. Trainable tokens are rows of an embedding.
ADAPTER_PARTS = {
    "lora_A": (False, 1),
    "lora_B": (True, 0),
    "lora_embedding_A": (False, 1),
    "lora_embedding_B": (True, 0),
    "lora_magnitude_vector": (True, 0),
    "trainable_tokens_delta": (True, 1),
    "trainable_tokens_original": (True, 1),
}
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def gather_tensors(tensors: Mapping[str, AnyTensor], indices: Indices) -> None:
    """Move channels of tensors in place; if anything fails midway, all tensors are as before.

    Beside the tensors themselves only a copy of a small piece of one is held.

    Args:
        tensors: Tensors by name; those without an index stay as they are.
        indices: Gather index of each moved dimension, int64, by tensor and dimension: `[length]`, or
            `[entries, length]` where each entry of the first dimension moves on its own, before the first dimension.
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
    """Parameters and buffers of the plain model by name, shared ones under their first name; writing goes there.

    Of a layer that is trained beside its original, the trained one; of a sharded parameter, the shards.
    """
    with plain_structure(model) as plain:
        reshard(plain)
        tensors = {name: values_of(parameter) for name, parameter in plain.named_parameters()}
        return {**tensors, **dict(plain.named_buffers())}


def gather_model(model: nn.Module, indices: Indices, *, others: Moves | None = None) -> None:
    """Move channels of a model's parameters and buffers in place, with its adapters, copies and gradients.

    Args:
        model: The model to write to, plain or in training.
        indices: Gather index of each moved dimension, by name of the plain model's tensor and dimension.
        others: Tensors that move along, each with its own index, by any name.
    """
    moves = live_moves(model, indices)
    for name, parameter in inner_model(model).named_parameters():
        if name in moves and parameter.grad is not None:
            moves[f"{name}.grad"] = (parameter.grad, moves[name][1])
    for name, move in (others or {}).items():
        moves[f"{name} beside the model"] = move
    carry(moves)


def carry(moves: Moves) -> None:
    """Move channels of tensors in place, each by its own index, all of them or none."""
    tensors = {name: tensor for name, (tensor, _) in moves.items()}
    gather_tensors(tensors, {name: dims for name, (_, dims) in moves.items()})


def invert_moves(moves: Moves) -> dict[str, Move]:
    """The moves that bring every tensor back."""
    return {name: (tensor, _invert(dims)) for name, (tensor, dims) in moves.items()}


def live_moves(model: nn.Module, indices: Indices) -> dict[str, Move]:
    """Each tensor of a model in training that moves, by its own name, and the index of each of its dimensions.

    Raises:
        UnsupportedModelError: An adapter adds to a moved weight in a way that is not known.
    """
    model = inner_model(model)
    reshard(model)
    turned = {
        part_of(f"{path}.weight").tensor
        for path, module in model.named_modules()
        if isinstance(module, (Conv1D, nn.Embedding))
    }
    tensors = {**{name: values_of(one) for name, one in model.named_parameters()}, **dict(model.named_buffers())}
    first: dict[int, str] = {}
    # A tied weight has its index under its first name, and an adapter of it may have another.
    plain = [(part_of(name), one) for name, one in model.named_parameters(remove_duplicate=False)]
    names = {part.tensor: first.setdefault(id(one), part.tensor) for part, one in plain if part.adapter is None}
    moves: dict[str, Move] = {}
    for name, tensor in tensors.items():
        part = part_of(name)
        dims = indices.get(part.tensor) or indices.get(names.get(part.tensor, ""), {})
        if part.adapter is not None and dims:
            dims = adapter_dims(name, tuple(tensor.shape), dims, turned=part.tensor in turned)
        if dims:
            moves[name] = (tensor, dims)
    return moves


def adapter_dims(name: str, shape: tuple[int, ...], dims: Dims, *, turned: bool = False) -> Dims:
    """The index of each dimension of an adapter's tensor, from those of the weight that it adds to.

    `lora_A` reads what the weight reads, `lora_B` and DoRA's magnitudes write what it writes.

    Args:
        name: Name of the adapter's tensor.
        shape: Its shape.
        dims: Gather index of each moved dimension of the weight.
        turned: Whether the weight is `[inputs, outputs]`, as in GPT-2 and in embeddings; the adapter's never are.

    Raises:
        UnsupportedModelError: The kind of the adapter is not known.
    """
    part = part_of(name)
    outputs, inputs = (dims.get(1), dims.get(0)) if turned else (dims.get(0), dims.get(1))
    if part.adapter not in ADAPTER_PARTS:
        raise UnsupportedModelError(
            f"Adapter tensor {name} {list(shape)} adds to {part.tensor}, whose channels move, in a way that is not "
            "known. Accepted: lora_A, lora_B, lora_embedding_A, lora_embedding_B and lora_magnitude_vector. Merge the "
            "adapter (merge_and_unload), or reorder before it is added."
        )
    writes, place = ADAPTER_PARTS[part.adapter]
    index = outputs if writes else inputs
    if part.adapter == "lora_magnitude_vector" and len(shape) > 1:
        place = 1  # [1, outputs, 1, 1] beside a convolution
    if index is None:
        return {}
    if index.dim() != 1 or place >= len(shape) or shape[place] != len(index):
        raise UnsupportedModelError(
            f"Adapter tensor {name} is {list(shape)}, which does not fit the {len(index)} channels of {part.tensor} "
            "that move. Merge the adapter (merge_and_unload), or reorder before it is added."
        )
    return {place: index}


@contextmanager
def effective_weights(model: nn.Module) -> Iterator[Any]:
    """Give the plain model inside the block, its weights with what active adapters add to them.

    Afterwards every bit is as before. The weights that adapters add to are copied meanwhile. Where weights are divided
    among processes, adapters do not count.
    """
    layers = [
        one
        for one in (() if is_sharded(model) else tuner_layers(model))
        if hasattr(one, "lora_A") and one.active_adapters and not one.merged and not one.disable_adapters
    ]
    kept = []
    try:
        for layer in layers:
            base = layer.get_base_layer()
            kept.append((layer, [(one, one.data, one.detach().clone()) for one in base.parameters()]))
            layer.merge()
        with plain_structure(model) as plain:
            yield plain
    finally:
        for layer, parameters in reversed(kept):
            for parameter, storage, before in parameters:
                parameter.data = storage
                storage.copy_(before)
            layer.merged_adapters.clear()
            # What DoRA keeps for taking the adapter out again.
            layer._caches.clear()


@contextmanager
def varied_constants(model: nn.Module, seed: int, indices: Indices | None = None) -> Iterator[None]:
    """Let weights that are all the same differ while the block runs; afterwards every bit is as before.

    Zero biases and unit norms of a fresh model look the same in every order, so they hide what became of theirs. Every
    constant parameter, and buffer that is saved, holds random values instead, in place: the one value that comes back
    is all that is kept.

    Args:
        model: The model; without constant weights nothing is written.
        seed: Seed of the values, which also depend on the tensor's name and nothing else.
        indices: What moved since the values of the same seed were there, so that they are where they had come to.
    """
    model = inner_model(model)
    tensors = {**{name: values_of(one) for name, one in model.named_parameters()}, **dict(model.named_buffers())}
    for path, module in model.named_modules():
        for name in module._non_persistent_buffers_set:
            tensors.pop(f"{path}.{name}" if path else name, None)
    constants = {name: value for name, tensor in tensors.items() if (value := _constant(tensor)) is not None}
    moves = live_moves(model, indices or {})
    try:
        with torch.no_grad():
            for name, value in constants.items():
                _vary(tensors[name], value, zlib.crc32(f"{seed}:{name}".encode()))
        gather_tensors(tensors, {name: dims for name, (_, dims) in moves.items() if name in constants})
        yield
    finally:
        with torch.no_grad():
            for name, value in constants.items():
                tensors[name].fill_(value)


def _constant(tensor: AnyTensor) -> Tensor | None:
    """The value that all entries of a tensor have, bit for bit; None if they differ or are no weights."""
    # Entries that share memory cannot be written one by one.
    if not is_whole(tensor) or not tensor.is_floating_point() or tensor.numel() < 2 or 0 in tensor.stride():
        return None
    bits = tensor.view(_INTEGERS[tensor.element_size()])
    # Trained weights differ within their first row; the others are read once.
    for part in (bits[(0,) * (bits.dim() - 1)], bits):
        low, high = part.aminmax()
        if not bool(low == high):
            return None
    value = tensor[(0,) * tensor.dim()].clone()
    return value if abs(float(value)) < _LARGEST_WEIGHT else None


def _vary(tensor: Tensor, value: Tensor, seed: int) -> None:
    """Fill a tensor with random values around one, in place."""
    reach = max(abs(float(value)), 1.0) / 2
    generator = torch.Generator(tensor.device).manual_seed(seed)
    tensor.uniform_(float(value) - reach, float(value) + reach, generator=generator)


def _invert(dims: Mapping[int, Tensor]) -> dict[int, Tensor]:
    inverse = {dim: index.argsort(dim=-1) for dim, index in dims.items()}
    # An index per entry of the first dimension names entries by their place before the first dimension moved.
    return {dim: index[dims[0]] if index.dim() == 2 and 0 in dims else index for dim, index in inverse.items()}


def _gather(tensor: AnyTensor, dims: Dims) -> None:
    """Gather by every index; of a tensor that is divided among processes, the whole where a divided dimension moves."""
    local = local_part(tensor, {*dims, *(0 for index in dims.values() if index.dim() == 2)})
    if local is not None:
        _gather_local(local, dims)
        return
    values = whole(tensor)
    _gather_local(values, dims)
    write_whole(tensor, values)


def _gather_local(tensor: Tensor, dims: Dims) -> None:
    """Gather by every index, those per entry of the first dimension first."""
    done: list[tuple[Tensor, int, Tensor]] = []
    try:
        for part, dim, index in _steps(tensor, dims):
            _gather_dim(part, dim, index)
            done.append((part, dim, index))
    except BaseException:
        for part, dim, index in reversed(done):
            _gather_dim(part, dim, index.argsort())
        raise


def _steps(tensor: Tensor, dims: Mapping[int, Tensor]) -> Iterator[tuple[Tensor, int, Tensor]]:
    for dim, index in sorted(dims.items(), key=lambda item: -item[1].dim()):
        if index.dim() == 2:
            yield from ((tensor[entry], dim - 1, one) for entry, one in enumerate(index))
        else:
            yield tensor, dim, index


def _gather_dim(tensor: Tensor, dim: int, index: Tensor) -> None:
    """Gather one dimension in place, a piece of the others at a time."""
    pieces, dim = _pieces(tensor, dim)
    index = index.to(tensor.device)
    spare = tensor.new_empty(max((piece.numel() for piece in pieces), default=0))
    done = 0
    try:
        for piece in pieces:
            _move(piece, dim, index, spare)
            done += 1
    except BaseException:
        for piece in pieces[:done]:
            _move(piece, dim, index.argsort(), spare)
        raise


def _move(piece: Tensor, dim: int, index: Tensor, spare: Tensor) -> None:
    moved = spare[: piece.numel()].view(piece.shape)
    # On a CPU the one is faster along columns, the other along rows.
    if dim == 1 and piece.dim() == 2:
        torch.gather(piece, 1, index.expand(piece.shape[0], -1), out=moved)
    else:
        torch.index_select(piece, dim, index, out=moved)
    piece.copy_(moved)


def _pieces(tensor: Tensor, dim: int) -> tuple[Sequence[Tensor], int]:
    """The tensor as matrices that each hold `dim` whole, and which of their dimensions it is.

    A tensor that is no such matrix in memory is one piece.
    """
    length = tensor.shape[dim]
    if tensor.is_contiguous() and dim == tensor.dim() - 1 > 0:
        matrix, dim, split = tensor.view(-1, length), 1, 0
    elif tensor.is_contiguous() and dim == 0:
        matrix, split = tensor.view(length, -1), 1
    else:
        return [tensor], dim
    size = _PIECE_BYTES if tensor.device.type == "cpu" else _ACCELERATOR_PIECE_BYTES
    return torch.split(matrix, max(1, size // (length * tensor.element_size())), dim=split), dim
