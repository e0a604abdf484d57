"""The proof of equal function: what it runs on, and that zero biases and unit norms do not hide a wrong map."""

import contextlib

import pytest
import torch
import transformers
from conftest import ARCHITECTURES, build_model, heads_of, outputs_of, same_bits, weights_of
from torch import nn

from hf_spp import (
    CheckpointError,
    EqualFunctionError,
    ExampleInputsError,
    Reordering,
    SPPConfig,
    apply_spp,
    channel_groups,
    proof,
    transform,
)
from hf_spp import apply as writing
from hf_spp.apply import gather_tensors, varied_constants
from hf_spp.architectures import patterns
from hf_spp.architectures.index import Projection
from hf_spp.conversion import verify_checkpoint
from hf_spp.orders_file import _check_summary
from hf_spp.proof import Witness

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


# --- inputs from the config -------------------------------------------------------------------------------------------

_VISION = {**_SIZES, "image_size": 8, "patch_size": 4}
_TEXT = {**_SIZES, "vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GENERATING = {
    "d_model": 24, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 3, "decoder_attention_heads": 3,
    "encoder_ffn_dim": 20, "decoder_ffn_dim": 20, "vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip


def build(name, **values):
    return lambda: fresh_model(getattr(transformers, name), **values)


def clip(name="CLIPModel"):
    text, vision = {**_TEXT, "max_position_embeddings": 16}, _VISION
    return fresh_model(getattr(transformers, name), text_config=text, vision_config=vision, projection_dim=12)


def llava():
    vision = transformers.CLIPVisionConfig(**{**_VISION, "num_hidden_layers": 3})
    text = transformers.LlamaConfig(**_TEXT)
    return fresh_model(
        transformers.LlavaForConditionalGeneration, vision_config=vision, text_config=text, image_token_index=39
    )


def qwen2_vl():
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 24, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    rope = {"type": "mrope", "mrope_section": [1, 1, 2], "rope_type": "default"}
    text = {**_TEXT, "num_key_value_heads": 3, "rope_parameters": rope}
    tokens = {"image_token_id": 37, "video_token_id": 38, "vision_start_token_id": 35, "vision_end_token_id": 36}
    return fresh_model(transformers.Qwen2VLForConditionalGeneration, vision_config=vision, text_config=text, **tokens)


def vision_encoder_decoder():
    encoder, decoder = transformers.ViTConfig(**_VISION), transformers.BertConfig(**_SIZES, vocab_size=40)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    with torch.random.fork_rng(devices=[]):
        return transformers.VisionEncoderDecoderModel(config).eval()


BUILT = {
    "causal-lm": build("Qwen3ForCausalLM", **_TEXT, num_key_value_heads=3, head_dim=8),
    "experts": build("MixtralForCausalLM", **_TEXT, num_key_value_heads=3, num_local_experts=3),
    "cross-attention": build("BartForCausalLM", **_GENERATING),
    "encoder-decoder": build("BartForSequenceClassification", **_GENERATING),
    "bounding-boxes": build("LayoutLMModel", **_TEXT, max_position_embeddings=16),
    "dual-encoder": clip,
    "pooling-head": build("SiglipVisionModel", **_VISION),
    "windows": fresh_swin,
    "video": build("VideoMAEModel", **_VISION, num_frames=4),
    "placeholders": llava,
    "patches-in-a-row": qwen2_vl,
    "image-to-text": vision_encoder_decoder,
    "speech": build("WhisperForConditionalGeneration", **_GENERATING, num_mel_bins=8, max_source_positions=6),
    "waves": build(
        "Wav2Vec2Model", **_SIZES, conv_dim=(8, 8), conv_kernel=(10, 3), conv_stride=(5, 2), num_feat_extract_layers=2,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    ),
    "time-series": build(
        "PatchTSTModel", context_length=16, patch_length=4, num_input_channels=2, d_model=24, num_attention_heads=3,
        ffn_dim=20, num_hidden_layers=1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("build", BUILT.values(), ids=BUILT)
def test_built_inputs_reach_every_group(build):
    model = build()
    reordering = apply_spp(model, SPPConfig(metric="random"))
    assert reordering.changed
    assert reordering.proof.unproved == ()


@pytest.mark.parametrize(("name", "head"), [(name, head) for name in ARCHITECTURES for head in heads_of(name)])
def test_built_inputs_reach_every_group_of_every_head(name, head):
    model = build_model(name, head)
    assert Witness(model, groups=channel_groups(model)).unproved == ()


def test_experts_are_proved_in_double_precision():
    """The implementation that is the default does not take it."""
    model = BUILT["experts"]().double()
    assert model.config._experts_implementation == "grouped_mm"
    assert apply_spp(model, SPPConfig(metric="random")).relative_diff < 1e-10
    assert model.config._experts_implementation == "grouped_mm"


def test_attributes_that_inputs_set_come_back():
    """Swin takes a smaller window for good once an image is too small for its own."""
    model = fresh_model(
        transformers.SwinModel, image_size=32, patch_size=4, embed_dim=12, depths=[2], num_heads=[3], window_size=4
    )
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    small = {"pixel_values": torch.ones(1, 3, 8, 8)}
    windows = [getattr(module, "window_size", None) for module in model.modules()]
    before = outputs_of(model, {"pixel_values": pixels})
    with pytest.raises(ExampleInputsError):
        apply_spp(model, SPPConfig(metric="random"), example_inputs=small)
    apply_spp(model, SPPConfig(metric="random"))
    assert [getattr(module, "window_size", None) for module in model.modules()] == windows
    torch.testing.assert_close(outputs_of(model, {"pixel_values": pixels}), before, rtol=1e-5, atol=1e-5)


def test_modules_that_inputs_replace_come_back():
    """BigBird takes full attention for good once a text is too short for sparse attention."""
    model = build("BigBirdModel", **_TEXT, attention_type="block_sparse", block_size=2, num_random_blocks=1)()
    modules = dict(model.named_modules())
    apply_spp(model, SPPConfig(metric="random"))
    assert model.attention_type == "block_sparse"
    assert {path: id(module) for path, module in model.named_modules()} == {p: id(m) for p, m in modules.items()}


@pytest.mark.parametrize(
    "settings",
    [{"patch_size": "large"}, {"image_size": None}, {"num_channels": [3]}, {"patch_size": ()}, {"image_size": {}}],
    ids=str,
)
def test_odd_settings_only_mean_that_no_inputs_can_be_built(settings):
    model = build_model("vit")
    for name, value in settings.items():
        vars(model.config)[name] = value
    with contextlib.suppress(ExampleInputsError):
        assert apply_spp(model, SPPConfig(metric="random")).changed


def test_settings_that_are_missing():
    """Many configs have no end-of-sequence token, and some no vocabulary."""
    model = build_model("bert")
    vars(model.config).update(vocab_size=None, eos_token_id=None)
    assert apply_spp(model, SPPConfig(metric="random")).changed


# --- outputs ----------------------------------------------------------------------------------------------------------


def masked_outputs(model, value):
    """The same model with an output that is not finite in some places."""

    class Masked(type(model)):
        def forward(self, pixel_values, **options):
            output = super().forward(pixel_values=pixel_values, **options)
            output["masked"] = output.logits.clone()
            output["masked"][..., 0] = value
            return output

    model.__class__ = Masked
    return model


def test_infinite_outputs_are_compared_where_they_are_finite():
    model = masked_outputs(build_model("vit"), -torch.inf)
    witness = Witness(model)
    assert apply_spp(model, SPPConfig(metric="random")).relative_diff < 1e-5
    model.classifier.bias.data[1] += 1
    assert witness.compare(model).max_abs_diff > 0.5


def test_outputs_that_are_infinite_elsewhere_differ():
    model = build_model("vit")
    witness = Witness(masked_outputs(model, -torch.inf))
    assert witness.compare(masked_outputs(model, torch.inf)).relative_diff == torch.inf


def test_outputs_that_are_no_numbers_are_refused():
    with pytest.raises(ExampleInputsError, match="puts out NaN or infinity"):
        Witness(masked_outputs(build_model("vit"), torch.nan))


def test_model_that_does_not_run_afterwards(monkeypatch):
    model = build_model("vit")
    before, runs, run = weights_of(model), [], proof._outputs

    def fail(*arguments):
        runs.append(arguments)
        if len(runs) == 2:
            raise ValueError("no more")
        return run(*arguments)

    monkeypatch.setattr(proof, "_outputs", fail)
    with pytest.raises(EqualFunctionError, match=r"does not after its channels moved: no more\. Give other"):
        apply_spp(model, SPPConfig(metric="random"))
    assert same_bits(model, before)


@pytest.mark.parametrize("change", [{}, {"logits": torch.zeros(1, 7)}], ids=["missing", "another-shape"])
def test_outputs_of_another_form_differ(change, monkeypatch):
    model = build_model("vit")
    witness = Witness(model)
    monkeypatch.setattr(proof, "_outputs", lambda *arguments: change)
    assert witness.compare(model).relative_diff == torch.inf


# --- groups that the inputs do not reach ------------------------------------------------------------------------------


def test_groups_that_the_inputs_do_not_reach(monkeypatch):
    model, warnings = llava(), []
    monkeypatch.setattr(transform.logger, "warning", warnings.append)
    inputs = {"input_ids": torch.tensor([[5, 6, 7]])}
    reordering = apply_spp(model, SPPConfig(metric="random"), example_inputs=inputs)
    unproved = {name for name in reordering.orders if not name.startswith("language_model")}
    assert unproved
    assert set(reordering.proof.unproved) == unproved
    assert len(warnings) == 1
    assert f"did not run {len(unproved)} of {len(reordering.orders)} groups of Llava" in warnings[0]
    assert "same: vision_tower, multi_modal_projector. Give example_inputs" in warnings[0]
    assert f"NOT checked of {len(unproved)} groups: vision_tower, multi_modal_projector" in str(reordering)
    again = Reordering.from_bytes(reordering.to_bytes())
    assert again.proof == reordering.proof
    warnings.clear()
    assert apply_spp(llava(), SPPConfig(metric="random")).proof.unproved == ()
    assert warnings == []


def test_part_of_a_tower_that_the_inputs_do_not_reach(monkeypatch):
    model, warnings = BUILT["cross-attention"](), []
    monkeypatch.setattr(transform.logger, "warning", warnings.append)
    apply_spp(model, SPPConfig(metric="random"), example_inputs={"input_ids": torch.tensor([[5, 6, 7]])})
    assert "same: decoder.layers.*.encoder_attn. Give" in warnings[0]


def test_only_groups_that_move_are_named():
    model = llava()
    inputs = {"input_ids": torch.tensor([[5, 6, 7]])}
    config = SPPConfig(metric="random", towers=("language_model",))
    assert apply_spp(model, config, example_inputs=inputs).proof.unproved == ()


def test_tied_parameters_count_wherever_they_run():
    """The embedding of T5 has its first name at a module that never runs."""
    model = build_model("t5")
    witness = Witness(model, groups=channel_groups(model).select(("hidden",)))
    assert witness.unproved == ()


def test_stored_names_of_unproved_groups_are_checked():
    reordering = apply_spp(build_model("vit"), SPPConfig(metric="random"))
    summary = reordering.summary()
    _check_summary(summary, reordering.groups.by_name, reordering.scores)
    for wrong in ("all", ["elsewhere.ffn"], [["nested"]], {}, None):
        with pytest.raises(CheckpointError, match="of another type"):
            _check_summary({**summary, "unproved": wrong}, reordering.groups.by_name, reordering.scores)
