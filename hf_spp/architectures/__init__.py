"""From a model to its channel groups: the written map as data, and the code that resolves it by structure."""

from .resolution import channel_groups

__all__ = ["channel_groups"]
