"""The one place that states the version of hf_spp."""

__version__ = "0.1.0"
