"""Experts whose matrices are stacked in one parameter, and the router that stands beside them."""

import re

from torch import nn

from ..channels import Role
from . import patterns as written
from .groups import fits
from .index import Feature, ModelIndex, join
from .units import FeedForwardUnit, Misfit

# What writes the neurons reads the stream, and the other way round.
_STREAM_ROLES: dict[Role, Role] = {"producer": "consumer", "consumer": "producer", "other": "other"}


def find_experts(index: ModelIndex, path: str, module: nn.Module) -> FeedForwardUnit | Misfit | None:
    """The experts that a module holds as matrices of one parameter each, None if it holds none."""
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
        Feature(one.tensor, re.sub(r"\b[io]\b", "s", one.layout), _STREAM_ROLES[one.role])
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
    features = [Feature(name, "(x m) i", "producer") for name in names[:-1]]
    features.append(Feature(names[-1], "(x m) o", "consumer"))
    unit = FeedForwardUnit(path, next(iter(rows))[0] // experts, features, experts=experts)
    unit.stacked = [Feature(one.tensor, "(x m) s", _STREAM_ROLES[one.role]) for one in features]
    _find_router(index, unit)
    return unit


def _is_transposed(index: ModelIndex, module: nn.Module, inner: list[str], output: str) -> bool | None:
    """Whether the matrices are `[inputs, outputs]`; None if shapes and attributes leave it open."""
    down, up = index.tensors[output].shape, index.tensors[inner[0]].shape
    straight = up[2] == down[1] and up[1] in (down[2], 2 * down[2])
    turned = up[1] == down[2] and up[2] in (down[1], 2 * down[1])
    if straight and turned:
        stated = getattr(module, "is_transposed", None)
        return stated if isinstance(stated, bool) else None
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
