"""DINOv2-small, MiniLM (BERT) and SmolLM2-135M (Llama): the real weights, from pinned packages."""

import copy

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageClassification, AutoTokenizer

from hf_spp import Reordering, SPPConfig, apply_spp, channel_groups
from hf_spp.assets import dinov2_small, minilm, smollm2

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]
MODELS = {
    "dinov2-small": (dinov2_small, AutoModelForImageClassification),
    "minilm": (minilm, AutoModel),
    "smollm2": (smollm2, AutoModelForCausalLM),
}


def load(name, dtype=torch.float32):
    folder, auto_class = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return auto_class.from_pretrained(folder(), dtype=dtype)


def same_bits(model, state):
    return all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_stay_equal_and_undo_restores_every_bit(name, dtype, bound):
    model = load(name, dtype)
    before = copy.deepcopy(model.state_dict())
    reordering = apply_spp(model, SPPConfig(axes=channel_groups(model).axes))
    assert reordering.relative_diff <= bound
    assert not same_bits(model, before)
    assert all(count["moved"] > 0 for count in reordering.summary()["axes"].values())
    reordering.undo(model)
    assert same_bits(model, before)


def test_greedy_generation_of_64_tokens_is_identical():
    model, tokenizer = load("smollm2"), AutoTokenizer.from_pretrained(smollm2())
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    options = {"do_sample": False, "min_new_tokens": 64, "max_new_tokens": 64}
    before = model.generate(**prompt, **options)
    reordering = apply_spp(model, SPPConfig(axes=("vo", "heads", "ffn", "hidden")))
    assert reordering.axes == ("vo", "heads", "ffn", "hidden")
    after = model.generate(**prompt, **options)
    assert after.shape[1] == prompt["input_ids"].shape[1] + 64
    assert torch.equal(before, after)
    assert "Paris" in tokenizer.decode(after[0])


@pytest.mark.parametrize("name", ["dinov2-small", "minilm"])
def test_raffm_order_is_the_papers(name):
    model = load(name)
    reordering = apply_spp(copy.deepcopy(model), SPPConfig.raffm())
    base = model.base_model.encoder.layer
    for layer, block in enumerate(base):
        attention = block.attention
        query, key = (
            (attention.self.query, attention.self.key) if name == "minilm" else (attention.q_proj, attention.k_proj)
        )
        norms = (query.weight.double().abs().sum(1) + key.weight.double().abs().sum(1)) / 2
        heads = norms.view(model.config.num_attention_heads, -1)
        expected = torch.sort(heads, dim=-1, descending=True, stable=True).indices
        assert torch.equal(reordering.orders[f"encoder.layer.{layer}.attention.qk"], expected)


@pytest.mark.parametrize("name", MODELS)
def test_saved_checkpoint_is_stock_and_can_be_undone(name, tmp_path):
    model = load(name)
    original = copy.deepcopy(model.state_dict())
    reordering = apply_spp(model)
    model.save_pretrained(tmp_path)
    reordering.save_pretrained(tmp_path)
    stock = MODELS[name][1].from_pretrained(tmp_path)
    assert type(stock) is type(model)
    assert same_bits(stock, model.state_dict())
    Reordering.from_pretrained(tmp_path).undo(stock)
    assert same_bits(stock, original)


@pytest.mark.parametrize("metric", ["activation", "taylor"])
def test_calibrated_metrics_order_a_real_model(metric):
    model = load("dinov2-small")
    generator = torch.Generator().manual_seed(0)
    batches = [{"pixel_values": torch.randn(2, 3, 56, 56, generator=generator)} for _ in range(2)]
    reordering = apply_spp(model, SPPConfig(metric=metric), calibration=batches)
    assert reordering.relative_diff <= 1e-5
    assert reordering.changed
