"""Smaller models from one reordered checkpoint: what to keep, cutting it out, and making up for what is gone."""

from .elastic import ElasticTrainer
from .extraction import extract_subnetwork, subnetwork_view
from .loading import load_subnetwork, plan_read, save_width
from .prefix_layout import write_prefix_layout
from .reading import ReadReport
from .spec import SubnetworkSpec

__all__ = [
    "ElasticTrainer",
    "ReadReport",
    "SubnetworkSpec",
    "extract_subnetwork",
    "load_subnetwork",
    "plan_read",
    "save_width",
    "subnetwork_view",
    "write_prefix_layout",
]
