"""The callback on a CUDA device: mixed precision with and without a gradient scaler, and compilation."""

import pytest
import torch
from test_callback import losses, trained

from hf_spp import SPPCallback, SPPConfig

pytestmark = pytest.mark.gpu

# What the rounding of half precision moves the losses by, which are about 2.
BOUNDS = {"fp32": 2e-5, "compile": 2e-5, "bf16": 2e-2, "fp16": 2e-2}
ARGUMENTS = {"fp32": {}, "compile": {"torch_compile": True}, "bf16": {"bf16": True}, "fp16": {"fp16": True}}


@pytest.fixture(autouse=True)
def _device():
    if not torch.cuda.is_available():
        pytest.fail("the tests marked gpu need a CUDA device")


@pytest.mark.parametrize("precision", BOUNDS)
def test_losses_stay_the_same(precision, tmp_path):
    settings = {"use_cpu": False, "max_steps": 60, "save_strategy": "no", "eval_strategy": "no"}
    callback = SPPCallback(SPPConfig(metric="random", seed=3), strategy="steps", every=16)
    moved = trained(tmp_path / "moved", callback, **settings, **ARGUMENTS[precision])
    plain = trained(tmp_path / "plain", **settings, **ARGUMENTS[precision])
    assert next(moved.model.parameters()).is_cuda
    assert callback.reordering.changed
    scaler = moved.accelerator.scaler
    assert (scaler is not None and scaler.is_enabled()) == (precision == "fp16")
    assert losses(moved) == pytest.approx(losses(plain), abs=BOUNDS[precision])
    assert len(losses(moved)) == 60


def test_resumed_run_equals_the_uninterrupted_one(tmp_path):
    settings = {"use_cpu": False, "fp16": True, "max_steps": 12}
    schedule = {"strategy": "steps", "every": 4}
    whole = trained(tmp_path / "whole", SPPCallback(SPPConfig(metric="random"), **schedule), **settings)
    source = tmp_path / "whole" / "checkpoint-6"
    resumed = trained(
        tmp_path / "resumed", SPPCallback(SPPConfig(metric="random"), **schedule), resume=source, **settings
    )
    assert losses(resumed)[-6:] == pytest.approx(losses(whole)[-6:], abs=1e-3)
