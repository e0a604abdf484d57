"""The written map: which structures hold channels that may move together, as patterns over child names.

Data only. `architectures` resolves it against a model; adding a family is adding a row here, or nothing.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionPattern:
    """Children of an attention module: one projection each for q, k and v, or one that stacks the three in blocks."""

    projections: tuple[str, ...]
    output: str
    beside: tuple[str, ...] = ()


@dataclass(frozen=True)
class FeedForwardPattern:
    """Children of a feed-forward module: the projections into the intermediate neurons, and the one out of them.

    `beside` names children of the same modules that act on the residual stream and do not see the neurons.
    """

    inner: tuple[str, ...]
    output: str
    beside: tuple[str, ...] = ()


ATTENTION_PATTERNS = (
    AttentionPattern(("q_proj", "k_proj", "v_proj"), "o_proj"),
    AttentionPattern(("self.query", "self.key", "self.value"), "output.dense", beside=("output.LayerNorm",)),
    AttentionPattern(("q_lin", "k_lin", "v_lin"), "out_lin"),
    AttentionPattern(("q", "k", "v"), "o"),
    AttentionPattern(("c_attn",), "c_proj"),
)
FEED_FORWARD_PATTERNS = (
    FeedForwardPattern(("gate_proj", "up_proj"), "down_proj"),
    FeedForwardPattern(("wi_0", "wi_1"), "wo"),
    FeedForwardPattern(("fc1",), "fc2"),
    FeedForwardPattern(("lin1",), "lin2"),
    FeedForwardPattern(("wi",), "wo"),
    FeedForwardPattern(("c_fc",), "c_proj"),
    FeedForwardPattern(("intermediate.dense",), "output.dense", beside=("output.LayerNorm",)),
)
# Parameters of an attention module beside its projections: per head (follows the heads) or per in-head channel.
HEAD_TABLES = {"relative_attention_bias.weight": "n c"}
HEAD_NORMS = ("q_norm.weight", "k_norm.weight")
HEAD_DIM_ATTRIBUTES = ("head_dim", "attention_head_size", "key_value_proj_dim")
# Linear layers of a head whose outputs are the model's, so no stream even where they are as many as its channels.
OUTPUT_LAYERS = (
    "classifier", "cls_classifier", "distillation_classifier", "score", "qa_outputs", "out_proj", "decoder", "lm_head",
    "vocab_projector",
)  # fmt: skip
# Linear layers that read several copies of the residual stream side by side, by model type.
CONCATENATED_READERS = {"dinov2": ("classifier",)}

ROTARY_REASON = "rotary position embedding: each frequency belongs to a fixed row of q and k"
CROSS_ATTENTION_REASON = "cross-attention reads the states of another model, which keep their order"
HEADLESS_REASON = (
    "the model has no head, its output is the residual stream itself and would change order; load it with a task head"
)
