"""Salient Parameter Prioritization for Hugging Face models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import (
    AdapterError,
    AppError,
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
    OptimizerError,
    OrdersError,
    RanksDisagreeError,
    SPPConfigError,
    SPPError,
    SubnetworkError,
    UnsupportedArchitectureError,
    UnsupportedModelError,
)
from .version import __version__

if TYPE_CHECKING:
    from .architectures import AttentionPattern, FeedForwardPattern, channel_groups, register_architecture
    from .callback import SPPCallback
    from .cards.eval_entries import Benchmark
    from .cards.width_results import WidthReport
    from .channels import ChannelGroup, ChannelMap, Member, Refusal
    from .comparison.evaluation import compare_methods
    from .config import SPPConfig
    from .conversion import load_reordered
    from .curves.measurement import width_report
    from .publishing import push_to_hub
    from .reordering import Reordering
    from .streaming import reorder_checkpoint
    from .subnetworks import (
        ElasticTrainer,
        ReadReport,
        SubnetworkSpec,
        extract_subnetwork,
        load_subnetwork,
        plan_read,
        save_width,
        subnetwork_view,
        write_prefix_layout,
    )
    from .transform import apply_spp

__all__ = [
    "AdapterError",
    "AppError",
    "AssetError",
    "AttentionPattern",
    "Benchmark",
    "CalibrationError",
    "CallbackError",
    "CardError",
    "ChannelGroup",
    "ChannelMap",
    "CheckpointError",
    "DatasetError",
    "ElasticTrainer",
    "EqualFunctionError",
    "ExampleInputsError",
    "FeedForwardPattern",
    "HubError",
    "IllegalAxisError",
    "Member",
    "NonFiniteWeightsError",
    "OptimizerError",
    "OrdersError",
    "RanksDisagreeError",
    "ReadReport",
    "Refusal",
    "Reordering",
    "SPPCallback",
    "SPPConfig",
    "SPPConfigError",
    "SPPError",
    "SubnetworkError",
    "SubnetworkSpec",
    "UnsupportedArchitectureError",
    "UnsupportedModelError",
    "WidthReport",
    "__version__",
    "apply_spp",
    "channel_groups",
    "compare_methods",
    "extract_subnetwork",
    "load_reordered",
    "load_subnetwork",
    "plan_read",
    "push_to_hub",
    "register_architecture",
    "reorder_checkpoint",
    "save_width",
    "subnetwork_view",
    "width_report",
    "write_prefix_layout",
]

# What needs torch is imported when it is first used, so that the command line answers at once.
_HOMES = {
    "AttentionPattern": "architectures",
    "Benchmark": "cards.eval_entries",
    "ChannelGroup": "channels",
    "ChannelMap": "channels",
    "ElasticTrainer": "subnetworks",
    "FeedForwardPattern": "architectures",
    "Member": "channels",
    "Refusal": "channels",
    "ReadReport": "subnetworks",
    "Reordering": "reordering",
    "SPPCallback": "callback",
    "SPPConfig": "config",
    "SubnetworkSpec": "subnetworks",
    "WidthReport": "cards.width_results",
    "apply_spp": "transform",
    "channel_groups": "architectures",
    "compare_methods": "comparison.evaluation",
    "extract_subnetwork": "subnetworks",
    "load_reordered": "conversion",
    "load_subnetwork": "subnetworks",
    "plan_read": "subnetworks",
    "push_to_hub": "publishing",
    "register_architecture": "architectures",
    "reorder_checkpoint": "streaming",
    "save_width": "subnetworks",
    "subnetwork_view": "subnetworks",
    "width_report": "curves.measurement",
    "write_prefix_layout": "subnetworks",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
