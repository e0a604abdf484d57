"""Pretrained models as their config describes them: the class, the weights, and the files that lie beside them."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from . import checkpoint, hub
from ._compat import finish_loading
from .bounds import check_counts, check_weights
from .errors import (
    CheckpointError,
    HubError,
    SPPConfigError,
    SPPError,
    UnsupportedArchitectureError,
    UnsupportedModelError,
)

logger = logging.get_logger(__name__)

DTYPES = ("float32", "float64", "bfloat16", "float16", "auto")
# What a checkpoint needs beside its weights and config: tokenizer, processor, sentence-transformers' modules, license.
COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "chat_template*",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "modules.json",
    "sentence_*_config.json",
    "config_sentence_transformers.json",
    "[0-9]_*/*",
    "LICENSE*",
    "NOTICE*",
)


def check_folder(source: str | os.PathLike[str]) -> None:
    """Refuse the path of a folder that does not exist; what may be a Hub id is left to the Hub.

    Raises:
        CheckpointError: There is no such folder.
    """
    name = os.fspath(source)
    if _is_path(name) and not Path(name).is_dir():
        raise CheckpointError(
            f"Folder {name!r} does not exist. Accepted: a folder written by save_pretrained, or a Hub id such as "
            "'google/vit-base-patch16-224'. Check the path."
        )


def load_config(source: str | os.PathLike[str]) -> PreTrainedConfig:
    """Load a model's config from a folder or a Hub repo.

    Raises:
        CheckpointError: The folder is missing, or its config is missing or damaged.
        HubError: The repo cannot be reached.
        UnsupportedArchitectureError: transformers does not know the model type.
    """
    check_folder(source)
    name = os.fspath(source)
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise CheckpointError(
            f"Folder {name!r} has no config.json. Accepted: a folder written by save_pretrained. Check the path, or "
            "save the model there again."
        )
    with suppress(HubError):
        # What transformers cannot find either, it says itself below.
        stated = checkpoint.read_json(hub.resolve_file(name, "config.json"), finite=False)
        check_counts(stated, name)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(name)
    except ValueError as error:
        raise UnsupportedArchitectureError(
            f"The config of {name!r} names no model type that transformers {transformers.__version__} has: "
            f"{_first_line(error)} Accepted: models of transformers itself; code from a repo is not run. "
            "Upgrade transformers, or choose another model."
        ) from error
    except Exception as error:  # what transformers raises on a value of a config that it does not expect is of any kind
        if isinstance(error, OSError) and not Path(name).is_dir():
            raise HubError(
                f"Model {name!r} is no folder here, and was not loaded from the Hub: {_first_line(error)} Accepted: an "
                "existing folder, or a Hub id that can be reached. Check the spelling and the network."
            ) from error
        raise CheckpointError(
            f"{name!r} has no readable config.json: {_first_line(error)} Accepted: what save_pretrained wrote. Check "
            "the path, or save the model there again."
        ) from error
    classes = getattr(config, "architectures", None)
    if not (classes is None or (isinstance(classes, list) and all(isinstance(one, str) for one in classes))):
        raise CheckpointError(
            f"The config of {name!r} states architectures {classes!r}. Accepted: a list of names of classes. Save the "
            "model again."
        )
    return config


def load_model(source: str | os.PathLike[str], dtype: str = "auto", *, cls: Any = None) -> PreTrainedModel:
    """Load a pretrained model as the class that its config names.

    Weights that the class does not use, or that the checkpoint lacks, are named in a warning. Only safetensors are
    read, and no code of the repo is run.

    Args:
        source: A folder or a Hub id.
        dtype: One of `DTYPES`; `auto` keeps the checkpoint's.
        cls: Another class than the config names.

    Raises:
        SPPConfigError: The dtype is unknown.
        UnsupportedModelError: The checkpoint is quantized.
        CheckpointError: The weights are missing, damaged, or do not fit the config.
    """
    check_dtype(dtype)
    config = load_config(source)
    refuse_quantized(config, source)
    return _loaded(model_class(config) if cls is None else cls, source, config, dtype, {"use_safetensors": True})


def fill_model(
    cls: Any,
    config: PreTrainedConfig,
    state: Mapping[str, Any],
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    dtype: str = "auto",
    unused: Sequence[str] = (),
) -> PreTrainedModel:
    """Make a model of a config and fill it, as `load_model` does with files.

    Args:
        cls: The model's class.
        config: Its config.
        state: Tensors, or what is read when it is indexed with `...`, by their name in the model.
        source: The folder or Hub id that they come from.
        folder: Where its small files lie.
        dtype: As for `load_model`.
        unused: Names of tensors in the files that the model does not take.

    Raises:
        SPPConfigError: The dtype is unknown.
        CheckpointError: The tensors do not fit the config, or cannot be read.
    """
    check_dtype(dtype)
    model = _loaded(cls, source, config, dtype, {"state_dict": dict(state)})
    with quiet_transformers():
        finish_loading(model, folder)
    name_source(model, source)
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    left = [name for name in unused if not any(re.search(pattern, name) for pattern in ignored)]
    warn_names(left, f"weights of {os.fspath(source)} are not used by {cls.__name__} and left out")
    return model


def name_source(model: PreTrainedModel, source: str | os.PathLike[str]) -> None:
    """Note on a model which folder or Hub id it was loaded from."""
    model.config.name_or_path = os.fspath(source)
    for module in model.modules():
        # Parts with a config of their own come from nowhere.
        if isinstance(module, PreTrainedModel) and module.name_or_path:
            module.name_or_path = os.fspath(source)


def check_dtype(dtype: str) -> None:
    """Refuse an unknown dtype.

    Raises:
        SPPConfigError: It is none of `DTYPES`.
    """
    if dtype not in DTYPES:
        raise SPPConfigError(f"dtype {dtype!r} is unknown. Accepted: {', '.join(DTYPES)}. Use float32 if in doubt.")


def _loaded(
    cls: Any, source: str | os.PathLike[str], config: PreTrainedConfig, dtype: str, options: Mapping[str, Any]
) -> PreTrainedModel:
    wanted = dtype if dtype == "auto" else getattr(torch, dtype)
    name = None if "state_dict" in options else source
    try:
        with quiet_transformers():
            if name is not None:
                check_weights(Path(name), cls, config)
            loaded, report = cls.from_pretrained(name, config=config, dtype=wanted, output_loading_info=True, **options)
    except SPPError:
        raise
    except Exception as error:  # a config builds a model of any kind, which fails in any way where a value is odd
        raise CheckpointError(
            f"The weights of {os.fspath(source)!r} cannot be loaded into {cls.__name__}: {_first_line(error)} "
            "Accepted: whole safetensors weights that fit config.json. Download or save the model again."
        ) from error
    warn_names(report["unexpected_keys"], f"weights of {os.fspath(source)} are not used by {cls.__name__} and left out")
    warn_names(report["missing_keys"], f"weights of {cls.__name__} are not in {os.fspath(source)} and drawn at random")
    model: PreTrainedModel = loaded.eval()
    return model


def refuse_quantized(config: PreTrainedConfig, source: str | os.PathLike[str]) -> None:
    """Refuse a checkpoint whose config says that it is quantized.

    Raises:
        UnsupportedModelError: It is.
    """
    if getattr(config, "quantization_config", None):
        raise UnsupportedModelError(
            f"Model {os.fspath(source)!r} holds quantized weights, whose packed rows cannot be moved. Accepted: "
            "float weights. Reorder the unquantized checkpoint first and quantize the result."
        )


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model that a config describes, with shapes and no values."""
    with torch.device("meta"):
        model: PreTrainedModel = model_class(config)._from_config(config)
    return model


def model_class(config: PreTrainedConfig) -> Any:
    """The transformers class that a config names, or the class without a head where it names none that exists.

    Raises:
        UnsupportedArchitectureError: transformers has no model for the config.
    """
    for name in getattr(config, "architectures", None) or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    if type(config) not in AutoModel._model_mapping:
        raise UnsupportedArchitectureError(
            f"model_type {config.model_type!r} has no model class in transformers {transformers.__version__}. "
            "Accepted: types of AutoModel. Choose another model."
        )
    headless = AutoModel._model_mapping[type(config)]
    return headless[0] if isinstance(headless, tuple) else headless


@contextmanager
def quiet_transformers(*, bars: bool = True) -> Iterator[None]:
    """Silence transformers' own warnings inside the block, and without `bars` its bars too; downloads still show."""
    verbosity, shown, downloads = (
        logging.get_verbosity(),
        logging.is_progress_bar_enabled(),
        not are_progress_bars_disabled(),
    )
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if not bars:
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        if downloads:
            enable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown and not bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
            if not downloads:
                disable_progress_bars()


@contextmanager
def without_notes(name: str) -> Iterator[None]:
    """Leave out what a logger, and those below it, say beneath errors inside the block."""
    logger = getLogger(name)
    level = logger.level
    logger.setLevel(ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def companion_files(source: str | os.PathLike[str]) -> dict[str, Path]:
    """Files that belong to a checkpoint beside its weights and config, by their path inside it."""
    return hub.find_files(source, COMPANIONS)


def warn_names(names: Any, what: str) -> None:
    """Warn of some names, a few of them spelled out."""
    if names:
        some = sorted(map(str, names))
        logger.warning(f"{len(some)} {what}: {', '.join(some[:4])}{', …' if len(some) > 4 else ''}")


def _is_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name or Path(name).exists()


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{lines[0].rstrip('.:')}." if lines else f"{type(error).__name__}."
