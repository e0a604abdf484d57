"""Attention units: finding the projections, sizing the heads, explaining what hangs on them, and naming the groups."""

import inspect
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from torch import nn

from ..channels import ChannelGroup
from . import patterns as written
from .groups import fits, group_of, layer_of, tokens
from .index import Feature, ModelIndex, Projection, join

AXES = ("qk", "vo", "heads")


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
        tie: Where heads of several units move together, the name of their stack.
    """

    path: str
    owner: str
    sizes: dict[str, int]
    features: list[Feature]
    refused: dict[str, str] = field(default_factory=dict)
    readers: list[Projection] = field(default_factory=list)
    writers: list[Projection] = field(default_factory=list)
    tie: str | None = None
    has_table: bool = False

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


@dataclass(frozen=True)
class Misfit:
    """A structure that looks like attention and is not understood."""

    path: str
    axes: tuple[str, ...]
    reason: str


def attention_units(index: ModelIndex) -> tuple[list[AttentionUnit], list[Misfit]]:
    """Every attention of a model, and those that are not understood with the reason."""
    units, misfits = [], []
    for path, module in index.modules.items():
        found = _match(index, path, module)
        if isinstance(found, AttentionUnit):
            units.append(found)
        elif found is not None:
            misfits.append(found)
    _tie_heads(index, units)
    return units, misfits


def _match(index: ModelIndex, path: str, module: nn.Module) -> AttentionUnit | Misfit | None:
    for find in (_multihead, _separate, _latent, _query_and_fused, _fused, _deformable):
        if (found := find(index, path, module)) is not None:
            return found
    return None


# Finding the projections


def _separate(index: ModelIndex, path: str, module: nn.Module) -> AttentionUnit | Misfit | None:
    for query, key, value in written.SEPARATE_PROJECTIONS:
        if all(join(path, child) in index.modules for child in (query, key)):
            children = [query, key] + ([value] if join(path, value) in index.modules else [])
            return _build(index, path, module, children)
    return None


def _build(index: ModelIndex, path: str, module: nn.Module, children: list[str]) -> AttentionUnit | Misfit | None:
    projections = []
    for child in children:
        projection = index.projection(join(path, child))
        if projection is None:
            return _wrapped(index, path, child)
        projections.append(projection)
    query, key = projections[:2]
    value = projections[2] if len(projections) > 2 else None
    return _unit(index, path, module, query, key, value)


def _wrapped(index: ModelIndex, path: str, child: str) -> Misfit:
    kind = type(index.modules[join(path, child)]).__name__
    return Misfit(path, AXES, f"{child} is a {kind}, no plain linear layer")


def _fused(index: ModelIndex, path: str, module: nn.Module) -> AttentionUnit | Misfit | None:
    child = index.first_of(path, (*written.FUSED_BLOCKS, *written.FUSED_HEADS))
    if child is None or index.first_of(path, written.OUTPUT_PROJECTIONS) is None:
        return None
    fused = index.projection(join(path, child))
    if fused is None:
        return _wrapped(index, path, child)
    dims, counts = _head_sizes(index, path)
    layout = written.FUSED_LAYOUTS.get(type(module).__name__, "heads" if child in written.FUSED_HEADS else "blocks")
    outputs = [o for o in _outputs(index, path, (child,)) if o is not None]
    for output in outputs:
        for heads in [*counts, *(output.inputs // d for d in dims if output.inputs % d == 0)]:
            if output.inputs % heads or fused.outputs % (dim := output.inputs // heads):
                continue
            rest = fused.outputs // dim - heads
            if rest <= 0 or rest % 2 or heads % (shared := rest // 2):
                continue
            parts = _split(fused, layout, heads, shared, dim)
            if parts is None:
                return Misfit(path, AXES, f"the layout {layout!r} of {child} is not understood")
            return _unit(index, path, module, *parts)
    return Misfit(path, AXES, f"{child} does not stack q, k and v of the heads that the output projection reads")


def _split(fused: Projection, layout: str, heads: int, shared: int, dim: int) -> tuple[Projection, ...] | None:
    """The query, key and value parts of a fused projection."""
    q, kv = heads * dim, shared * dim
    if layout == "blocks":
        return fused.part(0, q), fused.part(q, q + kv), fused.part(q + kv, q + 2 * kv)
    if layout == "heads":
        chunk, q = (heads // shared + 2) * dim, heads // shared * dim
        return tuple(fused.part(*part, chunk) for part in ((0, q), (q, q + dim), (q + dim, q + 2 * dim)))
    if layout == "quarters" and heads == shared and heads % 4 == 0:
        quarter = q // 4
        return tuple(fused.part(part * quarter, (part + 1) * quarter, 3 * quarter) for part in (0, 2, 1))
    return None


def _query_and_fused(index: ModelIndex, path: str, module: nn.Module) -> AttentionUnit | Misfit | None:
    for query, both in written.QUERY_AND_FUSED:
        q, kv = index.projection(join(path, query)), index.projection(join(path, both))
        if q is not None and kv is not None:
            half = kv.outputs // 2
            return _unit(index, path, module, q, kv.part(0, half), kv.part(half, kv.outputs))
    return None


def _multihead(index: ModelIndex, path: str, module: nn.Module) -> AttentionUnit | Misfit | None:
    if not isinstance(module, nn.MultiheadAttention):
        return None
    width = module.embed_dim
    bias = None if module.in_proj_bias is None else join(path, "in_proj_bias")
    if module.in_proj_weight is not None:
        fused = Projection(join(path, "in_proj_weight"), bias, "f i", width, 3 * width)
        q, k, v = (fused.part(part * width, (part + 1) * width) for part in range(3))
    else:
        names = (join(path, f"{one}_proj_weight") for one in "qkv")
        q, k, v = (Projection(name, None, "f i", index.tensors[name].shape[1], width) for name in names)
    unit = _unit(index, path, module, q, k, v)
    if isinstance(unit, AttentionUnit) and module.in_proj_weight is None and bias is not None:
        for part, layout in enumerate(("(k r d)", "(k d)", "(k e)")):
            span = (part * width, (part + 1) * width, 3 * width)
            unit.features.append(Feature(bias, layout, "producer", span))
    return unit


def _latent(index: ModelIndex, path: str, module: nn.Module) -> AttentionUnit | Misfit | None:
    expand = index.projection(join(path, written.LATENT_KEYS_VALUES))
    if expand is None:
        return None
    child = index.first_of(path, written.LATENT_QUERIES)
    query = None if child is None else index.projection(join(path, child))
    nope, value = (getattr(module, name, None) for name in written.LATENT_SIZE_ATTRIBUTES)
    output = next((o for o in _outputs(index, path, ()) if o is not None), None)
    if query is None or output is None or not isinstance(nope, int) or not isinstance(value, int):
        return Misfit(path, AXES, "latent attention whose parts are not all stated")
    chunk = nope + value
    heads = expand.outputs // chunk
    if expand.outputs % chunk or output.inputs != heads * value or query.outputs % heads:
        return Misfit(path, AXES, "latent attention whose parts do not fit each other")
    sizes = {"k": heads, "r": 1, "d": query.outputs // heads, "e": value}
    features = query.produce("(k r d)") + output.consume("(k r e)")
    features += expand.part(0, nope, chunk).produce("(k n)") + expand.part(nope, chunk, chunk).produce("(k e)")
    unit = AttentionUnit(path, path, sizes, features, {"qk": written.LATENT_REASON})
    first = (index.projection(join(path, one)) for one in written.LATENT_READERS)
    unit.readers, unit.writers = [one for one in first if one is not None], [output]
    return _explained(index, unit, {*query.tensors, *expand.tensors, *output.tensors}, [path])


def _deformable(index: ModelIndex, path: str, module: nn.Module) -> AttentionUnit | Misfit | None:
    value, offsets, weights, output = (index.projection(join(path, child)) for child in written.DEFORMABLE)
    if value is None or offsets is None or weights is None or output is None:
        return None
    _, counts = _head_sizes(index, path)
    heads = next((count for count in counts if value.outputs % count == 0), None)
    if heads is None or output.inputs != value.outputs or offsets.outputs % heads or weights.outputs % heads:
        return Misfit(path, AXES, "deformable attention whose heads are not stated")
    sizes = {"k": heads, "r": 1, "d": 1, "e": value.outputs // heads}
    features = value.produce("(k e)") + output.consume("(k e)")
    features += offsets.produce("(k n)") + weights.produce("(k n)")
    unit = AttentionUnit(path, path, sizes, features, {"qk": written.DEFORMABLE_REASON})
    unit.readers, unit.writers = [value, offsets, weights], [output]
    known = {name for one in (value, offsets, weights, output) for name in one.tensors}
    return _explained(index, unit, known, [path])


# Sizing and explaining


def _unit(
    index: ModelIndex, path: str, module: nn.Module, query: Projection, key: Projection, value: Projection | None
) -> AttentionUnit | Misfit | None:
    dims, counts = _head_sizes(index, path)
    if not dims and not counts:
        return Misfit(path, AXES, "neither the head size nor the number of heads is stated")
    taken = {one.weight.removesuffix(".weight") for one in (query, key, value) if one is not None}
    found = None
    for output in _outputs(index, path, tuple(taken)):
        found = _fit(query, key, value, output, dims, counts)
        if found is not None:
            break
    if found is None:
        read = [o.inputs for o in _outputs(index, path, tuple(taken)) if o is not None]
        rows = [one.outputs for one in (query, key, value) if one is not None]
        return Misfit(
            path, AXES,
            f"q, k, v have {', '.join(map(str, rows))} rows and the output projection reads {read or 'nothing'}, which "
            f"is no multi-head attention of head size {dims or '?'} or {counts or '?'} heads",
        )  # fmt: skip
    sizes, gated = found
    features: list[Feature] = []
    if gated:
        width = 2 * sizes["d"]
        features += query.part(0, sizes["d"], width).produce("(k r d)")
        features += query.part(sizes["d"], width, width).produce("(k r e)")
    else:
        features += query.produce("(k r d)")
    features += key.produce("(k d)")
    features += [] if value is None else value.produce("(k e)")
    refused = {}
    if value is None and output is not None:
        refused["vo"] = written.KEYS_AS_VALUES_REASON
        features += output.consume("(k r d)")
    elif output is not None:
        features += output.consume("(k r e)")
    else:
        refused = dict.fromkeys(("vo", "heads"), written.NO_OUTPUT_REASON)
    scope, root = [path], path
    if output is not None:
        holder = output.weight.removesuffix(".weight").rpartition(".")[0]
        if holder != path and not holder.startswith(f"{path}."):
            root = path.rpartition(".")[0]
            scope += [holder] if holder != root else []
    unit = AttentionUnit(root, path, sizes, features, refused)
    unit.readers = [one for one in (query, key, value) if one is not None]
    unit.writers = [] if output is None else [output]
    known = {name for one in (*unit.readers, *unit.writers) for name in one.tensors}
    if isinstance(module, nn.MultiheadAttention):
        known.add(join(path, "in_proj_bias"))
    return _explained(index, unit, known, scope)


def _fit(
    query: Projection, key: Projection, value: Projection | None, output: Projection | None, dims: list[int],
    counts: list[int],
) -> tuple[dict[str, int], bool] | None:  # fmt: skip
    """Sizes of a multi-head attention that the projections make, and whether q holds a gate as well."""
    candidates = dict.fromkeys([*dims, *(query.outputs // n for n in counts if n and query.outputs % n == 0)])
    candidates |= dict.fromkeys(query.outputs // n // 2 for n in counts if n and query.outputs % (2 * n) == 0)
    found = []
    for gated in (False, True):
        for dim in candidates:
            rows = dim * (1 + gated)
            if not dim or query.outputs % rows or key.outputs % dim:
                continue
            heads, shared = query.outputs // rows, key.outputs // dim
            if heads % shared or (value is not None and value.outputs % shared):
                continue
            e = dim if value is None else value.outputs // shared
            if output is not None and output.inputs != heads * e:
                continue
            if gated and e != dim:
                continue
            found.append(({"k": shared, "r": heads // shared, "d": dim, "e": e}, gated))
    stated = [one for one in found if not counts or one[0]["k"] * one[0]["r"] in counts]
    return next(iter(stated or found), None)


def _head_sizes(index: ModelIndex, path: str) -> tuple[list[int], list[int]]:
    """Head sizes and numbers of heads that the module states, or the one around it."""
    module, parent = index.modules[path], index.modules.get(path.rpartition(".")[0])
    for owner in (module, parent):
        dims, counts = (
            [value for name in names if isinstance(value := getattr(owner, name, None), int) and value > 0]
            for names in (written.HEAD_DIM_ATTRIBUTES, written.HEAD_COUNT_ATTRIBUTES)
        )
        if dims or counts:
            return dims, counts
    return [], []


def _outputs(index: ModelIndex, path: str, taken: tuple[str, ...]) -> Iterator[Projection | None]:
    """Linear maps that may be the output projection, inside the module, then beside it, then none."""
    within = [join(path, name) for name in written.OUTPUT_PROJECTIONS]
    parent = path.rpartition(".")[0]
    beside = [join(parent, name) for name in written.OUTPUT_PROJECTIONS] if path else []
    inside = False
    for place in [*within, *beside]:
        if place in beside and inside:
            return
        if place in taken or place not in index.modules:
            continue
        projection = index.projection(place)
        inner = index.modules.get(f"{place}.dense") if projection is None else None
        if projection is None and inner is None and place.startswith(f"{path}."):
            projection = index.projection(f"{place}.0")  # Sequential(Linear, Dropout)
        if projection is not None:
            inside = inside or place in within
            yield projection
    if not inside:
        yield None


def _explained(index: ModelIndex, unit: AttentionUnit, known: set[str], scope: list[str]) -> AttentionUnit | Misfit:
    """Add every tensor that hangs on the heads, or say which one is not understood."""
    for place in scope:
        for name in index.below(place):
            if name in known:
                continue
            relative = name[len(place) + 1 :] if place else name
            found = _side(index, place, relative, unit.sizes)
            if found is None:
                return Misfit(unit.path, AXES, f"parameter {index.short(name)} is not understood")
            unit.features += found
            stem = name.removesuffix(".weight")
            if found and stem.rpartition(".")[2] in written.STREAM_READING_SIDES and (one := index.projection(stem)):
                unit.readers.append(one)
            unit.has_table = unit.has_table or any("n" in one.layout and "k" in one.layout for one in found)
    _judge(index, unit)
    return unit


def _side(index: ModelIndex, place: str, relative: str, sizes: dict[str, int]) -> list[Feature] | None:
    """What a parameter beside the projections holds: features, nothing of the heads, or None if unknown."""
    stem = relative.removesuffix(".weight").removesuffix(".bias")
    if any(f"{relative}.".startswith(f"{beside}.") for beside in written.ATTENTION_BESIDE):
        return []
    name = join(place, relative)
    shape = tuple(index.tensors[name].shape)
    for names, layouts in written.ATTENTION_SIDES:
        if relative not in names and stem not in names:
            continue
        projection = index.projection(join(place, stem)) if stem != relative else None
        for layout in layouts:
            if projection is not None and stem in names:
                if fits(layout, (projection.outputs,), sizes):
                    return [one for one in projection.produce(layout) if one.tensor == name]
            elif fits(layout, shape, sizes):
                return [Feature(name, layout)]
    return None


def _judge(index: ModelIndex, unit: AttentionUnit) -> None:
    """Refuse the axes that the code of the module ties to something that does not move."""
    module = index.modules[unit.owner]
    names, arguments = _code_names(module)
    if any(re.search(written.ROTARY_NAMES, name) for name in names):
        unit.refused.setdefault("qk", written.ROTARY_REASON)
    tied = [name for name in arguments if name in written.PER_HEAD_ARGUMENTS]
    if tied and not unit.has_table and not hasattr(module, "has_relative_attention_bias"):
        for axis in ("heads", "qk"):
            unit.refused.setdefault(axis, written.PER_HEAD_REASON.format(argument=tied[0]))
    if any(getattr(module, name, False) for name in written.SHARED_KEYS_ATTRIBUTES):
        for axis in ("heads", "vo"):
            unit.refused.setdefault(axis, written.SHARED_KEYS_REASON)
    for axis, reason in written.ATTENTION_EXCEPTIONS.get(type(module).__name__, {}).items():
        unit.refused.setdefault(axis, reason)


def _code_names(module: nn.Module) -> tuple[list[str], list[str]]:
    """Names that a module's forward uses, and its arguments."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    if code is None:
        return [], []
    return [*code.co_names, *code.co_varnames], list(code.co_varnames[: code.co_argcount])


def _tie_heads(index: ModelIndex, units: list[AttentionUnit]) -> None:
    """Tie the head order of every layer of a stack whose table serves them all."""
    stacks = defaultdict(list)
    for unit in units:
        stacks[re.sub(r"\.\d+\.", ".*.", unit.path)].append(unit)
    for stack, members in stacks.items():
        with_table = [unit for unit in members if unit.has_table]
        if with_table and len(with_table) < len(members):
            for unit in members:
                unit.tie = stack
    known = {feature.tensor for unit in units for feature in unit.features}
    for name in index.parameters:
        for suffix, layout in written.SHARED_HEAD_TABLES.items():
            if name not in known and f".{name}".endswith(f".{suffix}"):
                _share_table(index, _around(units, name.removesuffix(suffix)), name, layout)
    _refuse_unknown_tables(index, units)


def _around(units: list[AttentionUnit], place: str) -> list[AttentionUnit]:
    """The units below the nearest module around a place that has any."""
    below: list[AttentionUnit] = []
    while place and not below:
        place = place.rpartition(".")[0]
        below = [unit for unit in units if unit.path.startswith(f"{place}." if place else "")]
    return below


def _share_table(index: ModelIndex, units: list[AttentionUnit], name: str, layout: str) -> None:
    """Tie all units that a table outside of them serves."""
    stack = re.sub(r"\.\d+\.", ".*.", units[0].path)
    for unit in units:
        if fits(layout, tuple(index.tensors[name].shape), unit.sizes):
            unit.tie = stack
            unit.features.append(Feature(name, layout))
            for axis in ("heads", "qk"):
                if unit.refused.get(axis, "").startswith(written.PER_HEAD_REASON.partition("{")[0]):
                    del unit.refused[axis]
        else:
            unit.refused.setdefault("heads", f"parameter {index.short(name)} does not fit the heads")


def _refuse_unknown_tables(index: ModelIndex, units: list[AttentionUnit]) -> None:
    """Keep heads in place where a parameter that no unit explains may add a bias to each of them."""
    explained = {feature.tensor for unit in units for feature in unit.features}
    owners = tuple(f"{unit.owner}." for unit in units)
    for name, parameter in index.parameters.items():
        if name in explained or name.startswith(owners) or not re.search(written.HEAD_TABLE_NAMES, name):
            continue
        for unit in _around(units, name):
            if unit.sizes["k"] * unit.sizes["r"] in parameter.shape:
                unit.refused.setdefault("heads", written.HEAD_TABLE_REASON.format(name=index.short(name)))
