"""What a config may ask for: models about as large as the weights beside it, before any memory is filled for them."""

import copy
import math
import re
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from . import checkpoint
from .errors import CheckpointError
from .tensor_files import INDEX_NAME, WEIGHTS_NAME, parse_index, read_header

# Names under which configs say how many of something a model has, and the most that any needs.
_COUNTS = {
    "labels": (re.compile(r"(?:^|_)labels$"), 1 << 18),
    "layers or experts": (re.compile(r"(?:^|_)(?:layers?|depths?|blocks?|stages?|experts?)$"), 1 << 16),
}
_LAYERS = re.compile(r"(?:^|_)(?:layers?|depths?|blocks?|stages?)$")
# Every layer has a tensor, unless all share theirs. A head may be new, and part of the weights be left out.
_MOST_LAYERS = 1000
_LARGEST_GROWTH, _LARGEST_HEAD = 4, 1 << 26


def check_counts(config: Any, name: str) -> None:
    """Refuse the JSON of a config that counts so many labels or layers that their names alone fill the memory.

    Raises:
        CheckpointError: It does.
    """
    for what, (names, most) in _COUNTS.items():
        if found := [count for count in _counts_of(config, names) if count > most]:
            raise CheckpointError(
                f"The config of {name!r} counts {found[0]:,} {what}. Accepted: up to {most:,}. Download or save the "
                "model again."
            )


def check_weights(folder: Path, cls: Any, config: PreTrainedConfig) -> None:
    """Refuse damaged weights of a folder, and a config of a model far larger than they are.

    Args:
        folder: The folder; one without safetensors weights is left to transformers.
        cls: The model's class.
        config: Its config.

    Raises:
        CheckpointError: A header or the index is damaged, or the config describes something much larger.
    """
    index = folder / INDEX_NAME
    if (folder / WEIGHTS_NAME).is_file():
        files = [WEIGHTS_NAME]
    elif index.is_file():
        files = sorted(set(parse_index(checkpoint.read_json(index), str(index))[0].values()))
    else:
        return
    tensors = [one for file in files for one in read_header(folder / file).tensors.values()]
    held = sum(math.prod(one.shape) for one in tensors)
    layers = max((0, *_counts_of(config.to_dict(), _LAYERS)))
    if layers > max(len(tensors), _MOST_LAYERS):
        raise CheckpointError(
            f"The config of '{folder}' counts {layers:,} layers, and its files hold {len(tensors):,} tensors. Download "
            "or save the model again."
        )
    with torch.device("meta"):
        model = cls._from_config(copy.deepcopy(config))
    described = sum(parameter.numel() for parameter in model.parameters())
    if described > _LARGEST_GROWTH * held + _LARGEST_HEAD:
        raise CheckpointError(
            f"The config of '{folder}' describes a {cls.__name__} of {described:,} weights, and its files hold "
            f"{held:,}. Download or save the model again."
        )


def _counts_of(config: Any, names: re.Pattern[str]) -> list[int]:
    """The whole numbers that stand under some names in a config."""
    found, waiting = [], [("", config)]
    while waiting:
        name, one = waiting.pop()
        if isinstance(one, dict):
            waiting.extend((str(key), value) for key, value in one.items())
        elif isinstance(one, list | tuple):
            waiting.extend((name, value) for value in one)
        elif isinstance(one, int) and names.search(name):
            found.append(one)
    return found
