"""What `width_report` is given, checked before anything is measured and brought into one form."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..calibration import check_batch
from ..cards.result_rows import unique
from ..errors import CalibrationError, ExampleInputsError, SPPConfigError, SubnetworkError
from ..structure import inner_model
from ..subnetworks.spec import SubnetworkSpec
from ..subnetworks.widths import CUTS
from .quality import Batch, batch_length, forward_arguments

Specs = float | SubnetworkSpec | Sequence[float | SubnetworkSpec] | Mapping[str, float | SubnetworkSpec]
# What the row of the full model is called.
FULL = "full"


def named_specs(model: Any, specs: Specs) -> dict[str, SubnetworkSpec]:
    """Specs by the names that the report gives them.

    Raises:
        SubnetworkError: There is none, one does not fit the model, or two have one name.
    """
    if isinstance(specs, (float, SubnetworkSpec)):
        specs = [specs]
    if isinstance(specs, str) or not isinstance(specs, (Mapping, Sequence)) or not specs:
        raise SubnetworkError(
            f"specs={specs!r} names no width. Accepted: fractions and SubnetworkSpecs, in a list or by name. Give "
            "specs=[0.25, 0.5, 0.75]."
        )
    named = list(specs.items()) if isinstance(specs, Mapping) else [(None, one) for one in specs]
    found: dict[str, SubnetworkSpec] = {}
    for name, one in named:
        if not isinstance(one, (float, SubnetworkSpec)):
            raise SubnetworkError(
                f"A width is {one!r}. Accepted: a fraction above 0 and up to 1 as a float, such as 0.5, or a "
                "SubnetworkSpec. Give specs=[0.25, 0.5, 0.75]."
            )
        spec = SubnetworkSpec.uniform(model, one) if isinstance(one, float) else one
        spec.widths(model)
        label = str(name) if name is not None else f"{100 * one:g} %" if isinstance(one, float) else name_of_spec(one)
        if label in found or label == FULL:
            raise SubnetworkError(
                f"Two widths are called {label!r}. Accepted: widths that differ. Leave one out, or give specs by name: "
                "specs={'small': spec}."
            )
        found[label] = spec
    return found


def name_of_spec(spec: SubnetworkSpec) -> str:
    """What a report calls a spec: its widths in short, such as `heads 2, ffn 50 %` or `ffn 96–1024`."""

    def show(one: float | int) -> str:
        return f"{100 * one:g} %" if isinstance(one, float) else str(one)

    parts = []
    for cut in CUTS:
        value = getattr(spec, cut)
        if isinstance(value, tuple):
            low, high = min(value), max(value)
            parts.append(f"{cut} {show(low)}" if low == high else f"{cut} {show(low)}–{show(high)}")
        elif value is not None:
            parts.append(f"{cut} {show(value)}")
    return ", ".join(parts) or "nothing cut"


def seeds_of(random_control: bool | Sequence[int]) -> tuple[int, ...]:
    """Seeds of the random orders to measure.

    Raises:
        SPPConfigError: It is neither a bool nor a list of seeds.
    """
    if isinstance(random_control, bool):
        return (0,) if random_control else ()
    if (
        isinstance(random_control, str)
        or not isinstance(random_control, Sequence)
        or not all(isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0 for seed in random_control)
    ):
        raise SPPConfigError(
            f"random_control={random_control!r} is neither True nor False nor a list of seeds. Give random_control="
            "(0, 1, 2), for example."
        )
    return tuple(unique(random_control))


def calibration_batches(calibration: Iterable[Batch] | None) -> list[Batch] | None:
    """The calibration batches without labels, read once: every width is compensated on the same.

    Raises:
        CalibrationError: It is no iterable of dict batches, or holds none.
    """
    if calibration is None:
        return None
    if not isinstance(calibration, Iterable) or isinstance(calibration, (Mapping, str)):
        raise CalibrationError(
            f"The calibration data is a {type(calibration).__name__}; an iterable of dict batches of forward arguments "
            "is needed. Give a DataLoader or a list of batches."
        )
    batches = list(calibration)
    if not batches:
        raise CalibrationError(
            "The calibration data holds no batch. Give a non-empty iterable of dict batches (a generator that was read "
            "before is empty), or leave calibration out."
        )
    for batch in batches:
        check_batch(batch)
    return [forward_arguments(batch) for batch in batches]


def timed_inputs(model: Any, inputs: Any, sizes: Sequence[int] | None) -> dict[int, dict[str, Any]]:
    """Forward arguments by batch size; samples repeat where there are too few.

    Raises:
        ExampleInputsError: The inputs hold no tensor.
        SPPConfigError: The sizes are no list of counts.
    """
    if not isinstance(inputs, Mapping) or not any(isinstance(v, Tensor) and v.dim() > 0 for v in inputs.values()):
        raise ExampleInputsError(
            f"example_inputs is a {type(inputs).__name__} without a tensor that has samples. Accepted: a dict of "
            "forward arguments. Give what you would call the model with, by argument name."
        )
    inputs = forward_arguments(inputs)
    main = inputs.get(getattr(inner_model(model), "main_input_name", ""))
    count = len(main) if isinstance(main, Tensor) and main.dim() > 0 else batch_length(inputs)
    if sizes is None:
        sizes = [count]
    if isinstance(sizes, (str, int)) or not sizes:
        raise SPPConfigError(
            f"latency_batch_sizes={sizes!r} is no list of batch sizes. Give latency_batch_sizes=(1, 16)."
        )
    for size in sizes:
        check_count("latency_batch_sizes", size, 1)

    def resized(value: Any, size: int) -> Any:
        if isinstance(value, Tensor) and value.dim() > 0 and len(value) == count:
            return value[torch.arange(size) % count]
        return value

    return {size: {name: resized(value, size) for name, value in inputs.items()} for size in sizes}


def check_count(name: str, value: Any, least: int) -> None:
    """Refuse what is no whole number from `least` up.

    Raises:
        SPPConfigError: It is none.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise SPPConfigError(f"{name} has {value!r}. Accepted: whole numbers from {least} up. Correct it.")
