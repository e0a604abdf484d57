"""Small inputs for a model, from its config and the arguments of its forward, by rules that know no family.

Every candidate is a guess that may not run; who asks for them tries them in order.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .forward import accepted_arguments, evaluation_mode, fixed_rng, place_inputs

Inputs = dict[str, Any]

_TOKENS = 8
# Rows and columns of patches of an image that is given as a row of patches.
_GRID = 4
# Arguments that take images, videos and sound, and the settings that name their placeholders in a text.
_MEDIA = {
    "image": ("pixel_values", "pixel_values_images", "image_pixel_values", "images", "image"),
    "video": ("pixel_values_videos",),
    "audio": ("input_features", "input_values", "audio_values", "audio_input_features"),
}
_PLACEHOLDERS = {
    "image": ("image_token_id", "image_token_index", "im_patch_id", "image_patch_id", "img_context_token_id"),
    "video": ("video_token_id", "video_token_index", "video_context_token_id"),
    "audio": ("audio_token_id", "audio_token_index", "sound_context_token_id"),
}
_GRIDS = {
    "image": ("image_grid_thw", "grid_thw", "image_grid_hws", "grid_hws", "grid_hw"),
    "video": ("video_grid_thw",),
}
_MEL_BINS = (
    "num_mel_bins", "input_feat_per_channel", "feature_size", "input_dim", "feature_projection_input_dim",
    "input_feat_size", "mel_bins", "n_mels", "feat_dim", "num_mels", "mel_dim",
)  # fmt: skip
_WIDTHS = ("hidden_size", "d_model", "embed_dim", "n_embd", "dim", "encoder_hidden_size")


def example_inputs(model: PreTrainedModel, seed: int) -> Iterator[Inputs]:
    """Forward arguments for one small sample, the likeliest first and those that reach most of the model first.

    Args:
        model: The model; parts of it may be run to learn how many tokens an image takes.
        seed: Seed of their values.
    """
    guesses = _Guesses(model, seed)
    for part in (guesses.with_media, guesses.texts, guesses.media, guesses.series, guesses.by_name):
        try:
            yield from map(guesses.complete, part())
        except Exception:  # a setting may hold anything, and a guess from it is only a guess
            continue


class _Guesses:
    def __init__(self, model: PreTrainedModel, seed: int) -> None:
        self.model, self.seed = model, seed
        self.generator = torch.Generator().manual_seed(seed)
        self.accepted = accepted_arguments(model)
        self.required = [
            name
            for name, parameter in inspect.signature(type(model).forward).parameters.items()
            if parameter.default is inspect.Parameter.empty
            and parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
            and name != "self"
        ]
        self.configs = list(_nested(getattr(model, "config", None)))
        vision = [one for one in self.configs if "vi" in type(one).__name__.lower()]
        self.vision_configs = [*vision, *self.configs]
        names = {kind: next((name for name in names if name in self.accepted), None) for kind, names in _MEDIA.items()}
        self.media_names = {kind: name for kind, name in names.items() if name is not None}
        self.width = self.whole(*_WIDTHS, default=64)

    # Settings

    def setting(self, *names: str, default: Any = None, vision: bool = False) -> Any:
        """The first of these settings that a config has; earlier names come first."""
        for name in names:
            for config in self.vision_configs if vision else self.configs:
                try:
                    value = getattr(config, name, None)
                except Exception:  # settings that differ between layers raise on reading
                    continue
                if value is not None and not callable(value):
                    return value
        return default

    def whole(self, *names: str, default: int, vision: bool = False) -> int:
        value = self.setting(*names, default=default, vision=vision)
        value = value[0] if isinstance(value, (list, tuple)) and value else value
        return value if isinstance(value, int) else default

    # Texts

    @property
    def embedding(self) -> nn.Module | None:
        """The embedding of the model's tokens, as far as it says."""
        try:
            found: nn.Module = self.model.get_input_embeddings()
            return found
        except Exception:  # some models raise, others have no such method
            return None

    def ids(self, *shape: int) -> Tensor:
        """Random tokens that mean nothing special, with the end-of-sequence token last, as classifiers expect."""
        sizes = [size for config in self.configs if isinstance(size := getattr(config, "vocab_size", None), int)]
        sizes += [module.num_embeddings for module in (self.embedding,) if isinstance(module, nn.Embedding)]
        vocabulary = min([size for size in sizes if size > 1] or [100])
        named = (
            v for config in self.configs for n, v in vars(config).items() if n.endswith(("token_id", "token_index"))
        )
        special = {one for value in named for one in (value if isinstance(value, list) else [value])}
        plain = torch.tensor([token for token in range(vocabulary) if token not in special] or [0])
        ids = plain[torch.randint(0, len(plain), shape, generator=self.generator)]
        end = self.setting("eos_token_id")
        end = end[0] if isinstance(end, list) and end else end
        if isinstance(end, int) and 0 <= end < vocabulary:
            ids[..., -1] = end
        return ids

    def texts(self) -> Iterator[Inputs]:
        """Texts, with the states of an encoder beside them first."""
        if "input_ids" not in self.accepted:
            return
        streams = self.whole("num_codebooks", "num_channels", default=1)
        for shape in ((1, _TOKENS), (1, 2, _TOKENS), (streams, _TOKENS), (1, _TOKENS, streams), (1, streams, _TOKENS)):
            text = self.text(shape)
            if "encoder_hidden_states" in self.accepted:
                yield {**text, "encoder_hidden_states": self.floats(1, _TOKENS, self.width)}
            yield text
            yield {**text, "attention_mask": torch.ones(shape[:2], dtype=torch.int64)}
        if "decoder_input_ids" in self.accepted:
            yield {**self.text((1, _TOKENS)), "decoder_input_ids": self.ids(1, _TOKENS, streams)}
            yield {"input_ids": self.ids(1, _TOKENS)}

    def text(self, shape: tuple[int, ...] = (1, _TOKENS)) -> Inputs:
        inputs = {"input_ids": self.ids(*shape), **self.decoder_text(shape)}
        if "bbox" in self.accepted:
            inputs["bbox"] = torch.tensor([10, 20, 30, 40]).expand(*shape, 4)
        return inputs

    def decoder_text(self, shape: tuple[int, ...] = (1, _TOKENS)) -> Inputs:
        return {"decoder_input_ids": self.ids(*shape)} if "decoder_input_ids" in self.accepted else {}

    # Images, videos and sound

    def with_media(self) -> Iterator[Inputs]:
        """Texts beside images, videos and sound, with placeholders where the config names some."""
        if "input_ids" not in self.accepted or not self.media_names:
            return
        known = {kind: found for kind in self.media_names if (found := self.first_that_is_read(kind)) is not None}
        for kinds in [tuple(known), *((kind,) for kind in known)] if known else []:
            yield self.interleaved({kind: known[kind] for kind in kinds})
        for kind in self.media_names:
            if _reader(self.model, kind) is None:
                for form in self.forms(kind):
                    yield from self.beside_text(kind, form)
                for form in islice(self.forms(kind), 1):
                    yield {**self.text((1, 2, _TOKENS)), **form}

    def beside_text(self, kind: str, form: Inputs) -> Iterator[Inputs]:
        """A text beside something of which nobody says how many tokens it takes."""
        if isinstance(self.setting(*_PLACEHOLDERS[kind]), int):
            text = self.interleaved({kind: (form, 1)})
            yield {**text, "attention_mask": torch.ones_like(text["input_ids"])}
        yield {**self.text(), **form}

    def media(self) -> Iterator[Inputs]:
        for kind in self.media_names:
            for form in self.forms(kind):
                yield {**form, **self.decoder_text()}

    def forms(self, kind: str) -> Iterator[Inputs]:
        return self.sounds() if kind == "audio" else chain(self.packed(kind), self.pictures(kind))

    def first_that_is_read(self, kind: str) -> tuple[Inputs, int] | None:
        """The first form of a medium that the model makes features of, and how many; None if it makes none."""
        read = _reader(self.model, kind)
        if read is None:
            return None
        hidden = self.width
        text = getattr(self.model.config, "get_text_config", lambda: None)()
        hidden = getattr(text, "hidden_size", hidden)
        for form in self.forms(kind):
            try:
                with torch.no_grad(), evaluation_mode(self.model), fixed_rng(self.model, self.seed):
                    found = read(place_inputs(self.model, self.complete(form)))
            except Exception:  # whatever is raised only means that this form does not suit it
                continue
            features = getattr(found, "pooler_output", found)
            features = list(features) if isinstance(features, (list, tuple)) else [features]
            count = sum(one.numel() for one in features if isinstance(one, Tensor)) // hidden
            return form, count
        return None

    def interleaved(self, media: Mapping[str, tuple[Inputs, int]]) -> Inputs:
        """A text with a placeholder for every feature of every medium, and what says which token is which."""
        inputs = self.text()
        ids, kinds = [inputs["input_ids"][:, :2]], [torch.zeros(1, 2, dtype=torch.int64)]
        for number, kind in enumerate(_MEDIA, start=1):
            if kind not in media:
                continue
            form, count = media[kind]
            inputs |= form
            token = self.setting(*_PLACEHOLDERS[kind])
            if token is None and f"{kind}_embeds_position_mask" in self.accepted:
                token = 0  # any will do where a mask says which it is
            if isinstance(token, int):
                start = self.setting("vision_start_token_id", f"{kind}_start_token_id")
                before = torch.full((1, 1), start) if isinstance(start, int) else inputs["input_ids"][:, 2:3]
                ids += [before, torch.full((1, count), token)]
                kinds += [torch.zeros(1, 1, dtype=torch.int64), torch.full((1, count), number)]
        ids.append(inputs["input_ids"][:, 2:])
        kinds.append(torch.zeros_like(ids[-1]))
        inputs["input_ids"], types = torch.cat(ids, 1), torch.cat(kinds, 1)
        known = {"mm_token_type_ids": types, "moe_mm_token_type_ids": types, "image_embeds_position_mask": types == 1}
        return {**inputs, **{name: value for name, value in known.items() if name in self.accepted}}

    def pictures(self, kind: str) -> Iterator[Inputs]:
        """Images as grids of pixels, alone, several at once, or as the frames of a video."""
        name, channels = (
            self.media_names[kind],
            self.whole("num_channels", "in_channels", "in_chans", "image_channels", default=3, vision=True),
        )
        patch = self.pair(self.setting("patch_size", default=16, vision=True))
        own = self.pair(self.setting("image_size", "img_size", "input_size", "crop_size", default=64, vision=True))
        few = (2 * patch[0], 2 * patch[1])
        frames = self.whole("num_frames", "tubelet_frames", "frames_per_clip", default=4, vision=True)
        single = [] if kind == "video" else [()]
        if "interpolate_pos_encoding" in self.accepted and single:
            yield {name: self.floats(1, channels, *few), "interpolate_pos_encoding": True}
        tiles: list[tuple[int, ...]] = [(3,), (5,)] if "image_sizes" in self.accepted else []
        if "aspect_ratio_ids" in self.accepted:
            tiles.append((1, self.whole("max_num_tiles", default=4, vision=True)))
        for outer in (*single, (1,), (2,), (frames,), *tiles):
            for height, width in dict.fromkeys([few, own] if outer else [few, own, (64, 64), (128, 128)]):
                pixels = {name: self.floats(1, *outer, channels, height, width)}
                yield pixels
                if beside := self.beside(outer, height, width):
                    yield {**pixels, **beside}
        count, area = (own[0] // patch[0]) * (own[1] // patch[1]), patch[0] * patch[1]
        yield {name: self.floats(1, count, channels * area)}
        if single:
            yield {name: self.floats(frames, channels, *own)}  # frames in place of samples

    def beside(self, outer: tuple[int, ...], height: int, width: int) -> Inputs:
        """What says how large images are, and which of their pixels count."""
        whole = torch.ones(1, *outer, height, width, dtype=torch.int64)
        known = {
            "image_sizes": torch.tensor([[height, width]]),
            "pixel_attention_mask": whole,
            "pixel_mask": whole,
            "image_attention_mask": torch.ones(1, _TOKENS, *(outer or (1,)), dtype=torch.int64),
            "aspect_ratio_ids": torch.ones(1, *outer[:1], dtype=torch.int64),
            "aspect_ratio_mask": torch.ones(1, *outer, dtype=torch.int64),
        }
        return {name: value for name, value in known.items() if name in self.accepted}

    def packed(self, kind: str) -> Iterator[Inputs]:
        """An image as a row of patches, in every layout there is, with its rows and columns beside it."""
        grid = next((name for name in _GRIDS[kind] if name in self.accepted), None)
        channels = self.whole("in_channels", "num_channels", "in_chans", default=3, vision=True)
        side, _ = self.pair(self.setting("patch_size", default=14, vision=True))
        frames = self.whole("temporal_patch_size", "patch_temporal", default=2, vision=True)
        name, count, area = self.media_names[kind], _GRID**2, side * side
        if grid is not None:
            size = torch.tensor([[1, _GRID, _GRID] if "thw" in grid else [_GRID, _GRID]])
            merge = self.whole("spatial_merge_size", "merge_size", default=2, vision=True)
            merges = [one for one in (f"{kind}_merge_sizes", "merge_sizes") if one in self.accepted]
            extra = dict.fromkeys(merges, torch.tensor([merge]))
            shapes = (
                (count, channels * area * frames), (count, channels * area), (count, channels, side, side),
                (1, count, channels, side, side), (1, count, channels * area), (count, channels, frames, side, side),
                (count, frames, channels, side, side),
            )  # fmt: skip
            for shape in shapes:
                yield {name: self.floats(*shape), grid: size, **extra}
        if "spatial_shapes" in self.accepted:
            mask = torch.ones(1, count, dtype=torch.int64)
            shapes_of = {"spatial_shapes": torch.tensor([[_GRID, _GRID]]), "pixel_attention_mask": mask}
            yield {name: self.floats(1, count, channels * area), **shapes_of}
        if "target_sizes" in self.accepted:
            yield {name: self.floats(1, channels, side, count * side), "target_sizes": torch.tensor([[_GRID, _GRID]])}

    def sounds(self) -> Iterator[Inputs]:
        """Waves and spectrograms."""
        name = self.media_names["audio"]
        waves = [self.floats(1, *outer, samples) for samples in (2400, 16000) for outer in ((), (1,))]
        positions = self.setting("max_source_positions", "n_window")
        own = [2 * positions, positions] if isinstance(positions, int) else []
        spectrograms = (
            self.floats(1, *shape)
            for width in self.feature_widths()
            for frames in (64, 100, 200, *own)
            for shape in ((width, frames), (frames, width))
        )
        for sound in chain(waves, spectrograms) if name == "input_values" else chain(spectrograms, waves):
            masks = (f"{name}_mask", "feature_attention_mask")
            frames = max(sound.shape[1:])
            yield {
                name: sound,
                **{mask: torch.ones(1, frames, dtype=torch.int64) for mask in masks if mask in self.accepted},
            }

    def feature_widths(self) -> list[int]:
        """How wide features of sound may be: what the config says, and what the first layer that reads some takes."""
        widths = [self.whole(name, default=0) for name in _MEL_BINS]
        for module in self.model.modules():
            if isinstance(module, (nn.Linear, nn.Conv1d)):
                widths.append(module.in_features if isinstance(module, nn.Linear) else module.in_channels)
                break
        return list(dict.fromkeys(width for width in widths if width > 0))

    # Others

    def series(self) -> Iterator[Inputs]:
        """Time series."""
        if "past_values" not in self.accepted:
            return
        length, ahead = self.whole("context_length", default=32), self.whole("prediction_length", default=4)
        channels = self.whole("num_input_channels", default=1)
        lags, features = self.setting("lags_sequence", default=[0]), self.whole("num_time_features", default=1)
        past = length + max(lags)
        yield {"past_values": self.floats(1, length, channels)}
        yield {
            "past_values": self.floats(1, past),
            "past_time_features": self.floats(1, past, features),
            "past_observed_mask": torch.ones(1, past),
            "future_values": self.floats(1, ahead),
            "future_time_features": self.floats(1, ahead, features),
        }

    def by_name(self) -> Iterator[Inputs]:
        """What the names of arguments say, whatever the model is for."""
        grid = next((name for name in _GRIDS["image"] if name in self.required), None)
        if grid is not None:
            self.media_names["image"] = self.required[0]
            yield from self.packed("image")
        if "flattened_patches" in self.accepted:
            side, _ = self.pair(self.setting("patch_size", default=16, vision=True))
            width = side * side * self.whole("num_channels", default=3, vision=True)
            width = 2 + self.whole("patch_embed_hidden_size", default=width, vision=True)
            patches = self.floats(1, _GRID**2, width)
            patches[..., :2] = 1  # row and column of each
            yield {"flattened_patches": patches, **self.decoder_text()}
        for width in dict.fromkeys([self.width, *self.feature_widths()]):
            if self.required:
                self.width = width
                if "encoder_hidden_states" in self.accepted:
                    yield {"encoder_hidden_states": self.floats(1, _TOKENS, width)}
                yield {}
        if "inputs_embeds" in self.accepted:
            yield {"inputs_embeds": self.floats(1, _TOKENS, self.width)}

    def complete(self, inputs: Inputs) -> Inputs:
        """The inputs with every other argument that is required and whose name says what it is."""
        for name in self.required:
            if name not in inputs:
                if name.endswith(("states", "embeds", "state")):
                    inputs = {**inputs, name: self.floats(1, _TOKENS, self.width)}
                elif name.endswith("mask"):
                    inputs = {**inputs, name: torch.ones(1, _TOKENS, dtype=torch.int64)}
                elif name == "task_inputs":
                    inputs = {**inputs, name: self.ids(1, self.whole("task_seq_len", default=_TOKENS))}
                elif name.endswith(("_ids", "_inputs", "codes", "inputs")):
                    inputs = {**inputs, name: self.ids(1, _TOKENS)}
        return inputs

    def floats(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def pair(self, value: Any) -> tuple[int, int]:
        """Height and width of a setting that may state one for both."""
        if isinstance(value, Mapping):
            value = (value.get("height", 64), value.get("width", 64))
        return (value, value) if isinstance(value, int) else (int(value[-2]), int(value[-1]))


def _nested(config: Any) -> Iterator[PreTrainedConfig]:
    """A config and every config nested in it."""
    if isinstance(config, PreTrainedConfig):
        yield config
        for value in list(vars(config).values()):
            yield from _nested(value)


def _reader(model: PreTrainedModel, kind: str) -> Callable[[Inputs], Any] | None:
    """The method that makes features of a medium for the text, called with those arguments that it takes."""
    for owner in (model, getattr(model, "model", None)):
        method = getattr(owner, f"get_{kind}_features", None)
        if method is not None:
            taken = inspect.signature(method).parameters
            anything = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in taken.values())
            return lambda inputs: method(**{n: value for n, value in inputs.items() if anything or n in taken})
    return None
