"""Resolving the map of every model type of transformers from its default config: no weights, no download."""

import difflib
import importlib
import inspect
import multiprocessing
import os
import pkgutil
import re
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..architectures import channel_groups
from ..channels import ChannelMap
from ..config import AXES
from ..errors import HubError, SPPError, UnsupportedArchitectureError
from ..loading import load_config, meta_model
from .families import Families, Family, general_reason

# The first task for which transformers has a class decides: those that hold the whole model before those that hold one
# side of it, and those with an output layer, without which the residual stream may not move.
TASKS = (
    "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "MASKED_LM", "TEXT_TO_WAVEFORM",
    "CAUSAL_LM", "SEQUENCE_CLASSIFICATION", "IMAGE_CLASSIFICATION", "VIDEO_CLASSIFICATION", "AUDIO_CLASSIFICATION",
    "CTC", "RNNT", "TDT", "TEXT_TO_SPECTROGRAM", "OBJECT_DETECTION", "SEMANTIC_SEGMENTATION", "UNIVERSAL_SEGMENTATION",
    "INSTANCE_SEGMENTATION", "DEPTH_ESTIMATION", "NORMAL_ESTIMATION", "POSE_ESTIMATION", "MASK_GENERATION",
    "KEYPOINT_DETECTION", "KEYPOINT_MATCHING", "TIME_SERIES_PREDICTION", "IMAGE_TO_IMAGE", "IMAGE_MATTING",
    "TABLE_RECOGNITION", "TEXT_RECOGNITION", "DECISION", "VISUAL_QUESTION_ANSWERING", "RETRIEVAL", "PRETRAINING",
    "ZERO_SHOT_IMAGE_CLASSIFICATION", "ZERO_SHOT_OBJECT_DETECTION",
)  # fmt: skip

_RESNET: Mapping[str, Any] = {"model_type": "resnet", "out_features": ["stage2", "stage3", "stage4"]}
_CONV_LAYERS = [*["conv"] * 3, "full_attention"] * 8
_LINEAR_LAYERS = [*["linear_attention"] * 3, "full_attention"] * 8
_DETR: Mapping[str, Any] = {"backbone": None, "backbone_config": _RESNET, "use_timm_backbone": False}
_SERIES: Mapping[str, Any] = {"prediction_length": 24}
_COMPASS_ROPE: Mapping[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [16, 24, 24]}
_COMPASS_TEXT: Mapping[str, Any] = {
    "rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), _COMPASS_ROPE)
}
_OCR2_TEXT: Mapping[str, Any] = {
    "num_hidden_layers": 12,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "mlp_layer_types": ["dense", *["sparse"] * 11],
}
_DIFFUSION_TEXT: Mapping[str, Any] = {"num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704}
_QWEN4_TEXT: Mapping[str, Any] = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 2048,
    "indexer_compress_ratio": 4,
    "ngram_vocab_size_base": 1024,
}
# What the default config of a type lacks to describe a model, or one with every kind of layer that the type has.
ARGUMENTS: Mapping[str, Mapping[str, Any]] = {
    "autoformer": _SERIES,
    "aya_vision": {
        "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 1152, "num_attention_heads": 16}
    },
    "bamba": {"attn_layer_indices": [9, 18, 27]},
    "chameleon": {"vocabulary_map": {"<image>": 8711}},
    "cohere_compass": {"text_config": _COMPASS_TEXT},
    "cohere_compass_text": _COMPASS_TEXT,
    "conditional_detr": _DETR,
    "dab-detr": _DETR,
    "dbrx": {"attn_config": {"kv_n_heads": 8, "rope_theta": 500000.0, "clip_qkv": 8.0}},
    "deepseek_ocr2": {"text_config": _OCR2_TEXT},
    "deepseek_ocr2_text": _OCR2_TEXT,
    "deformable_detr": _DETR,
    "detr": _DETR,
    "diffusion_gemma": {"text_config": _DIFFUSION_TEXT},
    "diffusion_gemma_text": _DIFFUSION_TEXT,
    "dots1": {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6, "n_group": 1, "topk_group": 1},
    "emu3": {"vocabulary_map": {"<image>": 151854, "<|extra_200|>": 151853}},
    "esm": {"vocab_size": 33},
    "granitemoehybrid": {"layer_types": _LINEAR_LAYERS},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "hunyuan_vl": {"text_config": {"head_dim": 128}},
    "hunyuan_vl_text": {"head_dim": 128},
    "informer": _SERIES,
    "lfm2": {"layer_types": _CONV_LAYERS},
    "lfm2_moe": {"layer_types": _CONV_LAYERS},
    "lfm2_vl": {"text_config": {"model_type": "lfm2", "layer_types": _CONV_LAYERS}},
    "ministral": {"head_dim": 128},
    "moonshine_streaming": {"num_key_value_heads": 8},
    "nemotron": {"num_key_value_heads": 8},
    "qwen3_omni_moe": {
        "talker_config": {"text_config": {"shared_expert_intermediate_size": 768}, "spatial_merge_size": 2}
    },
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 768},
    "qwen4_exp": {"text_config": _QWEN4_TEXT},
    "qwen4_exp_text": _QWEN4_TEXT,
    "t5gemma2_decoder": {"dropout_rate": 0.0},
    "t5gemma2_encoder": {"text_config": {"dropout_rate": 0.0}},
    "t5gemma2_text": {"dropout_rate": 0.0},
    "table-transformer": _DETR,
    "time_series_transformer": _SERIES,
    "vitmatte": {"fusion_hidden_sizes": [256, 128, 64, 32]},
}


@dataclass(frozen=True)
class Finding:
    """What was found out about one model type.

    Attributes:
        model_class: The class that was resolved.
        verdicts: By axis, `yes`, `part` or `no`, and the reasons.
        left_out: Why it was not resolved, instead.
        failed: Whether that is the package's own failure.
        holds: Types whose configs its default config holds.
    """

    model_class: str = ""
    verdicts: Mapping[str, tuple[str, tuple[str, ...]]] = field(default_factory=dict)
    left_out: str = ""
    failed: bool = False
    holds: frozenset[str] = frozenset()


def model_types() -> list[str]:
    """Every model type of the installed transformers."""
    return sorted(CONFIG_MAPPING.keys())


def default_model(model_type: str) -> PreTrainedModel:
    """The model of a type's default config, with a task head where there is one, on the meta device.

    Raises:
        UnsupportedArchitectureError: There is no such type, it has no model, or its default config describes none.
    """
    if model_type not in CONFIG_MAPPING:
        raise UnsupportedArchitectureError(
            f"model_type {model_type!r} is unknown to transformers {transformers.__version__}. Accepted: those that "
            "`hf-spp architectures` lists. Correct the name."
        )
    reasons = []
    for model_class in _model_classes(model_type):
        try:
            config = _default_config(model_type)
            with torch.device("meta"):
                model: PreTrainedModel = model_class._from_config(config)  # type: ignore[no-untyped-call]
            return model
        except Exception as error:  # configs and models raise what they like; the next class may do
            reasons.append(_described(error))
    reason = reasons[0] if reasons else "it has no model of its own"
    raise UnsupportedArchitectureError(
        f"The default config of model_type {model_type!r} describes no model: {reason}. Accepted: a folder or Hub id "
        "of a model of this type. Give one."
    ) from _Unbuildable(reason)


def find_model(name: str) -> tuple[PreTrainedModel, str]:
    """The model of a folder, Hub id or model type on the meta device, and for a type a word on where it is from.

    Raises:
        CheckpointError, HubError: The config of a folder or repo is missing or damaged.
        UnsupportedArchitectureError: The config describes no model of the installed transformers.
    """
    if name in CONFIG_MAPPING and not Path(name).is_dir():
        return default_model(name), f"default config of {name}"
    try:
        config = load_config(name)
    except HubError as error:
        if "/" not in name and (near := difflib.get_close_matches(name, list(CONFIG_MAPPING), n=3)):
            raise HubError(f"{error} Model types of transformers with a similar name: {', '.join(near)}.") from error
        raise
    try:
        return meta_model(config), ""
    except SPPError:
        raise
    except Exception as error:  # configs and models raise what they like
        raise UnsupportedArchitectureError(
            f"The config of {name!r} (model_type {config.model_type!r}) describes no model: {_described(error)}. "
            "Accepted: a config that transformers can build here. Install what is missing, or correct the config."
        ) from error


def find_verdicts(model_type: str) -> Finding:
    """Resolve a type's default model."""
    holds = _held_types(model_type)
    try:
        model = default_model(model_type)
    except UnsupportedArchitectureError as error:
        return Finding(left_out=str(error.__cause__ or error), holds=holds)
    name = type(model).__name__
    try:
        return Finding(name, verdicts(channel_groups(model)), holds=holds)
    except UnsupportedArchitectureError:
        return Finding(name, holds=holds)
    except Exception as error:  # the table is written all the same, and the failure reported
        return Finding(left_out=f"hf_spp failed with {type(error).__name__}: {error}", failed=True, holds=holds)


def verdicts(groups: ChannelMap) -> dict[str, tuple[str, tuple[str, ...]]]:
    """By axis, whether all units, some (`part`) or none move, and why not, without names and sizes."""
    found = {}
    for axis in AXES:
        reasons = tuple(dict.fromkeys(general_reason(one.reason) for one in groups.refused if one.axis == axis))
        if axis in groups.axes:
            found[axis] = ("part" if reasons else "yes", reasons)
        elif reasons:
            found[axis] = ("no", reasons)
    return found


def survey(types: Iterable[str], jobs: int = 2, limit_s: float = 60.0) -> Iterator[tuple[str, Finding]]:
    """Resolve types, each in a process of its own, which may die or take too long; gives findings as they come."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    waiting = list(types)[::-1]
    running: dict[Connection, tuple[str, BaseProcess, float]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            receiver, sender = context.Pipe(duplex=False)
            process: BaseProcess = context.Process(
                target=_send_finding, args=(name := waiting.pop(), sender), daemon=True
            )
            process.start()
            sender.close()
            running[receiver] = (name, process, time.monotonic())
        done = set(wait(list(running), timeout=min(1.0, limit_s)))
        for receiver, (name, process, started) in list(running.items()):
            if receiver in done or time.monotonic() - started > limit_s:
                del running[receiver]
                yield name, _receive(receiver, process, limit_s)


def collect(findings: Mapping[str, Finding]) -> Families:
    """The table of all findings; reasons are numbered as they first occur in it."""
    resolved = {name: one for name, one in sorted(findings.items()) if not one.left_out}
    headless = {name for name in resolved if not any(_listed(task, name) for task in TASKS)}
    parts = {
        name: containers
        for name in headless
        if (containers := tuple(other for other in sorted(findings) if name in findings[other].holds))
    }
    rows = defaultdict(list)
    for name in resolved:
        found = resolved[name].verdicts
        rows[name in parts, tuple((axis, *found[axis]) for axis in AXES if axis in found)].append(name)
    numbers: dict[str, int] = {}
    for (_, row), _names in sorted(rows.items(), key=lambda item: (item[0][0], -len(item[1]), item[1])):
        for _axis, _word, reasons in row:
            for reason in reasons:
                numbers.setdefault(reason, len(numbers) + 1)
    families = {
        name: Family(
            one.model_class,
            {
                axis: " ".join([word, *map(str, sorted(numbers[reason] for reason in reasons))])
                for axis, (word, reasons) in one.verdicts.items()
            },
            parts.get(name, ()),
        )
        for name, one in resolved.items()
    }
    left_out = {name: one.left_out for name, one in findings.items() if one.left_out}
    return Families(transformers.__version__, AXES, tuple(numbers), families, left_out)


class _Unbuildable(Exception):
    """Why a default config describes no model."""


def _model_classes(model_type: str) -> list[type[PreTrainedModel]]:
    names = [name for task in (*TASKS, None) for name in _listed(task, model_type)]
    found = [one for name in dict.fromkeys(names) if (one := getattr(transformers, name, None)) is not None]
    return found or _own_classes(CONFIG_MAPPING[model_type])


def _listed(task: str | None, model_type: str) -> tuple[str, ...]:
    table = f"MODEL_FOR_{task}_MAPPING_NAMES" if task else "MODEL_MAPPING_NAMES"
    names = getattr(modeling_auto, table, {}).get(model_type, ())
    return (names,) if isinstance(names, str) else tuple(names[:1])


def _own_classes(config_class: type[PreTrainedConfig]) -> list[type[PreTrainedModel]]:
    """Classes beside a config class that no auto class lists, those with the shortest names first."""
    package = importlib.import_module(config_class.__module__.rpartition(".")[0])
    found = []
    for info in pkgutil.iter_modules(package.__path__):
        if not info.name.startswith("modeling_"):
            continue
        try:
            module = importlib.import_module(f"{package.__name__}.{info.name}")
        except ImportError:  # a library is missing
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
    return sorted(found, key=lambda value: ("For" in value.__name__, len(value.__name__)))


def _held_types(model_type: str) -> frozenset[str]:
    """The types of the configs that a type's default config holds, at any depth."""
    try:
        configs = _nested(_default_config(model_type))
    except Exception:  # a config that cannot be made holds what its class states
        configs = iter(CONFIG_MAPPING[model_type].sub_configs.values())
    return frozenset(getattr(one, "model_type", "") for one in configs) - {"", model_type}


def _nested(config: PreTrainedConfig) -> Iterator[Any]:
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield value
            yield from _nested(value)


def _default_config(model_type: str) -> PreTrainedConfig:
    config: PreTrainedConfig = CONFIG_MAPPING[model_type](**ARGUMENTS.get(model_type, {}))
    return config


def _send_finding(model_type: str, pipe: Connection) -> None:
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(silence, stream.fileno())
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    pipe.send(find_verdicts(model_type))


def _receive(receiver: Connection, process: BaseProcess, limit_s: float) -> Finding:
    try:
        finding = (
            receiver.recv() if receiver.poll() else Finding(left_out=f"not resolved in {limit_s:.0f} s", failed=True)
        )
    except EOFError:
        process.join()
        finding = Finding(left_out=f"its process ended with {process.exitcode}", failed=True)
    process.kill()
    process.join()
    receiver.close()
    return finding


def _described(error: Exception) -> str:
    """An error in one line; that of a missing library by its name."""
    text = " ".join(str(error).split())
    missing = re.search(r"requires the (\S+) library", text)
    return f"it needs the library {missing[1]}" if missing else f"it raises {type(error).__name__}: {text[:100]}"
