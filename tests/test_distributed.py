"""Reordering in the middle of training on several processes, and with what Trainer can switch on, changes no loss."""

import pytest
import torch
from launching import run_training

from hf_spp import Reordering

pytestmark = pytest.mark.distributed

STEPS = 60
CALLBACK = {"config": {"metric": "random", "seed": 3}, "strategy": "steps", "every": 16}
FEATURES = {
    "accumulation": {"arguments": {"gradient_accumulation_steps": 2}},
    "activation-checkpointing": {"arguments": {"activation_checkpointing": True}},
    "compile": {"arguments": {"torch_compile": True}},
}


def losses(setup, folder, **settings):
    found = run_training(setup, folder, steps=STEPS, **settings)
    assert len(found["losses"]) == STEPS
    return torch.tensor(found["losses"], dtype=torch.float64), found


def differences(setup, folder, *, control=False, **settings):
    """Largest difference of a loss to that of a run without reorderings, and without moving what goes along."""
    plain, _ = losses(setup, folder / "plain", **settings)
    moved, found = losses(setup, folder / "moved", callback=CALLBACK, **settings)
    left = losses(setup, folder / "left", callback=CALLBACK, leave_behind=True, **settings)[0] if control else plain
    return float((moved - plain).abs().max()), float((left - plain).abs().max()), found


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_ddp(dtype, tmp_path):
    moved, left, found = differences("ddp", tmp_path, dtype=dtype, control=dtype == "float64")
    assert found["world_size"] == 2
    assert moved <= {"float64": 1e-10, "float32": 2e-6}[dtype]
    assert left >= 1e-4 or dtype == "float32"


def test_ddp_with_adapters(tmp_path):
    lora = {"r": 4, "target_modules": ["q_proj", "v_proj", "fc1", "fc2"], "modules_to_save": ["classifier"]}
    moved, left, _ = differences("ddp", tmp_path, dtype="float64", lora={**lora, "use_dora": True}, control=True)
    assert moved <= 1e-10
    assert left >= 1e-4


def test_fsdp2(tmp_path):
    moved, left, found = differences("fsdp2", tmp_path, dtype="float64", control=True)
    # FSDP gives the model another class while it is sharded.
    assert Reordering.from_pretrained(tmp_path / "moved").model_class == "ViTForImageClassification"
    assert found["dtensor"]
    assert moved <= 1e-10
    assert left >= 1e-4


def test_fsdp2_in_float32(tmp_path):
    moved, _, found = differences("fsdp2", tmp_path)
    assert found["dtensor"]
    assert moved <= 2e-6


@pytest.mark.parametrize("stage", [2, 3])
def test_zero(stage, tmp_path):
    moved, left, found = differences(f"zero{stage}", tmp_path, control=True)
    assert found["zero_stage"] == stage
    assert moved <= 2e-6
    assert left >= 1e-4


@pytest.mark.parametrize("setup", ["plain", "ddp", "fsdp2", "zero2", "zero3"])
def test_bfloat16_differs_by_its_rounding(setup, tmp_path):
    """Products are rounded to 8 bits in another order; the losses, about 1.6, move by less than two of such steps."""
    moved, _, _ = differences(setup, tmp_path, arguments={"bf16": True})
    assert moved <= 2e-2


@pytest.mark.parametrize("feature", FEATURES)
def test_features_of_the_trainer(feature, tmp_path):
    moved, _, _ = differences("plain", tmp_path / "32", **FEATURES[feature])
    assert moved <= 2e-6
    moved, left, _ = differences("plain", tmp_path / "64", dtype="float64", control=True, **FEATURES[feature])
    assert moved <= 1e-10
    assert left >= 1e-4


@pytest.mark.parametrize("setup", ["ddp", "fsdp2", "zero2", "zero3"])
def test_resumed_run_goes_on_as_the_uninterrupted_one(setup, tmp_path):
    settings = {"callback": {**CALLBACK, "every": 5}, "arguments": {"save_strategy": "steps", "save_steps": 7}}
    whole = run_training(setup, tmp_path / "whole", steps=20, **settings)
    checkpoint = str(tmp_path / "whole" / "checkpoint-7")
    resumed = run_training(setup, tmp_path / "resumed", steps=20, resume=checkpoint, **settings)
    assert resumed["losses"] == whole["losses"][7:]


@pytest.mark.parametrize("setup", ["fsdp2", "zero3"])
def test_metrics_that_run_the_model_are_refused_where_it_is_sharded(setup, tmp_path):
    callback = {**CALLBACK, "config": {"metric": "activation"}}
    with pytest.raises(AssertionError, match="are divided among processes by FSDP or ZeRO-3"):
        run_training(setup, tmp_path, steps=20, callback=callback)


@pytest.mark.parametrize("setup", ["ddp", "fsdp2", "zero2", "zero3"])
def test_best_model_is_loaded_in_its_order(setup, tmp_path):
    # Trainer leaves the layers of a ViT unread without the callback; a Llama's have the same names in files.
    settings = {"save_strategy": "steps", "save_steps": 5, "eval_strategy": "steps", "eval_steps": 5}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    runs = [
        run_training(setup, tmp_path / str(number), steps=15, callback=callback, arguments=settings, model="llama")
        for number, callback in enumerate((None, {**CALLBACK, "every": 4}))
    ]
    assert all(run["best"].endswith("checkpoint-5") for run in runs)
    assert runs[1]["best_loss"] == pytest.approx(runs[0]["best_loss"], abs=1e-5)
    assert abs(runs[0]["best_loss"] - runs[0]["losses"][-1]) > 1e-3
