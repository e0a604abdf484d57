"""Where channels can be watched while a model runs: at the modules that read and write them, or inside of others."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from .channels import ChannelGroup, Member
from .errors import CalibrationError

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Point:
    """A dimension of a parameter, and whether it reads the channels that flow there or writes them."""

    tensor: str
    dim: int
    reads: bool


def point_of(member: Member) -> Point:
    """Where the channels of a member flow."""
    return Point(member.tensor, member.dim, member.role == "consumer")


def watched_members(group: ChannelGroup) -> tuple[Member, ...]:
    """The members whose channels say how salient they are: those that read them, else those that write them."""
    matrices = group.scored_members
    return tuple(m for m in matrices if m.role == "consumer") or tuple(m for m in matrices if m.role == "producer")


class Owners:
    """Which modules compute with each parameter of a model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._modules: dict[int, list[nn.Module]] = defaultdict(list)
        modules = dict(model.named_modules())
        for path, module in modules.items():
            around = modules[path.rpartition(".")[0]]
            # The one never calls its output projection, the others hand out tokens to what is inside of them.
            computes = isinstance(around, nn.MultiheadAttention) or (
                path.rpartition(".")[0].endswith("experts") and "weight" not in module._parameters
            )
            owner = around if computes else module
            for parameter in module._parameters.values():
                self._modules[id(parameter)].append(owner)

    def of(self, tensor: str) -> list[nn.Module]:
        """The modules that compute with a parameter, several where it is tied."""
        return self._modules[id(self.model.get_parameter(tensor))]

    def are_plain(self, tensor: str) -> bool:
        """Whether the channels of a parameter are what its modules get or give, not something in between."""
        owners, parameter = self.of(tensor), self.model.get_parameter(tensor)
        matrix = parameter.dim() == 2 or isinstance(owners[0], _CONVOLUTIONS)
        return matrix and all(owner._parameters.get("weight") is parameter for owner in owners)


@contextmanager
def module_hooks(owners: Owners, points: Iterable[Point], see: Callable[[Point, Tensor], Tensor]) -> Iterator[None]:
    """Show features to a watch while the block runs, and hand on what it gives back.

    Args:
        owners: The modules of each parameter.
        points: Points of parameters whose channels are what their modules get or give.
        see: Gets the point and its features, `[..., channels]`.
    """
    handles: list[RemovableHandle] = []
    try:
        for point in sorted(points, key=lambda point: (point.tensor, point.reads)):
            channels = owners.model.get_parameter(point.tensor).shape[point.dim]
            handles += [_hook(owner, point, channels, see) for owner in owners.of(point.tensor)]
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(module: nn.Module, point: Point, channels: int, see: Callable[[Point, Tensor], Tensor]) -> RemovableHandle:
    axis = -1 - len(module.kernel_size) if isinstance(module, _CONVOLUTIONS) else -1

    def watched(features: Any) -> Tensor:
        if not isinstance(features, Tensor) or features.dim() < -axis or features.shape[axis] != channels:
            given = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise CalibrationError(
                f"The {'input' if point.reads else 'output'} of {type(module).__name__} around {point.tensor} is "
                f"{given}; its {channels} channels are no dimension of that, so what flows there cannot be watched. "
                "Choose a weight-only metric: l1, l2."
            )
        return see(point, features.movedim(axis, -1)).movedim(-1, axis)

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (watched(args[0]), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: watched(kwargs[name])}

    if point.reads:
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(lambda _, args, output: watched(output))


def is_idle_expert(group: ChannelGroup, seen: Iterable[str]) -> bool:
    """Whether a group is part of an expert that no token reached, while tokens reached others beside it.

    Args:
        group: A group that nothing reached.
        seen: Names of the parameters that something reached.
    """
    stacks = {
        found[0] for member in group.members if (found := re.match(r"(.*\.)?experts\.(?=[^.]+\.)", member.tensor))
    }
    return bool(stacks) and any(name.startswith(tuple(stacks)) for name in seen)


def token_mask(model: PreTrainedModel, batch: Mapping[str, Any]) -> Tensor | None:
    """Which tokens are no padding, `[batch, tokens]`, as far as the batch says.

    In an encoder-decoder the mask is the encoder's only, and lengths cannot tell the two streams apart.
    """
    mask = batch.get("attention_mask")
    if (
        not isinstance(mask, Tensor)
        or mask.dim() != 2
        or getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    ):
        return None
    return mask.bool()


def unpadded(features: Tensor, mask: Tensor | None) -> Tensor:
    """Features of every token that is no padding, `[tokens, features]`."""
    if mask is not None and features.shape[:-1] in (mask.shape, (mask.numel(),)):
        mask = mask.to(features.device)
        return features[mask if features.dim() == 3 else mask.flatten()]
    return features.reshape(-1, features.shape[-1])
