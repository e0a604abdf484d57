import weakref

import pytest
import torch
from conftest import build_model
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import spawn

from hf_spp import RanksDisagreeError, SPPConfig, apply, apply_spp, saliency
from hf_spp.processes import agree, check_agreed, is_plain_tensor, is_whole, whole


def test_one_process_agrees_with_itself():
    found = {"a": torch.arange(3)}
    assert agree(lambda: found) is found
    check_agreed("orders", found)
    assert is_whole(found["a"])
    assert is_plain_tensor(found["a"])
    assert whole(found["a"]) is found["a"]


def run(rank, file, case):
    distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    values = torch.arange(4.0) + rank / 1000
    if case == "rounding":
        found = agree(lambda: {"a": values})
        assert torch.equal(found["a"], torch.arange(4.0))
        check_agreed("orders", found)
    elif case == "shapes":
        with pytest.raises(RanksDisagreeError, match="would reorder other channels"):
            agree(lambda: {"a": values[: 4 - rank]})
    elif case == "failure":
        # The one that failed says why, the other does not wait for it.
        with pytest.raises(ZeroDivisionError if rank == 1 else RanksDisagreeError):
            agree(lambda: {"a": values / (1 // (1 - rank))})
    elif case == "values":
        with pytest.raises(RanksDisagreeError, match="hold different orders"):
            check_agreed("orders", {"a": values})
    elif case == "memory":
        move_shards()
    distributed.destroy_process_group()


def move_shards():
    """Reorder a model that FSDP2 has divided, and look how many of its tensors are whole at a time."""
    model, expected = build_model("vit").double(), build_model("vit").double()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    alive, most = [], 0

    def watched(tensor):
        nonlocal most
        found = whole(tensor)
        if not is_whole(tensor):
            alive.append(weakref.ref(found))
            most = max(most, sum(one() is not None for one in alive))
        return found

    for module in (apply, saliency):
        module.whole = watched
    config = SPPConfig(axes=("qk", "vo", "heads", "ffn", "hidden"), metric="l1")
    apply_spp(model, config)
    apply_spp(expected, config)
    assert len(alive) > 20
    assert most == 1
    for name, parameter in expected.named_parameters():
        assert torch.equal(model.get_parameter(name).full_tensor(), parameter)


@pytest.mark.distributed
@pytest.mark.parametrize("case", ["rounding", "shapes", "failure", "values", "memory"])
def test_two_processes_agree_or_both_stop(case, tmp_path):
    spawn(run, (str(tmp_path / "store"), case), nprocs=2)
