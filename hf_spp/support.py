"""Which channels may move in which models, read off configs: no weights, no download of any."""

from collections.abc import Iterator

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from .architectures import channel_groups
from .channels import ChannelMap

# The auto class gives each family the task head that its residual stream needs to be movable.
FAMILIES = {
    "vit": AutoModelForImageClassification,
    "deit": AutoModelForImageClassification,
    "dinov2": AutoModelForImageClassification,
    "bert": AutoModelForSequenceClassification,
    "roberta": AutoModelForSequenceClassification,
    "distilbert": AutoModelForSequenceClassification,
    "t5": AutoModelForSeq2SeqLM,
    "llama": AutoModelForCausalLM,
    "qwen2": AutoModelForCausalLM,
    "qwen3": AutoModelForCausalLM,
    "mistral": AutoModelForCausalLM,
    "gpt2": AutoModelForCausalLM,
}


def family_maps() -> Iterator[tuple[str, ChannelMap]]:
    """The channel map of every supported family, from its default config with two layers."""
    for model_type, auto_class in FAMILIES.items():
        config = AutoConfig.for_model(model_type, num_hidden_layers=2, architectures=[])
        with torch.device("meta"):
            model = auto_class.from_config(config)  # type: ignore[no-untyped-call]
        yield model_type, channel_groups(model)
