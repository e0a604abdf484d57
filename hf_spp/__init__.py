"""Salient Parameter Prioritization for Hugging Face models."""

from .architectures import channel_groups
from .callback import SPPCallback
from .channels import ChannelGroup, ChannelMap, Member, Refusal
from .config import SPPConfig
from .errors import (
    AssetError,
    CalibrationError,
    CallbackError,
    CardError,
    CheckpointError,
    DatasetError,
    EqualFunctionError,
    ExampleInputsError,
    HubError,
    IllegalAxisError,
    NonFiniteWeightsError,
    OrdersError,
    SPPConfigError,
    SPPError,
    UnsupportedArchitectureError,
    UnsupportedModelError,
)
from .evaluation import compare_methods
from .reordering import Reordering, apply_spp
from .version import __version__

__all__ = [
    "AssetError",
    "CalibrationError",
    "CallbackError",
    "CardError",
    "ChannelGroup",
    "ChannelMap",
    "CheckpointError",
    "DatasetError",
    "EqualFunctionError",
    "ExampleInputsError",
    "HubError",
    "IllegalAxisError",
    "Member",
    "NonFiniteWeightsError",
    "OrdersError",
    "Refusal",
    "Reordering",
    "SPPCallback",
    "SPPConfig",
    "SPPConfigError",
    "SPPError",
    "UnsupportedArchitectureError",
    "UnsupportedModelError",
    "__version__",
    "apply_spp",
    "channel_groups",
    "compare_methods",
]
