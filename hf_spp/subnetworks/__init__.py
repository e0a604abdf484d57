"""Smaller models from one reordered checkpoint: what to keep, cutting it out, and making up for what is gone."""

from .elastic import ElasticTrainer
from .extraction import extract_subnetwork, subnetwork_view
from .loading import load_subnetwork, save_width
from .spec import SubnetworkSpec

__all__ = ["ElasticTrainer", "SubnetworkSpec", "extract_subnetwork", "load_subnetwork", "save_width", "subnetwork_view"]
