"""How salient each head, and each part of the neurons, of every layer is: numbers for a heat map."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..channels import ChannelGroup
from ..reordering import Reordering
from ..subnetworks.widths import cut_of

# Neurons are too many for a cell each.
PARTS = 20


@dataclass(frozen=True)
class Line:
    """One layer.

    Attributes:
        name: Number of the layer, or the path of its group.
        group: Name of the group.
        size: How many channels the cells stand for.
        values: Saliency of each cell as a fraction of the largest in this line, in the checkpoint's order.
        origins: Number of each channel in the original order, where a cell is one channel.
    """

    name: str
    group: str
    size: int
    values: tuple[float, ...]
    origins: tuple[int, ...] | None


@dataclass(frozen=True)
class HeatMap:
    """The lines of one kind of channel.

    Attributes:
        cut: What a spec calls it: `heads`, `query_heads` or `ffn`.
        name: What it is called in words.
        lines: One for each layer.
    """

    cut: str
    name: str
    lines: tuple[Line, ...]


def heat_maps(reordering: Reordering) -> list[HeatMap]:
    """Saliency of heads and neurons by layer; only what was put in order.

    Heads that share a key-value head count with it, and neurons of a layer's experts together.

    Args:
        reordering: The scores, in the original order, and the orders.
    """
    found: dict[str, list[Line]] = {}
    groups = [group for group in reordering.groups if group.axis in ("heads", "ffn") and group.parent is None]
    groups.sort(key=lambda group: (group.axis == "ffn", group.layer is None, group.layer))
    for group in groups:
        scores, order = reordering.scores[group.name], reordering.orders[group.name]
        own = [other for other in groups if cut_of(other) == cut_of(group)]
        found.setdefault(cut_of(group), []).append(_line(group, scores, order, _name(group, own)))
    shared = any(group.axis == "heads" and group.parent for group in reordering.groups)
    names = {"heads": "key-value heads" if shared else "heads", "query_heads": "query heads", "ffn": "neurons"}
    return [HeatMap(cut, names[cut], tuple(lines)) for cut, lines in found.items()]


def kept_cells(line: Line, widths: Mapping[str, int]) -> float:
    """How many cells of a line stay at some widths; parts of neurons by fractions of a cell."""
    return widths.get(line.group, line.size) / line.size * len(line.values)


def _name(group: ChannelGroup, own: Sequence[ChannelGroup]) -> str:
    layers = [other.layer for other in own]
    return str(group.layer) if group.layer is not None and layers.count(group.layer) == 1 else group.name


def _line(group: ChannelGroup, scores: Tensor, order: Tensor, name: str) -> Line:
    ranked = scores.double().gather(1, order.to(scores.device)).mean(0)
    origins: tuple[int, ...] | None = None
    if group.axis == "heads":
        origins = tuple(order[0].tolist()) if group.blocks == 1 else None
    elif group.size > PARTS:
        ranked = torch.stack([part.mean() for part in ranked.tensor_split(PARTS)])
    largest = float(ranked.max())
    values: Iterable[float] = (ranked / largest if largest > 0 else ranked).tolist()
    return Line(name, group.name, group.size, tuple(values), origins)
