"""Model types, their classes, and building one of them with inputs that run."""

import importlib
import inspect
import json
import os
import pkgutil
import re
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from .configs import VARIANTS, overrides
from .guessed_inputs import guesses, setting
from .hand_inputs import HAND_INPUTS
from .shrinking import LEVELS, shrunk_config

_TASKS = (
    "CAUSAL_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "SEQUENCE_CLASSIFICATION",
    "IMAGE_CLASSIFICATION",
    "IMAGE_TEXT_TO_TEXT",
    "MASKED_LM",
    "CTC",
    "SPEECH_SEQ_2_SEQ",
    "AUDIO_CLASSIFICATION",
    "VIDEO_CLASSIFICATION",
    "OBJECT_DETECTION",
    "SEMANTIC_SEGMENTATION",
    "UNIVERSAL_SEGMENTATION",
    "DEPTH_ESTIMATION",
    "MASK_GENERATION",
    "BACKBONE",
    "TEXT_TO_WAVEFORM",
    "TEXT_TO_SPECTROGRAM",
    "KEYPOINT_DETECTION",
    "KEYPOINT_MATCHING",
    "TIME_SERIES_PREDICTION",
    "PRETRAINING",
    "MULTIMODAL_LM",
    "RNNT",
    "TDT",
    "RETRIEVAL",
    "IMAGE_TO_IMAGE",
    "TABLE_RECOGNITION",
    "TEXT_RECOGNITION",
    "INSTANCE_SEGMENTATION",
    "DECISION",
    "POSE_ESTIMATION",
    "NORMAL_ESTIMATION",
    "VISUAL_QUESTION_ANSWERING",
)
_MAX_PARAMETERS = dict(zip(LEVELS, (60e6, 60e6, 80e6, 120e6), strict=True))
_MAX_PLACEHOLDERS = 4096


class ZooError(RuntimeError):
    """No config, size or inputs of a model type gave a model that runs."""


@dataclass(frozen=True)
class Built:
    """A tiny model and arguments of its forward.

    Attributes:
        model: The model in evaluation mode.
        inputs: Arguments that its forward runs on.
        kind: A word on what the inputs are.
    """

    model: PreTrainedModel
    inputs: dict[str, Any]
    kind: str


def listed_types() -> list[str]:
    """The model types that are known to build and run, and their variants."""
    listed = json.loads((Path(__file__).parent / "types.json").read_text())
    return sorted({*listed, *VARIANTS})


def all_types() -> list[str]:
    """Every model type of the installed transformers, and the variants of those."""
    return sorted({*CONFIG_MAPPING_NAMES, *(name for name in VARIANTS if _base(name) in CONFIG_MAPPING_NAMES)})


def model_classes(model_type: str) -> list[type[PreTrainedModel]]:
    """Classes of a model type: the base model, then up to three with heads."""
    name = _base(model_type)
    base = _public_class(modeling_auto.MODEL_MAPPING_NAMES.get(name))
    tables = (getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES", {}) for task in _TASKS)
    heads = [head for table in tables if (head := _public_class(table.get(name))) is not None]
    found = [base] if base is not None else []
    if base is None and (own := _own_classes(CONFIG_MAPPING[name])):
        found, heads = own[:1], [*heads, *own[1:3]]
    heads = [head for head in dict.fromkeys(heads) if head not in found]
    return [*found, *heads[:3]]


def build(model_type: str, model_class: type[PreTrainedModel]) -> Built:
    """Build a tiny model of a type and find inputs that it runs on.

    The global random state stays as it is.

    Raises:
        ZooError: None was found; the message lists what was tried.
    """
    failures: list[str] = []
    with torch.random.fork_rng(devices=[]):
        for level in LEVELS:
            try:
                return _build_at(level, model_type, model_class)
            except Exception as error:  # whatever a config or model raises, the next level may suit it
                failures.append(f"level {level}: {_described(error)}")
    raise ZooError("; ".join(dict.fromkeys(failures)))


def _base(model_type: str) -> str:
    return model_type.split("+")[0]


def _public_class(name: Any) -> type[PreTrainedModel] | None:
    if isinstance(name, (list, tuple)):
        name = name[0]
    return None if name is None else getattr(transformers, name, None)


def _own_classes(config_class: type[PreTrainedConfig]) -> list[type[PreTrainedModel]]:
    """Model classes beside a config class that no auto class lists, those without a task first."""
    package = importlib.import_module(config_class.__module__.rpartition(".")[0])
    found = []
    for info in pkgutil.iter_modules(package.__path__):
        if not info.name.startswith("modeling_"):
            continue
        try:
            module = importlib.import_module(f"{package.__name__}.{info.name}")
        except Exception:  # an optional dependency is missing
            continue
        found += [
            value
            for name, value in vars(module).items()
            if inspect.isclass(value)
            and issubclass(value, PreTrainedModel)
            and value.__module__ == module.__name__
            and value.config_class is config_class
            and not name.endswith("PreTrainedModel")
        ]
    whole = re.compile(r"(Model|Encoder|Decoder|Transformer)$")
    return sorted(found, key=lambda value: ("For" in value.__name__, not whole.search(value.__name__)))


def _build_at(level: int, model_type: str, model_class: type[PreTrainedModel]) -> Built:
    config = shrunk_config(CONFIG_MAPPING[_base(model_type)], level, overrides(model_type))
    config._attn_implementation = "eager"
    model = _build_model(model_class, config, _MAX_PARAMETERS[level])
    failures: dict[str, None] = {}
    for kind, inputs in _candidates(model_type, model, config):
        try:
            return _first_run(model, config, kind, inputs)
        except Exception as error:  # whatever a forward raises, other inputs may suit it
            failures[f"{kind}: {_described(error)}"] = None
    raise ZooError("it builds but runs on no inputs; " + "; ".join(list(failures)[:3]))


def _build_model(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, max_parameters: float
) -> PreTrainedModel:
    try:
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in model_class(config).parameters())
    except Exception:  # some models compute with values while they are built
        count = 0
    if count > max_parameters:
        raise ZooError(f"{count / 1e6:.0f} million parameters are too many")
    torch.manual_seed(0)
    model = model_class(config).eval()
    first = next(model.parameters(), None)
    if first is not None and first.dtype in (torch.float16, torch.bfloat16):
        model = model.float()
    _randomize(model)
    return model


@torch.no_grad()
def _randomize(model: nn.Module) -> None:
    """Draw every parameter anew, so that no zero bias, unit norm or empty table hides a missing permutation."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        kind = type(module).__name__
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.is_floating_point() or parameter.numel() == 0:
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            is_vector = parameter.dim() == 1
            if ("norm" in kind.lower() and name.startswith("weight")) or (
                is_vector and name in ("weight", "gamma", "scale")
            ):
                parameter.copy_(1.0 + 0.3 * noise)
            elif parameter.dim() <= 1:
                parameter.copy_(0.3 * noise)
            elif isinstance(module, nn.Embedding):
                parameter.copy_(0.7 * noise)
            else:
                inputs = parameter.shape[0] if kind == "Conv1D" else parameter[0].numel()
                if parameter.dim() == 3 and not isinstance(module, nn.Conv1d):
                    inputs = parameter.shape[-1]
                parameter.copy_(noise / max(inputs, 1) ** 0.5)


def _candidates(
    model_type: str, model: PreTrainedModel, config: PreTrainedConfig
) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        by_hand = HAND_INPUTS[_base(model_type)](model, config) if _base(model_type) in HAND_INPUTS else None
    except Exception:  # they may suit other classes of the type only
        by_hand = None
    if by_hand is not None:
        yield "by hand", dict(by_hand)
    yield from guesses(model, config)


def _first_run(model: PreTrainedModel, config: PreTrainedConfig, kind: str, inputs: dict[str, Any]) -> Built:
    try:
        output = _run(model, inputs)
    except Exception as error:
        repaired = _with_placeholders(error, config, inputs)
        if repaired is None:
            raise
        _run(model, repaired)
        return Built(model, repaired, f"{kind} with placeholders")
    if not any(tensor.is_floating_point() for tensor in _tensors(output)):
        raise ZooError("no floating-point tensor comes out")
    return Built(model, inputs, kind)


@torch.no_grad()
def _run(model: PreTrainedModel, inputs: dict[str, Any]) -> Any:
    torch.manual_seed(1234)
    return model(**inputs)


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (Mapping, list, tuple)):
        for value in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(value)


def _with_placeholders(error: Exception, config: PreTrainedConfig, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """The inputs with as many placeholders for an image, video or sound as the error says are wanted."""
    message = str(error)
    counts = re.search(r"tokens:? *(\d+)[,;]? *(?:image |video |audio )?features:? *(?:torch\.Size\(\[)?(\d+)", message)
    if not counts or "input_ids" not in inputs:
        return None
    subject = message.split("token")[0]
    kind = "video" if "ideo" in subject else "audio" if "udio" in subject else "image"
    names = (f"{kind}_token_id", f"{kind}_token_index", "image_token_id", "image_token_index")
    token, wanted, ids = setting(config, *names), int(counts[2]), inputs["input_ids"]
    if token is None or wanted > _MAX_PLACEHOLDERS or wanted % len(ids):
        return None
    placeholders = torch.full((len(ids), wanted // len(ids)), token)
    return {**inputs, "input_ids": torch.cat([ids[:, :4], placeholders, ids[:, 4:]], 1)}


def _described(error: Exception) -> str:
    """An error in one line, with the place in transformers that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if f"{os.sep}transformers{os.sep}" in frame.filename] or frames
    place = f"{Path(inside[-1].filename).name}:{inside[-1].lineno}"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]} ({place})"
