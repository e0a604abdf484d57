"""What depends on the version of transformers, huggingface_hub or torch, in one place."""

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from copy import copy, deepcopy
from typing import Any

import huggingface_hub.errors
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

# The HTTP client under huggingface_hub is httpx or httpx2, by version; Python's own errors come from hf_xet.
CONNECTION_ERRORS: tuple[type[Exception], ...] = (
    huggingface_hub.errors.HTTPError,  # type: ignore[attr-defined]
    ConnectionError,
    TimeoutError,
)


def accept_checkpoint_names(model: PreTrainedModel) -> None:
    """Let `model.load_state_dict` take the names of checkpoint files besides those in memory.

    `Trainer` resumes with `load_state_dict(strict=False)`, without the renaming of `from_pretrained`: up to
    transformers 5.23 the layers of ViT, DINOv2 and others silently stay as they are (transformers issue 43701).
    """
    hooks = model._load_state_dict_pre_hooks.values()
    if not any(getattr(hook, "hook", None) is _rename for hook in hooks):
        model.register_load_state_dict_pre_hook(_rename)  # type: ignore[no-untyped-call]


def _rename(model: PreTrainedModel, state_dict: dict[str, Any], *rest: Any) -> None:
    own = set(model.state_dict())
    foreign = [name for name in state_dict if name not in own]
    renamings = get_model_conversion_mapping(model) if foreign else []
    for name in foreign:
        renamed = name
        for renaming in renamings:
            if isinstance(renaming, WeightRenaming):
                renamed, _pattern = renaming.rename_source_key(renamed)
        if renamed in own:
            state_dict[renamed] = state_dict.pop(name)


def converted(model: PreTrainedModel, stored: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """What `from_pretrained` makes of the tensors of checkpoint files: renamed, stacked, joined, cut and turned.

    Args:
        model: The model that they are loaded into; it stays as it is.
        stored: Tensors by their name in the files.

    Returns:
        Tensors by their name in the model, and the names in the files that it does not use.
    """
    own: dict[str, Any] = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    made: dict[str, Tensor] = {}
    collected: dict[str, Any] = {}
    unused: list[str] = []
    # The order in which transformers collects the tensors of a list.
    for name in sorted(stored, key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, own)
        if renamed not in own and name in own:
            renamed, pattern = rename_source_key(name, [], [], model.base_model_prefix, own)
        if renamed not in own or (pattern is None and (renamed in made or renamed in collected)):
            unused.append(name)
        elif pattern is None:
            made[renamed] = stored[name]
        else:
            converter = collected.setdefault(renamed, deepcopy(by_pattern[pattern]))
            converter.add_tensor(renamed, name, pattern, stored[name])
    for name, converter in collected.items():
        results = converter.convert(name, model=model, config=model.config)
        made.update({key: one[0] if isinstance(one, list) else one for key, one in results.items()})
    return made, unused


def computed_buffers(model: PreTrainedModel) -> dict[str, Tensor]:
    """The buffers of a model without values that no file holds, as `from_pretrained` computes them."""
    found = {}
    for path, module in model.named_modules():
        names = [name for name in module._non_persistent_buffers_set if module._buffers.get(name) is not None]
        if names:
            # Weights stay on the meta device, where drawing them anew does nothing.
            twin = copy(module)
            buffers = {name: torch.zeros_like(module.get_buffer(name), device="cpu") for name in names}
            vars(twin)["_buffers"] = {**module._buffers, **buffers}
            initialize: Any = model._init_weights
            initialize(twin)
            found.update({f"{path}.{name}" if path else name: twin.get_buffer(name) for name in names})
    return found


def keeps_own_names(model: PreTrainedModel, names: Collection[str]) -> bool:
    """Whether `from_pretrained` takes a model's own names for what they are, instead of converting them once more."""
    traced = {name: torch.empty(0, device="meta") for name in names}
    try:
        made, unused = converted(model, traced)
    # A conversion that takes such a name may refuse empty tensors in any way.
    except Exception:
        return False
    return not unused and made.keys() == traced.keys() and all(made[name] is one for name, one in traced.items())


def finish_loading(model: PreTrainedModel, folder: str | os.PathLike[str]) -> None:
    """Do to a model from a state dict what else `from_pretrained` does with a local folder.

    It takes the generation config from there, and saves with the names that its class has in files.
    """
    if model.can_generate() and hasattr(model, "adjust_generation_fn"):
        adjust: Any = model.adjust_generation_fn
        adjust(
            None, False, None, folder, cache_dir=None, force_download=False, proxies=None, local_files_only=True,
            token=None, revision=None, subfolder="", trust_remote_code=False,
        )  # fmt: skip
    # Nothing was converted, which transformers would take for a model whose files hold names as in memory.
    vars(model).pop("_weight_conversions", None)


@contextmanager
def eager_experts(model: nn.Module) -> Iterator[None]:
    """Run experts one by one inside the block, as their own code says, not through a fused implementation."""
    name = "_experts_implementation_internal"
    configs = {
        id(config): config for module in model.modules() if hasattr(config := getattr(module, "config", None), name)
    }
    before = {key: getattr(config, name) for key, config in configs.items()}
    try:
        for config in configs.values():
            setattr(config, name, "eager")
        yield
    finally:
        for key, config in configs.items():
            setattr(config, name, before[key])
