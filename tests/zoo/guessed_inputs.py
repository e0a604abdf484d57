"""Guesses of a forward's arguments from their names and the sizes in the config, the likeliest first."""

import inspect
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from .hand_inputs import floats, integers, ones

Guess = tuple[str, dict[str, Any]]

_TOKENS = 12
_DECODER_TOKENS = 7
_IMAGES = ("pixel_values", "pixel_values_videos", "images", "image", "pixel_values_images", "pixel_values1")
_SOUNDS = ("input_features", "input_values", "audio_values", "audio_features", "spectrogram", "audio_input_features")
_GRIDS = ("grid_thw", "image_grid_thw", "grid_hws", "image_grid_hws", "grid_hw")
_STATES = ("hidden_states", "inputs_embeds", "encoder_hidden_states", "query_embeds", "hidden_state")
_MEL_BINS = (
    "num_mel_bins",
    "input_dim",
    "input_feat_per_channel",
    "feature_projection_input_dim",
    "feature_size",
    "input_feat_size",
    "input_feature_dim",
    "mel_bins",
    "n_mels",
    "feat_dim",
    "num_mels",
    "mel_dim",
)


def guesses(model: nn.Module, config: PreTrainedConfig) -> Iterator[Guess]:
    """Arguments that the model's forward may run on, each with a word on what they are."""
    forward = _Forward(model, config)
    yield from forward.packed_images()
    yield from forward.text_with_images()
    yield from forward.text_with_sound()
    if forward.is_textual:
        yield from forward.text()
    yield from forward.images()
    yield from forward.sound()
    if forward.has_text and not forward.is_textual:
        yield "text", forward.texts()
    yield from forward.by_name()


def setting(config: PreTrainedConfig, *names: str, default: Any = None) -> Any:
    """The first of these settings that the config, or one nested in it, has; earlier names come first."""
    for name in names:
        for part in _parts(config):
            try:
                value = getattr(part, name, None)
            except Exception:  # settings that differ between layers raise on reading
                value = None
            if value is not None and not callable(value):
                return value
    return default


class _Forward:
    """What a model's forward takes, and arguments of each kind for it."""

    def __init__(self, model: nn.Module, config: PreTrainedConfig) -> None:
        self.model, self.config = model, config
        parameters = inspect.signature(model.forward).parameters
        self.names = tuple(parameters)
        self.required = [
            name
            for name, parameter in parameters.items()
            if parameter.default is inspect.Parameter.empty
            and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        ]
        self.image = next((name for name in _IMAGES if name in self.names), None)
        self.sound_name = next((name for name in _SOUNDS if name in self.names), None)
        self.grid = next((name for name in _GRIDS if name in self.names), None)
        self.has_text = "input_ids" in self.names
        self.main_input = getattr(model, "main_input_name", "input_ids")
        reads_other = self.image is not None or self.sound_name is not None
        self.is_textual = self.has_text and (self.main_input == "input_ids" or not reads_other)

    def texts(self) -> dict[str, Any]:
        """Token ids and what belongs to them."""
        inputs: dict[str, Any] = {}
        if self.has_text:
            inputs["input_ids"] = _ids(self.config)
        inputs.update(self._decoder_texts())
        if "bbox" in self.names:
            inputs["bbox"] = torch.tensor([[10, 20, 30, 40]]).repeat(2, _TOKENS, 1)
        return {**inputs, **self._no_cache()}

    def text(self) -> Iterator[Guess]:
        kind = type(self.model).__name__
        has_decoder = getattr(self.config, "is_encoder_decoder", False) or "decoder_input_ids" in self.names
        if (has_decoder and "Classification" in kind) or "QuestionAnswering" in kind:
            inputs = self.texts()
            inputs.pop("decoder_input_ids", None)
            end = setting(self.config, "eos_token_id", default=2)
            inputs["input_ids"][:, -1] = end[0] if isinstance(end, list) else end
            yield "text that ends", inputs
        yield "text", self.texts()
        yield "one text", {k: v[:1] if isinstance(v, Tensor) else v for k, v in self.texts().items()}

    def images(self) -> Iterator[Guess]:
        if self.image is not None:
            for kind, pixels in _images(self.config):
                yield kind, {self.image: pixels, **self._decoder_texts(), **self._no_cache()}

    def sound(self) -> Iterator[Guess]:
        if self.sound_name is not None:
            first, second = _waves(self.config), _spectrograms(self.config)
            if self.sound_name != "input_values":
                first, second = second, first
            for kind, sound in chain(first, second):
                yield kind, {self.sound_name: sound, **self._decoder_texts(), **self._no_cache()}

    def text_with_images(self) -> Iterator[Guess]:
        if self.has_text and self.image is not None:
            for kind, pixels in islice(_images(self.config), 6):
                yield f"text and {kind}", {**self.texts(), self.image: pixels}

    def text_with_sound(self) -> Iterator[Guess]:
        name = self.sound_name
        if self.has_text and name is not None and (self.main_input != "input_ids" or name in self.required):
            for kind, sound in islice(chain(_spectrograms(self.config), _waves(self.config)), 10):
                yield f"text and {kind}", {**self.texts(), name: sound}

    def packed_images(self) -> Iterator[Guess]:
        """Images of any size as rows of flattened patches, with the grid of each."""
        if self.grid is None:
            return
        if not self.has_text:
            for count, height, width in ((2, 4, 4), (1, 4, 4), (1, 8, 8)):
                for kind, patches in _patches(self.config, count * height * width):
                    yield kind, {self.names[0]: patches, self.grid: self._grid(count, height, width)}
        elif "pixel_values" in self.names:
            yield from self._text_with_packed_images()

    def _text_with_packed_images(self) -> Iterator[Guess]:
        placeholder = setting(self.config, "image_token_id", "image_token_index", "im_patch_id")
        if not isinstance(placeholder, int):
            return
        merge = setting(_vision_part(self.config), "spatial_merge_size", "merge_size", default=2)
        merge = merge if isinstance(merge, int) else merge[0]
        count, height, width = 2, 4, 4
        texts = self.texts()
        ids = texts["input_ids"]
        start = setting(self.config, "vision_start_token_id", "image_start_token_id")
        before = torch.full((count, 1), start) if isinstance(start, int) else ids[:count, :1]
        image = torch.full((count, height * width // merge**2), placeholder)
        texts["input_ids"] = ids = torch.cat([ids[:count, :3], before, image, ids[:count, 4:]], 1)
        types = next((name for name in ("mm_token_type_ids", "token_type_ids") if name in self.names), None)
        typed = {types: (ids == placeholder).long()} if types else {}
        for kind, patches in _patches(self.config, count * height * width, beside_text=True):
            inputs = {"pixel_values": patches, self.grid: self._grid(count, height, width)}
            yield f"text and {kind}", {**texts, **typed, **inputs}
            yield f"text and {kind} without types", {**texts, **inputs}

    def by_name(self) -> Iterator[Guess]:
        """What the names of the required arguments say, whatever the model is for."""
        hidden = setting(self.config, "hidden_size", "d_model", "embed_dim", "n_embd", "dim", default=64)
        states = floats(2, _TOKENS, hidden if isinstance(hidden, int) else 64)
        known = {
            **dict.fromkeys(_STATES, states),
            **dict.fromkeys(("input_ids", "decoder_input_ids"), _ids(self.config)),
            "attention_mask": ones(2, _TOKENS),
            "position_ids": torch.arange(_TOKENS).repeat(2, 1),
        }
        if self.required and all(name in known for name in self.required):
            yield "required arguments", {name: known[name] for name in self.required}
        if "inputs_embeds" in self.names:
            yield "embeddings", {"inputs_embeds": states, **self._no_cache()}
        if "pixel_values" in self.required:
            for kind, pixels in islice(_images(self.config), 4):
                inputs = {"pixel_values": pixels, **(self.texts() if "input_ids" in self.required else {})}
                for name in ("qformer_input_ids", "task_inputs"):
                    if name in self.required:
                        inputs[name] = _ids(self.config, len(pixels), 6)
                if "labels" in self.required:
                    inputs["labels"] = torch.zeros(2, 4, dtype=torch.long)
                yield f"required arguments and {kind}", inputs
        if "hidden_states" in self.names and "hidden_states" not in self.required:
            yield "hidden states", {"hidden_states": states}
        for name in ("audio_codes", "codes", "labels"):
            if name in self.required:
                yield name, {name: integers(2, 4, _TOKENS, low=0, high=8)}

    def _decoder_texts(self) -> dict[str, Any]:
        takes = "decoder_input_ids" in self.names
        return {"decoder_input_ids": _ids(self.config, tokens=_DECODER_TOKENS, low=12)} if takes else {}

    def _no_cache(self) -> dict[str, Any]:
        return {"use_cache": False} if "use_cache" in self.names else {}

    def _grid(self, count: int, height: int, width: int) -> Tensor:
        return torch.tensor([[1, height, width] if "thw" in self.grid else [height, width]] * count)


def _parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """The config and every config nested in it."""
    yield config
    for name in list(vars(config)):
        try:
            value = getattr(config, name)
        except Exception:  # settings that differ between layers raise on reading
            continue
        if isinstance(value, PreTrainedConfig):
            yield from _parts(value)


def _whole(config: PreTrainedConfig, *names: str, default: int) -> int:
    value = setting(config, *names, default=default)
    return value if isinstance(value, int) else default


def _ids(config: PreTrainedConfig, batch: int = 2, tokens: int = _TOKENS, low: int = 10) -> Tensor:
    """Token ids of the vocabulary, away from its special tokens at both ends."""
    vocabulary = _whole(config, "vocab_size", default=200)
    low, high = min(low, max(1, vocabulary // 4)), min(200, max(vocabulary - 1, 2))
    return integers(batch, tokens, low=low if low < high else 0, high=high)


def _image_sizes(config: PreTrainedConfig) -> list[tuple[int, int]]:
    size = setting(config, "image_size", "img_size", "input_size", "crop_size")
    if isinstance(size, dict):
        size = (
            size.get("height", size.get("shortest_edge", 64)),
            size.get("width", size.get("longest_edge", 64)),
        )
    own = []
    if isinstance(size, int):
        own = [(size, size)]
    elif isinstance(size, (list, tuple)) and len(size) >= 2:
        own = [(int(size[-2]), int(size[-1]))]
    return list(dict.fromkeys([*own, *((side, side) for side in (64, 128, 224, 256))]))


def _images(config: PreTrainedConfig) -> Iterator[tuple[str, Tensor]]:
    channels = _whole(config, "num_channels", "in_channels", "in_chans", "image_channels", default=3)
    frames = _whole(config, "num_frames", "tubelet_frames", default=4)
    for height, width in _image_sizes(config):
        yield f"images of {height}", floats(2, channels, height, width)
        yield f"a video of {height}", floats(1, frames, channels, height, width)
        yield f"a list of images of {height}", floats(1, 1, channels, height, width)


def _spectrograms(config: PreTrainedConfig) -> Iterator[tuple[str, Tensor]]:
    bins = setting(config, *_MEL_BINS, default=80)
    positions = setting(config, "max_source_positions")
    own = [2 * positions, positions] if isinstance(positions, int) else []
    if isinstance(bins, int):
        for frames in (*own, 64, 100, 128, 200, 256):
            yield f"spectrograms of {frames}", floats(2, bins, frames)
            yield f"transposed spectrograms of {frames}", floats(2, frames, bins)
    side = setting(config, "spec_size")
    if isinstance(side, int):
        bins = setting(config, "num_mel_bins", default=64)
        yield "spectrograms as images", floats(2, 1, 4 * side, side // 4 if side % 4 == 0 else 64)
        yield "folded spectrograms", floats(2, 1, side * (side // (bins or 64) or 1), bins)


def _waves(config: PreTrainedConfig) -> Iterator[tuple[str, Tensor]]:
    for samples in (4000, 16000, 2400):
        yield f"waves of {samples}", floats(2, samples)
        yield f"waves with a channel of {samples}", floats(2, 1, samples)


def _vision_part(config: PreTrainedConfig) -> PreTrainedConfig:
    parts = (getattr(config, name, None) for name in ("vision_config", "vit_config"))
    return next((part for part in parts if part is not None), config)


def _patches(config: PreTrainedConfig, count: int, beside_text: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Patches of images in every layout there is, those of models without text included if asked."""
    vision = _vision_part(config)
    channels = _whole(vision, "in_channels", "num_channels", "in_chans", default=3)
    side = setting(vision, "patch_size", default=14)
    side = side if isinstance(side, int) else side[0]
    frames = _whole(vision, "temporal_patch_size", "patch_temporal", default=2)
    yield f"{count} patches in time", floats(count, channels * side * side * frames)
    yield f"{count} patches", floats(count, channels * side * side)
    yield f"{count} square patches", floats(count, channels, side, side)
    yield f"a batch of {count} square patches", floats(1, count, channels, side, side)
    if not beside_text:
        yield f"a batch of {count} patches", floats(1, count, channels * side * side)
        yield f"{count} cubic patches", floats(count, channels, frames, side, side)
    yield f"{count} patches of frames", floats(count, frames, channels, side, side)
