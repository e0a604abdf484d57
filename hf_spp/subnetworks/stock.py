"""Cuts that a stock config can state: the same model class, built from a config with smaller sizes."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .._compat import computed_buffers
from ..architectures.index import code_names
from ..channels import ChannelGroup, ChannelMap, Member
from .edits import IN_HEAD
from .widths import Kept, Widths, cut_of, kept_places, narrowed

# What configs call the sizes that a cut changes.
_FIELDS = {
    "ffn": (
        "intermediate_size", "hidden_dim", "n_inner", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff",
        "d_inner", "ffn_hidden_size", "ffn_intermediate_size", "moe_intermediate_size", "dim_feedforward",
        "shared_expert_intermediate_size", "hidden_mult_size", "dff", "intermediate_size_mlp", "feed_forward_size",
    ),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts"),
    "hidden": ("hidden_size", "n_embd", "d_model", "dim", "embed_dim", "word_embed_proj_dim", "embedding_size"),
    "query_heads": (
        "num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads",
        "attention_heads",
    ),
    "key_value_heads": ("num_key_value_heads", "num_kv_heads", "decoder_num_key_value_heads"),
    "head_dim": ("head_dim", "d_kv", "attention_head_size"),
}  # fmt: skip
_HEAD_DIMS = _FIELDS["head_dim"]
# What modules call the number that scores are multiplied with.
_SCALES = ("scaling", "scale", "softmax_scale", "inv_norm_factor", "scale_attn")


@dataclass(frozen=True)
class StockModel:
    """A smaller model that a stock config gives.

    Attributes:
        model: The model, on the meta device.
        query_scale: What its queries are multiplied with, so that scores are scaled as before; None where they are.
    """

    model: PreTrainedModel
    query_scale: float | None


def stock_model(model: Any, groups: ChannelMap, widths: Widths) -> StockModel | str:
    """The model that a stock config gives for a cut, without values, or why none does.

    Args:
        model: The model that is cut.
        groups: Its channel groups.
        widths: Channels kept in each block, by name of the groups that are cut.
    """
    if not isinstance(model, PreTrainedModel):
        return f"{type(model).__name__} is no transformers model and has no config"
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    kept = kept_places(groups, widths, {name: tensor.shape for name, tensor in tensors.items()})
    reason = _in_head_reason(groups, widths)
    if reason:
        return reason
    build: Callable[..., PreTrainedModel] = type(model)._from_config
    try:
        config = _stated(model, groups, widths)
        with torch.device("meta"):
            small = build(config, dtype=model.dtype)
    except Exception as error:  # whatever a config or a constructor raises only means that sizes do not fit
        reason = f"{type(model.config).__name__} does not take these sizes: {' '.join(str(error).split())}"
    else:
        reason = _difference(small, tensors, kept) or _other_buffers(model, small, groups, widths, kept)
        if not reason:
            return StockModel(small, _query_scale(model, small, groups, widths))
    return _difference_of_layers(groups, widths) or reason


def _difference_of_layers(groups: ChannelMap, widths: Widths) -> str:
    """The first cut whose widths differ where the sizes were the same, nothing if there is none."""
    found: dict[tuple[str, int], set[int]] = {}
    for group in groups:
        found.setdefault((cut_of(group), group.size), set()).add(widths.get(group.name, group.size))
    cut = next((cut for (cut, _), each in found.items() if len(each) > 1), None)
    return "" if cut is None else f"the widths of {cut} differ between layers, and the config has one for all"


def query_factors(groups: ChannelMap, widths: Widths, scale: float, lengths: Mapping[str, int]) -> dict[str, Tensor]:
    """Factors of the rows of every tensor that writes queries, before it is cut.

    Args:
        groups: The groups of the model.
        widths: Channels kept in each block, by name of the groups that are cut.
        scale: What queries are multiplied with.
        lengths: Number of rows of every tensor.
    """
    factors: dict[str, Tensor] = {}
    for group in groups:
        if group.axis == "qk" and group.name in widths:
            for member in _query_members(group):
                factor = factors.setdefault(member.tensor, torch.ones(lengths[member.tensor], dtype=torch.float64))
                factor[member.positions(lengths[member.tensor], group).flatten()] = scale
    return factors


def _query_members(group: ChannelGroup) -> list[Member]:
    """The members that write queries: the map names their projection first, with its bias."""
    first = group.members[0]
    path = first.tensor.rpartition(".")[0]
    return [one for one in group.members if one.tensor.rpartition(".")[0] == path and one.span == first.span]


def _query_scale(model: nn.Module, small: nn.Module, groups: ChannelMap, widths: Widths) -> float | None:
    """What queries of smaller heads need so that scores are scaled as in the model; None where nothing changes."""
    ratios = set()
    for group in groups:
        if group.axis == "qk" and group.name in widths:
            ratios.add(
                _scale_ratio(model.get_submodule(group.owners[0]), small.get_submodule(group.owners[0]), group, widths)
            )
    return ratios.pop() if ratios and ratios != {1.0} else None


def _scale_ratio(before: nn.Module, after: nn.Module, group: ChannelGroup, widths: Widths) -> float:
    for name in _SCALES:
        old, new = vars(before).get(name), vars(after).get(name)
        if isinstance(old, float) and isinstance(new, float) and new:
            return old / new
    computed = "sqrt" in code_names(before)[0]
    return float((widths[group.name] / group.size) ** 0.5) if computed else 1.0


def _in_head_reason(groups: ChannelMap, widths: Widths) -> str:
    """Why no config states the sizes of heads, nothing if one may."""
    cut = [group for group in groups if group.axis in IN_HEAD and group.name in widths]
    whole = [group for group in groups if group.axis in IN_HEAD]
    if not cut:
        return ""
    sizes = {(group.size, widths.get(group.name, group.size)) for group in whole}
    if len(sizes) > 1 or {group.axis for group in cut} != set(IN_HEAD):
        return "a stock config states one head size for queries, keys and values of all layers"
    other = next((one for group in cut if group.axis == "qk" for one in group.members if one.role == "other"), None)
    return "" if other is None else f"{other.tensor} has an entry for each row of a head and is no projection"


def _stated(model: PreTrainedModel, groups: ChannelMap, widths: Widths) -> PreTrainedConfig:
    """The config that may state the cut."""
    memo: dict[int, Any] = {}
    config = copy.deepcopy(model.config, memo)
    modules = dict(model.named_modules())
    for group in groups:
        if group.name in widths:
            own = memo.get(id(_config_of(model, modules, group)), config)
            _state(own, group, groups, widths)
    return config


def _config_of(model: PreTrainedModel, modules: Mapping[str, nn.Module], group: ChannelGroup) -> Any:
    """The config of the part of the model that holds a group."""
    path = group.owners[0] if group.owners else ""
    while path and not hasattr(modules[path], "config"):
        path = path.rpartition(".")[0]
    return getattr(modules[path], "config", model.config)


def _state(config: Any, group: ChannelGroup, groups: ChannelMap, widths: Widths) -> None:
    width, cut = widths[group.name], cut_of(group)
    if cut == "ffn":
        _set(config, "ffn", group.size, width)
        hidden = _hidden_of(config)
        ratio = getattr(config, "mlp_ratio", None)
        if isinstance(ratio, (int, float)) and hidden and int(hidden * ratio) == group.size:
            config.mlp_ratio = width // hidden if width % hidden == 0 else width / hidden
        if getattr(config, "n_inner", 0) is None:
            config.n_inner = width
    elif cut == "experts":
        _set(config, "experts", group.channels, group.blocks * width)
    elif cut == "hidden":
        _set(config, "hidden", group.size, width)
    elif cut in IN_HEAD:
        if not _set(config, "head_dim", group.size, width):
            config.head_dim = width
    else:
        heads = groups.by_name[group.parent] if group.parent else group
        inside = next((one for one in groups if cut_of(one) == "query_heads" and one.parent == heads.name), None)
        kv = widths.get(heads.name, heads.size)
        shared = (1, 1) if inside is None else (inside.size, widths.get(inside.name, inside.size))
        _set(config, "query_heads", heads.size * shared[0], kv * shared[1])
        _set(config, "key_value_heads", heads.size, kv)
        rows = next((one for one in groups if one.axis == "vo" and one.parent == heads.name), None)
        hidden = widths.get("hidden", _hidden_of(config))
        if rows is not None and hidden != kv * shared[1] * rows.size and not any(map(vars(config).get, _HEAD_DIMS)):
            # Code that reads the size of a head from the config does so under this name, declared or not.
            config.head_dim = rows.size


def _hidden_of(config: Any) -> int:
    return next((getattr(config, name) for name in _FIELDS["hidden"] if hasattr(config, name)), 0)


def _set(config: Any, what: str, before: int, after: int) -> bool:
    """Replace a size under every name that a config has for it; false if it has none."""
    found = False
    for name in _FIELDS[what]:
        if getattr(config, name, None) == before and not isinstance(getattr(config, name), bool):
            setattr(config, name, after)
            found = True
    return found


def _other_buffers(model: Any, small: Any, groups: ChannelMap, widths: Widths, kept: Kept) -> str:
    """The first buffer that a smaller model computes in another way than the cut leaves it, nothing if all agree.

    They depend on the sizes of the residual stream and of heads: factors of embeddings, frequencies.
    """
    if not any(group.axis in ("hidden", *IN_HEAD) for group in groups if group.name in widths):
        return ""
    build: Callable[..., PreTrainedModel] = type(model)._from_config
    with torch.device("meta"):
        empty = build(copy.deepcopy(model.config), dtype=model.dtype)
    whole = computed_buffers(empty)
    for name, values in computed_buffers(small).items():
        if not torch.equal(narrowed(whole[name], kept.get(name, {})), values):
            return f"{type(small).__name__} computes {name} from its sizes, and this cut leaves it"
    return ""


def _difference(small: nn.Module, tensors: Mapping[str, Tensor], kept: Kept) -> str:
    """The first tensor that a model has in another shape than the cut gives it, nothing if all agree."""
    own = {**dict(small.named_parameters()), **dict(small.named_buffers())}
    for name, tensor in tensors.items():
        wanted = [
            len(kept[name][dim]) if dim in kept.get(name, {}) else length for dim, length in enumerate(tensor.shape)
        ]
        found = list(own[name].shape) if name in own else None
        if found != wanted:
            return f"{type(small).__name__} builds {name} as {found}, and this cut leaves {wanted}"
    return "" if len(own) == len(tensors) else f"{type(small).__name__} has other parameters at these sizes"
