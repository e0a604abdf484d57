"""Feed-forward units: plain, gated and fused projections around the neurons, and what hangs on these."""

import re
from collections.abc import Iterator, Mapping

from torch import nn

from . import patterns as written
from .experts import find_experts
from .groups import fits
from .index import Feature, ModelIndex, join
from .registry import FeedForwardPattern
from .units import FeedForwardUnit, Misfit


def feed_forward_units(index: ModelIndex, claimed: set[str]) -> tuple[list[FeedForwardUnit], list[Misfit]]:
    """Every feed-forward unit of a model, and those that are not understood with the reason.

    Args:
        index: The model.
        claimed: Tensors that attention units explain.
    """
    units: list[FeedForwardUnit] = []
    misfits: list[Misfit] = []
    owners: list[tuple[FeedForwardUnit, str]] = []
    for path, module in index.modules.items():
        found = find_experts(index, path, module) or _match(index, path, module)
        if isinstance(found, FeedForwardUnit):
            units.append(found)
            owners.append((found, path))
        elif found is not None:
            misfits.append(found)
    # What another unit explains is no neuron of this one.
    claimed = claimed | {feature.tensor for unit in units for feature in unit.features}
    claimed |= {name for unit in units for one in (*unit.readers, *unit.writers) for name in one.tensors}
    for unit, path in owners:
        if unit.experts is None and (name := _unexplained(index, unit, path, claimed)) is not None:
            units.remove(unit)
            misfits.append(Misfit(path, ("ffn",), f"parameter {index.short(name)} is not understood"))
    return units, [*misfits, *_unmatched(index, units, misfits)]


def _unmatched(index: ModelIndex, units: list[FeedForwardUnit], misfits: list[Misfit]) -> Iterator[Misfit]:
    """Modules that are a feed-forward by name, with several linear layers of which no pattern reached one."""
    reached = [unit.path for unit in units] + [one.path for one in misfits]
    known = {feature.tensor for unit in units for feature in unit.features}
    for path, module in index.modules.items():
        if not re.search(written.FEED_FORWARD_NAMES, type(module).__name__):
            continue
        if path in reached or any(place.startswith(f"{path}.") for place in reached):
            continue
        children = []
        for name, one in module.named_children():
            listed = isinstance(one, nn.ModuleList)
            children += [f"{name}.{number}" for number, _ in enumerate(one)] if listed else [name]
        found = [(child, index.projection(join(path, child))) for child in children]
        left = [child for child, projection in found if projection is not None and projection.weight not in known]
        if len(left) > 1:
            yield Misfit(path, ("ffn",), written.UNKNOWN_REASON.format(children=", ".join(left)), cuts_stream=False)


def _match(index: ModelIndex, path: str, module: nn.Module) -> FeedForwardUnit | Misfit | None:
    misfit = None
    for pattern in index.patterns:
        if isinstance(pattern, FeedForwardPattern) and index.has(path, pattern.children):
            index.matched.append(pattern)
            return _unit(index, path, pattern.inner, pattern.output, pattern)
    for inner, output in written.FEED_FORWARD:
        children = (*inner, output)
        if not index.has(path, children):
            continue
        if children[0] == "0" and not _is_chain(module, int(output)):
            continue
        found = _unit(index, path, inner, output)
        if isinstance(found, FeedForwardUnit):
            return found
        misfit = misfit or found
    return misfit


def _unit(
    index: ModelIndex, path: str, inner: tuple[str, ...], output: str, pattern: FeedForwardPattern | None = None
) -> FeedForwardUnit | Misfit | None:
    projections = []
    for child in (*inner, output):
        projection = index.projection(join(path, child))
        if projection is None:
            return _wrapped(index, path, child)
        projections.append(projection)
    *readers, writer = projections
    neurons = writer.inputs
    if all(one.outputs == neurons for one in readers):
        layout = "m"
    elif len(readers) == 1 and readers[0].outputs == 2 * neurons:
        layout = "(t m)"
    else:
        return Misfit(path, ("ffn",), f"{output} does not read what {' and '.join(inner)} write")
    features = [feature for one in readers for feature in one.produce(layout)] + writer.consume("m")
    unit = FeedForwardUnit(path, neurons, features, readers, [writer])
    unit.beside = () if pattern is None else pattern.beside
    places = {join(path, child).rpartition(".")[0] for child in (*inner, output)}
    for name in [name for place in places for name in index.below(place)]:
        found = _side(index, unit, name, {} if pattern is None else pattern.sides)
        if isinstance(found, Misfit):
            return found
        unit.features += found
    return unit


def _wrapped(index: ModelIndex, path: str, child: str) -> Misfit | None:
    """A child that is no linear layer: nothing where it holds no weights or several layers, else a misfit."""
    module = index.modules[join(path, child)]
    several = isinstance(module, (nn.ModuleList, nn.Sequential)) or index.has(path, (f"{child}.dense",))
    if several or next(module.parameters(), None) is None:
        return None
    return Misfit(path, ("ffn",), f"{child} is a {type(module).__name__}, no plain linear layer")


def _side(index: ModelIndex, unit: FeedForwardUnit, name: str, stated: Mapping[str, str]) -> list[Feature] | Misfit:
    """The features of a parameter beside the projections, if it is one that holds an entry for each neuron."""
    relative = name[len(unit.path) + 1 :] if unit.path else name
    stem = relative.removesuffix(".weight").removesuffix(".bias")
    shape, sizes = tuple(index.tensors[name].shape), {"m": unit.neurons}
    layouts = [layout for key in (relative, stem) if (layout := stated.get(key)) is not None]
    if stem in written.FEED_FORWARD_SIDES or stem.rpartition(".")[0] in written.FEED_FORWARD_SIDES:
        layouts += written.NEURON_LAYOUTS
    found = next((layout for layout in layouts if fits(layout, shape, sizes)), None)
    if found is not None:
        return [Feature(name, found)]
    if layouts and any(length % unit.neurons == 0 for length in shape):
        return Misfit(unit.path, ("ffn",), f"parameter {index.short(name)} is not understood")
    return []


def _is_chain(module: nn.Module, last: int) -> bool:
    """Whether a Sequential has only activations and dropout between its first linear layer and the given one."""
    if not isinstance(module, nn.Sequential):
        return False
    between = list(module.children())[1:last]
    return all(type(one).__name__ in written.ELEMENTWISE for one in between)


def _unexplained(index: ModelIndex, unit: FeedForwardUnit, path: str, claimed: set[str]) -> str | None:
    """A parameter of the same module that may hold the neurons and that no pattern explains."""
    streams = {one.inputs for one in unit.readers} | {one.outputs for one in unit.writers}
    own = {feature.tensor for feature in unit.features}
    own |= {name for one in (*unit.readers, *unit.writers) for name in one.tensors}
    rest = [name for name in index.below(path) if name not in own]
    others = [name for name in rest if index.first_name(name) in claimed or _own_forward(index, path, name)]
    for name in rest:
        shape = index.tensors[name].shape
        if name in others or shape.numel() == 1:
            continue
        if any(f"{name}.".startswith(f"{join(path, one)}.") for one in unit.beside):
            continue
        # A module with other units in it is a layer, whose other parameters see the stream.
        leaf = type(index.modules[name.rpartition(".")[0]]).__module__.startswith("torch.nn")
        on_stream = others or leaf or streams.intersection(shape)
        if on_stream and not any(n % unit.neurons == 0 for n in shape):
            continue
        stem = name.removesuffix(".weight").removesuffix(".bias")
        norm = re.search(r"norm|(^|\.)ln", stem, re.IGNORECASE) and len(shape) == 1 and shape[0] in streams
        if norm and (shape[0] != unit.neurons or f".{stem}".endswith(tuple(f".{one}" for one in written.STREAM_NORMS))):
            continue
        return name
    return None


def _own_forward(index: ModelIndex, path: str, name: str) -> bool:
    """Whether a parameter belongs to a module below the given one that runs code of its own, container or not."""
    place = name.rpartition(".")[0]
    while place != path and len(place) > len(path):
        module = index.modules[place]
        if not type(module).__module__.startswith("torch.nn") and next(module.children(), None) is not None:
            return True
        place = place.rpartition(".")[0]
    return False
