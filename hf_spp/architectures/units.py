"""What a model is made of: attention and feed-forward units, and structures that are not understood."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from ..channels import ChannelGroup
from . import patterns as written
from .groups import group_of, layer_of, tokens
from .index import Feature, ModelIndex, Projection
from .registry import AttentionPattern

ATTENTION_AXES = ("qk", "vo", "heads")


@dataclass(frozen=True)
class Misfit:
    """A structure that looks like a unit and is not understood.

    Attributes:
        path: The module.
        axes: Axes that it might have had.
        reason: What about it is not understood.
        cuts_stream: Whether it may cut the residual stream into heads.
    """

    path: str
    axes: tuple[str, ...]
    reason: str
    cuts_stream: bool = True


@dataclass
class AttentionUnit:
    """One attention, sized, with every tensor that its heads and their rows reach.

    Attributes:
        path: Where it is named: the module that holds the projections and the output projection.
        owner: The module that holds the projections, whose forward runs them.
        sizes: Key-value heads `k`, query heads for each `r`, rows of a query head `d`, of a value head `e`.
        features: The tensors, in the written map's axis names.
        refused: Reason by axis that may not move.
        readers: Projections that read the residual stream.
        writers: Projections that write it.
        pattern: The registered pattern that it follows, if any.
        known: Parameters of its own projections beside those of readers and writers.
        scope: Modules whose parameters hang on it, all of which must be explained.
        notes: What stays in place, by axis, although others of the axis move.
        rotates_apart: Whether the rows `d` of q and k are those that no position rotates.
        tie: Where heads of several units move together, the name of their stack.
    """

    path: str
    owner: str
    sizes: dict[str, int]
    features: list[Feature]
    refused: dict[str, str] = field(default_factory=dict)
    readers: list[Projection] = field(default_factory=list)
    writers: list[Projection] = field(default_factory=list)
    pattern: AttentionPattern | None = None
    known: set[str] = field(default_factory=set)
    scope: list[str] = field(default_factory=list)
    tie: str | None = None
    has_table: bool = False
    rotates_apart: bool = False
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def owners(self) -> tuple[str, ...]:
        """Modules whose code counts the heads."""
        return tuple(dict.fromkeys((self.owner, self.path, *self.scope)))

    def stream_features(self) -> list[Feature]:
        """Where its projections read and write the residual stream `s`."""
        read = [feature for one in self.readers for feature in one.consume("s")]
        return read + [feature for one in self.writers for feature in one.produce("s")]

    def stream_widths(self) -> set[int]:
        """Widths of the streams that it reads and writes."""
        return {one.inputs for one in self.readers} | {one.outputs for one in self.writers}

    def groups(self, index: ModelIndex) -> Iterator[ChannelGroup]:
        """The channel groups of every axis that may move."""
        name, layer = index.short(self.path), layer_of(self.path)
        for axis, rows in (("qk", "d"), ("vo", "e")):
            # A gather per head needs the heads in the first dimension, or in the same one as their rows.
            between = (f.tensor for f in self.features if re.search(rf"\S .*\bk\b.*(\) |k ){rows}\b", f.layout))
            if (tensor := next(between, None)) is not None:
                self.refused.setdefault(axis, written.BETWEEN_REASON.format(name=index.short(tensor)))
        k, r, d, e = (self.sizes[size] for size in "krde")
        heads = f"{index.short(self.tie) if self.tie else name}.heads"
        if r == 1:
            self.features = [replace(one, layout=one.layout.replace("k r", "k")) for one in self.features]
        if "heads" not in self.refused:
            whole = None if self.tie else layer
            yield group_of(heads, "heads", whole, 1, k, self.features, {"k": "c"})
            if r > 1:
                grouped = f"{heads.removesuffix('.heads')}.query_heads"
                yield group_of(grouped, "heads", whole, k, r, self.features, {"k": "b", "r": "c"}, heads)
        for axis, rows, size in (("qk", "d", d), ("vo", "e", e)):
            if axis in self.refused:
                continue
            own = [one for one in self.features if rows in tokens(one.layout)]
            if all("k" in tokens(one.layout) for one in own):
                yield group_of(f"{name}.{axis}", axis, layer, k, size, own, {"k": "b", rows: "c"}, heads)
            else:  # a tensor that all heads share leaves one order for all of them
                yield group_of(f"{name}.{axis}", axis, layer, 1, size, own, {rows: "c"})


@dataclass
class FeedForwardUnit:
    """Intermediate neurons `m` and every tensor that holds them, stacked over experts `x` or not.

    Attributes:
        path: The module that holds the projections.
        neurons: How many there are, in each expert.
        features: The tensors, in the written map's axis names.
        readers: Projections that read the residual stream; none where experts are stacked.
        writers: Projections that write it.
        experts: How many experts are stacked, None where none are.
        expert_groups: Groups of experts that the router chooses among.
        router: The router's tensors with an entry per expert.
        refused: Reason by axis that may not move.
        stacked: Where stacked experts and their router hold the residual stream `s`.
        beside: What a registered pattern says no neuron reaches.
        notes: What stays in place, by axis, although others of the axis move.
    """

    path: str
    neurons: int
    features: list[Feature]
    readers: list[Projection] = field(default_factory=list)
    writers: list[Projection] = field(default_factory=list)
    experts: int | None = None
    expert_groups: int = 1
    router: list[Feature] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    stacked: list[Feature] = field(default_factory=list)
    beside: tuple[str, ...] = ()
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def owners(self) -> tuple[str, ...]:
        """Modules whose code counts the neurons."""
        return (self.path,)

    def stream_features(self) -> list[Feature]:
        """Where its projections read and write the residual stream `s`."""
        read = [feature for one in self.readers for feature in one.consume("s")]
        return self.stacked + read + [feature for one in self.writers for feature in one.produce("s")]

    def stream_widths(self) -> set[int]:
        """Widths of the streams that it reads and writes."""
        return {one.inputs for one in self.readers} | {one.outputs for one in self.writers}

    def groups(self, index: ModelIndex) -> Iterator[ChannelGroup]:
        """The groups of neurons, and of experts where they may move."""
        name, layer = index.short(self.path), layer_of(self.path)
        if self.experts is None:
            yield group_of(f"{name}.ffn", "ffn", layer, 1, self.neurons, self.features, {"m": "c"})
            return
        parent = f"{name}.experts"
        yield group_of(
            f"{name}.ffn", "ffn", layer, self.experts, self.neurons, self.features, {"x": "b", "m": "c"}, parent
        )
        if "experts" in self.refused or self.experts % self.expert_groups:
            return
        features, names = [*self.features, *self.router], {"x": "c"}
        if self.expert_groups > 1:  # a router that chooses among groups of experts keeps each in its group
            features = [replace(one, layout=_grouped(one.layout)) for one in features]
            names = {"g": "b", "x": "c"}
        size = self.experts // self.expert_groups
        yield group_of(parent, "experts", layer, self.expert_groups, size, features, names)


def _grouped(layout: str) -> str:
    """A layout over experts `x` with their groups `g` named as well."""
    return layout.replace("(x ", "(g x ") if "(x " in layout else re.sub(r"\bx\b", "(g x)", layout)
