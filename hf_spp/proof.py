"""The proof of equal function: run the model on small inputs before and after, and compare what it puts out."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ._compat import eager_experts
from .apply import Indices, varied_constants
from .architectures import model_type_of
from .errors import ExampleInputsError
from .example_inputs import example_inputs
from .forward import Float64Throughout, evaluation_mode, fixed_rng, output_tensors, run_model
from .saliency import check_finite

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}
"""Largest accepted max|Δ| relative to the output's scale, by the dtype of the weights."""


@dataclass(frozen=True)
class Proof:
    """How far a model's outputs moved.

    Attributes:
        max_abs_diff: Largest absolute difference over all outputs.
        relative_diff: Largest difference of an output relative to that output's largest magnitude.
        output_scale: Largest magnitude over all outputs.
    """

    max_abs_diff: float
    relative_diff: float
    output_scale: float


class Witness:
    """A model's outputs on fixed inputs, taken before a change, to compare with afterwards.

    Weights that are all the same, as the biases and norms of a fresh model, look alike in every order; while the model
    runs they hold random values, which move as they would.

    Args:
        model: The model before the change.
        inputs: A dict of forward arguments; None builds inputs from the model's config.
        seed: Seed of built inputs.

    Raises:
        ExampleInputsError: No inputs were given and none that run could be built, or the given ones do not run.
        NonFiniteWeightsError: The model's output is not finite, because a weight is not.
    """

    def __init__(self, model: PreTrainedModel, inputs: Mapping[str, Any] | None = None, seed: int = 0) -> None:
        self.seed = seed
        with varied_constants(model, seed):
            self.inputs, self.before = _first_that_runs(model, inputs, seed)
        if not all(bool(value.isfinite().all()) for value in self.before.values()):
            check_finite(dict(model.named_parameters()))
            raise ExampleInputsError(
                f"{type(model).__name__} puts out NaN or infinity on the inputs of the proof. "
                "Give example_inputs on which its outputs are finite."
            )

    def compare(
        self, model: PreTrainedModel, hidden_order: Tensor | None = None, indices: Indices | None = None
    ) -> Proof:
        """Run the model again and measure how far its outputs moved.

        Args:
            model: The same model, after the change.
            hidden_order: If the residual stream was reordered, its order `[hidden]`; outputs that are hidden states
                are compared in that order.
            indices: The change: the gather index of each moved dimension, by tensor name and dimension.
        """
        with varied_constants(model, self.seed, indices):
            after = _outputs(model, self.inputs, self.seed)
        # Where hidden states are all that comes out, their order is part of the function.
        if all("hidden_state" in name for name in self.before):
            hidden_order = None
        worst, relative, scale = 0.0, 0.0, 0.0
        for name, expected in self.before.items():
            if hidden_order is not None and "hidden_state" in name:
                expected = expected.index_select(-1, hidden_order.to(expected.device))
            size = float(expected.abs().max()) if expected.numel() else 0.0
            diff = float((after[name] - expected).abs().max()) if expected.numel() else 0.0
            # A NaN difference must fail every comparison with a tolerance.
            diff = diff if diff == diff else float("inf")
            worst, scale = max(worst, diff), max(scale, size)
            relative = max(relative, diff / size if size else diff)
        return Proof(worst, relative, scale)


def default_tolerance(model: PreTrainedModel) -> float:
    """The tolerance for the coarsest dtype among the model's weights."""
    return max(TOLERANCES[parameter.dtype] for parameter in model.parameters())


def _first_that_runs(
    model: PreTrainedModel, inputs: Mapping[str, Any] | None, seed: int
) -> tuple[Mapping[str, Any], dict[str, Tensor]]:
    if inputs is not None and not isinstance(inputs, Mapping):
        raise ExampleInputsError(
            f"example_inputs is a {type(inputs).__name__}; a dict of forward arguments is needed. "
            "Give what you would call the model with, by argument name."
        )
    failure: Exception | None = None
    for candidate in [inputs] if inputs is not None else example_inputs(model, seed):
        try:
            outputs = _outputs(model, candidate, seed)
        except Exception as error:  # whatever a forward raises only means that these inputs do not suit it
            failure = error
            continue
        if outputs:
            return candidate, outputs
    name = type(model).__name__
    if inputs is not None:
        raise ExampleInputsError(
            f"{name} does not run on the given example_inputs {sorted(inputs)}: {failure or 'no tensor comes out'}. "
            "Give a dict of arguments that its forward accepts."
        ) from failure
    raise ExampleInputsError(
        f"No inputs on which {name} (model_type {model_type_of(model)!r}) runs could be built from its config"
        f"{f': {failure}' if failure else ''}. Pass example_inputs=dict(...) of forward arguments, or switch the proof "
        "off by name with SPPConfig(verify=False)."
    ) from failure


@torch.no_grad()
def _outputs(model: PreTrainedModel, inputs: Mapping[str, Any], seed: int) -> dict[str, Tensor]:
    exact = Float64Throughout() if default_tolerance(model) == TOLERANCES[torch.float64] else nullcontext()
    # Fused experts are not made for every dtype.
    with evaluation_mode(model), fixed_rng(model, seed), eager_experts(model), exact:
        found = output_tensors(run_model(model, inputs))
    return {name: value.double() if value.dtype == torch.float64 else value.float() for name, value in found.items()}
