"""Feed-forward units: plain, gated and fused projections around the neurons, and experts stacked in one tensor."""

import re
from collections.abc import Iterator

from torch import nn

from . import patterns as written
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
        found = _experts(index, path, module) or _match(index, path, module)
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
            module = index.modules[join(path, child)]
            bare = next(module.parameters(), None) is None
            if (
                bare
                or isinstance(module, (nn.ModuleList, nn.Sequential))
                or join(path, f"{child}.dense") in index.modules
            ):
                return None
            return Misfit(path, ("ffn",), f"{child} is a {type(module).__name__}, no plain linear layer")
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
    owners = {join(path, child).rpartition(".")[0] for child in (*inner, output)}
    for name in [name for owner in owners for name in index.below(owner)]:
        relative = name[len(path) + 1 :] if path else name
        stem = relative.removesuffix(".weight").removesuffix(".bias")
        stated = None if pattern is None else pattern.sides.get(relative, pattern.sides.get(stem))
        if stated is not None and fits(stated, tuple(index.tensors[name].shape), {"m": neurons}):
            unit.features.append(Feature(name, stated))
        elif stem in written.FEED_FORWARD_SIDES or stem.rpartition(".")[0] in written.FEED_FORWARD_SIDES:
            layout_found = _side_layout(tuple(index.tensors[name].shape), neurons)
            if layout_found is None and any(length % neurons == 0 for length in index.tensors[name].shape):
                return Misfit(path, ("ffn",), f"parameter {index.short(name)} is not understood")
            if layout_found is not None:
                unit.features.append(Feature(name, layout_found))
    return unit


def _side_layout(shape: tuple[int, ...], neurons: int) -> str | None:
    layouts = ("m", "m 1 i", "m 1 i j", "1 1 1 m")
    return next((layout for layout in layouts if fits(layout, shape, {"m": neurons})), None)


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


# Experts


def _experts(index: ModelIndex, path: str, module: nn.Module) -> FeedForwardUnit | Misfit | None:
    for inner, output in written.EXPERTS:
        names = [join(path, name) for name in (*inner, output)]
        if all(name in index.tensors and index.tensors[name].dim() == 2 for name in names):
            counts = (getattr(module, name, None) for name in written.EXPERT_COUNT_ATTRIBUTES)
            if (experts := next((count for count in counts if isinstance(count, int)), None)) is not None:
                return _flat_expert_unit(index, path, names, experts)
        if all(name in index.tensors and index.tensors[name].dim() == 3 for name in names):
            return _expert_unit(index, path, module, names[:-1], names[-1])
    return None


def _expert_unit(
    index: ModelIndex, path: str, module: nn.Module, inner: list[str], output: str
) -> FeedForwardUnit | Misfit:
    experts = index.tensors[output].shape[0]
    transposed = _is_transposed(index, module, inner, output)
    if transposed is None:
        return Misfit(path, ("ffn", "experts"), "whether the experts' matrices are transposed cannot be told")
    neurons = index.tensors[output].shape[1 if transposed else 2]
    sizes = {"x": experts, "m": neurons}
    rows = "m" if index.tensors[inner[0]].shape[2 if transposed else 1] == neurons else "(t m)"
    if rows == "(t m)" and not getattr(module, "is_concatenated", True):
        rows = "(m t)"
    layouts = dict.fromkeys(inner, f"x i {rows}" if transposed else f"x {rows} i")
    layouts[output] = "x m o" if transposed else "x o m"
    stem = output.removesuffix(".weight")
    biases = {f"{name.removesuffix('.weight')}{suffix}": f"x {rows}" for name in inner for suffix in ("_bias", ".bias")}
    biases |= {f"{stem}_bias": "x o", f"{stem}.bias": "x o"}
    features = []
    for name in index.below(path):
        layout = layouts.get(name) or biases.get(name)
        shape = tuple(index.tensors[name].shape)
        if layout is None and "norm" in name and len(shape) == 1 and shape[0] not in (experts, neurons):
            continue
        if layout is None or not fits(layout, shape, sizes):
            return Misfit(path, ("ffn", "experts"), f"parameter {index.short(name)} is not understood")
        role = "consumer" if name == output else "producer" if name in layouts else "other"
        features.append(Feature(name, layout, role))  # type: ignore[arg-type]
    unit = FeedForwardUnit(path, neurons, features, experts=experts)
    unit.stacked = [
        Feature(one.tensor, re.sub(r"\b[io]\b", "s", one.layout), one.role)
        for one in features
        if re.search(r"\b[io]\b", one.layout)
    ]
    _find_router(index, unit)
    return unit


def _flat_expert_unit(index: ModelIndex, path: str, names: list[str], experts: int) -> FeedForwardUnit | Misfit:
    """Experts whose matrices `[neurons, stream]` lie below each other in one."""
    rows = {tuple(index.tensors[name].shape) for name in names}
    if len(rows) != 1 or next(iter(rows))[0] % experts or set(index.below(path)) != set(names):
        return Misfit(path, ("ffn", "experts"), "the experts' matrices do not fit each other")
    features = [Feature(name, "(x m) i", "producer") for name in names[:-1]] + [
        Feature(names[-1], "(x m) o", "consumer")
    ]
    unit = FeedForwardUnit(path, next(iter(rows))[0] // experts, features, experts=experts)
    unit.stacked = [Feature(one.tensor, "(x m) s", one.role) for one in features]
    _find_router(index, unit)
    return unit


def _is_transposed(index: ModelIndex, module: nn.Module, inner: list[str], output: str) -> bool | None:
    """Whether the matrices are `[inputs, outputs]`; None if shapes and attributes leave it open."""
    down, up = index.tensors[output].shape, index.tensors[inner[0]].shape
    straight = up[2] == down[1] and up[1] in (down[2], 2 * down[2])
    turned = up[1] == down[2] and up[2] in (down[1], 2 * down[1])
    if straight and turned:
        stated = getattr(module, "is_transposed", None)
        return stated if isinstance(stated, bool) else False
    return turned if straight or turned else None


def _find_router(index: ModelIndex, unit: FeedForwardUnit) -> None:
    """Find the router beside the experts and the tensors in it that have an entry per expert."""
    parent = unit.path.rpartition(".")[0]
    child = index.first_of(parent, written.ROUTERS)
    if child is None:
        unit.refused["experts"] = written.NO_ROUTER_REASON
        return
    place = join(parent, child)
    modules = [module for path, module in index.modules.items() if path == place or path.startswith(f"{place}.")]
    stated = [
        getattr(module, name, None) for module in (*modules, index.modules[parent]) for name in written.ROUTER_GROUPS
    ]
    unit.expert_groups = max([1, *(count for count in stated if isinstance(count, int))])
    scored = False
    for name, tensor in index.tensors.items():
        owner = name.rpartition(".")[0]
        if owner != parent and owner != place and not owner.startswith(f"{place}."):
            continue
        shape = tuple(tensor.shape)
        if not tensor.is_floating_point() and tensor.numel() > 1:
            unit.refused["experts"] = written.ROUTER_TABLE_REASON.format(name=index.short(name))
            return
        layout = next((one for one in ("x i", "x", "1 x") if fits(one, shape, {"x": unit.experts or 0})), None)
        if layout == "x i" and owner == parent:
            layout = None
        if layout is not None:
            scored = scored or layout == "x i"
            unit.router.append(Feature(name, layout, "producer" if layout == "x i" else "other"))
            if layout == "x i":
                unit.stacked.append(Feature(name, "x s", "consumer"))
        elif unit.experts in shape:
            unit.refused["experts"] = f"parameter {index.short(name)} is not understood"
            return
    if not scored:
        unit.refused["experts"] = written.NO_ROUTER_REASON
