"""A checkpoint on this machine as its files have it: what they hold is known, and nothing of it is loaded."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from . import checkpoint
from .apply import named_tensors
from .hub import find_files, resolve_file
from .loading import COMPANIONS, load_config, meta_model, refuse_quantized, warn_names
from .orders_file import ORDERS_NAME
from .reordering import Reordering
from .stored_names import StoredNames, stored_names
from .sums import SUMS_NAME
from .tensor_files import INDEX_NAME, WEIGHTS_NAME, StoredTensor, StoredWeights, parse_index, read_weights

# Weights in other forms, which would stay in the old order, what belongs to a training run, and what is written anew.
_LEFT_OUT = (
    *("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.h5"),
    *("*.msgpack", "*.onnx", "*.onnx_data", "*.gguf", "*.ot", "*.pkl", "*.npz", "*.tflite"),
    *("trainer_state.json", "adapter_config.json", "spp_config.json", "README.md", SUMS_NAME, "saliency.png"),
)
# What is fetched from the Hub besides weights.
_FETCHED = (*COMPANIONS, "*.json", "*.txt", "*.jinja")


@dataclass(frozen=True)
class StoredCheckpoint:
    """A checkpoint on this machine that is to be reordered.

    Attributes:
        folder: Its folder.
        weights: What its files of weights hold.
        model: Its model, without values.
        names: How stored tensors and the model's relate.
        beside: Other files to copy, by path inside the folder.
        earlier: The reordering that it has gone through, None if it is in its original order.
    """

    folder: Path
    weights: StoredWeights
    model: PreTrainedModel
    names: StoredNames
    beside: Mapping[str, Path]
    earlier: Reordering | None

    @property
    def stored(self) -> dict[str, StoredTensor]:
        """The tensors that the result has."""
        unused = set(self.names.unused)
        return {name: one for name, one in self.weights.tensors.items() if name not in unused}

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Shapes of the model's tensors."""
        return {name: tensor.shape for name, tensor in named_tensors(self.model).items()}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights: of the first parameter that files hold."""
        held = next(name for name, _ in self.model.named_parameters() if name not in self.names.missing)
        return self.weights.tensors[self.names.layout(held).sources[0]].torch_dtype


def open_checkpoint(source: str | os.PathLike[str]) -> StoredCheckpoint:
    """Find a checkpoint's files and what they hold; of a Hub id they are downloaded."""
    config = load_config(source)
    refuse_quantized(config, source)
    folder = Path(source).expanduser()
    if not folder.is_dir():
        found = find_files(source, (*_FETCHED, WEIGHTS_NAME, INDEX_NAME))
        if WEIGHTS_NAME not in found and INDEX_NAME in found:
            shards, _ = parse_index(checkpoint.read_json(found[INDEX_NAME]), f"{INDEX_NAME} of {source}")
            find_files(source, tuple(dict.fromkeys(shards.values())))
        folder = resolve_file(source, "config.json").parent
    weights = read_weights(folder)
    model = meta_model(config)
    names = stored_names(model, {name: one.shape for name, one in weights.tensors.items()})
    kept, left_out = _other_files(folder, weights)
    cls = type(model).__name__
    warn_names(names.unused, f"weights of {os.fspath(source)} are not used by {cls} and left out")
    warn_names(names.missing, f"weights of {cls} are not in {os.fspath(source)}, nor in what is made of it")
    warn_names(
        left_out, f"files of {os.fspath(source)} hold weights in another form or a training run, and stay behind"
    )
    earlier = Reordering.from_pretrained(folder) if (folder / ORDERS_NAME).is_file() else None
    return StoredCheckpoint(folder, weights, model, names, kept, earlier)


def _other_files(folder: Path, weights: StoredWeights) -> tuple[dict[str, Path], list[str]]:
    """Files beside the weights that are copied, and those that are not, by path inside the folder."""
    kept: dict[str, Path] = {}
    left_out = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if not path.is_file() or any(part.startswith(".") for part in name.parts):
            continue
        if name.parts[0].startswith("checkpoint-") or any(path.match(pattern) for pattern in _LEFT_OUT):
            if name.as_posix() not in (*weights.headers, INDEX_NAME, ORDERS_NAME) and path.suffix not in (
                ".md",
                ".png",
            ):
                left_out.append(name.as_posix())
        else:
            kept[name.as_posix()] = path
    return kept, [name for name in left_out if name not in ("spp_config.json", SUMS_NAME)]
