"""The proof of equal function: what it runs on, and that zero biases and unit norms do not hide a wrong map."""

import contextlib

import pytest
import torch
import transformers
from conftest import build_model, outputs_of, same_bits, weights_of
from torch import nn

from hf_spp import EqualFunctionError, ExampleInputsError, SPPConfig, apply_spp
from hf_spp import apply as writing
from hf_spp.apply import gather_tensors, varied_constants
from hf_spp.architectures import patterns
from hf_spp.architectures.index import Projection
from hf_spp.conversion import verify_checkpoint

_SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 20}


def fresh_model(model_class, **values):
    """A model as its class initializes it: zero biases, unit norms."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model_class(model_class.config_class(**values)).eval()


def fresh_bert():
    return fresh_model(transformers.BertForMaskedLM, vocab_size=40, **_SIZES)


def fresh_bitnet():
    return fresh_model(transformers.BitNetModel, vocab_size=40, num_key_value_heads=3, pad_token_id=0, **_SIZES)


def fresh_swin():
    sizes = {"image_size": 16, "patch_size": 4, "embed_dim": 12, "depths": [2], "num_heads": [3], "window_size": 2}
    return fresh_model(transformers.SwinModel, **sizes)


def forget_biases(patch):
    produce = Projection.produce
    patch.setattr(Projection, "produce", lambda projection, features: produce(projection, features)[:1])


def forget_norm(patch):
    patch.setattr(patterns, "ATTENTION_BESIDE", (*patterns.ATTENTION_BESIDE, "attn_sub_norm"))


def forget_table(patch):
    patch.setattr(patterns, "ATTENTION_BESIDE", (*patterns.ATTENTION_BESIDE, "relative_position_bias"))
    patch.setattr(patterns, "SHARED_HEAD_TABLES", {})
    patch.setattr(patterns, "HEAD_TABLE_NAMES", "(?!)")


# A fresh model, what makes its map forget a constant parameter, and an axis that moves it.
FORGETFUL = {
    "zero-bias": (fresh_bert, forget_biases, "ffn"),
    "unit-norm": (fresh_bitnet, forget_norm, "vo"),
    "zero-table": (fresh_swin, forget_table, "heads"),
}


@pytest.mark.parametrize(("build", "forget", "axis"), FORGETFUL.values(), ids=FORGETFUL)
def test_constant_weights_do_not_hide_a_wrong_map(build, forget, axis, monkeypatch):
    model, config = build(), SPPConfig(axes=(axis,), metric="random")
    before = weights_of(model)
    with monkeypatch.context() as patch:
        forget(patch)
        with pytest.raises(EqualFunctionError, match="put back bit for bit"):
            apply_spp(model, config)
        assert same_bits(model, before)
        # The control: on the model's own weights the same wrong map goes through.
        patch.setattr("hf_spp.proof.varied_constants", lambda *arguments: contextlib.nullcontext())
        apply_spp(model, config).undo(model)
        assert same_bits(model, before)
    assert apply_spp(model, config).relative_diff < 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_fresh_model_is_reordered_and_keeps_its_constants(dtype):
    model = fresh_bert().to(dtype)
    before, inputs = weights_of(model), {"input_ids": torch.arange(12)[None]}
    constant = [name for name, value in before.items() if value.unique().numel() == 1 < value.numel()]
    assert "bert.encoder.layer.1.output.LayerNorm.weight" in constant
    outputs = outputs_of(model, inputs)
    reordering = apply_spp(model, SPPConfig(axes=("qk", "vo", "heads", "ffn", "hidden"), metric="random"))
    assert reordering.changed
    assert all(model.state_dict()[name].equal(before[name]) for name in constant)
    allowed = 5e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(outputs_of(model, inputs), outputs, rtol=allowed, atol=allowed)
    reordering.undo(model)
    assert same_bits(model, before)


def test_checkpoint_of_a_fresh_model_verifies(tmp_path):
    model = fresh_bert()
    reordering = apply_spp(model, SPPConfig(axes=("qk", "ffn"), metric="random"))
    model.save_pretrained(tmp_path)
    reordering.save_pretrained(tmp_path)
    verification = verify_checkpoint(tmp_path)
    assert verification.equal
    assert verification.proof.max_abs_diff > 0


@pytest.mark.parametrize("run", [1, 2])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_crash_of_a_run_on_varied_weights(run, error):
    model, runs = fresh_bert(), []
    before = weights_of(model)

    def crash(*arguments):
        runs.append(not same_bits(model, before))
        if len(runs) == run:
            raise error("crash")

    model.register_forward_hook(crash)
    # An error of the first run only means that the inputs do not suit the model.
    with pytest.raises(ExampleInputsError if (run, error) == (1, RuntimeError) else error):
        apply_spp(model, SPPConfig(metric="random"), example_inputs={"input_ids": torch.arange(12)[None]})
    assert len(runs) == run
    assert all(runs)
    assert same_bits(model, before)


# --- varied constants -------------------------------------------------------------------------------------------------


class Constants(nn.Module):
    """Weights that are all the same, and some that are not or are no weights."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.zero = nn.Parameter(torch.zeros(6, dtype=dtype))
        self.minus_zero = nn.Parameter(-torch.zeros(6, 4, dtype=dtype), requires_grad=False)
        self.mixed_zero = nn.Parameter(torch.tensor([0.0, -0.0], dtype=dtype))
        self.single = nn.Parameter(torch.ones(1, dtype=dtype))
        self.zero_row = nn.Parameter(torch.tensor([[0, 0], [1, 0]], dtype=dtype))
        self.register_buffer("variance", torch.ones(6, dtype=dtype))
        self.register_buffer("mask", torch.full((6,), torch.finfo(dtype).min, dtype=dtype))
        self.register_buffer("scale", torch.full((6,), 0.5, dtype=dtype), persistent=False)
        self.register_buffer("shared", torch.ones(1, dtype=dtype).expand(6))
        self.register_buffer("count", torch.zeros(6, dtype=torch.int64))
        self.register_buffer("nothing", None)


VARIED = {"zero", "minus_zero", "variance"}


def values_of(module):
    return {name: tensor.detach().clone() for name, tensor in writing.named_tensors(module).items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_constants_vary_and_come_back(dtype):
    module = Constants(dtype)
    before, saved = values_of(module), weights_of(module)
    for _ in range(2):
        with varied_constants(module, 0):
            inside = values_of(module)
            assert {name for name, value in inside.items() if not value.equal(before[name])} == VARIED
            assert all(inside[name].unique().numel() > 2 for name in VARIED)
            assert inside["variance"].min() > 0
        assert same_bits(module, saved)
    with varied_constants(module, 0):
        assert all(values_of(module)[name].equal(inside[name]) for name in VARIED)
    with varied_constants(module, 1):
        assert not any(values_of(module)[name].equal(inside[name]) for name in VARIED)


def test_varied_constants_move_with_the_rest():
    module = Constants()
    indices = {"zero": {0: torch.randperm(6)}, "minus_zero": {0: torch.randperm(6), 1: torch.tensor([2, 0, 3, 1])}}
    with varied_constants(module, 0):
        expected = values_of(module)
    gather_tensors(expected, indices)
    with varied_constants(module, 0, indices):
        assert all(values_of(module)[name].equal(expected[name]) for name in VARIED)


@pytest.mark.parametrize("crash_at", range(3))
def test_crash_while_constants_are_varied(crash_at, monkeypatch):
    module, vary, calls = Constants(), writing._vary, []
    before = weights_of(module)

    def crash(*arguments):
        vary(*arguments)
        calls.append(arguments)
        if len(calls) == crash_at + 1:
            raise MemoryError("crash")

    monkeypatch.setattr(writing, "_vary", crash)
    with pytest.raises(MemoryError), varied_constants(module, 0):
        pytest.fail("the block does not run")
    assert same_bits(module, before)


def test_nothing_is_written_to_trained_weights(monkeypatch):
    model = build_model("bert")
    monkeypatch.setattr(writing, "_vary", None)
    assert apply_spp(model, SPPConfig(metric="random")).changed
