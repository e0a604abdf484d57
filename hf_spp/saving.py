"""What is saved of a model in training: the orders with the weights, adapters in the order that is asked for."""

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from . import checkpoint, folders
from .adapters import ADAPTER_WEIGHTS, read_adapter, remapped
from .config import CONFIG_NAME
from .orders_file import ORDERS_NAME
from .reordering import Reordering, total_of
from .structure import inner_model, part_of, tuner_layers
from .sums import SUMS_NAME

# What a folder is taken for depends on these, so they go first and come last.
_LAST = (
    "model.safetensors",
    "model.safetensors.index.json",
    "spp_subnetwork.json",
    CONFIG_NAME,
    ORDERS_NAME,
    SUMS_NAME,
)
# Weights and what was made of them.
_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json", "spp_*/*.safetensors")
_HUB_OPTIONS = ("push_to_hub", "repo_id", "commit_message", "private", "token", "revision", "create_pr")
AdapterOrder = Literal["original", "reordered"]
_SAMPLE = 256


class OrderedSaving:
    """The `save_pretrained` of a model in training, which keeps the orders with the weights.

    Beside the weights of a plain model it writes the orders that the model is in. Adapters are saved for the original
    base model, or as they are with the orders beside them. Copies of the model save in the same way.

    Args:
        model: The model, plain or PEFT's.
        adapters: In which order adapters are saved.
    """

    def __init__(self, model: Any, adapters: AdapterOrder = "original") -> None:
        self.model, self.adapters = model, adapters

    def __call__(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> Any:
        """Save the model into a folder; arguments are those of the model's own `save_pretrained`."""
        reordering = total_of(self.model)
        portable = reordering is not None and saves_portable(self.model, self.adapters)
        if reordering is not None and portable:
            state = kwargs.pop("state_dict", None)
            state = self.model.state_dict() if state is None else state
            kwargs["state_dict"] = self._in_original_order(state, reordering)

        def write(folder: Path) -> None:
            if reordering is not None and not portable:
                reordering.save_pretrained(folder)

        return save_together(self.model, save_directory, args, kwargs, write)

    def _in_original_order(self, state: Mapping[str, Tensor], reordering: Reordering) -> dict[str, Tensor]:
        # PEFT saves embeddings beside adapters that add to them, or where their number of tokens has changed.
        embeddings = {id(parameter) for end in _embeddings(self.model) for parameter in end.parameters()}
        names = {name for name, one in self.model.named_parameters(remove_duplicate=False) if id(one) in embeddings}
        saved = {name: one for name, one in state.items() if is_in_adapter_file(name) or name in names}
        return {**state, **remapped(saved, reordering.groups, reordering.orders, "to_original")}

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return OrderedSaving(memo[id(self.model)], self.adapters)

    def __reduce__(self) -> Any:
        return OrderedSaving, (self.model, self.adapters)


def save_together(
    model: Any,
    save_directory: str | Path,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    write: Callable[[Path], object],
) -> Any:
    """Save a model with what belongs to it: the folder holds both, or what it held before.

    Args:
        model: The model, plain or PEFT's.
        save_directory: The folder.
        args: Further arguments of the model's own `save_pretrained`.
        kwargs: Its keyword arguments; `push_to_hub=True` pushes when everything is there.
        write: Writes what belongs to the model into the folder that it is given.
    """
    options = dict(kwargs)
    if not options.get("is_main_process", True) or Path(save_directory).is_file():
        return type(model).save_pretrained(model, save_directory, *args, **options)
    pushed = {name: options.pop(name) for name in _HUB_OPTIONS if name in options} if "push_to_hub" in options else {}
    with replacing_checkpoint(save_directory) as folder:
        result = type(model).save_pretrained(model, folder, *args, **options)
        write(folder)
    if pushed.pop("push_to_hub", False):
        model.push_to_hub(pushed.pop("repo_id", Path(save_directory).name), **pushed)
    return result


@contextmanager
def replacing_checkpoint(save_directory: str | Path) -> Iterator[Path]:
    """Build the files of a model and move them into a folder, where no old file of a model stays beside new ones.

    Raises:
        CheckpointError: The folder cannot be written.
    """
    with folders.replacing_files(save_directory, _LAST, _WEIGHTS) as folder:
        card = Path(save_directory) / "README.md"
        # PEFT adds to the card that it finds.
        checkpoint.copy_missing({card.name: card} if card.is_file() else {}, folder)
        yield folder


def saves_portable(model: Any, adapters: AdapterOrder) -> bool:
    """Whether what is saved of a model is an adapter for the original base model, to which no orders belong."""
    alone = inner_model(model) is not model or getattr(model, "_hf_peft_config_loaded", False)
    return adapters == "original" and alone and bool(tuner_layers(model))


def names_beside_adapters(folder: Path) -> list[str]:
    """Names of the plain model's tensors in the files of a folder's adapters: heads, embeddings."""
    files = [folder, *(path.parent for path in folder.glob(f"*/{ADAPTER_WEIGHTS}"))]
    tensors = [name for file in files if (file / ADAPTER_WEIGHTS).is_file() for name in read_adapter(file)[0]]
    parts = (part_of(name.removeprefix("base_model.model.")) for name in tensors)
    return sorted({part.tensor for part in parts if part.adapter is None})


def is_in_adapter_file(name: str, beside: Collection[str] = ()) -> bool:
    """Whether a live model's tensor is saved with its adapter.

    Args:
        name: The tensor's name in the live model.
        beside: Names of the plain model's tensors in the file.
    """
    part, steps = part_of(name), name.split(".")
    if part.adapter is not None or "modules_to_save" in steps:
        return True
    return part.tensor in beside and "original_module" not in steps


def fingerprint(model: Any) -> str:
    """SHA-256 over a sample of every weight that a checkpoint of the model holds."""
    total, inner = hashlib.sha256(), inner_model(model)
    alone = bool(tuner_layers(inner))
    for name, tensor in inner.state_dict().items():
        if not isinstance(tensor, Tensor) or (alone and not is_in_adapter_file(name)):
            continue
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, flat.numel() // _SAMPLE)].to("cpu", torch.float64)
        total.update(sample.numpy().tobytes())
    return total.hexdigest()


def _embeddings(model: Any) -> list[torch.nn.Module]:
    """The modules that read and write tokens, of models that have such."""
    found = []
    for find in (model.get_input_embeddings, model.get_output_embeddings):
        try:
            found.append(find())
        except (AttributeError, NotImplementedError):  # how transformers says that a model of images or sound has none
            continue
    return [end for end in found if end is not None]
