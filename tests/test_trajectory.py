"""Reordering in the middle of training leaves training as it is: the same data gives the same losses."""

import pytest
import torch
from conftest import build_model
from peft import LoraConfig, get_peft_model
from transformers import Adafactor

from hf_spp import SPPConfig, apply_spp

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

STEPS, MOVES = 60, (15, 30, 45)
BOUNDS = {torch.float64: 1e-10, torch.float32: 2e-6}
OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "adamw-amsgrad-foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, amsgrad=True, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    "adafactor": lambda p: Adafactor(p, lr=1e-3, relative_step=False, scale_parameter=False, beta1=0.9),
    "adafactor-torch": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}


def batches(steps, dtype):
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        pixels = torch.randn(4, 3, 12, 12, generator=generator, dtype=torch.float64).to(dtype)
        yield {"pixel_values": pixels, "labels": torch.randint(0, 5, (4,), generator=generator)}


def losses(model, optimizer, dtype, *, reorder=None, move_state=True):
    """Train, and give the loss of every step; `reorder` gives the config of the reordering after a step."""
    model.train()
    found = []
    for step, batch in enumerate(batches(STEPS, dtype), 1):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
        if reorder is not None and step in MOVES:
            reordering = apply_spp(model, reorder(step))
            assert reordering.changed
            if move_state:
                reordering.apply_to_optimizer(optimizer, model)
    return torch.tensor(found, dtype=torch.float64)


def shuffle(step):
    return SPPConfig(metric="random", seed=step, axes=("qk", "vo", "heads", "ffn", "hidden"))


def compare(make, optimizer, dtype, **how):
    runs = []
    for reorder in (None, shuffle):
        model = make().to(dtype)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        runs.append(losses(model, OPTIMIZERS[optimizer](trained), dtype, reorder=reorder, **how))
    return float((runs[0] - runs[1]).abs().max())


def vit():
    return build_model("vit")


def adapted(**changes):
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj", "o_proj", "fc1", "fc2"], **changes}
    torch.manual_seed(0)
    return get_peft_model(vit(), LoraConfig(modules_to_save=["classifier"], **settings))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_losses_stay_the_same(optimizer):
    assert compare(vit, optimizer, torch.float64) <= BOUNDS[torch.float64]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd-momentum", "adafactor"])
def test_losses_stay_the_same_in_float32(optimizer):
    assert compare(vit, optimizer, torch.float32) <= BOUNDS[torch.float32]


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("changes", [{}, {"use_dora": True}, {"use_rslora": True, "lora_bias": True}], ids=str)
def test_losses_stay_the_same_with_adapters(changes, dtype):
    assert compare(lambda: adapted(**changes), "adamw", dtype) <= BOUNDS[dtype]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd-momentum", "adafactor"])
def test_losses_differ_where_the_optimizer_state_stays(optimizer):
    assert compare(vit, optimizer, torch.float64, move_state=False) >= 1e-4
