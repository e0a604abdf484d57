"""`apply_spp`: score, order, gather, prove."""

import dataclasses
import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from .apply import Indices, Moves, effective_weights, gather_model, invert_indices, invert_moves, named_tensors
from .architectures import channel_groups, model_type_of
from .calibration import calibrated_scores
from .channels import ChannelMap
from .config import AXES, Metric, SPPConfig
from .errors import CalibrationError, EqualFunctionError, IllegalAxisError, SPPConfigError
from .permutation import gather_indices, salient_order
from .processes import agree, check_agreed
from .proof import Proof, Witness, default_tolerance, places_of
from .reordering import Reordering, check_writable, history_of, remember
from .saliency import check_finite, weight_scores
from .structure import inner_model, is_sharded, plain_class
from .version import __version__

logger = logging.get_logger(__name__)


def apply_spp(
    model: PreTrainedModel,
    config: SPPConfig | None = None,
    *,
    calibration: Iterable[Mapping[str, Any]] | None = None,
    example_inputs: Mapping[str, Any] | None = None,
) -> Reordering:
    """Put a model's channels in order of saliency, in place, without changing what it computes.

    The model is run on a small input before and after. If its outputs moved further than the tolerance, every weight
    is put back bit for bit and an error is raised.

    Args:
        model: A transformers model. Its class, config and shapes stay the same; tied weights stay tied.
        config: What to reorder and how; None means `SPPConfig()`.
        calibration: Any iterable of dict batches of forward arguments, for the metrics `activation` and `taylor`.
        example_inputs: Forward arguments for the proof; None builds them from the model's config.

    Returns:
        The reordering, with orders, scores, the proof, and what may not move and why.

    Raises:
        UnsupportedModelError: The model is quantized, on the meta device, or no transformers model.
        UnsupportedArchitectureError: No channel group was found.
        IllegalAxisError: A configured axis may not move in this model.
        CalibrationError: The metric needs calibration data and has none that works.
        NonFiniteWeightsError: A weight is NaN or infinite.
        ExampleInputsError: No inputs for the proof.
        EqualFunctionError: The outputs moved past the tolerance; the model was restored.

    Reference:
        Salient parameter prioritization, arXiv:2310.00247.
    """
    groups, config = prepare(model, config, calibration)
    witness = Witness(model, example_inputs, config.seed, groups) if config.verify else None
    reordering = carry_out(model, plan(model, groups, config, calibration), witness)
    if not reordering.changed:
        logger.warning(f"{reordering.model_class} was already in this order; no channel moved.")
    return reordering


@dataclass(frozen=True)
class Plan:
    """An order for every group of a model, not carried out yet.

    Attributes:
        groups: The groups to move.
        config: The settings, with axes and metric as they are really used.
        scores: Saliency by group name, `[blocks, size]`, on the CPU.
        orders: Orders by group name, `[blocks, size]`, int64, on the CPU.
    """

    groups: ChannelMap
    config: SPPConfig
    scores: Mapping[str, Tensor]
    orders: Mapping[str, Tensor]


def prepare(
    model: PreTrainedModel, config: SPPConfig | None = None, calibration: Iterable[Any] | None = None
) -> tuple[ChannelMap, SPPConfig]:
    """Settle what may be put in order, and how; see `apply_spp` for the errors."""
    groups, config = select(model, config, calibration)
    check_writable(model)
    if config.needs_calibration and is_sharded(inner_model(model)):
        raise CalibrationError(
            f"Metric {config.metric!r} runs the plain model, and the weights of {type(inner_model(model)).__name__} "
            "are divided among processes by FSDP or ZeRO-3. Choose a weight-only metric (l1, l2, random), or call "
            "apply_spp before the model is sharded."
        )
    return groups, config


def select(
    model: PreTrainedModel, config: SPPConfig | None = None, calibration: Iterable[Any] | None = None
) -> tuple[ChannelMap, SPPConfig]:
    """Settle what of a model may be put in order, and how, also where its weights hold no values."""
    config = SPPConfig() if config is None else config
    if not isinstance(config, SPPConfig):
        raise SPPConfigError(f"config is {config!r}; an SPPConfig is needed. Give SPPConfig(metric='l1', …).")
    groups = _select_axes(channel_groups(model), config, inner_model(model))
    return groups, _settle(config, groups, calibration)


def plan(
    model: PreTrainedModel,
    groups: ChannelMap,
    config: SPPConfig,
    calibration: Iterable[Mapping[str, Any]] | None = None,
    *,
    together: bool = False,
) -> Plan:
    """Score the channels and order them; nothing is moved.

    Adapters count with the weights that they add to.

    Args:
        model: The model.
        groups: What `prepare` gave.
        config: What `prepare` gave.
        calibration: Dict batches for the metrics that need them.
        together: Whether all processes of a distributed run plan at once, so that all take the scores of the first.
    """
    with effective_weights(model) as merged:

        def score() -> dict[str, Tensor]:
            _check_finite(merged, groups, config)
            return _score(merged, named_tensors(merged), groups, config, calibration)

        scores = agree(score) if together else score()
    orders = {name: salient_order(values) for name, values in scores.items()}
    if together:
        check_agreed("orders", orders)
    return Plan(groups, config, scores, orders)


def carry_out(
    model: PreTrainedModel,
    planned: Plan,
    witness: Witness | None,
    others: Callable[[Indices], Moves] | None = None,
) -> Reordering:
    """Move the channels as planned, prove that the function is equal, and otherwise put everything back.

    Args:
        model: The model, with or without adapters.
        planned: What `plan` gave.
        witness: The model's outputs before, None to leave out the proof.
        others: Finds what moves along, such as optimizer states, before anything is moved.
    """
    config, orders = planned.config, planned.orders
    indices = gather_indices(planned.groups, orders, {name: one.shape for name, one in named_tensors(model).items()})
    along = {} if others is None else dict(others(indices))
    history = history_of(model) or ()
    gather_model(model, indices, others=along)
    inner = inner_model(model)
    try:
        tolerance = None if witness is None else config.tolerance or default_tolerance(inner)
        proof = None if witness is None else _prove(model, witness, orders, indices, config, tolerance or 0.0)
        reordering = describe(inner, planned, next(inner.parameters()).dtype, proof, tolerance)
        remember(model, (*history, reordering))
    except BaseException:
        gather_model(model, invert_indices(indices), others=invert_moves(along))
        raise
    if proof is not None and proof.unproved:
        logger.warning(
            f"The proof did not run {len(proof.unproved)} of {len(orders)} groups of {type(inner).__name__}; nothing "
            f"shows that these still compute the same: {', '.join(places_of(proof.unproved, orders))}. "
            "Give example_inputs that reach them."
        )
    return reordering


def describe(
    model: PreTrainedModel,
    planned: Plan,
    dtype: torch.dtype,
    proof: Proof | None = None,
    tolerance: float | None = None,
) -> Reordering:
    """What a plan does to a model, for the record."""
    return Reordering(
        planned.config,
        planned.orders,
        {name: values.float() for name, values in planned.scores.items()},
        planned.groups,
        planned.groups.refused,
        proof,
        tolerance,
        model_type_of(model),
        plain_class(model).__name__,
        str(dtype).removeprefix("torch."),
        _versions(),
    )


def _select_axes(groups: ChannelMap, config: SPPConfig, model: PreTrainedModel) -> ChannelMap:
    for tower in config.towers or ():
        if len(groups.select(AXES, [tower])) == 0:
            raise IllegalAxisError(
                f"Tower {tower!r} of {type(model).__name__} holds no channel that may move. Towers here: "
                f"{', '.join(groups.towers)}, and the paths of modules below them. Name some in SPPConfig(towers=...)."
            )
    groups = groups.select(AXES, config.towers)
    if config.axes is None:
        selected = groups.select(axis for axis in AXES if axis != "hidden")
        if len(selected) == 0:
            raise IllegalAxisError(
                f"No axis but 'hidden' may move in {type(model).__name__}, and 'hidden' must be asked for by name. "
                "Set SPPConfig(axes=('hidden',))."
            )
        return selected
    for axis in config.axes:
        if axis not in groups.axes:
            reasons = "; ".join(f"{r.where}: {r.reason}" for r in groups.refused if r.axis == axis)
            raise IllegalAxisError(
                f"Axis {axis!r} may not move in {type(model).__name__} (model_type {model_type_of(model)!r}): "
                f"{reasons or 'the model has no such channels'}. Legal axes here: {', '.join(groups.axes)}. "
                "Leave it out of SPPConfig(axes=...)."
            )
    return groups.select(config.axes)


def _settle(config: SPPConfig, groups: ChannelMap, calibration: Iterable[Any] | None) -> SPPConfig:
    """The config with axes and metric as they will really be used."""
    metric = config.metric
    if metric is None:
        metric = "l1" if calibration is None else "activation"
    settled = dataclasses.replace(config, metric=metric, axes=tuple(a for a in AXES if a in groups.axes))
    if settled.needs_calibration and calibration is None:
        raise CalibrationError(
            f"Metric {metric!r} needs calibration data and none was given. Pass calibration=<iterable of dict batches "
            "of forward arguments>, or choose a weight-only metric: l1, l2, random."
        )
    if calibration is not None and not settled.needs_calibration:
        raise CalibrationError(
            f"Calibration data was given, but metric {settled.metric_name!r} does not use it. Leave calibration out, "
            "or choose metric 'activation' or 'taylor'."
        )
    return settled


def _score(
    model: PreTrainedModel,
    tensors: Mapping[str, Tensor],
    groups: ChannelMap,
    config: SPPConfig,
    calibration: Iterable[Mapping[str, Any]] | None,
) -> dict[str, Tensor]:
    if calibration is not None and isinstance(config.metric, str):
        return calibrated_scores(
            model, groups, calibration, config.metric, max_batches=config.calibration_batches, seed=config.seed
        )
    # `_settle` has replaced a metric that was left open.
    return weight_scores(groups, tensors, cast(Metric, config.metric), config.seed)


def _check_finite(model: PreTrainedModel, groups: ChannelMap, config: SPPConfig) -> None:
    """Refuse NaN and infinity in every weight; those that a norm will read are left to it."""
    read = {m.tensor for group in groups for m in group.scored_members} if config.metric in ("l1", "l2") else set()
    check_finite(named_tensors(model), seen=read)


def _prove(
    model: PreTrainedModel,
    witness: Witness,
    orders: Mapping[str, Tensor],
    indices: Indices,
    config: SPPConfig,
    tolerance: float,
) -> Proof:
    hidden = orders.get("hidden")
    proof = witness.compare(model, None if hidden is None else hidden.flatten(), indices)
    if not proof.relative_diff <= tolerance:
        raise EqualFunctionError(
            f"The outputs of {type(model).__name__} moved by {proof.max_abs_diff:.3g}, {proof.relative_diff:.3g} of "
            f"their scale; up to {tolerance:.3g} is accepted. The model was put back bit for bit. Leave out the axis "
            f"that is not legal here (one of {', '.join(config.axes or ())}) and report the architecture; in low "
            "precision, reorder in float32 instead."
        )
    return proof


def _versions() -> dict[str, str]:
    return {
        "hf_spp": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
