"""Several processes: tensors that are divided among them, and agreement on what to do.

FSDP's tensors are DTensors, DeepSpeed's are reached through its own functions. Reading and writing one is collective:
every process does it, in the same order, and holds one whole tensor at a time.
"""

import hashlib
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor, distributed, nn

from .errors import RanksDisagreeError


class ZeroTensor:
    """A tensor that DeepSpeed's ZeRO has divided: a parameter, its float32 master copy, or an optimizer's state of it.

    Args:
        parameter: The parameter that it is or belongs to.
        kind: `parameter`, `master`, or the name of an optimizer's state.
    """

    def __init__(self, parameter: nn.Parameter, kind: str = "parameter") -> None:
        self.parameter, self.kind = parameter, kind

    @property
    def shape(self) -> torch.Size:
        """The shape of the whole tensor."""
        return torch.Size(getattr(self.parameter, "ds_shape", self.parameter.shape))

    def read(self) -> Tensor:
        """All values."""
        from deepspeed import utils, zero

        if self.kind == "parameter":
            with zero.GatheredParameters([self.parameter]):
                return self.parameter.detach().clone()
        if self.kind == "master":
            values: Tensor = utils.safe_get_full_fp32_param(self.parameter)
        else:
            values = utils.safe_get_full_optimizer_state(self.parameter, self.kind)
        return values.view(self.shape)

    def write(self, values: Tensor) -> None:
        """Write all values, the same in every process."""
        from deepspeed import utils, zero

        if self.kind == "parameter":
            with zero.GatheredParameters([self.parameter], modifier_rank=0):
                self.parameter.data.copy_(values)
        elif hasattr(self.parameter, "ds_shape"):
            part = self._own_part(values)
            if self.kind == "master":
                utils.safe_set_local_fp32_param(self.parameter, part)
            else:
                utils.safe_set_local_optimizer_state(self.parameter, part, self.kind)
        elif self.kind == "master":
            utils.safe_set_full_fp32_param(self.parameter, values)
        else:
            utils.safe_set_full_optimizer_state(self.parameter, values, self.kind)

    def _own_part(self, values: Tensor) -> Tensor:
        """This process's part; DeepSpeed's own cut of whole values fails where the last part is filled up."""
        size = self.parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
        start = distributed.get_rank(self.parameter.ds_process_group) * size  # type: ignore[attr-defined]
        part = values.flatten()[start : start + size]
        return nn.functional.pad(part, (0, size - part.numel()))


AnyTensor = Tensor | ZeroTensor


def values_of(parameter: nn.Parameter) -> Any:
    """What holds a parameter's values: its data, or DeepSpeed's parts of it."""
    # Under `plain_structure` a stand-in has its place.
    parameter = getattr(parameter, "stands_for", parameter)
    return ZeroTensor(parameter) if hasattr(parameter, "ds_shape") else parameter.data


def is_whole(tensor: AnyTensor) -> TypeGuard[Tensor]:
    """Whether every value of a tensor lies in this process."""
    return not isinstance(tensor, ZeroTensor) and not _is_dtensor(tensor)


def whole(tensor: AnyTensor) -> Tensor:
    """All values of a tensor; those of a divided one are gathered from all processes into a copy."""
    if isinstance(tensor, ZeroTensor):
        return tensor.read()
    return tensor.full_tensor() if _is_dtensor(tensor) else tensor


def is_plain_tensor(tensor: Tensor) -> bool:
    """Whether a tensor is of no subclass that keeps its values in another form."""
    return type(tensor) in (Tensor, torch.nn.Parameter) or _is_dtensor(tensor)


def local_part(tensor: AnyTensor, moved: Collection[int]) -> Tensor | None:
    """What this process holds of a tensor, None if a dimension of `moved` is divided among processes."""
    if isinstance(tensor, ZeroTensor):
        return None
    if not _is_dtensor(tensor):
        return tensor
    divided = {placement.dim for placement in tensor.placements if not placement.is_replicate()}
    return None if divided.intersection(moved) else tensor.to_local()


@torch.no_grad()
def write_whole(tensor: Any, values: Tensor) -> None:
    """Write all values of a divided tensor, each process its part.

    Args:
        tensor: A tensor that is divided among processes.
        values: Its new values, the same in every process.
    """
    if isinstance(tensor, ZeroTensor):
        tensor.write(values)
        return
    dtensors: Any = sys.modules["torch.distributed.tensor"]
    replicated = [dtensors.Replicate()] * tensor.device_mesh.ndim
    values = dtensors.DTensor.from_local(values, tensor.device_mesh, replicated, run_check=False)
    tensor.to_local().copy_(values.redistribute(placements=tensor.placements).to_local())  # type: ignore[attr-defined]


def agree(find: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Let every process of a run have the same tensors: those that the first one finds.

    What each found is compared by name and shape, so that a process with another model, or one that failed, stops all.

    Args:
        find: Finds the tensors in this process; what it raises is raised.

    Raises:
        RanksDisagreeError: A process found tensors of other names or shapes, or failed.
    """
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return find()
    found, failure = {}, None
    try:
        found = find()
    except Exception as error:  # the others must not wait for this process for ever
        failure = error
    first: list[Any] = [None if failure is not None else {name: one.cpu() for name, one in found.items()}]
    distributed.broadcast_object_list(first, src=0)
    shapes = hashlib.sha256(repr(sorted((name, tuple(one.shape)) for name, one in found.items())).encode())
    states: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(states, repr(failure) if failure is not None else shapes.hexdigest())
    if failure is not None:
        raise failure
    if first[0] is None or len(set(states)) > 1:
        raise RanksDisagreeError(
            f"Process {distributed.get_rank()} of {len(states)} would reorder other channels than another one: "
            f"{', '.join(f'{rank}: {state[:80]}' for rank, state in enumerate(states))}. Every process needs the same "
            "model, the same weights and the same settings. Nothing was moved."
        )
    agreed: dict[str, Tensor] = first[0]
    return agreed


def check_agreed(name: str, tensors: Mapping[str, Tensor]) -> None:
    """Check that every process of a run holds the same tensors, by one small exchange of their hash.

    Raises:
        RanksDisagreeError: They differ.
    """
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return
    total = hashlib.sha256()
    for key in sorted(tensors):
        total.update(key.encode())
        total.update(tensors[key].cpu().contiguous().numpy().tobytes())
    hashes: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(hashes, total.hexdigest())
    if len(set(hashes)) > 1:
        raise RanksDisagreeError(
            f"The processes hold different {name}: {', '.join(f'{rank}: {one[:8]}' for rank, one in enumerate(hashes))}"
            ". Every process needs the same model, the same weights and the same settings. Nothing was moved."
        )


def _is_dtensor(tensor: Tensor) -> TypeGuard[Any]:
    # Where nobody imported the module, no tensor is of its class.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)
