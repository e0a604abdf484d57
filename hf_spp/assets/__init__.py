"""Pinned models and data sets for examples and tests, kept in a local cache; they install without the Hub."""

from .image_datasets import DEMO_DATASETS, digits, fashion_mnist, mnist5k
from .models import dinov2_small, minilm, smollm2
from .store import ASSETS, Asset, cache_folder
from .text_datasets import fortunes

__all__ = [
    "ASSETS",
    "DEMO_DATASETS",
    "Asset",
    "cache_folder",
    "digits",
    "dinov2_small",
    "fashion_mnist",
    "fortunes",
    "minilm",
    "mnist5k",
    "smollm2",
]
