"""From a model to its channel groups: the written map as data, and the code that resolves it by structure."""

from .index import model_type_of
from .registry import AttentionPattern, FeedForwardPattern, register_architecture
from .resolution import channel_groups

__all__ = ["AttentionPattern", "FeedForwardPattern", "channel_groups", "model_type_of", "register_architecture"]
