"""Finding the projections of an attention and the sizes of its heads."""

from collections.abc import Iterator

from torch import nn

from . import patterns as written
from .index import Feature, ModelIndex, Projection, join
from .units import ATTENTION_AXES, AttentionUnit, Misfit


def find_attention(index: ModelIndex, path: str, module: nn.Module) -> AttentionUnit | Misfit | None:
    """The attention whose projections a module holds, not yet explained; None if it holds none."""
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
    return Misfit(path, ATTENTION_AXES, f"{child} is a {kind}, no plain linear layer")


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
                return Misfit(path, ATTENTION_AXES, f"the layout {layout!r} of {child} is not understood")
            return _unit(index, path, module, *parts)
    return Misfit(
        path, ATTENTION_AXES, f"{child} does not stack q, k and v of the heads that the output projection reads"
    )


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
        return Misfit(path, ATTENTION_AXES, "latent attention whose parts are not all stated")
    chunk = nope + value
    heads = expand.outputs // chunk
    if expand.outputs % chunk or output.inputs != heads * value or query.outputs % heads:
        return Misfit(path, ATTENTION_AXES, "latent attention whose parts do not fit each other")
    sizes = {"k": heads, "r": 1, "d": query.outputs // heads, "e": value}
    features = query.produce("(k r d)") + output.consume("(k r e)")
    features += expand.part(0, nope, chunk).produce("(k n)") + expand.part(nope, chunk, chunk).produce("(k e)")
    unit = AttentionUnit(path, path, sizes, features, {"qk": written.LATENT_REASON})
    first = (index.projection(join(path, one)) for one in written.LATENT_READERS)
    unit.readers, unit.writers = [one for one in first if one is not None], [output]
    unit.known = {*query.tensors, *expand.tensors, *output.tensors}
    return unit


def _deformable(index: ModelIndex, path: str, module: nn.Module) -> AttentionUnit | Misfit | None:
    value, offsets, weights, output = (index.projection(join(path, child)) for child in written.DEFORMABLE)
    if value is None or offsets is None or weights is None or output is None:
        return None
    _, counts = _head_sizes(index, path)
    heads = next((count for count in counts if value.outputs % count == 0), None)
    if heads is None or output.inputs != value.outputs or offsets.outputs % heads or weights.outputs % heads:
        return Misfit(path, ATTENTION_AXES, "deformable attention whose heads are not stated")
    sizes = {"k": heads, "r": 1, "d": 1, "e": value.outputs // heads}
    features = value.produce("(k e)") + output.consume("(k e)")
    features += offsets.produce("(k n)") + weights.produce("(k n)")
    unit = AttentionUnit(path, path, sizes, features, {"qk": written.DEFORMABLE_REASON})
    unit.readers, unit.writers = [value, offsets, weights], [output]
    return unit


def _unit(
    index: ModelIndex, path: str, module: nn.Module, query: Projection, key: Projection, value: Projection | None
) -> AttentionUnit | Misfit | None:
    dims, counts = _head_sizes(index, path)
    if not dims and not counts:
        return Misfit(path, ATTENTION_AXES, "neither the head size nor the number of heads is stated")
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
            path, ATTENTION_AXES,
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
    unit.scope = scope
    if isinstance(module, nn.MultiheadAttention):
        unit.known = {join(path, "in_proj_bias")}
    return unit


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
