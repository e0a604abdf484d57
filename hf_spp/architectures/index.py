"""A model's modules and parameters by path, and the linear maps among them, on any device with or without values."""

import inspect
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TypeGuard

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..channels import Role
from ..errors import UnsupportedModelError
from .patterns import LINEAR_WRAPPERS, PLAIN_LINEAR_CLASSES
from .registry import Pattern, registered_patterns

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Feature:
    """A tensor whose dimension holds features of a unit, in the axis names of the written map."""

    tensor: str
    layout: str
    role: Role = "other"
    span: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class Projection:
    """A linear map, `layout` being that of its weight with `f` the output and `i` the input features.

    A bias lies beside it, or not; `start:stop` is the part of the output features that is meant, out of every `every`.
    """

    weight: str
    bias: str | None
    layout: str
    inputs: int
    outputs: int
    span: tuple[int, int, int] | None = None

    def produce(self, features: str) -> list[Feature]:
        """The features of its outputs, with the given layout."""
        found = [Feature(self.weight, _put(self.layout, "f", features), "producer", self.span)]
        if self.bias is not None:
            found.append(Feature(self.bias, features, "producer", self.span))
        return found

    def consume(self, features: str) -> list[Feature]:
        """The features of its inputs, with the given layout."""
        return [Feature(self.weight, _put(self.layout, "i", features).replace("f", "o", 1), "consumer")]

    def part(self, start: int, stop: int, every: int | None = None) -> "Projection":
        """The part of its output features from `start` to `stop`, out of every so many."""
        every = every or self.outputs
        return replace(self, outputs=(stop - start) * (self.outputs // every), span=(start, stop, every))

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of its parameters."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


class ModelIndex:
    """Modules, parameters and buffers of a model by name.

    Args:
        model: The model; shapes are enough.

    Raises:
        UnsupportedModelError: A parameter is of a dtype that holds no plain weights.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.model_type = model_type_of(model)
        self.patterns = registered_patterns(model) or ()
        self.matched: list[Pattern] = []
        """Registered patterns that fitted somewhere."""
        self.modules = dict(model.named_modules())
        configs = (getattr(module, "config", None) for module in self.modules.values())
        self.configs = list({id(config): config for config in configs if config is not None}.values())
        """Configs of the model and of the models in it."""
        self.parameters: dict[str, nn.Parameter] = {}
        """Every parameter by its first name, so that a shared one moves once."""
        self.tensors: dict[str, Tensor] = {}
        """Parameters and buffers by every name they have."""
        self._first: dict[int, str] = {}
        self._below: dict[str, list[str]] = defaultdict(list)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self.tensors[name] = parameter
            if self._first.setdefault(id(parameter), name) == name:
                self.parameters[name] = parameter
            if parameter.dtype not in DTYPES and (parameter.is_floating_point() or parameter.itemsize == 1):
                raise UnsupportedModelError(
                    f"Parameter {name} of {type(model).__name__} has dtype {parameter.dtype}; float16, bfloat16, "
                    "float32 or float64 weights are needed. Reorder the unquantized checkpoint first and quantize the "
                    "result."
                )
            owner = name
            while owner:
                owner = owner.rpartition(".")[0]
                self._below[owner].append(name)
        for name, buffer in model.named_buffers(remove_duplicate=False):
            self.tensors[name] = buffer
            self._first.setdefault(id(buffer), name)

    def first_name(self, name: str) -> str:
        """The first name of a tensor that may have several."""
        return self._first[id(self.tensors[name])]

    def below(self, path: str) -> list[str]:
        """Names of all parameters of a module and what it holds."""
        return self._below[path]

    def short(self, path: str) -> str:
        """The path below the base model, so that a model with and without a head has the same names."""
        return path.removeprefix(f"{getattr(self.model, 'base_model_prefix', '')}.")

    def projection(self, path: str) -> Projection | None:
        """The linear map at a path, None if there is none or it is more than one."""
        module = self.modules.get(path)
        if type(module).__name__ in LINEAR_WRAPPERS:
            path, module = f"{path}.linear", self.modules.get(f"{path}.linear")
        if module is None or not is_linear(module):
            return None
        weight = module.weight
        if isinstance(module, Conv1D):
            layout, outputs, inputs = "i f", weight.shape[1], weight.shape[0]
        else:
            layout = " ".join(["f", "i", *(f"x{index}" for index in range(weight.dim() - 2))])
            outputs, inputs = weight.shape[0], weight.shape[1]
        bias = f"{path}.bias" if getattr(module, "bias", None) is not None else None
        return Projection(f"{path}.weight", bias, layout, inputs, outputs)

    def has(self, path: str, children: Iterable[str]) -> bool:
        """Whether a module has all of these children."""
        return all(join(path, child) in self.modules for child in children)

    def first_of(self, path: str, names: Iterable[str]) -> str | None:
        """The first of the names that is a child of a module."""
        return next((name for name in names if join(path, name) in self.modules), None)


def model_type_of(model: nn.Module) -> str:
    """The model type that a config states, or the name of the class where there is none."""
    return str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))


def is_linear(module: nn.Module | None) -> TypeGuard[nn.Linear]:
    """Whether a module is a plain linear map whose weight is its own parameter, no parametrization of others."""
    plain = type(module).forward is nn.Linear.forward if isinstance(module, nn.Linear) else False
    known = plain or type(module).__name__ in PLAIN_LINEAR_CLASSES
    known |= isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and module.groups == 1
    return module is not None and (known or isinstance(module, Conv1D)) and "weight" in module._parameters


def join(path: str, relative: str) -> str:
    """A path below another one, which may be empty."""
    return f"{path}.{relative}" if path and relative else path or relative


def code_names(module: nn.Module) -> tuple[list[str], list[str]]:
    """Names that a module's forward uses, and its arguments."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    if code is None:
        return [], []
    return [*code.co_names, *code.co_varnames], list(code.co_varnames[: code.co_argcount])


def _put(layout: str, axis: str, features: str) -> str:
    return " ".join(features if token == axis else token for token in layout.split())
