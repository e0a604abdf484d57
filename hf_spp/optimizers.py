"""What an optimizer remembers of each weight, and how it moves when the weight's channels do."""

from typing import Any

import torch
from torch import Tensor, nn

from .apply import Dims, Indices, Move, live_moves
from .errors import OptimizerError
from .processes import ZeroTensor, is_plain_tensor
from .structure import inner_model

# Adafactor and CAME keep, instead of the second moment of a matrix, its means over rows and over columns.
_ROW_MEANS = ("exp_avg_sq_row", "exp_avg_res_row")
_COLUMN_MEANS = ("exp_avg_sq_col", "exp_avg_res_col")
_ELEMENTWISE = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg")
# Packages whose optimizers keep states in blocks or in a projection, whose entries are no longer those of the weight.
_COMPRESSED = ("galore_torch", "q_galore_torch", "apollo_torch", "torchao", "flora_opt", "lpmm")
_MOVABLE = (
    "Accepted: states shaped like their weight (AdamW, Adam, SGD, Lion, Muon), and Adafactor's row and column means."
)


def optimizer_moves(optimizer: Any, model: nn.Module, indices: Indices) -> dict[str, Move]:
    """Each tensor of an optimizer's state that moves with a weight, and the index of each of its dimensions.

    Args:
        optimizer: A torch optimizer, or accelerate's wrapper of one; None or a fresh one holds nothing.
        model: The model that it trains.
        indices: Gather index of each moved dimension, by name of the plain model's tensor and dimension.

    Raises:
        OptimizerError: A state cannot be moved by index, or the optimizer trains other weights.
    """
    optimizer = inner_optimizer(optimizer)
    if optimizer is not None and _is_deepspeed(optimizer):
        return _zero_moves(optimizer, model, indices)
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise OptimizerError(
            f"A {type(optimizer).__name__} was given as the optimizer; a torch optimizer is needed, or accelerate's "
            "wrapper of one."
        )
    if optimizer is None or not optimizer.state:
        return {}
    check_movable(optimizer)
    parameters = dict(inner_model(model).named_parameters())
    own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not own.intersection(map(id, parameters.values())):
        raise OptimizerError(
            f"{type(optimizer).__name__} trains none of the parameters of this {type(model).__name__}, but copies or "
            "parts of them, so its state cannot be told apart. Give the model and the optimizer that train together."
        )
    names = {id(parameter): name for name, parameter in parameters.items()}
    moved = {name: dims for name, (_, dims) in live_moves(model, indices).items()}
    elementwise = {*_ELEMENTWISE, *_keys_of_rectangles(optimizer)}
    moves: dict[str, Move] = {}
    # States of weights that stay say as well whether the optimizer is of a kind that can be moved.
    for parameter, state in optimizer.state.items():
        name = names.get(id(parameter), "a weight outside of the model")
        for key, value in state.items():
            where = f"{type(optimizer).__name__}'s {key} of {name}"
            dims = _state_dims(where, key, value, parameter, moved.get(name, {}))
            square = len(set(parameter.shape)) == 1 < parameter.dim()
            if dims and square and value.shape == parameter.shape and key not in elementwise:
                raise OptimizerError(
                    f"{where} has the shape of its weight, {list(parameter.shape)}, which is square, so it may as well "
                    f"be a matrix between channels. {_MOVABLE} Choose one of these optimizers."
                )
            if dims:
                moves[f"{name}'s {key}"] = (value, dims)
    return moves


def _keys_of_rectangles(optimizer: Any) -> set[str]:
    """States that have the shape of a weight that is not square, so that they hold a value for each of its entries."""
    return {
        key
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor) and value.shape == parameter.shape and len(set(parameter.shape)) > 1
    }


def inner_optimizer(optimizer: Any) -> Any:
    """The torch optimizer inside of accelerate's wrapper; anything else itself."""
    return optimizer.optimizer if type(optimizer).__module__.startswith("accelerate.") else optimizer


def _is_deepspeed(optimizer: Any) -> bool:
    return type(optimizer).__module__.startswith("deepspeed.runtime")


def _zero_moves(optimizer: Any, model: nn.Module, indices: Indices) -> dict[str, Move]:
    """The float32 master copies of moved parameters and their states, which ZeRO has flattened and divided."""
    inner = optimizer.optimizer
    check_movable(inner)
    parameters = dict(inner_model(model).named_parameters())
    if inner.state and hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        # DeepSpeed links states to parameters after its first group's first step, when the others have none yet.
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    moves: dict[str, Move] = {}
    for name, (_, dims) in live_moves(model, indices).items():
        parameter = parameters.get(name)
        if parameter is None or not parameter.requires_grad:
            continue
        flat = _flat_part(optimizer, parameter)
        if flat is None:
            raise OptimizerError(
                f"DeepSpeed's {type(optimizer).__name__} keeps no master copy of {name} that can be reached. "
                "Accepted: ZeRO stages 1, 2 and 3. Choose one of these, or call apply_spp(model) before training."
            )
        # A process asks for the same states as the others, or they would wait for it.
        kinds = []
        for key, value in inner.state.get(flat, {}).items():
            if _state_dims(f"{type(inner).__name__}'s {key} of {name}", key, value, flat, {0: torch.arange(0)}):
                kinds.append(key)
        for kind in ("master", *sorted(kinds)):
            moves[f"{name}'s {kind}"] = (ZeroTensor(parameter, kind), dims)
    return moves


def _flat_part(optimizer: Any, parameter: nn.Parameter) -> Any:
    """This process's part of the vector that ZeRO has made of the parameter's group."""
    if hasattr(parameter, "ds_shape"):
        return optimizer.fp32_partitioned_groups_flat[optimizer.grad_position[optimizer.get_param_id(parameter)][0]]
    for flat, group in zip(
        getattr(optimizer, "single_partition_of_fp32_groups", ()), getattr(optimizer, "bit16_groups", ()), strict=False
    ):
        if any(parameter is member for member in group):
            return flat
    return None


def check_movable(optimizer: Any) -> None:
    """Refuse an optimizer whose state can never be moved by index, before it has any.

    Raises:
        OptimizerError: The optimizer keeps compressed or projected states.
    """
    optimizer = inner_optimizer(optimizer)
    if _is_deepspeed(optimizer):
        optimizer = optimizer.optimizer
    others = [type(value).__name__ for value in vars(optimizer).values() if isinstance(value, torch.optim.Optimizer)]
    if others or hasattr(optimizer, "optimizer_dict") or isinstance(optimizer, torch.optim.LBFGS):
        what = f"is built around {others[0]}" if others else "keeps its state elsewhere than with its weights"
        raise OptimizerError(
            f"{type(optimizer).__name__} {what}, so its state cannot move with channels. {_MOVABLE} Choose one of "
            "these, or strategy='train_begin' on a fresh run."
        )
    packages = {kind.__module__.partition(".")[0] for kind in type(optimizer).__mro__}
    bits = getattr(getattr(optimizer, "args", None), "optim_bits", 32) if "bitsandbytes" in packages else 32
    projected = any("rank" in group and "update_proj_gap" in group for group in getattr(optimizer, "param_groups", ()))
    if packages.intersection(_COMPRESSED) or bits != 32 or projected:
        raise OptimizerError(
            f"{type(optimizer).__name__} of {type(optimizer).__module__.partition('.')[0]} keeps its state compressed "
            f"({'projected to a lower rank' if projected else 'in blocks of 8 bits or less, or projected'}), so it "
            f"cannot move with channels. {_MOVABLE} Choose one of these, or strategy='train_begin' on a fresh run."
        )


def _state_dims(where: str, key: str, value: Any, parameter: Tensor, dims: Dims) -> Dims:
    """The index of each dimension of one entry of a weight's state; empty for what is the same for all channels."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return {}
    shape, last = tuple(parameter.shape), parameter.dim() - 1
    if not isinstance(value, Tensor) or not is_plain_tensor(value):
        raise OptimizerError(
            f"{where} is a {type(value).__name__}, which cannot be moved by index. {_MOVABLE} "
            "Choose one of these optimizers."
        )
    if value.numel() <= 1:
        return {}
    given = tuple(value.shape)
    if not value.is_floating_point():
        raise OptimizerError(
            f"{where} is {value.dtype}, so it is quantized in blocks that channels cannot leave. {_MOVABLE} "
            "Choose one of these optimizers."
        )
    if len(given) == len(shape) and all(one in (1, length) for one, length in zip(given, shape, strict=True)):
        return {dim: index for dim, index in dims.items() if given[dim] == shape[dim]}
    if key in _ROW_MEANS and given == shape[:-1]:
        return {dim: index for dim, index in dims.items() if dim != last}
    if key in _COLUMN_MEANS and given == (*shape[:-2], shape[-1]):
        return {min(dim, last - 1): index for dim, index in dims.items() if dim != last - 1}
    raise OptimizerError(
        f"{where} is {list(given)}, which is not the shape of its weight, {list(shape)}, so it cannot be moved by "
        f"index. {_MOVABLE} Choose one of these optimizers."
    )
