"""What is saved of a model in training: the orders with the weights, adapters in the order that is asked for."""

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from . import checkpoint
from .adapters import remapped
from .config import CONFIG_NAME
from .orders_file import ORDERS_NAME
from .reordering import Reordering, is_in_order
from .structure import inner_model, part_of, tuner_layers

AdapterOrder = Literal["original", "reordered"]
_SAMPLE = 256


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
        if reordering is None:
            return save(save_directory, *args, **kwargs)
        reordered, writes = is_in_order(self.model, reordering), kwargs.get("is_main_process", True)
        if reordered and tuner_layers(self.model) and self.adapters == "original":
            state = kwargs.pop("state_dict", None) or self.model.state_dict()
            return save(save_directory, *args, **kwargs, state_dict=self._in_original_order(state, reordering))
        if writes:
            checkpoint.remove_file(Path(save_directory) / ORDERS_NAME)
            checkpoint.remove_file(Path(save_directory) / CONFIG_NAME)
        result = save(save_directory, *args, **kwargs)
        if writes and reordered:
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


def is_saved_with_adapter(name: str) -> bool:
    """Whether a live model's tensor is part of its adapter, by its name."""
    return part_of(name).adapter is not None or "modules_to_save" in name.split(".")


def fingerprint(model: Any) -> str:
    """SHA-256 over a sample of every weight of a live model, adapters included."""
    total, inner = hashlib.sha256(), inner_model(model)
    for tensor in (*inner.parameters(), *inner.buffers()):
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, flat.numel() // _SAMPLE)].to("cpu", torch.float64)
        total.update(sample.numpy().tobytes())
    return total.hexdigest()
