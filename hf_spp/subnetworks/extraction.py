"""Sub-networks as models of their own, and as views of the model that they are cut from."""

import copy
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..architectures import channel_groups
from ..calibration import check_batch
from ..channels import ChannelGroup, ChannelMap
from ..errors import CalibrationError, SubnetworkError
from ..reordering import check_writable
from ..structure import inner_model, is_sharded, tuner_layers
from .compensation import compensate as refit
from .costs import tensors_of
from .edits import Edits, check_experts, find_edits, narrowed_model
from .record import SubnetworkRecord, note_record, record_of
from .spec import SubnetworkSpec, known_reordering
from .stock import StockModel, query_factors, stock_model
from .widths import Kept, Widths, kept_places, narrowed

logger = logging.get_logger(__name__)

_NORM = re.compile(r"(?<!Batch)Norm|GRN")


def extract_subnetwork(
    model: PreTrainedModel,
    spec: SubnetworkSpec,
    *,
    calibration: Iterable[Mapping[str, Any]] | None = None,
    compensate: bool | None = None,
    allow_unordered: bool = False,
) -> Any:
    """Cut a smaller model out of a reordered one.

    The result is a model of the same class with its own memory. It computes what the model computes with the cut
    channels masked to zero (but for norms over neurons, which then count fewer), or with `compensate` comes closer to
    the whole model than that. Where a stock config can
    state its sizes it has that config, and `AutoModel.from_pretrained` loads what it saves; elsewhere
    `hf_spp.load_subnetwork` does.

    Args:
        model: The model; it stays as it is.
        spec: Which channels to keep.
        calibration: Any iterable of dict batches of forward arguments; labels are not used.
        compensate: Whether to refit the projections behind cut channels on the calibration data, by ridge least
            squares. None means yes when calibration data is given.
        allow_unordered: Whether to cut a model that was never reordered without a warning.

    Returns:
        The smaller model, in the same mode, dtype and on the same device.

    Raises:
        SubnetworkError: The spec does not fit the model, or the model cannot be cut so.
        CalibrationError: Compensation is asked for and there is no calibration data that works.
        UnsupportedModelError: The model is quantized, or its weights hold no values.
    """
    batches = _batches(calibration, compensate)
    groups, widths = settle(model, spec, allow_unordered)
    check_writable(model)
    small, kept, reason = cut_out(model, groups, widths)
    compensated: tuple[str, ...] = ()
    if batches is not None and widths:
        compensated = refit(model, small, groups, widths, kept, batches)
    else:
        warn_of_norms(model, groups, widths)
    note_record(small, SubnetworkRecord(spec, widths, type(small).__name__, reason, compensated))
    return small


@contextmanager
def subnetwork_view(model: Any, spec: SubnetworkSpec, *, allow_unordered: bool = False) -> Iterator[Any]:
    """Run a model at a smaller width inside the block, on the memory of its own weights.

    Weights are narrowed without a copy where the kept channels lie in one run, as neurons and heads do in separate
    projections; those of fused projections and of rows inside heads are joined, which copies them. Gradients reach the
    whole weights in all cases. Afterwards the model is as before.

    Call the backward pass inside the block where activations are checkpointed, and step the optimizer outside of it.

    Args:
        model: The model.
        spec: Which channels to keep.
        allow_unordered: Whether to cut a model that was never reordered without a warning.

    Raises:
        SubnetworkError: The spec does not fit the model, or the model cannot be cut so.
    """
    inner = inner_model(model)
    edits = _view_edits(inner, spec, allow_unordered)
    with narrowed_model(inner, edits):
        yield model


@dataclass(frozen=True)
class _Known:
    """What was found out about a model, as long as its parameters are the same."""

    parameters: tuple[tuple[int, torch.Size], ...]
    groups: ChannelMap
    edits: dict[str, Edits]


# Finding out what a cut changes takes longer than changing it.
_KNOWN: "WeakKeyDictionary[nn.Module, _Known]" = WeakKeyDictionary()


def _known(model: Any) -> _Known:
    parameters = tuple((id(parameter), parameter.shape) for parameter in inner_model(model).parameters())
    if model not in _KNOWN or _KNOWN[model].parameters != parameters:
        _KNOWN[model] = _Known(parameters, channel_groups(model), {})
    return _KNOWN[model]


def _view_edits(model: Any, spec: SubnetworkSpec, allow_unordered: bool) -> Edits:
    known, key = _known(model), repr(spec)
    if key not in known.edits:
        groups, widths = settle(model, spec, allow_unordered)
        known.edits[key] = find_edits(model, groups, widths)
    return known.edits[key]


def settle(model: Any, spec: SubnetworkSpec, allow_unordered: bool) -> tuple[ChannelMap, dict[str, int]]:
    """The groups of a model and the widths of a spec there, once the model may be cut."""
    if not isinstance(spec, SubnetworkSpec):
        raise SubnetworkError(f"spec is {spec!r}; a SubnetworkSpec is needed. Give SubnetworkSpec(ffn=0.5, heads=0.5).")
    groups = _known(model).groups
    if tuner_layers(inner_model(model)):
        raise SubnetworkError(
            f"{type(inner_model(model)).__name__} holds adapters, which add to weights at their full width. Merge them "
            "(merge_and_unload) before it is cut."
        )
    if is_sharded(inner_model(model)):
        raise SubnetworkError(
            f"The weights of {type(inner_model(model)).__name__} are divided among processes by FSDP or ZeRO-3, which "
            "cannot be cut. Cut the model before it is sharded."
        )
    widths = spec.widths(model, groups)
    if widths and not allow_unordered and not is_ordered(model, [groups.by_name[name] for name in widths]):
        warnings.warn(
            f"{type(inner_model(model)).__name__} was not reordered along all axes that are cut, so the channels that "
            "stay are no better than random ones. Call apply_spp(model) before, load a reordered checkpoint, or pass "
            "allow_unordered=True.",
            stacklevel=4,
        )
    return groups, widths


def warn_of_norms(model: Any, groups: ChannelMap, widths: Widths) -> None:
    """Say where a slice that is not compensated computes other statistics than the masked model."""
    if norms := _norms_over(model, groups, widths):
        logger.warning(
            f"{', '.join(norms)} of {type(model).__name__} computes statistics over the channels that are cut, so the "
            "slice is not quite what the model computes without these channels. Give calibration data to make up for "
            "that."
        )


def _norms_over(model: Any, groups: ChannelMap, widths: Widths) -> list[str]:
    """Classes of norms whose statistics are those of channels that are cut, inside a unit."""
    found = []
    for group in groups:
        if group.name in widths and group.axis in ("ffn", "heads", "vo"):
            for member in group.members:
                name = type(model.get_submodule(member.tensor.rpartition(".")[0])).__name__
                if member.role == "other" and _NORM.search(name):
                    found.append(name)
            # Gemma's has no weight, so it is no member.
            norms = (getattr(model.get_submodule(owner), "v_norm", None) for owner in group.owners)
            found += [type(norm).__name__ for norm in norms if group.axis == "vo" and norm is not None]
    return list(dict.fromkeys(found))


def is_ordered(model: Any, groups: Iterable[ChannelGroup]) -> bool:
    """Whether the channels of some groups are known to be in order of saliency."""
    if record_of(model) is not None:
        return True
    reordering = known_reordering(model)
    return reordering is not None and all(group.name in reordering.orders for group in groups)


def _batches(
    calibration: Iterable[Mapping[str, Any]] | None, compensate: bool | None
) -> list[Mapping[str, Any]] | None:
    """The batches to compensate on, None to leave it out."""
    if compensate is False or (compensate is None and calibration is None):
        return None
    if calibration is None:
        raise CalibrationError(
            "compensate=True needs calibration data and none was given. Pass calibration=<iterable of dict batches of "
            "forward arguments>, or leave compensate out."
        )
    if not isinstance(calibration, Iterable):
        raise CalibrationError(
            f"The calibration data is a {type(calibration).__name__}; an iterable of dict batches of forward arguments "
            "is needed. Give a DataLoader or a list of batches."
        )
    batches = list(calibration)
    for batch in batches:
        check_batch(batch)
    return [{name: value for name, value in batch.items() if name not in ("labels", "label")} for batch in batches]


@torch.no_grad()
def cut_out(model: Any, groups: ChannelMap, widths: Widths) -> tuple[Any, Kept, str | None]:
    """A smaller copy of a model, the places that its tensors keep, and why no stock config states it.

    Args:
        model: The plain model, with values or on the meta device.
        groups: Its channel groups.
        widths: Channels kept in each block, by name of the groups that are cut.
    """
    model = inner_model(model)
    check_experts(model, groups, widths)
    found = stock_model(model, groups, widths)
    if isinstance(found, str):
        edits = find_edits(model, groups, widths)
        pieces: dict[int, Any] = {}
        for name, tensor in tensors_of(model).items():
            piece_of(tensor, edits.kept.get(name, {}), pieces)
        small = copy.deepcopy(model, {**pieces, **_left_behind(model)})
        edits.write_attributes(small)
        return small, edits.kept, found
    kept = kept_places(groups, widths, _shapes_of(model))
    _fill(found.model, model, kept)
    scale_queries(found.model, _query_scales(model, groups, widths, found, kept))
    return found.model, kept, None


@dataclass(frozen=True)
class Cut:
    """What a cut makes of a model whose weights need not be loaded.

    Attributes:
        config: The config of the smaller model.
        kept: Places that stay, by name and dimension of every tensor that gets shorter.
        reason: Why no stock config states it, None where `config` does.
        edits: What changes in the model where no stock config states it.
        scales: Factors of the rows of tensors that write queries, after they are cut.
    """

    config: Any
    kept: Kept
    reason: str | None
    edits: Edits | None
    scales: Mapping[str, Tensor]


def plan_cut(model: Any, groups: ChannelMap, widths: Widths) -> Cut:
    """What `cut_out` does to a model, which may lie on the meta device.

    Args:
        model: The plain model.
        groups: Its channel groups.
        widths: Channels kept in each block, by name of the groups that are cut.

    Raises:
        SubnetworkError: A module computes with its parameters in a way that the cut would break.
    """
    check_experts(model, groups, widths)
    found = stock_model(model, groups, widths)
    if isinstance(found, str):
        edits = find_edits(model, groups, widths)
        return Cut(model.config, edits.kept, found, edits, {})
    kept = kept_places(groups, widths, _shapes_of(model))
    return Cut(found.model.config, kept, None, None, _query_scales(model, groups, widths, found, kept))


@torch.no_grad()
def scale_queries(small: Any, scales: Mapping[str, Tensor]) -> None:
    """Multiply the rows that write queries, so that scores are scaled as before the cut."""
    for name, rows in scales.items():
        tensor = tensors_of(small)[name]
        tensor.mul_(rows.to(tensor).reshape(-1, *[1] * (tensor.dim() - 1)))


def _query_scales(model: Any, groups: ChannelMap, widths: Widths, found: StockModel, kept: Kept) -> dict[str, Tensor]:
    if found.query_scale is None:
        return {}
    lengths = {name: shape[0] for name, shape in _shapes_of(model).items() if shape}
    factors = query_factors(groups, widths, found.query_scale, lengths)
    return {name: factor[kept[name][0]] for name, factor in factors.items()}


def _shapes_of(model: Any) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors_of(model).items()}


def _left_behind(model: Any) -> dict[int, Any]:
    """What a copy of a model does not take along: what this package and training put on it."""
    names = ("save_pretrained", "_spp_history", "_spp_subnetwork")
    return {id(vars(model)[name]): None for name in names if name in vars(model)}


def _fill(small: Any, model: Any, kept: Kept) -> None:
    """Give a model without values those that it keeps of another."""
    pieces: dict[int, Any] = {}
    first = {id(tensor): name for name, tensor in tensors_of(model).items()}
    modules = dict(model.named_modules())
    for path, module in small.named_modules():
        for holder, sources in (
            (module._parameters, modules[path]._parameters),
            (module._buffers, modules[path]._buffers),
        ):
            for name, tensor in holder.items():
                source = sources.get(name)
                if tensor is not None and source is not None:
                    holder[name] = piece_of(source, kept.get(first[id(source)], {}), pieces)
    small.train(model.training)
    if getattr(model, "generation_config", None) is not None:
        small.generation_config = copy.deepcopy(model.generation_config)


def piece_of(tensor: Tensor, dims: Mapping[int, Tensor], pieces: dict[int, Any]) -> Tensor:
    """A copy of the kept places of a tensor, one for all modules that share it."""
    if id(tensor) not in pieces:
        part = narrowed(tensor.detach(), dims).clone(memory_format=torch.contiguous_format)
        pieces[id(tensor)] = nn.Parameter(part, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else part
    found: Tensor = pieces[id(tensor)]
    return found
