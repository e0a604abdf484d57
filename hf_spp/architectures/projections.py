"""Finding the projections of an attention and the sizes of its heads."""

from collections.abc import Iterator

from torch import nn

from . import patterns as written
from .index import Feature, ModelIndex, Projection, code_names, join
from .registry import AttentionPattern
from .units import ATTENTION_AXES, AttentionUnit, Misfit


def find_attention(index: ModelIndex, path: str, module: nn.Module) -> AttentionUnit | Misfit | None:
    """The attention whose projections a module holds, not yet explained; None if it holds none."""
    for find in (_registered, _multihead, _parameters, _separate, _latent, _query_and_fused, _fused, _deformable):
        if (found := find(index, path, module)) is not None:
            return found
    return None


# Finding the projections


def _registered(index: ModelIndex, path: str, module: nn.Module) -> AttentionUnit | Misfit | None:
    for pattern in index.patterns:
        if not isinstance(pattern, AttentionPattern) or not index.has(path, pattern.children):
            continue
        index.matched.append(pattern)
        found = [index.projection(join(path, child)) for child in dict.fromkeys(pattern.children)]
        for child, projection in zip(pattern.children, found, strict=False):
            if projection is None:
                return _wrapped(index, path, child)
        heads = pattern.heads if isinstance(pattern.heads, int) else getattr(module, pattern.heads, None)
        *inner, output = [projection for projection in found if projection is not None]
        if not isinstance(heads, int) or heads < 1 or output.inputs % heads:
            return Misfit(
                path, ATTENTION_AXES,
                f"heads={pattern.heads!r} gives {heads!r}, into which the {output.inputs} inputs of {pattern.output} "
                "cannot be cut",
            )  # fmt: skip
        if len(inner) == 1:
            parts = _fused_parts(inner[0], pattern.fused, heads, output)
            if parts is None:
                return Misfit(path, ATTENTION_AXES, f"{pattern.query} does not stack q, k and v of {heads} heads")
            inner = [*parts]
        unit = _unit(index, path, module, inner[0], inner[1], inner[2], heads=[heads], outputs=[output])
        if isinstance(unit, AttentionUnit):
            unit.pattern = pattern
        return unit
    return None


def _separate(index: ModelIndex, path: str, module: nn.Module) -> AttentionUnit | Misfit | None:
    for query, key, value in written.SEPARATE_PROJECTIONS:
        if index.has(path, (query, key)):
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


def _parameters(index: ModelIndex, path: str, module: nn.Module) -> AttentionUnit | Misfit | None:
    names = {join(path, name): layout for name, layout in written.PARAMETER_PROJECTIONS.items()}
    if not all(name in index.tensors and index.tensors[name].dim() == 3 for name in names):
        return None
    (query, key, value, output) = (tuple(index.tensors[name].shape) for name in names)
    if not query[:2] == value[:2] == output[:2] or query[1] % key[1] or value[2] != output[2]:
        return Misfit(path, ATTENTION_AXES, "the parameters q, k, v and o do not fit each other")
    sizes = {"k": key[1], "r": query[1] // key[1], "d": query[2], "e": value[2]}
    features = [Feature(name, layout, "consumer" if "o" in layout else "producer") for name, layout in names.items()]
    unit = AttentionUnit(path, path, sizes, features, known=set(names))
    unit.refused["hidden"] = written.BETWEEN_REASON.format(name=index.short(join(path, "q")))
    return unit


def _fused(index: ModelIndex, path: str, module: nn.Module) -> AttentionUnit | Misfit | None:
    with_bias = [name for name, bias in written.FUSED_WITH.items() if join(path, bias) in index.tensors]
    child = index.first_of(path, (*written.FUSED_BLOCKS, *written.FUSED_HEADS, *with_bias))
    if child is None or not any(_outputs(index, path, (child,))):
        return None
    fused = index.projection(join(path, child))
    if fused is None:
        return _wrapped(index, path, child)
    dims, counts = _head_sizes(index, path)
    usual = "blocks" if child in written.FUSED_BLOCKS else "heads"
    layout = written.FUSED_LAYOUTS.get(type(module).__name__, usual)
    outputs = [o for o in _outputs(index, path, (child,)) if o is not None]
    for output in outputs:
        for heads in [*counts, *(output.inputs // d for d in dims if output.inputs % d == 0)]:
            if (parts := _fused_parts(fused, layout, heads, output)) is not None:
                return _unit(index, path, module, *parts)
    return Misfit(
        path, ATTENTION_AXES, f"{child} does not stack q, k and v of the heads that the output projection reads"
    )


def _fused_parts(
    fused: Projection, layout: str, heads: int, output: Projection
) -> tuple[Projection, Projection, Projection] | None:
    """The query, key and value parts of a fused projection, None if it does not stack them."""
    if output.inputs % heads or fused.outputs % (dim := output.inputs // heads):
        return None
    rest = fused.outputs // dim - heads
    if rest <= 0 or rest % 2 or heads % (shared := rest // 2):
        return None
    return _split(fused, layout, heads, shared, dim)


def _split(
    fused: Projection, layout: str, heads: int, shared: int, dim: int
) -> tuple[Projection, Projection, Projection] | None:
    q, kv = heads * dim, shared * dim
    if layout == "blocks":
        return fused.part(0, q), fused.part(q, q + kv), fused.part(q + kv, q + 2 * kv)
    if layout == "heads":
        chunk, q = (heads // shared + 2) * dim, heads // shared * dim
        return fused.part(0, q, chunk), fused.part(q, q + dim, chunk), fused.part(q + dim, q + 2 * dim, chunk)
    if layout == "quarters" and heads == shared and heads % 4 == 0:
        one, two, three = q // 4, q // 2, 3 * q // 4
        return fused.part(0, one, three), fused.part(two, three, three), fused.part(one, two, three)
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
    rows = query.outputs // heads
    if rows < nope:
        return Misfit(path, ATTENTION_AXES, "latent attention whose queries are shorter than its keys")
    # Each head of q and k has rows without rotation first, which may move, and then rows with it.
    sizes = {"k": heads, "r": 1, "d": nope, "e": value}
    features = query.part(0, nope, rows).produce("(k r d)")
    features += query.part(nope, rows, rows).produce("(k r n)") if rows > nope else []
    features += expand.part(0, nope, chunk).produce("(k d)") + expand.part(nope, chunk, chunk).produce("(k e)")
    unit = AttentionUnit(path, path, sizes, [*features, *output.consume("(k r e)")], rotates_apart=True)
    unit.notes["qk"] = written.LATENT_REASON
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
    index: ModelIndex, path: str, module: nn.Module, query: Projection, key: Projection, value: Projection | None,
    heads: list[int] | None = None, outputs: list[Projection] | None = None,
) -> AttentionUnit | Misfit:  # fmt: skip
    """The unit that the projections make, with given numbers of heads and outputs or those that the module shows."""
    dims, counts = _head_sizes(index, path) if heads is None else ([], heads)
    if not dims and not counts:
        return Misfit(path, ATTENTION_AXES, "neither the head size nor the number of heads is stated")
    taken = {one.weight.removesuffix(".weight") for one in (query, key, value) if one is not None}
    choices = [*_outputs(index, path, tuple(taken))] if outputs is None else [*outputs]
    fits = ((output, fit) for output in choices if (fit := _fit(query, key, value, output, dims, counts)) is not None)
    output, found = next(fits, (None, None))
    if found is None:
        read = [one.inputs for one in choices if one is not None]
        rows = [one.outputs for one in (query, key, value) if one is not None]
        return Misfit(
            path, ATTENTION_AXES,
            f"q, k, v have {', '.join(map(str, rows))} rows and the output projection reads {read or 'nothing'}, which "
            f"is no multi-head attention of head size {dims or '?'} or {counts or '?'} heads",
        )  # fmt: skip
    sizes, gated = found
    features: list[Feature] = []
    if gated and not any("gate" in name for name in code_names(module)[0]):
        return Misfit(path, ATTENTION_AXES, "q has twice as many rows as the heads need")
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
    for owner in (module, parent, getattr(module, "config", None)):
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
