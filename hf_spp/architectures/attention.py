"""Attention units: explaining what hangs on the heads, and what the code of a module ties them to."""

import re
from collections import defaultdict
from collections.abc import Iterator

from . import patterns as written
from .groups import fits
from .index import Feature, ModelIndex, code_names, join
from .projections import find_attention
from .registry import FeedForwardPattern
from .units import ATTENTION_AXES, AttentionUnit, Misfit


def attention_units(index: ModelIndex) -> tuple[list[AttentionUnit], list[Misfit]]:
    """Every attention of a model, and those that are not understood with the reason."""
    units, misfits = [], []
    for path, module in index.modules.items():
        found = find_attention(index, path, module)
        if isinstance(found, AttentionUnit):
            found = _explained(index, found)
        if isinstance(found, AttentionUnit):
            units.append(found)
        elif found is not None:
            misfits.append(found)
    _tie_heads(index, units)
    return units, [*misfits, *_unmatched(index, units, misfits)]


def _unmatched(index: ModelIndex, units: list[AttentionUnit], misfits: list[Misfit]) -> Iterator[Misfit]:
    """Modules that are attention by name, or mix tokens in another way, and that no pattern reached."""
    reached = {unit.owner for unit in units} | {unit.path for unit in units} | {one.path for one in misfits}
    known = {feature.tensor for unit in units for feature in unit.features}
    for path, module in index.modules.items():
        if any(name in module._parameters for name in written.MIXER_PARAMETERS):
            yield Misfit(path, ATTENTION_AXES, written.MIXER_REASON, cuts_stream=False)
        elif path not in reached and re.search("Attention|Attn", type(module).__name__):
            children = ((name, index.projection(join(path, name))) for name, _ in module.named_children())
            left = [name for name, projection in children if projection is not None and projection.weight not in known]
            if not any(place.startswith(f"{path}.") for place in reached):
                left += [name for name, one in module.named_parameters(recurse=False) if one.dim() > 1]
            if left:
                yield Misfit(path, ATTENTION_AXES, written.UNKNOWN_REASON.format(children=", ".join(left)))


def _explained(index: ModelIndex, unit: AttentionUnit) -> AttentionUnit | Misfit:
    """Add every tensor that hangs on the heads, or say which one is not understood."""
    known = unit.known | {name for one in (*unit.readers, *unit.writers) for name in one.tensors}
    for place in unit.scope or [unit.owner]:
        for name in index.below(place):
            if name in known:
                continue
            relative = name[len(place) + 1 :] if place else name
            found = _side(index, place, relative, unit)
            if found is None:
                return Misfit(unit.path, ATTENTION_AXES, f"parameter {index.short(name)} is not understood")
            unit.features += found
            stem = name.removesuffix(".weight")
            if found and stem.rpartition(".")[2] in written.STREAM_READING_SIDES and (one := index.projection(stem)):
                unit.readers.append(one)
            unit.has_table = unit.has_table or any("n" in one.layout and "k" in one.layout for one in found)
    _judge(index, unit)
    return unit


def _side(index: ModelIndex, place: str, relative: str, unit: AttentionUnit) -> list[Feature] | None:
    """What a parameter beside the projections holds: features, nothing of the heads, or None if unknown."""
    stem, sizes = relative.removesuffix(".weight").removesuffix(".bias"), unit.sizes
    own, beside = ((), ()) if unit.pattern is None else (unit.pattern.sides.items(), unit.pattern.beside)
    neighbours = [child for one in index.patterns if isinstance(one, FeedForwardPattern) for child in one.children]
    if any(f"{relative}.".startswith(f"{one}.") for one in (*beside, *neighbours, *written.ATTENTION_BESIDE)):
        return []
    name = join(place, relative)
    shape = tuple(index.tensors[name].shape)
    for names, layouts in (*(((one,), (layout,)) for one, layout in own), *written.ATTENTION_SIDES):
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
    names, arguments = code_names(module)
    stated = None if unit.pattern is None else unit.pattern.rotary
    rotary = any(re.search(written.ROTARY_NAMES, name) for name in names) if stated is None else stated
    if rotary and not unit.rotates_apart:
        unit.refused.setdefault("qk", written.ROTARY_REASON)
    tied = [name for name in arguments if name in written.PER_HEAD_ARGUMENTS]
    if tied and not any(re.search(written.HEAD_TABLE_NAMES, name) for name in index.parameters):
        tied = [name for name in tied if name not in written.TABLE_ARGUMENTS]
    if tied and not unit.has_table and not hasattr(module, "has_relative_attention_bias"):
        unit.refused.setdefault("heads", written.PER_HEAD_REASON.format(argument=tied[0]))
        if tied[0] in written.PER_ROW_ARGUMENTS:
            unit.refused.setdefault("qk", written.PER_HEAD_REASON.format(argument=tied[0]))
    if any(getattr(module, name, False) for name in written.SHARED_KEYS_ATTRIBUTES):
        for axis in ("heads", "vo"):
            unit.refused.setdefault(axis, written.SHARED_KEYS_REASON)
    if getattr(module, written.ROTARY_VALUE_ATTRIBUTE, False):
        unit.refused.setdefault("vo", written.ROTARY_VALUE_REASON)
    explained = {feature.tensor for feature in unit.features}
    for name, buffer in module.named_buffers(prefix=unit.owner, recurse=False):
        heads = unit.sizes["k"] * unit.sizes["r"]
        if buffer.is_floating_point() and heads > 1 and heads in buffer.shape and name not in explained:
            unit.refused.setdefault("heads", written.HEAD_BUFFER_REASON.format(name=index.short(name)))
    for (name, value), reasons in written.CONFIG_EXCEPTIONS.items():
        if any(getattr(config, name, None) == value for config in index.configs):
            unit.refused |= {axis: reason for axis, reason in reasons.items() if axis not in unit.refused}
    for holder in (module, index.modules.get(unit.owner.rpartition(".")[0])):
        for axis, reason in written.ATTENTION_EXCEPTIONS.get(type(holder).__name__, {}).items():
            unit.refused.setdefault(axis, reason)


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
    while not below:
        place = place.rpartition(".")[0]
        below = [unit for unit in units if unit.path.startswith(f"{place}." if place else "")]
        if not place:
            break
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
