import pytest
import torch
from torch import distributed
from torch.multiprocessing.spawn import spawn

from hf_spp import RanksDisagreeError
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
    distributed.destroy_process_group()


@pytest.mark.distributed
@pytest.mark.parametrize("case", ["rounding", "shapes", "failure", "values"])
def test_two_processes_agree_or_both_stop(case, tmp_path):
    spawn(run, (str(tmp_path / "store"), case), nprocs=2)
