"""What flows inside of modules that compute with their parameters themselves: experts and nn.MultiheadAttention."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from .channels import Member
from .saliency import channel_sums
from .watch import Owners, unpadded

_aten = torch.ops.aten
# The matrix products that linear layers and `@` end in, and where the first of their two factors stands.
_PRODUCTS = {_aten.mm.default: 0, _aten.bmm.default: 0, _aten.addmm.default: 1, _aten.baddbmm.default: 1}


@dataclass
class Flow:
    """Sum of squares of features over tokens that are no padding."""

    squares: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    tokens: int = 0

    def add(self, features: Tensor) -> None:
        """Add features of some tokens, `[..., tokens, features]`."""
        self.squares = self.squares + features.double().square().sum(-2).cpu()
        self.tokens += features.shape[-2]

    @property
    def energy(self) -> Tensor:
        """Mean square of every feature, `[..., features]`."""
        return self.squares / max(self.tokens, 1)


@dataclass(frozen=True)
class _Part:
    """The part of a parameter that is a factor of a product, `[..., summed, rest]`.

    Attributes:
        tensor: Name of the parameter.
        shape: Shape of the part.
        stride: Its strides.
        offset: Where it begins in the parameter.
    """

    tensor: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def places(self, rest: int) -> Tensor:
        """Place in the parameter's memory of all that is summed over, `[..., summed]`, at an index of the rest."""
        starts = torch.tensor(self.offset + rest * self.stride[-1])
        for length, step in zip(self.shape[:-1], self.stride[:-1], strict=True):
            starts = starts.unsqueeze(-1) + torch.arange(length) * step
        return starts


class InnerFlows(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches what parameters are multiplied with inside the modules that own them.

    Args:
        owners: The modules of each parameter.
        tensors: Names of the parameters.
        flow: Makes what adds up the features that a parameter is multiplied with.
    """

    def __init__(self, owners: Owners, tensors: Collection[str], flow: Callable[[], Any] = Flow) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.mask: Tensor | None = None
        """Which tokens of the batch are no padding, `[batch, tokens]`."""
        self._parameters = {name: owners.model.get_parameter(name).detach() for name in tensors}
        self._owned: dict[nn.Module, list[str]] = {}
        for name in tensors:
            for owner in owners.of(name):
                self._owned.setdefault(owner, []).append(name)
        self._flow = flow
        self._read: dict[_Part, Any] = {}
        self._written: dict[tuple[str, int], Flow] = {}
        self._tokens = dict.fromkeys(tensors, 0)
        # Of the run that is going on: the owner's parameters, and which rows are no padding.
        self._running: list[str] = []
        self._rows: Tensor | None = None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Watch every run of the owners inside the block."""
        own_forwards = {owner: vars(owner).get("forward") for owner in self._owned}
        try:
            for owner in self._owned:
                run: Callable[..., Any] = self._run_experts
                if isinstance(owner, nn.MultiheadAttention):
                    run = self._run_attention
                owner.forward = partial(run, owner, owner.forward)
            yield
        finally:
            for owner, forward in own_forwards.items():
                vars(owner).pop("forward", None)
                if forward is not None:
                    owner.forward = forward

    @contextmanager
    def _inside(self, owner: nn.Module, rows: Tensor | None = None) -> Iterator[None]:
        before = self._running, self._rows
        self._running, self._rows = self._owned[owner], rows
        try:
            with nullcontext() if before[0] else self:
                yield
        finally:
            self._running, self._rows = before

    def reached(self, tensor: str) -> bool:
        """Whether the owner of a parameter ran on any token."""
        return self._tokens[tensor] > 0

    def read_energy(self, member: Member) -> Tensor | None:
        """Mean square of what a member's parameter reads times the squared norm of the weights that read it.

        Where matrices are stacked, as those of experts, the mean is over all tokens that reached any of them. Of a
        member whose channels are whole matrices it is the sum over what each reads.

        Returns:
            As `Member.take_channels` wants it; None if the parameter was never seen in a product that sums over the
            member's channels.
        """
        parameter, found = self._parameters[member.tensor], False
        length, step = parameter.shape[member.dim], parameter.stride(member.dim)
        total = torch.zeros(parameter.shape[0] if member.stacked else 1, length, dtype=torch.float64)
        for part, flow in self._read.items():
            places = part.places(0)
            channels = places // step % length
            # Every weight of what is summed over belongs to the same channel.
            last = part.places(part.shape[-1] - 1) // step % length
            if part.tensor != member.tensor or not channels.equal(last):
                continue
            found = True
            weights = parameter.as_strided(part.shape, part.stride, part.offset + parameter.storage_offset())
            norms = channel_sums(weights, weights.dim() - 2, power=2, stacked=weights.dim() == 3)
            # One expert of several sees some of the tokens.
            is_entry = weights.dim() == 2 and weights.numel() < parameter.numel() and not self._in_attention(member)
            energy = (flow.squares / self._tokens[member.tensor] if is_entry else flow.energy) * norms
            entries = places // parameter.stride(0) if member.stacked else torch.zeros_like(places)
            total.index_put_((entries, channels), energy, accumulate=True)
        return (total if member.stacked else total[0]) if found else None

    def _in_attention(self, member: Member) -> bool:
        return any(isinstance(o, nn.MultiheadAttention) for o, names in self._owned.items() if member.tensor in names)

    def written_energy(self, member: Member) -> Tensor | None:
        """Mean square of what an input projection of nn.MultiheadAttention writes, `[rows]`; None if it never ran."""
        flows = [flow for (name, _), flow in sorted(self._written.items()) if name == member.tensor]
        return torch.cat([flow.energy for flow in flows]) if flows else None

    def seen(self, member: Member) -> Iterator[tuple[list[int], Any]]:
        """What parts of a stacked parameter read over a member's channels: the entries of the stack, and the flow."""
        parameter = self._parameters[member.tensor]
        length, step = parameter.shape[member.dim], parameter.stride(member.dim)
        for part, flow in self._read.items():
            places = part.places(0)
            channels = places // step % length
            if part.tensor == member.tensor and channels.equal(part.places(part.shape[-1] - 1) // step % length):
                yield sorted(set((places // parameter.stride(0)).flatten().tolist())), flow

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _PRODUCTS:
            left, right = args[_PRODUCTS[function] :][:2]
            self._see(right, left)
            self._see(left.transpose(-1, -2), right.transpose(-1, -2))
        return function(*args, **(kwargs or {}))

    def _see(self, weights: Tensor, features: Tensor) -> None:
        """Note the features that a factor is multiplied with, if it is a part of a watched parameter."""
        for name in self._running:
            parameter = self._parameters[name]
            start = weights.storage_offset() - parameter.storage_offset()
            if (
                weights.untyped_storage().data_ptr() != parameter.untyped_storage().data_ptr()
                or not parameter.is_contiguous()
                or not 0 <= start < parameter.numel()
            ):
                continue
            if self._rows is not None and features.shape[-2] == len(self._rows):
                features = features[..., self._rows.to(features.device), :]
            part = _Part(name, tuple(weights.shape), weights.stride(), int(start))
            self._read.setdefault(part, self._flow()).add(features)

    def _run_experts(self, owner: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run experts under watch; as they treat tokens one by one, padding is not counted by leaving it away."""
        states = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        keep = self._unpadded_rows(owner, states)
        rows = states.shape[:-1].numel() if keep is None else int(keep.sum())
        for name in self._owned[owner]:
            self._tokens[name] += rows
        if keep is None:
            with self._inside(owner):
                return forward(*args, **kwargs)
        weights = {parameter.untyped_storage().data_ptr() for parameter in owner.parameters()}

        def select(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.untyped_storage().data_ptr() in weights:
                return value
            if value.shape[:2] == keep.shape:
                return value[keep].unsqueeze(0)
            return value[keep.flatten()] if value.dim() > 0 and len(value) == keep.numel() else value

        with self._inside(owner):
            forward(*map(select, args), **{name: select(value) for name, value in kwargs.items()})
        return forward(*args, **kwargs)

    def _unpadded_rows(self, owner: nn.Module, states: Tensor) -> Tensor | None:
        """Which rows of what experts get are no padding; None if all are, or if rows are not the batch's tokens."""
        if self.mask is None or bool(self.mask.all()):
            return None
        mask = self.mask.to(states.device)
        if states.shape[:-1] == mask.shape:
            return mask
        experts = len(self._parameters[self._owned[owner][0]])
        # Every token, or every token once for each expert.
        times = states.shape[0] // mask.numel()
        return mask.flatten().repeat(times) if states.shape[0] in (mask.numel(), experts * mask.numel()) else None

    def _run_attention(
        self, owner: nn.MultiheadAttention, forward: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor,
        *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Run nn.MultiheadAttention under watch; inside, rows are tokens first, then samples."""
        tokens_first = query.dim() == 3 and not owner.batch_first
        shape = query.shape[1::-1] if tokens_first else query.shape[:-1]
        rows = self.mask.t().flatten() if self.mask is not None and self.mask.shape == shape else None
        with self._inside(owner, rows):
            output = forward(query, key, value, *args, **kwargs)
        flows = [one.transpose(0, 1) if tokens_first else one for one in (query, key, value)]
        for (name, part), weight, bias, features in zip(*_projections(owner), flows, strict=True):
            for tensor in self._owned[owner]:
                if tensor.endswith(f".{name}"):
                    written = functional.linear(features, weight, bias)
                    self._written.setdefault((tensor, part), Flow()).add(unpadded(written, self.mask))
        for name in self._owned[owner]:
            self._tokens[name] += query.shape[:-1].numel()
        return output


def _projections(attention: nn.MultiheadAttention) -> tuple[list[tuple[str, int]], list[Tensor], list[Tensor | None]]:
    """Name and place, weight and bias of the projections of q, k and v."""
    weights: list[Tensor]
    if attention.in_proj_weight is None:
        names = [(f"{one}_proj_weight", 0) for one in "qkv"]
        weights = [getattr(attention, name) for name, _ in names]
    else:
        names = [("in_proj_weight", part) for part in range(3)]
        weights = list(attention.in_proj_weight.chunk(3))
    bias = attention.in_proj_bias
    return names, weights, [None] * 3 if bias is None else list(bias.chunk(3))
