"""Running a model: without dropout, on its device and dtype, with its outputs as plain tensors."""

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ._compat import eager_experts

# Outputs that hold per-layer internals, whose channels and heads are what a reordering moves.
_INTERNAL_OUTPUTS = re.compile(r"past_key_values|(\w+_)?attentions|(\w+_)?router_(logits|probs)")


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Run the block in evaluation mode; afterwards every module has its own mode again.

    So has it its children and other plain attributes: short or small inputs make some models, as BigBird and Swin,
    take another attention or a smaller window for good.
    """
    plain = (bool, int, float, str, tuple, type(None))
    states = [
        (module, {k: v for k, v in vars(module).items() if isinstance(v, plain)}, dict(module._modules))
        for module in model.modules()
    ]
    model.eval()
    try:
        yield
    finally:
        for module, attributes, children in states:
            vars(module).update(attributes)
            module._modules.clear()
            module._modules.update(children)


@contextmanager
def fixed_rng(model: nn.Module, seed: int) -> Iterator[None]:
    """Run the block on the same random numbers every time; the global generators come back afterwards."""
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(seed)
        yield


@contextmanager
def unfused(model: nn.Module) -> Iterator[None]:
    """Run experts and nn.MultiheadAttention inside the block as plain matrix products, which can be watched."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with eager_experts(model):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def called_modules(model: nn.Module) -> Iterator[set[str]]:
    """Collect the paths of the modules that run inside the block, each under all of its names."""
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)
    called: set[str] = set()
    handles = [
        module.register_forward_pre_hook(lambda *_, names=names: called.update(names))
        for module, names in paths.items()
    ]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()


def accepted_arguments(model: nn.Module) -> tuple[str, ...]:
    """Names of the arguments that the model's forward takes."""
    return tuple(inspect.signature(type(model).forward).parameters)


def place_inputs(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Move the tensors of a batch to the model's device, floating ones to its dtype."""
    parameter = next(parameter for parameter in model.parameters() if parameter.is_floating_point())

    def place(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(parameter.device, parameter.dtype if value.is_floating_point() else None)

    return {name: place(value) for name, value in inputs.items()}


def run_model(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """Run forward on one batch in the weights' own precision, without a key-value cache."""
    inputs = place_inputs(model, inputs)
    accepted = accepted_arguments(model)
    for name, value in (("use_cache", False), ("return_dict", True)):
        if name in accepted:
            inputs.setdefault(name, value)
    # accelerate wraps the forward of a prepared model in autocast and keeps the plain one under this name.
    forward = getattr(model, "_original_forward", model)
    with torch.autocast(next(model.parameters()).device.type, enabled=False):
        return forward(**inputs)


class Float64Throughout(TorchFunctionMode):
    """Run code that asks for float32 in float64 instead.

    Norms, softmax and rotary tables of many models are computed in float32 whatever the dtype of the weights, which
    rounds a float64 model to float32 inside.
    """

    def __enter__(self) -> Any:
        self._default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        torch.set_default_dtype(self._default)
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.float:
            function = Tensor.double
        args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        kwargs = {k: torch.float64 if value is torch.float32 else value for k, value in (kwargs or {}).items()}
        return function(*args, **kwargs)


def output_tensors(output: Any, name: str = "") -> dict[str, Tensor]:
    """Floating-point tensors of a model's output by their path in it, without its internals."""
    if isinstance(output, Tensor):
        return {name or "output": output} if output.is_floating_point() else {}
    if isinstance(output, Mapping):
        items = [(str(key), value) for key, value in output.items() if not _INTERNAL_OUTPUTS.fullmatch(key)]
    elif isinstance(output, (list, tuple)):
        items = [(str(index), value) for index, value in enumerate(output)]
    else:
        return {}
    found: dict[str, Tensor] = {}
    for key, value in items:
        found.update(output_tensors(value, f"{name}.{key}" if name else key))
    return found
