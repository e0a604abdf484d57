"""A model in training: what moves along with it, and what is saved of it.

The callback decides when; here is how.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from . import checkpoint
from .adapters import remapped
from .apply import Indices, Move, Moves, carry, invert_indices, live_moves
from .config import CONFIG_NAME
from .errors import CallbackError
from .optimizers import optimizer_moves
from .orders_file import ORDERS_NAME
from .reordering import Reordering, history_of
from .structure import inner_model, part_of, tuner_layers, unwrapped

Copy = nn.Module | Mapping[str, Tensor] | Sequence[Tensor]
AdapterOrder = Literal["original", "reordered"]


def moves_along(model: nn.Module, optimizer: Any, copies: Sequence[Copy], indices: Indices) -> dict[str, Move]:
    """Everything outside of a model that moves with it: the optimizer's state and copies of the weights.

    Raises:
        OptimizerError: The optimizer's state cannot be moved by index.
        CallbackError: A copy is none of this model.
    """
    moves = optimizer_moves(optimizer, model, indices)
    for number, copy in enumerate(copies):
        moves |= {f"{name} in copy {number}": move for name, move in _copy_moves(model, copy, indices).items()}
    return moves


def _copy_moves(model: nn.Module, copy: Copy, indices: Indices) -> Moves:
    """The moves of a copy of the model's weights, such as their moving averages."""
    if isinstance(copy, nn.Module):
        inner = unwrapped(copy)
        if type(inner) is not type(inner_model(model)):
            raise CallbackError(
                f"The registered copy is a {type(inner).__name__}; one of the {type(inner_model(model)).__name__} in "
                "training is needed."
            )
        return live_moves(inner, indices)
    named = dict(inner_model(model).named_parameters())
    if not isinstance(copy, Mapping):
        trained = {name: one for name, one in named.items() if one.requires_grad}
        names = tuple(named if len(copy) == len(named) else trained)
        copy = dict(zip(names, copy, strict=len(copy) == len(names)))
    # A state dict of the model around this one has its names with a prefix.
    copy = {name.removeprefix("module.").removeprefix("base_model.model."): one for name, one in copy.items()}
    if wrong := [name for name, one in copy.items() if name not in named or one.shape != named[name].shape]:
        raise CallbackError(
            f"The registered copy holds {wrong[0]!r} {list(copy[wrong[0]].shape)}, which is no parameter of the "
            f"{type(model).__name__} in training, or has another shape there. Register a copy of the model, a dict of "
            "tensors by parameter name, or a list of tensors in the order of model.parameters()."
        )
    return {name: (copy[name], dims) for name, (_, dims) in live_moves(model, indices).items() if name in copy}


def restore_orders(
    model: nn.Module, reordering: Reordering, *, backwards: bool = False, only: Callable[[str], bool] | None = None
) -> None:
    """Bring weights of a live model into an order, or back out of it, where loading has mixed orders.

    Args:
        model: The model.
        reordering: The order.
        backwards: Whether weights are in it, and go back to the original order.
        only: Says by name which of the live model's tensors move.
    """
    indices: Indices = reordering.indices(model)
    moves = live_moves(model, invert_indices(indices) if backwards else indices)
    carry({name: move for name, move in moves.items() if only is None or only(name)})


def is_saved_with_adapter(name: str) -> bool:
    """Whether a live model's tensor is part of its adapter, by its name."""
    return part_of(name).adapter is not None or "modules_to_save" in name.split(".")


class OrderedSaving:
    """The `save_pretrained` of one model in training, which keeps the orders with the weights.

    Beside the weights of a plain model it writes the orders. Adapters are saved for the original base model, or as
    they are with the orders beside them. Old orders go first, so that no folder ever holds weights with the orders of
    others. Copies of the model save as their class does.

    Args:
        model: The model, plain or PEFT's.
        reordering: Gives the reordering that the model went through, None before the first.
        adapters: In which order adapters are saved.
    """

    def __init__(
        self, model: Any, reordering: Callable[[], Reordering | None], adapters: AdapterOrder = "original"
    ) -> None:
        self.model, self.reordering, self.adapters = model, reordering, adapters

    def __call__(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> Any:
        """Save the model into a folder; arguments are those of the model's own `save_pretrained`."""
        reordering, save = self.reordering(), partial(type(self.model).save_pretrained, self.model)
        if reordering is None or (history_of(self.model) or ())[-1:] != (reordering.digest,):
            return save(save_directory, *args, **kwargs)
        if tuner_layers(self.model) and self.adapters == "original":
            state = kwargs.pop("state_dict", None) or self.model.state_dict()
            return save(save_directory, *args, **kwargs, state_dict=self._in_original_order(state, reordering))
        writes = kwargs.get("is_main_process", True)
        if writes:
            checkpoint.remove_file(Path(save_directory) / ORDERS_NAME)
            checkpoint.remove_file(Path(save_directory) / CONFIG_NAME)
        result = save(save_directory, *args, **kwargs)
        if writes:
            reordering.save_pretrained(save_directory)
        return result

    def _in_original_order(self, state: Mapping[str, Tensor], reordering: Reordering) -> dict[str, Tensor]:
        # PEFT saves embeddings beside adapters that add to them, or where their number of tokens has changed.
        ends = [self.model.get_input_embeddings(), self.model.get_output_embeddings()]
        embeddings = {id(parameter) for end in ends if end is not None for parameter in end.parameters()}
        names = {name for name, one in self.model.named_parameters(remove_duplicate=False) if id(one) in embeddings}
        saved = {name: one for name, one in state.items() if is_saved_with_adapter(name) or name in names}
        return {**state, **remapped(saved, reordering.groups, reordering.orders, "to_original")}

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copy = memo[id(self.model)]
        return partial(type(copy).save_pretrained, copy)

    def __reduce__(self) -> Any:
        return partial, (type(self.model).save_pretrained, self.model)
