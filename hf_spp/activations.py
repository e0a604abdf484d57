"""The metric `activation`: the energy of what flows through a channel, and of the weights that read it."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .channels import ChannelGroup, Member
from .errors import CalibrationError
from .forward import run_model
from .products import Flow, InnerFlows
from .saliency import channel_sums
from .watch import Owners, Point, is_idle_expert, module_hooks, point_of, token_mask, unpadded, watched_members


class ActivationWatch:
    """Mean squares of what flows through the channels of some groups.

    Args:
        model: The model.
        groups: The groups to watch.
    """

    def __init__(self, model: PreTrainedModel, groups: Iterable[ChannelGroup]) -> None:
        self.model, self._owners = model, Owners(model)
        self._mask: Tensor | None = None
        points = {point_of(member) for group in groups for member in watched_members(group)}
        self._flows: dict[Point, Flow] = defaultdict(Flow)
        self._points = {point for point in points if self._owners.are_plain(point.tensor)}
        self._inner = InnerFlows(self._owners, sorted({point.tensor for point in points - self._points}))

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Watch every run of the model inside the block."""
        with module_hooks(self._owners, self._points, self._see), self._inner.attached():
            yield

    @torch.no_grad()
    def run(self, batch: Mapping[str, Any]) -> None:
        """Run the model on a batch and add up what flows."""
        self._mask = self._inner.mask = token_mask(self.model, batch)
        run_model(self.model, batch)

    def _see(self, point: Point, features: Tensor) -> Tensor:
        self._flows[point].add(unpadded(features.detach(), self._mask))
        return features

    def scores(self, group: ChannelGroup) -> Tensor:
        """Scores of a group's channels, `[blocks, size]`.

        Raises:
            CalibrationError: What flows through the group was not seen.
        """
        members = watched_members(group)
        energies = {member: self._energy(member, group) for member in members}
        seen = [member.take_channels(e, group).sum(-1).sqrt() for member, e in energies.items() if e is not None]
        reads = members[0].role == "consumer"
        # A layer that never ran reads nothing; of queries without keys no product can be made.
        if not seen or not (reads or len(seen) == len(members)):
            if is_idle_expert(group, (point.tensor for point in self._flows)):
                return torch.zeros(group.blocks, group.size, dtype=torch.float64)
            raise CalibrationError(
                f"No activation reached group {group.name} on the calibration data. Give batches that run this part of "
                "the model, leave it out by SPPConfig(towers=...), or choose a weight-only metric: l1, l2."
            )
        return torch.stack(seen).mean(0) if reads else torch.stack(seen).prod(0)

    def _energy(self, member: Member, group: ChannelGroup) -> Tensor | None:
        """Mean square of each channel, times the squared norm of what reads it; None if nothing reached it."""
        point, parameter = point_of(member), self.model.get_parameter(member.tensor).detach()
        if point in self._points:
            if point not in self._flows:
                return None
            energy = self._flows[point].energy
            return energy * channel_sums(parameter, point.dim, power=2) if point.reads else energy
        if not self._inner.reached(member.tensor):
            return None
        found = self._inner.read_energy(member) if point.reads else self._inner.written_energy(member)
        if found is None:
            owner = type(self._owners.of(member.tensor)[0]).__name__
            raise CalibrationError(
                f"What flows through group {group.name} cannot be watched: {owner} computes with {member.tensor} in a "
                "way of its own. Use metric 'taylor', or a weight-only one: l1, l2."
            )
        return found
