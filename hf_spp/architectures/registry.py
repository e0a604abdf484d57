"""Architectures that users describe themselves: patterns for their own modules, tried before the written map."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from ..errors import SPPConfigError


@dataclass(frozen=True)
class AttentionPattern:
    """An attention module by the names of its children, dotted where they lie deeper.

    Layouts, for what else hangs on the heads, are einops patterns over `k` key-value heads, `r` query heads for each of
    them, `d` rows of a query or key head and `e` rows of a value head; other letters are axes that stay. A table of a
    bias per head is `"n (k r)"`, a norm over one query head `"d"`.

    Attributes:
        query: The linear layer of queries. If one layer stacks all three, give it as query, key and value.
        key: The linear layer of keys.
        value: The linear layer of values.
        output: The linear layer that reads all heads.
        heads: How many query heads there are: a number, or the attribute of the module that holds it.
        fused: Where one layer stacks all three: whole `blocks` of q, k and v, or side by side for each of the `heads`.
        rotary: Whether q and k are rotated by position, so that their rows must stay; None reads the forward's code.
        sides: Further parameters that the heads reach, with their layouts.
        beside: Further children and parameters that no head reaches.
    """

    query: str
    key: str
    value: str
    output: str
    heads: int | str
    fused: str = "blocks"
    rotary: bool | None = None
    sides: Mapping[str, str] = field(default_factory=dict)
    beside: tuple[str, ...] = ()

    @property
    def children(self) -> tuple[str, ...]:
        """The children that must exist."""
        return (self.query, self.key, self.value, self.output)


@dataclass(frozen=True)
class FeedForwardPattern:
    """A feed-forward module by the names of its children.

    Attributes:
        inner: The linear layers into the neurons: one, or a gate and an up projection. One with twice as many outputs
            as `output` reads holds gate and up projection in blocks.
        output: The linear layer that reads the neurons.
        sides: Further parameters with an entry for each neuron, with layouts in which `m` is the neurons.
        beside: Further children and parameters that no neuron reaches.
    """

    inner: tuple[str, ...]
    output: str
    sides: Mapping[str, str] = field(default_factory=dict)
    beside: tuple[str, ...] = ()

    @property
    def children(self) -> tuple[str, ...]:
        """The children that must exist."""
        return (*self.inner, self.output)


Pattern = AttentionPattern | FeedForwardPattern

_REGISTERED: dict[type[nn.Module], tuple[Pattern, ...]] = {}


def register_architecture(model_class: type[nn.Module], *patterns: Pattern) -> None:
    """Describe the modules of a model class, so that its channels can be reordered with the same proof.

    The class may be any `nn.Module`; its subclasses count as well. Its patterns are tried before those that hf_spp
    has written, which fit where names and shapes are usual. Registering a class again replaces its patterns.

    Args:
        model_class: The class of the whole model, as it is given to `apply_spp`.
        patterns: How its attention and feed-forward modules are built; none if the usual names fit.

    Raises:
        SPPConfigError: `model_class` is no class of modules, or a pattern is of another type or names no child.
    """
    if not (isinstance(model_class, type) and issubclass(model_class, nn.Module)):
        raise SPPConfigError(
            f"register_architecture got {model_class!r}; a subclass of torch.nn.Module is needed. Give the class of "
            "the model, not an instance or a name."
        )
    for pattern in patterns:
        if not isinstance(pattern, (AttentionPattern, FeedForwardPattern)):
            raise SPPConfigError(
                f"register_architecture({model_class.__name__}, …) got {pattern!r}; an AttentionPattern or a "
                "FeedForwardPattern is needed. Wrap the names of the children in one."
            )
        if not all(isinstance(child, str) and child for child in pattern.children):
            raise SPPConfigError(
                f"{type(pattern).__name__} for {model_class.__name__} has the children {pattern.children!r}; names "
                "relative to the module are needed, as named_modules gives them. FeedForwardPattern takes a tuple of "
                "inner layers: FeedForwardPattern(('w1',), 'w2')."
            )
        if isinstance(pattern, AttentionPattern) and pattern.fused not in ("blocks", "heads"):
            raise SPPConfigError(
                f"AttentionPattern for {model_class.__name__} has fused={pattern.fused!r}; 'blocks' or 'heads' is "
                "accepted. Set 'blocks' if all of q comes before all of k."
            )
    _REGISTERED[model_class] = patterns


def registered_patterns(model: nn.Module) -> tuple[Pattern, ...] | None:
    """The patterns for a model's class or the nearest class above it, None where none is registered."""
    return next((_REGISTERED[one] for one in type(model).__mro__ if one in _REGISTERED), None)
