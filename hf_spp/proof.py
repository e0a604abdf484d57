"""The proof of equal function: run the model on small inputs before and after, and compare what it puts out."""

import re
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .apply import Indices, varied_constants
from .architectures import model_type_of
from .channels import ChannelGroup
from .errors import EqualFunctionError, ExampleInputsError
from .example_inputs import example_inputs
from .forward import Float64Throughout, called_modules, evaluation_mode, fixed_rng, output_tensors, run_model, unfused
from .saliency import check_finite
from .structure import inner_model, part_of, reshard

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}
"""Largest accepted max|Δ| relative to the output's scale, by the dtype of the weights."""


# Of inputs that run and leave groups out, so many are tried before the best are taken.
_RUNS = 3


@dataclass(frozen=True)
class Proof:
    """How far a model's outputs moved.

    Attributes:
        max_abs_diff: Largest absolute difference over all outputs.
        relative_diff: Largest difference of an output relative to that output's largest magnitude.
        output_scale: Largest magnitude over all outputs.
        unproved: Names of the groups that the inputs did not reach: some of their modules never ran, so nothing shows
            that these still compute the same.
    """

    max_abs_diff: float
    relative_diff: float
    output_scale: float
    unproved: tuple[str, ...] = ()


class Witness:
    """A model's outputs on fixed inputs, taken before a change, to compare with afterwards.

    Weights that are all the same, as the biases and norms of a fresh model, look alike in every order; while the model
    runs they hold random values, which move as they would.

    Args:
        model: The model before the change.
        inputs: A dict of forward arguments; None builds inputs from the model's config, of several those that reach
            most groups.
        seed: Seed of built inputs.
        groups: The groups that will move, to find out which of them the inputs reach.

    Raises:
        ExampleInputsError: No inputs were given and none that run could be built, or the given ones do not run.
        NonFiniteWeightsError: The model's output is not finite, because a weight is not.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        inputs: Mapping[str, Any] | None = None,
        seed: int = 0,
        groups: Iterable[ChannelGroup] = (),
    ) -> None:
        self.seed = seed
        model = inner_model(model)
        with varied_constants(model, seed):
            run = _best_run(model, inputs, seed, tuple(groups))
        self.inputs, self.before, self.unproved = run.inputs, run.outputs, run.unproved
        if not run.is_sound:
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

        Raises:
            EqualFunctionError: The model does not run any more.
        """
        model = inner_model(model)
        with varied_constants(model, self.seed, indices):
            try:
                after = _outputs(model, self.inputs, self.seed)
            except Exception as error:  # whatever a forward raises, it did not before the change
                raise EqualFunctionError(
                    f"{type(model).__name__} ran on the inputs of the proof and does not after its channels moved: "
                    f"{error}. Give other example_inputs, or leave out axes and report the architecture."
                ) from error
        # Where hidden states are all that comes out, their order is part of the function.
        if all("hidden_state" in name for name in self.before):
            hidden_order = None
        worst, relative, scale = 0.0, 0.0, 0.0
        for name, expected in self.before.items():
            if hidden_order is not None and "hidden_state" in name:
                expected = expected.index_select(-1, hidden_order.to(expected.device))
            finite = expected.isfinite()
            size = _largest(expected[finite])
            diff = float("inf")
            if name in after and after[name].shape == expected.shape and after[name][~finite].equal(expected[~finite]):
                diff = _largest((after[name] - expected)[finite])
            # A NaN difference must fail every comparison with a tolerance.
            diff = diff if diff == diff else float("inf")
            worst, scale = max(worst, diff), max(scale, size)
            relative = max(relative, diff / size if size else diff)
        return Proof(worst, relative, scale, self.unproved)


def _largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


def default_tolerance(model: PreTrainedModel) -> float:
    """The tolerance for the coarsest dtype among the model's weights."""
    return max(TOLERANCES[parameter.dtype] for parameter in model.parameters() if parameter.is_floating_point())


def places_of(names: Iterable[str], among: Iterable[str]) -> tuple[str, ...]:
    """Where groups are, in few words: whole towers, or else their paths, with one for all layers.

    Args:
        names: Names of the groups.
        among: Names of all groups of the model, to tell whether a tower holds any other.
    """
    names = tuple(names)
    others = {name.partition(".")[0] for name in set(among).difference(names)}
    places = (
        re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name.rpartition(".")[0] or name)
        if name.partition(".")[0] in others
        else name.partition(".")[0]
        for name in names
    )
    return tuple(dict.fromkeys(places))


@dataclass(frozen=True)
class _Run:
    inputs: Mapping[str, Any]
    outputs: dict[str, Tensor]
    unproved: tuple[str, ...]

    @property
    def is_sound(self) -> bool:
        """Whether the outputs are numbers; infinity is what some models put where there is nothing."""
        return all(value.numel() == 0 or bool(value.isfinite().any()) for value in self.outputs.values()) and not any(
            bool(value.isnan().any()) for value in self.outputs.values()
        )


def _best_run(
    model: PreTrainedModel, inputs: Mapping[str, Any] | None, seed: int, groups: Sequence[ChannelGroup]
) -> _Run:
    """The run on the inputs, or on those of all that can be built which reach most groups."""
    if inputs is not None and not isinstance(inputs, Mapping):
        raise ExampleInputsError(
            f"example_inputs is a {type(inputs).__name__}; a dict of forward arguments is needed. "
            "Give what you would call the model with, by argument name."
        )
    failure, runs, owners = None, [], _owners(model)
    with called_modules(model) as called:
        for candidate in [inputs] if inputs is not None else example_inputs(model, seed):
            called.clear()
            try:
                outputs = _outputs(model, candidate, seed)
            except Exception as error:  # whatever a forward raises only means that these inputs do not suit it
                failure = error
                continue
            if outputs:
                unproved = tuple(group.name for group in groups if not _is_reached(group, owners, called))
                runs.append(_Run(candidate, outputs, unproved))
            if len(runs) == _RUNS or (outputs and runs[-1].is_sound and not runs[-1].unproved):
                break
    if runs:
        return min(runs, key=lambda run: (not run.is_sound, len(run.unproved)))
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


def _owners(model: nn.Module) -> dict[str, set[str]]:
    """Paths of all modules that hold a parameter or buffer, by each of its names."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        if part_of(name).adapter is None:
            names[id(tensor)].append(name)
    return {part_of(name).tensor: {one.rpartition(".")[0] for one in tied} for tied in names.values() for name in tied}


def _is_reached(group: ChannelGroup, owners: Mapping[str, set[str]], called: Container[str]) -> bool:
    """Whether of every member a module ran that holds it, or the one around it, which may use its parameters.

    The model itself, which always runs, says nothing of the modules in it.
    """
    ran = {
        member.tensor: any(
            owner == "" or owner in called or (owner.rpartition(".")[0] or owner) in called
            for owner in owners[member.tensor]
        )
        for member in group.members
    }
    return all(ran.values())


@torch.no_grad()
def _outputs(model: PreTrainedModel, inputs: Mapping[str, Any], seed: int) -> dict[str, Tensor]:
    exact = Float64Throughout() if default_tolerance(model) == TOLERANCES[torch.float64] else nullcontext()
    # Fused operations are not made for every dtype, nor taken on every run.
    try:
        with evaluation_mode(model), fixed_rng(model, seed), unfused(model), exact:
            found = output_tensors(run_model(model, inputs))
    finally:
        # FSDP keeps what it gathered last for a backward pass, which does not come.
        reshard(model)
    return {name: value.double() if value.dtype == torch.float64 else value.float() for name, value in found.items()}
