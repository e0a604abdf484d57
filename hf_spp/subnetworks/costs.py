"""What a width costs: parameters, bytes, floating-point operations, and time."""

import re
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop

from ..channels import ChannelMap
from ..forward import evaluation_mode, run_model
from ..proof import Witness
from .edits import find_edits, narrowed_model
from .widths import Widths, kept_places

_LAYER = re.compile(r"^(?:.*?\.)?\d+(?=\.)")


@dataclass(frozen=True)
class Cost:
    """Cost of a model, or of one of its layers.

    Attributes:
        parameters: Number of weights, shared ones once.
        bytes: Memory of the weights.
        flops: Floating-point operations of matrix products, convolutions and attention, for each token or sample.
    """

    parameters: int
    bytes: int
    flops: float


@dataclass(frozen=True)
class Description:
    """What a sub-network costs, in all and per layer.

    Attributes:
        total: Cost of the sub-network.
        full: Cost of the model that it is cut from.
        layers: Cost of each layer of the sub-network, by path.
        per: What operations are counted for: `token` or `sample`.
        inputs: Shape of the main input that they were counted on.
    """

    total: Cost
    full: Cost
    layers: Mapping[str, Cost]
    per: str
    inputs: tuple[int, ...]

    def __str__(self) -> str:
        def line(name: str, cost: Cost) -> str:
            return f"{name:<40}{cost.parameters:>14,}{cost.bytes / 1e6:>10.1f} MB{cost.flops / 1e6:>12.1f} M"

        def share(count: float, whole: float) -> str:
            return f"{100 * count / whole:.1f} %" if whole else "-"

        shares = ", ".join(
            f"{share(getattr(self.total, name), getattr(self.full, name))} of the model's {name}"
            for name in ("parameters", "flops")
        )
        rows = [line(name, cost) for name, cost in self.layers.items()]
        head = f"{'layer':<40}{'parameters':>14}{'weights':>13}{'FLOPs/' + self.per:>14}"
        return "\n".join([head, *rows, line("in all", self.total), f"{shares}, on inputs of {list(self.inputs)}"])


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by first name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


class ParameterCount:
    """Counts the parameters that a width leaves.

    Args:
        model: The model.
        groups: Its channel groups.
        within: Path of the module to count in; the whole model by default.
    """

    def __init__(self, model: nn.Module, groups: ChannelMap, within: str | None = None) -> None:
        self._groups = groups
        self._shapes = {name: tuple(tensor.shape) for name, tensor in tensors_of(model).items()}
        prefix = f"{within}." if within else ""
        self._counted = {name: one.numel() for name, one in model.named_parameters() if name.startswith(prefix)}
        self._whole = sum(self._counted.values())

    def __call__(self, widths: Widths) -> int:
        """Parameters at some widths."""
        kept = kept_places(self._groups, widths, self._shapes)
        gone = (self._counted[n] - count_kept(self._shapes[n], dims) for n, dims in kept.items() if n in self._counted)
        return self._whole - sum(gone)


def count_kept(shape: Sequence[int], dims: Mapping[int, Tensor]) -> int:
    """Entries of a tensor that stay."""
    return prod(len(dims[dim]) if dim in dims else length for dim, length in enumerate(shape))


def describe(
    model: Any, groups: ChannelMap, widths: Widths, example_inputs: Mapping[str, Any] | None = None
) -> Description:
    """Cost of a model at some widths; it runs once at each width on a small input."""
    inputs = inputs_of(model, groups, example_inputs)
    per, count = unit_of(model, inputs)
    shape = tuple(inputs[_main_input(model, inputs)].shape)
    total, layers = _cost(model, groups, widths, inputs, count)
    full, _ = _cost(model, groups, {}, inputs, count)
    return Description(total, full, layers, per, shape)


def _cost(
    model: Any, groups: ChannelMap, widths: Widths, inputs: Mapping[str, Any], count: int
) -> tuple[Cost, dict[str, Cost]]:
    tensors = dict(model.named_parameters())
    kept = kept_places(groups, widths, {name: one.shape for name, one in tensors_of(model).items()})
    flops = _flops(model, groups, widths, inputs)
    layers: dict[str, list[int]] = {}
    total = [0, 0]
    for name, tensor in tensors.items():
        entries = count_kept(tensor.shape, kept.get(name, {}))
        found = _LAYER.match(name)
        for sums in (total, *([layers.setdefault(found[0], [0, 0])] if found else [])):
            sums[0] += entries
            sums[1] += entries * tensor.element_size()
    root = type(model).__name__
    costs = {path: Cost(own[0], own[1], flops.get(f"{root}.{path}", 0) / count) for path, own in layers.items()}
    return Cost(total[0], total[1], flops.get("Global", 0) / count), costs


def inputs_of(model: Any, groups: ChannelMap, example_inputs: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Inputs that a model runs on: the given ones, or such as its config describes, images in their full size."""
    inputs = Witness(model, example_inputs, groups=groups).inputs
    size, pixels = getattr(model.config, "image_size", None), inputs.get("pixel_values")
    if example_inputs is None and isinstance(size, int) and isinstance(pixels, Tensor) and pixels.dim() == 4:
        inputs = {**inputs, "pixel_values": pixels.new_zeros(1, pixels.shape[1], size, size)}
    return inputs


def count_flops(model: Any, groups: ChannelMap, widths: Widths, inputs: Mapping[str, Any]) -> float:
    """Floating-point operations at some widths, for each token or sample of the inputs."""
    _, count = unit_of(model, inputs)
    return _flops(model, groups, widths, inputs).get("Global", 0) / count


def unit_of(model: Any, inputs: Mapping[str, Any]) -> tuple[str, int]:
    """What costs of a run are stated for, `token` or `sample`, and how many of it the inputs hold."""
    main = inputs[_main_input(model, inputs)]
    return ("sample", main.shape[0]) if main.is_floating_point() else ("token", prod(main.shape[:2]))


def _main_input(model: Any, inputs: Mapping[str, Any]) -> str:
    return model.main_input_name if model.main_input_name in inputs else next(iter(inputs))


@torch.no_grad()
def _flops(model: Any, groups: ChannelMap, widths: Widths, inputs: Mapping[str, Any]) -> dict[str, float]:
    """Floating-point operations of a forward pass, by module."""
    # Attention of a CPU is a kernel of its own, which torch does not count.
    flash = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
    counter = FlopCounterMode(
        display=False, custom_mapping={} if flash is None else {flash: lambda q, k, v, *_, **__: sdpa_flop(q, k, v)}
    )
    with evaluation_mode(model), narrowed_model(model, find_edits(model, groups, widths)), counter:
        run_model(model, inputs)
    return {name: float(sum(counted.values())) for name, counted in counter.get_flop_counts().items()}


@dataclass(frozen=True)
class Latency:
    """Time of a forward pass.

    Attributes:
        milliseconds: Median over the runs.
        spread: Shortest and longest run, milliseconds.
        runs: How many were timed, after those to warm up.
        batch: Samples in a run.
        threads: Threads of torch.
        device: Where the model ran.
    """

    milliseconds: float
    spread: tuple[float, float]
    runs: int
    batch: int
    threads: int
    device: str


@torch.no_grad()
def measure_latency(model: Any, inputs: Mapping[str, Any], *, runs: int = 10, warm_up: int = 3) -> Latency:
    """Time forward passes of a model as it stands.

    Args:
        model: The model.
        inputs: Forward arguments.
        runs: How many runs are timed.
        warm_up: How many come before them.
    """
    device = next(model.parameters()).device
    times = []
    with evaluation_mode(model):
        for index in range(warm_up + runs):
            _wait_for(device)
            start = time.perf_counter()
            run_model(model, inputs)
            _wait_for(device)
            if index >= warm_up:
                times.append(1e3 * (time.perf_counter() - start))
    batch = next(len(value) for value in inputs.values() if isinstance(value, Tensor) and value.dim() > 0)
    return Latency(
        statistics.median(times), (min(times), max(times)), runs, batch, torch.get_num_threads(), str(device)
    )


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
