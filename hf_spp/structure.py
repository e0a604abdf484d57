"""A model as its own code describes it, without what training puts around and into it.

Adapters, modules trained beside their originals, activation checkpointing, compilation and sharding all change a
model's modules or the names of its weights. The map of channel groups is resolved, and every weight is named, as if
they were not there.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .errors import UnsupportedModelError

# Modules that training puts around others, and how the inner one is called.
_SHELLS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_WRAPPERS = ("base_layer", "original_module", "token_adapter", *_SHELLS)


@dataclass(frozen=True)
class Part:
    """What a weight of a model in training is to the model without adapters.

    Attributes:
        tensor: The plain model's tensor that it is, is a copy of, or that its adapter adds to.
        adapter: The adapter's kind, such as `lora_A`, None for the plain model's tensor and its copies.
        leaf: The last part of the name, `weight` or `bias`.
    """

    tensor: str
    adapter: str | None
    leaf: str


def part_of(name: str) -> Part:
    """Read the name of a weight in a live model, or in a saved adapter."""
    steps = [step for step in name.split(".") if step not in _WRAPPERS]
    if "modules_to_save" in steps:
        place = steps.index("modules_to_save")
        del steps[place : place + 2]
    adapter = next((step for step in steps if step.startswith(("lora_", "trainable_tokens_"))), None)
    if adapter is None:
        return Part(".".join(steps), None, steps[-1])
    path = steps[: steps.index(adapter)]
    return Part(".".join([*path, "weight"]), adapter, "bias" if steps[-1] == "bias" else "weight")


def inner_model(model: Any) -> Any:
    """The transformers model inside a PEFT model; any other model itself.

    Raises:
        UnsupportedModelError: The PEFT method is none whose weights go with channels of the model.
    """
    if not (hasattr(model, "peft_config") and hasattr(model, "get_base_model")):
        return model
    for name, config in model.peft_config.items():
        method = str(getattr(config.peft_type, "value", config.peft_type))
        if method not in ("LORA", "TRAINABLE_TOKENS"):
            raise UnsupportedModelError(_unknown_adapter(f"Adapter {name!r}", method))
    return model.get_base_model()


def unwrapped(model: Any) -> Any:
    """The model inside of parallel, averaged and compiled wrappers and a PEFT model."""
    while True:
        known = (nn.parallel.DistributedDataParallel, nn.DataParallel, torch.optim.swa_utils.AveragedModel)
        if isinstance(model, known) or hasattr(model, "_orig_mod") or type(model).__name__ == "DeepSpeedEngine":
            model = getattr(model, "_orig_mod", None) or model.module
        else:
            return inner_model(model)


@contextmanager
def plain_structure(model: nn.Module) -> Iterator[Any]:
    """Give a model its plain modules and classes inside the block, and shapes where shards hide them.

    Nothing is copied and no value is read: parameters stay the same objects, but for those that DeepSpeed has
    partitioned, which are on the meta device inside the block.
    """
    model = inner_model(model)
    children, classes, parameters = [], [], []
    shapes: dict[int, nn.Parameter] = {}
    waiting, seen = [model], {id(model)}
    try:
        while waiting:
            module = waiting.pop()
            if plain_class(module) is not type(module):
                classes.append((module, type(module)))
                module.__class__ = plain_class(module)
            for name, parameter in module._parameters.items():
                if parameter is not None and hasattr(parameter, "ds_shape"):
                    parameters.append((module._parameters, name, parameter))
            for name, child in module._modules.items():
                if child is None:
                    continue
                plain = _plain_child(child)
                if plain is not child:
                    children.append((module._modules, name, child))
                    module._modules[name] = plain
                if id(plain) not in seen:
                    seen.add(id(plain))
                    waiting.append(plain)
        for weights, name, parameter in parameters:
            weights[name] = shapes.setdefault(id(parameter), _shape_of(parameter))
        yield model
    finally:
        for weights, name, parameter in parameters:
            weights[name] = parameter
        for modules, name, child in children:
            modules[name] = child
        for module, sharded in classes:
            module.__class__ = sharded


def check_adapters(model: nn.Module) -> None:
    """Refuse layers of adapters that are not known to go with the channels of the weights that they add to.

    Raises:
        UnsupportedModelError: A layer is neither LoRA's nor one of trainable tokens.
    """
    for layer in tuner_layers(model):
        if not hasattr(layer, "lora_A") and not hasattr(layer, "trainable_tokens_delta"):
            raise UnsupportedModelError(_unknown_adapter("An adapter", type(layer).__module__))


def _unknown_adapter(which: str, kind: str) -> str:
    return (
        f"{which} is of the type {kind}, whose weights are not known to go with the model's channels. Accepted: LoRA "
        "with its variants DoRA and rsLoRA. Merge the adapter (merge_and_unload), or reorder before it is added."
    )


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP or DeepSpeed's ZeRO-3 has divided the parameters among processes."""
    fsdp = _fsdp_class()
    return any(hasattr(parameter, "ds_shape") for parameter in model.parameters()) or (
        fsdp is not None and any(isinstance(module, fsdp) for module in model.modules())
    )


def reshard(model: nn.Module) -> None:
    """Divide parameters again that FSDP or ZeRO-3 has left whole after a forward pass."""
    fsdp = _fsdp_class()
    for module in model.modules() if fsdp is not None else ():
        if isinstance(module, fsdp):
            module.reshard()
    parameters: Iterator[Any] = model.parameters()
    for parameter in parameters:
        if hasattr(parameter, "ds_shape") and parameter.numel() > 0 and not parameter.ds_persist:
            parameter.partition()


def plain_class(module: nn.Module) -> type[nn.Module]:
    """A module's own class; torch makes one of it and of FSDP's when it shards the module."""
    fsdp = _fsdp_class()
    return type(module).__mro__[2] if fsdp is not None and isinstance(module, fsdp) else type(module)


def tuner_layers(model: nn.Module) -> list[Any]:
    """The layers that PEFT has put in the place of others."""
    layers, *_ = _peft_classes()
    return [module for module in model.modules() if isinstance(module, layers)]


def _plain_child(module: nn.Module) -> nn.Module:
    """The module that lies inside of what training put around it."""
    layers, trained, wrappers = _peft_classes()
    while True:
        if isinstance(module, trained):
            active = [name for name in module.active_adapters if name in module.modules_to_save]
            module = module.modules_to_save[active[0]] if active else module.original_module
        elif isinstance(module, layers):
            module = module.get_base_layer()
        elif isinstance(module, wrappers) and "token_adapter" in module._modules:
            module = module.token_adapter
        else:
            inner = next((module._modules[name] for name in _SHELLS if module._modules.get(name) is not None), None)
            if inner is None:
                return module
            module = inner


def _peft_classes() -> tuple[Any, Any, Any]:
    """PEFT's classes: layers put in the place of others, modules trained beside their original, wrappers of others."""
    tuners, other = sys.modules.get("peft.tuners.tuners_utils"), sys.modules.get("peft.utils.other")
    wrappers = getattr(other, "ModulesToSaveWrapper", ()), getattr(other, "AuxiliaryTrainingWrapper", ())
    return getattr(tuners, "BaseTunerLayer", ()), *wrappers


def _fsdp_class() -> Any:
    """FSDP's class of sharded modules, None where it was never imported."""
    return getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)


def _shape_of(parameter: nn.Parameter) -> nn.Parameter:
    empty = torch.empty(parameter.ds_shape, dtype=parameter.dtype, device="meta")  # type: ignore[attr-defined]
    shape = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    shape.stands_for = parameter  # type: ignore[attr-defined]
    return shape
