"""Orders: sorting channels by score, checking, composing and inverting orders, and turning them into gather indices.

An order of a group is `[blocks, size]`, int64: entry `[b, i]` is the channel of the original block `b` that comes to
rank `i`. Blocks are named by their original place even when another group moves them, so every order reads on its own.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .channels import ChannelGroup, Member
from .errors import OrdersError

Orders = Mapping[str, Tensor]


def salient_order(scores: Tensor) -> Tensor:
    """Order channels from most to least salient inside each block.

    Equal scores keep their original order.

    Args:
        scores: Saliency per channel, `[blocks, size]`, float, unit-free.

    Returns:
        Channel indices, `[blocks, size]`, int64, on the CPU.

    Reference:
        Salient parameter prioritization, arXiv:2310.00247.
    """
    return torch.sort(scores.detach().cpu(), dim=-1, descending=True, stable=True).indices


def identity_orders(groups: Iterable[ChannelGroup]) -> dict[str, Tensor]:
    """The orders that move nothing."""
    return {group.name: torch.arange(group.size).repeat(group.blocks, 1) for group in groups}


def moved_channels(order: Tensor) -> int:
    """How many channels of an order do not keep their place."""
    return int((order != torch.arange(order.shape[-1])).sum())


def kendall_tau(orders: Orders) -> float:
    """How far orders keep channels as they are: 1 if none moves, -1 if all are reversed, about 0 by chance.

    The mean of Kendall's tau between an order and staying in place, over all blocks of all groups, weighted by their
    numbers of channel pairs; `(1 - tau) / 2` is the share of pairs that change places.
    """
    # Slow to import, and only needed where somebody asks.
    from scipy.stats import kendalltau

    total = pairs = 0.0
    for order in orders.values():
        size = order.shape[-1]
        for block in order.numpy():
            total += float(kendalltau(block, range(size)).statistic) * size * (size - 1)
            pairs += size * (size - 1)
    return total / pairs


def check_orders(groups: Iterable[ChannelGroup], orders: Orders) -> None:
    """Check that orders fit the groups of a model and are permutations.

    Raises:
        OrdersError: An order has no group here, a shape differs, or an order is no permutation.
    """
    by_name = {group.name: group for group in groups}
    for name in orders:
        if name not in by_name:
            known = ", ".join(list(by_name)[:3])
            raise OrdersError(
                f"The order of {name!r} belongs to another model: this one has the groups {known}, … . "
                "Use the orders that were saved with this checkpoint."
            )
    for name, order in orders.items():
        group = by_name[name]
        if tuple(order.shape) != (group.blocks, group.size) or order.dtype != torch.int64:
            raise OrdersError(
                f"The order of {name!r} is {order.dtype} {list(order.shape)}; this model needs torch.int64 "
                f"[{group.blocks}, {group.size}]. Use the orders that were saved with this checkpoint."
            )
        if not torch.equal(order.sort(dim=-1).values, torch.arange(group.size).expand(group.blocks, -1)):
            raise OrdersError(
                f"The order of {name!r} is no permutation of 0…{group.size - 1} in every block. "
                "The file is damaged; download or save it again."
            )


def compose_orders(groups: Iterable[ChannelGroup], first: Orders, second: Orders) -> dict[str, Tensor]:
    """The single reordering that equals `first` followed by `second`.

    Args:
        groups: The groups that the orders belong to; a group missing in either is left in place there.
        first: Orders applied to the original model.
        second: Orders applied to what `first` made, in terms of the places after it.

    Returns:
        Orders in terms of the original model, for every group in either.
    """
    groups = [group for group in groups if group.name in first or group.name in second]
    stay = identity_orders(groups)
    before, after = {**stay, **first}, {**stay, **second}
    composed = {}
    for group in groups:
        own, then = before[group.name], after[group.name]
        block_at = _blocks_after(group, before)
        total = torch.empty_like(own)
        total[block_at] = own[block_at].gather(1, then)
        composed[group.name] = total
    return composed


def scores_before(groups: Iterable[ChannelGroup], orders: Orders, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scores of channels at the places that `orders` brought them to, at their original places.

    Args:
        groups: The groups that the scores belong to.
        orders: What had moved; a group missing in it stayed in place.
        scores: Scores by place after `orders`, `[blocks, size]`.
    """
    before = {}
    for group in groups:
        own = orders.get(group.name, torch.arange(group.size).repeat(group.blocks, 1))
        block_at = _blocks_after(group, orders)
        original = torch.empty_like(scores[group.name])
        original[block_at] = torch.empty_like(original).scatter_(1, own[block_at], scores[group.name])
        before[group.name] = original
    return before


def invert_orders(groups: Iterable[ChannelGroup], orders: Orders) -> dict[str, Tensor]:
    """The orders that bring channels back to where they were before `orders`."""
    inverse = {}
    for group in groups:
        if group.name in orders:
            inverse[group.name] = orders[group.name][_blocks_after(group, orders)].argsort(dim=-1)
    return inverse


def gather_indices(
    groups: Iterable[ChannelGroup], orders: Orders, shapes: Mapping[str, torch.Size]
) -> dict[str, dict[int, Tensor]]:
    """One gather index per tensor dimension, composed over all groups that move it.

    Args:
        groups: Blocks before the groups that move those blocks, as a `ChannelMap` iterates.
        orders: An order for each group that moves.
        shapes: Shape of every member tensor, by name.

    Returns:
        Per tensor and dimension the index `[length]`, int64, for which `new = old.index_select(dim, index)`. Where
        every entry of the first dimension moves on its own, the index is `[entries, length]` and comes before that of
        the first dimension. Dimensions that stay as they are, are left out.
    """
    indices: dict[str, dict[int, Tensor]] = {}
    for group in groups:
        order = orders.get(group.name)
        if order is None or moved_channels(order) == 0:
            continue
        for member in group.members:
            index = _gather_index(group, member, order, shapes[member.tensor])
            dims = indices.setdefault(member.tensor, {})
            dims[member.dim] = _compose(dims[member.dim], index) if member.dim in dims else index
    return indices


def _gather_index(group: ChannelGroup, member: Member, order: Tensor, shape: torch.Size) -> Tensor:
    length = shape[member.dim]
    places = member.positions(length, group).expand(len(order), -1, -1)
    moved = places.gather(1, order.unsqueeze(-1).expand_as(places))
    if member.stacked:
        index = torch.arange(length).repeat(len(order), 1)
        index.scatter_(1, places.flatten(1), moved.flatten(1))
        return index.repeat_interleave(shape[0] // len(order), dim=0)
    index = torch.arange(length)
    index[places.flatten()] = moved.flatten()
    return index


def _compose(first: Tensor, second: Tensor) -> Tensor:
    """The index that gathers by `first` and then by `second`, either of them per entry of the first dimension."""
    if first.dim() == second.dim() == 1:
        return first[second]
    entries = max(first.shape[0] if first.dim() == 2 else 1, second.shape[0] if second.dim() == 2 else 1)
    return first.expand(entries, -1).gather(1, second.expand(entries, -1))


def _blocks_after(group: ChannelGroup, orders: Orders) -> Tensor:
    """Which original block lies at each place after `orders`, `[blocks]`."""
    if group.parent is None or group.parent not in orders:
        return torch.arange(group.blocks)
    parent = orders[group.parent]
    return (parent + torch.arange(len(parent)).unsqueeze(1) * parent.shape[-1]).flatten()
