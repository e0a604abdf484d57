"""What depends on the version of transformers, huggingface_hub or torch, in one place."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import huggingface_hub.errors
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

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
