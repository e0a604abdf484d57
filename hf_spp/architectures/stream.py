"""The residual stream: one group that moves every tensor dimension of a model that holds it.

Every tensor dimension as long as the stream is wide is taken to hold it, which is consistent by itself: a layer that
reads reordered channels and writes reordered ones computes the same. What must not move are the model's outputs, rows
that are heads, and everything whose order means something; those are refused where they are not known.
"""

import inspect
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from ..channels import ChannelGroup, Role
from . import patterns as written
from .groups import group_of, layer_of
from .index import Feature, ModelIndex, is_linear
from .units import AttentionUnit, FeedForwardUnit, Misfit


def hidden_group(
    index: ModelIndex, units: Sequence[AttentionUnit | FeedForwardUnit], misfits: Sequence[Misfit]
) -> ChannelGroup | Misfit:
    """The group of the residual stream, or why it may not move.

    Args:
        index: The model.
        units: Its attention and feed-forward units.
        misfits: Structures that are not understood, in which the stream may be cut into heads.
    """
    try:
        if (cut := next((one for one in misfits if one.cuts_stream), None)) is not None:
            raise _Unclear(cut.path, cut.reason)
        size, features = _features(index, units)
    except _Unclear as unclear:
        return Misfit(unclear.where, ("hidden",), unclear.reason)
    return group_of("hidden", "hidden", None, 1, size, features, {"s": "c"})


class _Unclear(Exception):
    def __init__(self, where: str, reason: str) -> None:
        super().__init__(where, reason)
        self.where, self.reason = where, reason


def _features(index: ModelIndex, units: Sequence[AttentionUnit | FeedForwardUnit]) -> tuple[int, list[Feature]]:
    for unit in units:
        if "hidden" in unit.refused:
            raise _Unclear(unit.path, unit.refused["hidden"])
    size = _width(index, units)
    found = [feature for unit in units for feature in unit.stream_features()]
    known = {feature.tensor for feature in found} | {feature.tensor for unit in units for feature in unit.features}
    # The bias of an output layer may be tied to a parameter of another name.
    known |= {
        index.first_name(f"{path}.bias")
        for path, module in index.modules.items()
        if path.rpartition(".")[2] in written.OUTPUT_LAYERS and is_linear(module) and module.bias is not None
    }
    known = {index.first_name(name) for name in known}
    for name in index.parameters:
        if name not in known:
            found += _parameter(index, name, size)
    for name, buffer in index.model.named_buffers():
        if buffer.is_floating_point() and size in buffer.shape:
            raise _Unclear(name, f"buffer of shape {list(buffer.shape)} is not understood")
    for feature in found:
        for pattern in getattr(index.model, "_keys_to_ignore_on_save", None) or ():
            if re.search(pattern, feature.tensor):
                raise _Unclear(feature.tensor, "it is not saved with the model and would come back in its first order")
    return size, found


def _width(index: ModelIndex, units: Sequence[AttentionUnit | FeedForwardUnit]) -> int:
    """The width of the one stream that all units share and an output layer reads."""
    config: Any = getattr(index.model, "config", None)
    if _reads_another_model(index, units, config):
        raise _Unclear("", written.CROSS_ATTENTION_REASON)
    if len(_configs(index, units)) > 1 and not getattr(config, "is_encoder_decoder", False):
        raise _Unclear("", written.COMPOSITE_REASON)
    if type(index.model).__name__ in _base_classes():
        raise _Unclear("", written.HEADLESS_REASON)
    _check_fixed_positions(index, sizes := {length for unit in units for length in unit.stream_widths()})
    if len(sizes) != 1:
        raise _Unclear("", f"the stream has several widths, {sorted(sizes)}" if sizes else "no unit states its width")
    size = sizes.pop()
    own = {feature.tensor for unit in units for feature in (*unit.stream_features(), *unit.features)}
    if not any(_reads_out(index, path, size, own) for path in index.modules):
        raise _Unclear("", written.HEADLESS_REASON)
    return size


def _reads_another_model(index: ModelIndex, units: Sequence[AttentionUnit | FeedForwardUnit], config: Any) -> bool:
    """Whether the model attends to hidden states that come from outside of it."""
    if getattr(config, "is_encoder_decoder", False):
        return False
    arguments = inspect.signature(type(index.model).forward).parameters
    taken = any(name in arguments for name in written.OUTSIDE_STATES)
    crossing = any(re.search(written.CROSS_ATTENTION_NAMES, unit.path) for unit in units)
    return bool(getattr(config, "add_cross_attention", False) or (taken and crossing))


def _configs(index: ModelIndex, units: Sequence[AttentionUnit | FeedForwardUnit]) -> set[type]:
    """Kinds of configs that the units were built from: one for each model that this one is made of."""
    found = set()
    for unit in units:
        path = unit.path
        while path and not hasattr(index.modules[path], "config"):
            path = path.rpartition(".")[0]
        found.add(type(getattr(index.modules[path], "config", None)))
    return found


@cache
def _base_classes() -> frozenset[str]:
    """Classes of transformers that put out their hidden states, without a task head."""
    names = MODEL_MAPPING_NAMES.values()
    return frozenset(name for one in names for name in ((one,) if isinstance(one, str) else one))


def _check_fixed_positions(index: ModelIndex, sizes: set[int]) -> None:
    """Refuse position embeddings that are computed and no parameter, which cannot move."""
    for path, module in index.modules.items():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_floating_point() and value.dim() and value.shape[-1] in sizes:
                raise _Unclear(path, written.FIXED_TENSOR_REASON.format(name=name))
        bare = not index.below(path) and re.search(written.FIXED_POSITION_NAMES, type(module).__name__)
        if bare and any(value in sizes for value in vars(module).values() if isinstance(value, int)):
            raise _Unclear(path, written.FIXED_TENSOR_REASON.format(name=type(module).__name__))


def _reads_out(index: ModelIndex, path: str, size: int, own: set[str]) -> bool:
    """Whether a linear map outside the layers turns the stream into something else, as a task head does."""
    projection = index.projection(path)
    if projection is None or projection.inputs % size or projection.weight in own:
        return False
    named = re.sub(r"\.\d+$", "", path).rpartition(".")[2] in written.OUTPUT_LAYERS
    return named or (layer_of(path) is None and projection.outputs != size)


def _parameter(index: ModelIndex, name: str, size: int) -> list[Feature]:
    """Where a parameter outside the units holds the stream."""
    path, _, leaf = name.rpartition(".")
    module, shape = index.modules[path], index.parameters[name].shape
    convolution = isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    if is_linear(module) and not convolution:
        return _linear(index, path, leaf, size)
    if isinstance(module, nn.Embedding) and len(shape) == 2:
        return [Feature(name, "n s")] if shape[1] == size else []
    if shape and shape[-1] > size and shape[-1] % size == 0 and not convolution:
        raise _Unclear(path, f"parameter {leaf} of shape {list(shape)} may hold {size} channels several times")
    if size not in shape:
        return []
    roles: dict[int, Role] = {len(shape) - 1: "other"}
    if convolution:
        roles = {0: "producer", 1: "consumer"} if leaf == "weight" else {0: "producer"}
    dims = [dim for dim in roles if shape[dim] == size]
    if len(dims) != 1 or getattr(module, "groups", 1) != 1 or isinstance(module, (nn.GroupNorm, nn.MultiheadAttention)):
        raise _Unclear(path, f"parameter {leaf} of a {type(module).__name__} of shape {list(shape)} is not understood")
    names = [f"i{index}" for index in range(len(shape))]
    names[dims[0]] = "s"
    return [Feature(name, " ".join(names), roles[dims[0]])]


def _linear(index: ModelIndex, path: str, leaf: str, size: int) -> list[Feature]:
    projection = index.projection(path)
    if projection is None:
        return []
    name = path.rpartition(".")[2]
    inside = layer_of(path) is not None
    produced = projection.outputs == size and (inside or name not in written.OUTPUT_LAYERS)
    if produced and name not in written.INTERNAL_LAYERS and (not inside or projection.inputs == size):
        raise _Unclear(path, "whether its outputs are the stream's channels cannot be told")
    if leaf == "bias":
        return [Feature(f"{path}.bias", "s", "producer")] if produced else []
    consumed = []
    if projection.inputs == size:
        consumed = projection.consume("s")
    elif projection.inputs % size == 0:
        if path not in written.CONCATENATED_READERS.get(index.model_type, ()):
            raise _Unclear(path, f"its {projection.inputs} inputs may be the stream's {size} channels several times")
        consumed = projection.consume("(n s)")
    return [*consumed, *(one for one in projection.produce("s") if produced and one.tensor.endswith(".weight"))]
