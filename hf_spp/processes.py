"""Several processes: tensors that are divided among them, and agreement on what to do.

FSDP's tensors are DTensors. Reading and writing one is collective: every process does it, in the same order, and holds
one whole tensor at a time.
"""

import hashlib
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor, distributed

from .errors import RanksDisagreeError


def is_whole(tensor: Tensor) -> bool:
    """Whether every value of a tensor lies in this process."""
    return not _is_dtensor(tensor)


def whole(tensor: Tensor) -> Tensor:
    """All values of a tensor; those of a divided one are gathered from all processes into a copy."""
    return tensor.full_tensor() if _is_dtensor(tensor) else tensor


def is_plain_tensor(tensor: Tensor) -> bool:
    """Whether a tensor is of no subclass that keeps its values in another form."""
    return type(tensor) in (Tensor, torch.nn.Parameter) or _is_dtensor(tensor)


def local_part(tensor: Tensor, moved: Collection[int]) -> Tensor | None:
    """What this process holds of a tensor, None if a dimension of `moved` is divided among processes."""
    if not _is_dtensor(tensor):
        return tensor
    divided = {placement.dim for placement in tensor.placements if not placement.is_replicate()}
    return None if divided.intersection(moved) else tensor.to_local()


@torch.no_grad()
def write_whole(tensor: Tensor, values: Tensor) -> None:
    """Write all values of a divided tensor, each process its part.

    Args:
        tensor: A tensor that is divided among processes.
        values: Its new values, the same in every process.
    """
    distributed = sys.modules["torch.distributed.tensor"]
    replicated = [distributed.Replicate()] * tensor.device_mesh.ndim  # type: ignore[attr-defined]
    values = distributed.DTensor.from_local(values, tensor.device_mesh, replicated, run_check=False)  # type: ignore[attr-defined]
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
