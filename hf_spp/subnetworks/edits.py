"""What a cut changes in a model: tensors that get shorter, attributes that count channels, and rows inside of heads.

Rows inside of heads leave their projections and come back as zeros behind them, so that heads keep their size, the code
of attention stays as it is, and scores are scaled as before.
"""

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..channels import ChannelGroup, ChannelMap
from ..errors import SubnetworkError
from ..watch import Owners
from . import counts
from .widths import Kept, Widths, cut_of, kept_places, narrowed

IN_HEAD = ("qk", "vo")


@dataclass(frozen=True)
class Edits:
    """The changes that a cut makes to a model.

    Attributes:
        kept: Places that stay, by name and dimension of every tensor that gets shorter.
        attributes: New values, by path of the module and name.
        padded: Where the outputs of a layer go among as many places as there were, by the layer's path.
        selected: Which of its inputs a layer reads, by its path.
    """

    kept: Kept
    attributes: Mapping[str, Mapping[str, Any]]
    padded: Mapping[str, "Padding"]
    selected: Mapping[str, "Selection"]

    def write_attributes(self, model: nn.Module) -> None:
        """Set the attributes of a model's modules, and what pads and selects channels, for good."""
        modules = dict(model.named_modules())
        for path, values in self.attributes.items():
            modules[path].__dict__.update(values)
        for path, padding in self.padded.items():
            modules[path].register_forward_hook(padding)
        for path, selection in self.selected.items():
            modules[path].register_forward_pre_hook(selection)


class Padding:
    """A hook that puts the outputs of a layer among zeros.

    Args:
        places: Where each output goes, int64.
        length: How many places there are.
        axis: The axis of the outputs.
    """

    def __init__(self, places: Tensor, length: int, axis: int) -> None:
        self.places, self.length, self.axis = places, length, axis

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """The outputs at their places."""
        shape = list(output.shape)
        shape[self.axis] = self.length
        self.places = self.places.to(output.device)
        return output.new_zeros(shape).index_copy(self.axis, self.places, output)


class Selection:
    """A hook that leaves a layer some of its inputs.

    Args:
        places: The inputs that the layer reads, int64.
        axis: Their axis.
    """

    def __init__(self, places: Tensor, axis: int) -> None:
        self.places, self.axis = places, axis

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments with fewer inputs."""
        self.places = self.places.to(args[0].device)
        return (args[0].index_select(self.axis, self.places), *args[1:])


def find_edits(model: nn.Module, groups: ChannelMap, widths: Widths) -> Edits:
    """What cutting a model to some widths changes in it; the model stays as it is.

    Args:
        model: The plain model, on any device.
        groups: Its channel groups.
        widths: Channels kept in each block, by name of the groups that are cut.

    Raises:
        SubnetworkError: A module computes with its parameters in a way that the cut would break.
    """
    check_experts(model, groups, widths)
    shapes = {name: tuple(tensor.shape) for name, tensor in _tensors(model).items()}
    in_head = {group.name for group in groups if group.axis in IN_HEAD}
    outer = kept_places(groups, {name: width for name, width in widths.items() if name not in in_head}, shapes)
    rows = [_only_projections(group) for group in groups if group.name in in_head and group.name in widths]
    kept = kept_places([*rows, *(group for group in groups if group.name not in in_head)], widths, shapes)
    _refuse_rigid(model, groups, widths)
    padded, selected = _in_head_hooks(model, rows, kept, outer, shapes)
    attributes: dict[str, dict[str, Any]] = defaultdict(dict)
    for path, name, value in (
        *_layer_attributes(model, kept, shapes),
        *_unit_attributes(model, groups, widths, outer, shapes),
    ):
        attributes[path][name] = value
    return Edits(kept, attributes, padded, selected)


def check_experts(model: nn.Module, groups: ChannelMap, widths: Widths) -> None:
    """Refuse to leave fewer experts than a router chooses for each token.

    Raises:
        SubnetworkError: A router chooses more.
    """
    for group in groups:
        if group.axis != "experts" or group.name not in widths:
            continue
        left = group.blocks * widths[group.name]
        around = [path.rpartition(".")[0] for path in (*group.owners, *(member.tensor for member in group.members))]
        for path in dict.fromkeys([*group.owners, *around]):
            for name in counts.CHOSEN_EXPERTS:
                chosen = vars(model.get_submodule(path)).get(name)
                if isinstance(chosen, int) and not isinstance(chosen, bool) and chosen > left:
                    raise SubnetworkError(
                        f"experts={widths[group.name]} leaves {left} experts at {group.name}, whose router chooses "
                        f"{chosen} for each token. Keep at least {chosen}."
                    )


@contextmanager
def narrowed_model(model: nn.Module, edits: Edits) -> Iterator[None]:
    """Run a model inside the block as if it were cut, on the memory of its own weights."""
    modules = dict(model.named_modules())
    tensors, values, handles = [], [], []
    shorter: dict[int, Tensor] = {}
    own = _tensors(model)
    for name, dims in edits.kept.items():
        shorter[id(own[name])] = narrowed(own[name], dims)
    try:
        for module in modules.values():
            for holder in (module._parameters, module._buffers):
                for name, tensor in holder.items():
                    if tensor is not None and id(tensor) in shorter:
                        tensors.append((holder, name, tensor))
                        holder[name] = shorter[id(tensor)]
        for path, changed in edits.attributes.items():
            own_values = modules[path].__dict__
            values.append((own_values, {name: own_values[name] for name in changed}))
            own_values.update(changed)
        handles += [modules[path].register_forward_hook(hook, prepend=True) for path, hook in edits.padded.items()]
        handles += [modules[path].register_forward_pre_hook(hook) for path, hook in edits.selected.items()]
        yield
    finally:
        for handle in handles:
            handle.remove()
        for own_values, before in values:
            own_values.update(before)
        for holder, name, tensor in tensors:
            holder[name] = tensor


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _only_projections(group: ChannelGroup) -> ChannelGroup:
    """The part of a group of rows inside heads that is cut: what else holds an entry for each row keeps them all."""
    members = tuple(member for member in group.members if member.role != "other")
    return ChannelGroup(group.name, group.axis, group.layer, group.blocks, group.size, members, group.parent)


def rigid_groups(model: nn.Module, groups: ChannelMap) -> dict[str, str]:
    """Groups that cannot be cut because of a module's code: what that does, by name of the group."""
    modules = dict(model.named_modules())
    found = {}
    for group in groups:
        if group.axis not in (*IN_HEAD, "heads"):
            continue
        holders = [member.tensor.rpartition(".")[0] for member in group.members]
        for path in (*group.owners, *holders, *(path.rpartition(".")[0] for path in holders)):
            kind = type(modules[path])
            if isinstance(modules[path], nn.MultiheadAttention):
                found[group.name] = f"nn.{kind.__name__} {counts.RIGID_MULTIHEAD}"
            # The names of some classes say only in their file which they are.
            for name in (kind.__name__, f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}"):
                if group.axis == "heads" and name in counts.RIGID_HEADS:
                    found[group.name] = f"{name} {counts.RIGID_HEADS[name]}"
    return found


def _refuse_rigid(model: nn.Module, groups: ChannelMap, widths: Widths) -> None:
    for name, reason in rigid_groups(model, groups).items():
        if name in widths:
            group = groups.by_name[name]
            raise SubnetworkError(
                f"{group.axis} cannot be cut at {name}: {reason}. Keep all {group.size} there by a list of widths, one "
                "for each group; SubnetworkSpec.uniform and from_budget do so."
            )


def _in_head_hooks(
    model: nn.Module, rows: Sequence[ChannelGroup], kept: Kept, outer: Kept, shapes: Mapping[str, Sequence[int]]
) -> tuple[dict[str, Padding], dict[str, Selection]]:
    owners, modules = Owners(model), dict(model.named_modules())
    padded, selected = {}, {}
    for group in rows:
        for member in group.members:
            if not member.is_matrix:
                continue
            path, _, leaf = member.tensor.rpartition(".")
            if leaf != "weight" or not owners.are_plain(member.tensor):
                raise SubnetworkError(
                    f"{group.axis} cannot be cut at {group.name}: {type(modules[path]).__name__} computes with "
                    f"{member.tensor} in a way of its own. Cut heads or ffn instead."
                )
            dim, length = member.dim, shapes[member.tensor][member.dim]
            around = outer.get(member.tensor, {}).get(dim, torch.arange(length))
            places = torch.searchsorted(around, kept[member.tensor][dim])
            axis = -1 - len(getattr(modules[path], "kernel_size", ()))
            if member.role == "producer":
                padded[path] = Padding(places, len(around), axis)
            else:
                selected[path] = Selection(places, axis)
    return padded, selected


def _layer_attributes(
    model: nn.Module, kept: Kept, shapes: Mapping[str, Sequence[int]]
) -> Iterator[tuple[str, str, Any]]:
    """New sizes of the layers whose weights get shorter."""
    first = {id(tensor): name for name, tensor in _tensors(model).items()}
    for path, module in model.named_modules():
        for own in (*module._parameters.items(), *module._buffers.items()):
            name = first.get(id(own[1]), "")
            if name not in kept:
                continue
            shape = shapes[name]
            for attribute, value in vars(module).items():
                if attribute == "normalized_shape" and list(value) == list(shape):
                    yield path, attribute, (len(kept[name][0]),) if len(shape) == 1 else value
                dim = counts.LAYER_SIZES.get(attribute)
                if dim is not None and dim < len(shape) and dim in kept[name] and value == shape[dim]:
                    yield path, attribute, len(kept[name][dim])


def _unit_attributes(
    model: nn.Module, groups: ChannelMap, widths: Widths, outer: Kept, shapes: Mapping[str, Sequence[int]]
) -> Iterator[tuple[str, str, Any]]:
    """New counts in the modules that attend, and that hold neurons, experts and the residual stream."""
    modules = dict(model.named_modules())
    configs: dict[str, Any] = {}
    for group in groups:
        if group.name not in widths or group.axis in IN_HEAD:
            continue
        holders = [member.tensor.rpartition(".")[0] for member in group.members]
        # The loss that keeps experts busy counts them in the model itself.
        around = [path for owner in group.owners for path in _above(owner)] if group.axis == "experts" else []
        if group.axis == "ffn":
            around = [path for path in (owner.rpartition(".")[0] for owner in group.owners) if path.endswith("experts")]
        changes = _counts(group, groups, widths, outer, shapes)
        for path in dict.fromkeys((*group.owners, *holders, *around)):
            if group.axis == "heads" and type(modules[path]).__name__ in counts.READ_CONFIG:
                config = configs.setdefault(path, copy.copy(modules[path].config))
                for names, before, after in changes:
                    for name in names:
                        if getattr(config, name, None) == before:
                            setattr(config, name, after)
                yield path, "config", config
            for names, before, after in changes:
                for name in names:
                    value = vars(modules[path]).get(name)
                    if isinstance(value, int) and not isinstance(value, bool) and value == before:
                        yield path, name, after


def _above(path: str) -> Iterator[str]:
    """The paths of the modules around a module."""
    while path:
        path = path.rpartition(".")[0]
        yield path


def _counts(
    group: ChannelGroup, groups: ChannelMap, widths: Widths, outer: Kept, shapes: Mapping[str, Sequence[int]]
) -> list[tuple[tuple[str, ...], int, int]]:
    """Names, old and new value of what a group's cut changes."""
    width = widths[group.name]
    if group.axis == "ffn":
        return [(counts.NEURONS, group.size, width)]
    if group.axis == "experts":
        return [(counts.EXPERTS, group.channels, group.blocks * width)]
    if group.axis == "hidden":
        return [(counts.STREAM, group.size, width)]
    if group.parent is None and cut_of(group) == "query_heads":
        # All query heads share the one key-value head, which is no group.
        kv, shared = (1, 1), (group.size, width)
    else:
        heads = groups.by_name[group.parent] if group.parent else group
        inside = next((one for one in groups if one.axis == "heads" and one.parent == heads.name), None)
        kv = (heads.size, widths.get(heads.name, heads.size))
        shared = (1, 1) if inside is None else (inside.size, widths.get(inside.name, inside.size))
    found = [
        (counts.QUERY_HEADS, kv[0] * shared[0], kv[1] * shared[1]),
        (counts.KEY_VALUE_HEADS, *kv),
        (counts.HEADS_PER_GROUP, *shared),
    ]
    for member in group.members:
        if member.role == "consumer":
            before = shapes[member.tensor][member.dim]
            after = len(outer[member.tensor][member.dim])
            dim = before // (kv[0] * shared[0])
            found += [(counts.INNER_WIDTH, before, after), (counts.KEY_VALUE_WIDTH, kv[0] * dim, kv[1] * dim)]
    return found
