"""The config of any model type, made tiny by rules on the names of its settings.

Levels are tried one after the other until a model builds and runs:

- 0: everything is small, and fewer key-value heads than heads where the config can say so.
- 1: as 0, with as many key-value heads as heads.
- 2: as 0, with images, patches and windows of their own size.
- 3: layers, vocabulary and experts are few, widths and sizes are the config's own.
"""

import copy
import dataclasses
import inspect
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from .configs import DROP

LEVELS = (0, 1, 2, 3)

_LAYERS, _HIDDEN, _FEED_FORWARD, _EXPERT, _HEADS, _KEY_VALUE_HEADS, _HEAD_DIM, _VOCABULARY = (
    2,
    64,
    96,
    48,
    4,
    2,
    16,
    512,
)
_FIRST_SPECIAL_TOKEN = 64

_SKIPPED = ("transformers_version", "architectures", "dtype", "id2label", "label2id", "per_layer_config")
# Small parts of these do not fit together.
_CONVOLUTIONAL = re.compile(r"HGNet|ResNet|LCNet|ConvNext")
_KEPT = re.compile(
    r"chunk_size_feed_forward|^transformers_version$|initializer|_eps$|_loss|_cost$|dropout|drop_rate|drop_path|"
    r"_prob$|theta|temperature|_weight$|sampling_rate|sample_rate|frame_rate|hop_length|_ratio$|_ratios$|num_labels$|"
    r"num_channels|^output_|in_channels|audio_channels|position_buckets|relative_|_kernel|kernel_|stride|padding|"
    r"dilation|upsampl|downsampl|problem_type|scale|n_group$|topk_group|rel_pos|max_2d"
)
_TOKEN_ID = re.compile(r"token_id|token_index|^(bos|eos|pad|sep|unk|mask|cls)_(index|id)$")
_KEY_VALUE_HEADS_NAME = re.compile(
    r"num_key_value_heads|^num_kv_heads$|_kv_heads$|key_value_heads|^multi_query_group_num$|"
    r"num_key_value_attention_heads|num_query_groups"
)
_HEAD_DIM_NAME = re.compile(
    r"^head_dim$|_head_dim$|^attention_head_dim$|^d_kv$|^kv_channels$|^d_head$|^attention_head_size$|^dim_head$|"
    r"head_size$|_dim_head$"
)
_IMAGE_SIZE_NAMES = ("image_size", "pretrain_image_size", "input_size", "img_size")

_LAYER_COUNT = re.compile(
    r"^num_hidden_layers$|^n_layers?$|^num_layers$|(^|_)(encoder|decoder)_layers$|^num_(encoder|decoder)_layers$|"
    r"_num_hidden_layers$|_num_layers$|^depth$|^layers$|^num_attention_layers$|^[lrx]_layers$|^num_blocks$|"
    r"^encoder_depth$|_layers_num$|^num_global_layers$|^resampler_depth$|^num_self_attends_per_block$|"
    r"^num_dense_layers$"
)

# Largest values of whole numbers by name; the first that matches decides. At every level:
_FEW = (
    (re.compile(r"(^|_)vocab_size$|^emb_vocab$|^vocab_size_per_layer_input$"), _VOCABULARY),
    (re.compile(r"num_experts$|num_local_experts|n_routed_experts|moe_num_experts|num_routed_experts"), 4),
    (re.compile(r"^(num_experts_per_tok|moe_topk|moe_k|top_k|num_selected_experts|num_experts_per_token)$"), 2),
    (re.compile(r"^(n_group|num_expert_group|topk_group|num_expert_groups)$"), 1),
    (re.compile(r"^(first_k_dense_replace|moe_layer_start_index)$"), 1),
)
# At levels that shrink widths:
_NARROW = (
    (re.compile(r"^rotary_dim$"), 8),
    (
        re.compile(
            r"num_attention_heads|^num_heads$|^n_heads?$|attention_heads$|_num_heads$|_n_heads$|_heads$|^heads$"
        ),
        _HEADS,
    ),
    (re.compile(r"moe.*intermediate|expert.*intermediate"), _EXPERT),
    (
        re.compile(
            r"intermediate_size|intermediate_dim|ffn_dim|ffn_hidden|^d_ff$|^dff$|^dim_ff$|d_inner|mlp_dim|"
            r"feed_?forward_dim|dim_feedforward|feed_forward_(hidden_)?size|linear_units|mlp_hidden|ffn_intermediate|"
            r"ff_dim"
        ),
        _FEED_FORWARD,
    ),
    (re.compile(r"lora_rank|_rank$|low_rank|lowrank"), 16),
    (re.compile(r"max_position_embeddings|^n_positions$|^n_ctx$|max_seq_len"), 512),
    (
        re.compile(
            r"hidden_size|hidden_dim$|^d_model$|^n_embd$|^dim$|^emb_dim$|embedding_size|embed_dim$|^width$|"
            r"projection_dim|proj_dim|^d_embed$|^decoder_dim$|^encoder_dim$|^output_dim$|^dim_model|hidden_channels$|"
            r"^d_latents$|^embedding_dim$|cross_attention_dim|^vision_dim|^out_dim$|^output_proj_dims$|^latent_dim$|"
            r"^text_dim$|^vision_output_dim$|^projector_hidden|^single_hidden"
        ),
        _HIDDEN,
    ),
)


def shrunk_config(
    config_class: type[PreTrainedConfig], level: int, overrides: Mapping[str, Any] | None = None
) -> PreTrainedConfig:
    """A tiny config.

    Args:
        config_class: Its class; sizes come from the class's defaults.
        level: One of `LEVELS`.
        overrides: Arguments that are given whatever the rules say, those of nested configs in nested dicts.
    """
    return _shrink(config_class(), level, _TokenIds(), overrides or {})


class _TokenIds:
    """Moves special tokens into the small vocabulary, from its end downwards, the same token to the same place."""

    def __init__(self) -> None:
        self.moved: dict[int, int] = {}

    def __call__(self, value: Any) -> Any:
        if not _is_whole(value) or value < _FIRST_SPECIAL_TOKEN:
            return value
        return self.moved.setdefault(value, _VOCABULARY - 1 - len(self.moved))


def _shrink(config: PreTrainedConfig, level: int, tokens: _TokenIds, overrides: Mapping[str, Any]) -> PreTrainedConfig:
    nested = {
        name: value
        for name, value in overrides.items()
        if isinstance(value, dict) and isinstance(getattr(config, name, None), PreTrainedConfig)
    }
    arguments = _Shrinker(config, level, tokens).arguments()
    for name, value in nested.items():
        arguments[name] = _shrink(getattr(config, name), level, tokens, value)
    arguments.update({name: value for name, value in overrides.items() if name not in nested})
    return _make(type(config), {name: value for name, value in arguments.items() if value is not DROP})


def _make(config_class: type[PreTrainedConfig], arguments: Mapping[str, Any]) -> PreTrainedConfig:
    try:
        return config_class(**arguments)
    except Exception:  # names of stages that a smaller model does not have
        if "out_features" not in arguments:
            raise
        return config_class(**{name: value for name, value in arguments.items() if name != "out_features"})


class _Shrinker:
    """The arguments that make one config, without those nested in it, tiny."""

    def __init__(self, config: PreTrainedConfig, level: int, tokens: _TokenIds) -> None:
        self.config, self.level, self.tokens = config, level, tokens
        self.narrow, self.small_images, self.shares_heads = level <= 2, level <= 1, level in (0, 2)
        # Settings that differ between layers raise on reading without this.
        config.allow_global_per_layer_attribute_access = True
        self.fresh = _default_config(type(config))
        self.layers = _layer_count(config)
        self.layer_types = self._layer_types()
        self.target_layers = len(self.layer_types) if self.layer_types else self._target_layers()

    def arguments(self) -> dict[str, Any]:
        """Arguments of the config's class."""
        arguments: dict[str, Any] = {}
        fields = [field for field in dataclasses.fields(type(self.config)) if field.name not in _SKIPPED]
        for field in fields:
            value = self._argument(field)
            if value is not DROP:
                arguments[field.name] = value
        self._name_stages(arguments)
        if self.narrow and self.layer_types and any(field.name == "num_hidden_layers" for field in fields):
            arguments["num_hidden_layers"] = self.target_layers
        return arguments

    def _argument(self, field: Any) -> Any:
        """The value of an argument, or `DROP` to leave it at its default."""
        name = field.name
        current = getattr(self.config, name, None)
        if isinstance(current, PreTrainedConfig):
            level = LEVELS[-1] if _CONVOLUTIONAL.search(type(current).__name__) else self.level
            return _shrink(current, level, self.tokens, {})
        if isinstance(current, dict) and any(isinstance(value, PreTrainedConfig) for value in current.values()):
            return {
                key: _shrink(value, self.level, self.tokens, {}) if isinstance(value, PreTrainedConfig) else value
                for key, value in current.items()
            }
        default = _default_of(field)
        if default is None and self._was_given(name, current):
            if name == "out_indices":
                return DROP
            default = current
        if default is None:
            return self._derived(name, current)
        value = copy.deepcopy(default if current is None else current)
        if isinstance(default, (list, tuple)) and not isinstance(value, (list, tuple)):
            value = copy.deepcopy(default)
        return list(value) if name == "out_features" else self._value(name, value)

    def _was_given(self, name: str, current: Any) -> bool:
        """Whether a setting without a default holds what was given to a nested config, and not what it derives."""
        if current is None or self.fresh is None or name == "layer_types":
            return False
        fresh = getattr(self.fresh, name, None)
        return type(fresh) is not type(current) or fresh != current

    def _derived(self, name: str, current: Any) -> Any:
        """A setting that the config derives from others, where deriving it would not be small."""
        value = DROP
        counts = (current, getattr(self.config, "num_attention_heads", None))
        if self.narrow and self.shares_heads and _KEY_VALUE_HEADS_NAME.search(name) and all(map(_is_whole, counts)):
            value = _KEY_VALUE_HEADS
        if current is None and self.narrow:
            if name in ("head_dim", "attention_head_dim"):
                if hasattr(self.config, "hidden_size") or hasattr(self.config, "d_model"):
                    value = _HEAD_DIM
            elif name == "num_key_value_heads":
                value = _KEY_VALUE_HEADS if self.shares_heads else _HEADS
        if current is None and name == "vocab_size":
            value = _VOCABULARY
        if name == "layer_types" and self.layer_types:
            value = self.layer_types
        if name in ("rope_parameters", "rope_scaling") and isinstance(current, dict) and self.narrow:
            rope = self._rope(current)
            if rope != current:
                value = rope
        return value

    def _value(self, name: str, value: Any) -> Any:
        if isinstance(value, dict):
            is_rope = name in ("rope_parameters", "rope_scaling") and self.narrow
            return self._rope(value) if is_rope else DROP
        if name == "layer_types" and self.layer_types:
            return self.layer_types
        if isinstance(value, (list, tuple)):
            return self._list(name, value)
        return self._whole(name, value) if _is_whole(value) else DROP

    def _list(self, name: str, values: Any) -> Any:
        kind, whole = type(values), all(map(_is_whole, values))
        filled = whole and len(values) > 0
        per_layer = bool(self.layers) and len(values) == self.layers > self.target_layers and not _KEPT.search(name)
        if _TOKEN_ID.search(name) and whole:
            return [self.tokens(value) for value in values]
        stages = r"^(depths?|num_block_repeats|layers|num_blocks|encoder_depths|blocks_per_stage)$"
        if filled and len(values) <= 6 and re.search(stages, name):
            return kind(min(value, 1 if place else 2) for place, value in enumerate(values))
        if not self.narrow:
            return list(values)[: self.target_layers] if per_layer else DROP
        if filled and re.search(r"^num_heads$|num_attention_heads$|attention_heads$|^heads$", name):
            first = 0 if values[0] == 1 else 1
            return kind(max(1, min(value, 2 ** (place + first))) for place, value in enumerate(values))
        if filled and self.small_images:
            if name in ("image_size", "img_size") and len(values) == 2 and min(values) > 128:
                patch = getattr(self.config, "patch_size", None)
                return kind([4 * patch if _is_whole(patch) and patch > 4 else 128] * 2)
            if re.search(r"^hidden_sizes$|^embed_dims?$|^encoder_hidden_sizes$|^dims$", name):
                grows = values[0] < values[-1]
                return kind(16 * 2**place if grows else _HIDDEN for place in range(len(values)))
        if per_layer:
            return list(values)[: self.target_layers]
        places = r"_indexes$|_indices$|layer_ids$|_layers$|_indexes|hook_ids|fullatt"
        if filled and self.layers and name != "encode_proj_layers" and re.search(places, name):
            return kind(sorted({min(value, self.target_layers - 1) for value in values}))
        return DROP

    def _whole(self, name: str, value: int) -> Any:
        if _TOKEN_ID.search(name):
            return self.tokens(value)
        if name == "upsample_groups" and self.narrow:
            return min(value, _HIDDEN)
        if name in ("num_encoder_blocks", "num_stages"):
            return DROP
        if name in ("num_kv_shared_layers", "insert_layer_id"):
            return 0
        if name == "vision_feature_layer" and value >= 0:
            return -1
        if _LAYER_COUNT.search(name):
            return min(value, self.target_layers)
        for names, largest in _FEW:
            if names.search(name):
                return min(value, largest)
        if _KEPT.search(name) or not self.narrow:
            return DROP
        return self._width(name, value)

    def _width(self, name: str, value: int) -> Any:
        if name in ("sliding_window", "attention_window", "local_attention"):
            return min(value, 8)
        if _KEY_VALUE_HEADS_NAME.search(name):
            return min(value, _KEY_VALUE_HEADS if self.shares_heads else _HEADS)
        if _HEAD_DIM_NAME.search(name):
            return self._head_dim(name, value)
        if name == "hidden_dim" and type(self.config).__name__ == "DistilBertConfig":
            return min(value, _FEED_FORWARD)
        for names, largest in _NARROW:
            if names.search(name):
                return min(value, largest)
        if self.small_images:
            if name in _IMAGE_SIZE_NAMES:
                patch = getattr(self.config, "patch_size", None)
                return min(value, 4 * patch if _is_whole(patch) and patch > 4 else 64)
            if name == "window_size":
                return min(value, 4)
        return DROP

    def _head_dim(self, name: str, value: int) -> int:
        if name == "qk_rope_head_dim":
            return min(value, 8)
        if name == "qk_head_dim" and all(hasattr(self.config, f"qk_{part}_head_dim") for part in ("rope", "nope")):
            return 24
        return min(value, _HEAD_DIM)

    def _rope(self, values: dict[str, Any]) -> dict[str, Any]:
        """Rotary settings with the sections of several axes cut to the small head."""
        values = copy.deepcopy(values)
        if "rope_type" in values and "mrope_section" not in values and _uses_sections(type(self.config)):
            values["mrope_section"] = [2, 3, 3]
        _cut_sections(values, values)
        return values

    def _name_stages(self, arguments: dict[str, Any]) -> None:
        """A config takes the stages that come out by name or by index, not both."""
        stages = getattr(self.config, "out_features", None)
        usual = list(getattr(self.fresh, "out_features", None) or [])
        if isinstance(stages, (list, tuple)) and self.fresh is not None and list(stages) != usual:
            arguments["out_features"] = list(stages)
        for name in ("_out_features", "_out_indices"):
            arguments.pop(name, None)
        if "out_features" in arguments:
            arguments.pop("out_indices", None)

    def _target_layers(self) -> int:
        """How many layers are kept: all, where they are the stages of a model."""
        names = ("patch_sizes", "hidden_sizes", "embed_dims", "num_heads", "depths")
        lists = [getattr(self.config, name, None) for name in names]
        per_stage = [value for value in lists if isinstance(value, (list, tuple)) and len(value) == self.layers]
        return self.layers if self.layers and len(per_stage) >= 2 else _LAYERS

    def _layer_types(self) -> list[Any] | None:
        """One layer of each type there is."""
        types = getattr(self.config, "layer_types", None)
        if not isinstance(types, (list, tuple)) or not types:
            return None
        kinds, count = list(dict.fromkeys(types)), self._target_layers()
        return kinds + [kinds[-1]] * (count - len(kinds))


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _default_of(field: Any) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else None


def _default_config(config_class: type[PreTrainedConfig]) -> PreTrainedConfig | None:
    try:
        config = config_class()
    except Exception:  # a config that needs arguments
        return None
    config.allow_global_per_layer_attribute_access = True
    return config


def _layer_count(config: PreTrainedConfig) -> int | None:
    names = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "encoder_layers", "layers")
    counts = (getattr(config, name, None) for name in names)
    return next((count for count in counts if _is_whole(count)), None)


@cache
def _uses_sections(config_class: type[PreTrainedConfig]) -> bool:
    """Whether the modeling code beside a config reads the sections of several rotary axes."""
    folder = Path(inspect.getsourcefile(config_class)).parent
    return any("mrope_section" in path.read_text("utf-8") for path in folder.glob("modeling_*.py"))


def _cut_sections(values: dict[str, Any], outer: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if name == "mrope_section" and isinstance(value, (list, tuple)):
            part = values.get("partial_rotary_factor", outer.get("partial_rotary_factor", 1.0))
            half = int(_HEAD_DIM * part) // 2
            if len(value) == 3:
                values[name] = [half - 2 * (half // 3), half // 3, half // 3]
            elif len(value) == 2:
                values[name] = [half // 2, half - half // 2]
        elif isinstance(value, dict):
            _cut_sections(value, outer)
