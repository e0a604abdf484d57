"""Equal outputs after every reordering, compared on inputs of this file's own, not by the package's proof."""

import copy
from dataclasses import replace

import pytest
import torch
import transformers
from conftest import (
    ARCHITECTURES,
    ROTARY,
    build_inputs,
    build_model,
    default_head,
    heads_of,
    legal_axes,
    outputs_of,
    relative_difference,
)

from hf_spp import IllegalAxisError, SPPConfig, apply_spp, channel_groups
from hf_spp.apply import gather_tensors, invert_indices, named_tensors
from hf_spp.permutation import gather_indices

ALLOWED = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}
AXES = ("qk", "vo", "heads", "ffn", "hidden")


def largest(group, weights):
    """A metric of a user: the sum of each matrix's largest weight."""
    return torch.stack([weight.flatten(2).abs().amax(-1) for weight in weights]).sum(0)


def assert_equal_function(model, config, *, calibration=None, inputs=None):
    """Reorder a model and compare all of its outputs; returns the reordering."""
    inputs = build_inputs(model) if inputs is None else inputs
    before = outputs_of(model, inputs)
    reordering = apply_spp(model, config, calibration=calibration)
    after = outputs_of(model, inputs)
    if "hidden" in reordering.orders:
        order = reordering.orders["hidden"].flatten()
        before = {n: v.index_select(-1, order) if "hidden_state" in n else v for n, v in before.items()}
    assert relative_difference(before, after) <= ALLOWED[model.dtype]
    for axis in config.axes or ():
        assert reordering.summary()["axes"][axis]["moved"] > 0
    return reordering


@pytest.mark.parametrize("dtype", ALLOWED, ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_all_axes_together(name, dtype):
    model = build_model(name, dtype=dtype)
    axes = legal_axes(model)
    assert axes == (("vo", "heads", "ffn", "hidden") if name in ROTARY else AXES)
    assert_equal_function(model, SPPConfig(axes=axes, metric="random"))


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_axis_alone(name, axis):
    model = build_model(name, dtype=torch.float64)
    config = SPPConfig(axes=(axis,), metric="random")
    if axis == "qk" and name in ROTARY:
        with pytest.raises(IllegalAxisError, match="rotary"):
            apply_spp(model, config)
    else:
        reordering = assert_equal_function(model, config)
        assert set(reordering.axis_of.values()) == {axis}


@pytest.mark.parametrize("metric", ["l1", "l2", largest], ids=["l1", "l2", "callable"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_weight_metrics(name, metric):
    model = build_model(name)
    assert_equal_function(model, SPPConfig(axes=legal_axes(model), metric=metric))


@pytest.mark.parametrize("metric", ["activation", "taylor"])
@pytest.mark.parametrize("name", ["dinov2", "bert", "t5", "qwen3", "gpt2"])
def test_calibrated_metrics(name, metric):
    model = build_model(name, dtype=torch.float64)
    config = SPPConfig(axes=legal_axes(model), metric=metric)
    assert_equal_function(model, config, calibration=[build_inputs(model, seed=seed) for seed in (2, 3)])


@pytest.mark.parametrize(
    ("name", "head"), [(name, head) for name in ARCHITECTURES for head in heads_of(name) if head != default_head(name)]
)
def test_every_task_head(name, head):
    model = build_model(name, head, torch.float64)
    assert_equal_function(model, SPPConfig(axes=legal_axes(model), metric="random"))


@pytest.mark.parametrize("name", ["vit", "bert", "t5", "llama", "gpt2"])
def test_eager_attention(name):
    model = build_model(name, dtype=torch.float64, attn_implementation="eager")
    reordering = assert_equal_function(model, SPPConfig(axes=legal_axes(model), metric="random"))
    other = apply_spp(build_model(name, dtype=torch.float64), reordering.config)
    assert reordering.digest == other.digest


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {"num_key_value_heads": 1}),
        ("llama", {"num_key_value_heads": 6}),
        ("bert", {"num_attention_heads": 1}),
        ("bert", {"num_attention_heads": 24}),
        ("bert", {"intermediate_size": 24}),
        ("bert", {"max_position_embeddings": 24}),
        ("bert", {"return_dict": False}),
        ("t5", {"d_model": 24, "num_heads": 6}),
        ("t5", {"num_layers": 1, "num_decoder_layers": 1}),
        ("t5-gated", {"tie_word_embeddings": True}),
        ("gpt2", {"n_inner": None}),
        ("gpt2", {"n_inner": 72}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "tie_word_embeddings": False}),
        ("vit", {"qkv_bias": False}),
        ("vit", {"image_size": (8, 12)}),
        ("dinov2", {"num_channels": 1}),
        ("roberta", {"add_cross_attention": True}),
    ],
    ids=str,
)
def test_unusual_shapes(name, changes):
    head = "causal-lm" if "add_cross_attention" in changes else None
    model = build_model(name, head, torch.float64, **changes)
    inputs = build_inputs(model)
    axes = legal_axes(model)
    if "add_cross_attention" in changes:
        axes = tuple(axis for axis in axes if axis != "hidden")
        inputs["encoder_hidden_states"] = torch.randn(2, 4, 24, generator=torch.Generator().manual_seed(0)).double()
    assert_equal_function(model, SPPConfig(axes=axes, metric="random"), inputs=inputs)


@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2"])
def test_hidden_with_cross_attention_to_an_outside_encoder(name):
    """Keys and values read another model's states, which no reordering of this model may expect in its own order."""
    model = build_model(name, "causal-lm", torch.float64, add_cross_attention=True)
    inputs = build_inputs(model)
    inputs["encoder_hidden_states"] = torch.randn(2, 4, 24, generator=torch.Generator().manual_seed(0)).double()
    before = outputs_of(model, inputs)
    try:
        apply_spp(model, SPPConfig(axes=("hidden",), metric="random"))
    except IllegalAxisError:
        return
    assert relative_difference(before, outputs_of(model, inputs)) <= 1e-10


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("vit", {"num_labels": 24}),
        ("bert", {"vocab_size": 24}),
        ("roberta", {"vocab_size": 24}),
        ("gpt2", {"vocab_size": 24}),
        ("qwen2", {"vocab_size": 24}),
        ("distilbert", {"vocab_size": 24}),
    ],
)
def test_as_many_outputs_as_hidden_channels(name, changes):
    model = build_model(name, dtype=torch.float64, **changes)
    inputs = {name: value % 24 if name == "input_ids" else value for name, value in build_inputs(model).items()}
    inputs.pop("labels")
    assert_equal_function(model, SPPConfig(axes=("hidden",), metric="random"), inputs=inputs)


class Noisy(transformers.ViTForImageClassification):
    """A model that draws random numbers in its forward also in evaluation mode, as masked autoencoders do."""

    def forward(self, pixel_values=None, **inputs):
        return super().forward(pixel_values=pixel_values + torch.randn_like(pixel_values), **inputs)


def test_forward_that_draws_random_numbers():
    model = build_model("vit")
    model.__class__ = Noisy
    state = torch.get_rng_state()
    reordering = apply_spp(model, SPPConfig(metric="random"))
    assert reordering.relative_diff <= 1e-5
    assert torch.get_rng_state().equal(state)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_control_every_member_matters(name):
    """Moving any one tensor of a group without its partners changes the outputs, so equal outputs mean something."""
    model = build_model(name, dtype=torch.float64)
    inputs = build_inputs(model)
    before, tensors = outputs_of(model, inputs), named_tensors(model)
    shapes = {tensor: value.shape for tensor, value in tensors.items()}
    unseen = set()
    for group in channel_groups(model):
        wrong = {group.name: torch.arange(group.size).roll(1).repeat(group.blocks, 1)}
        for member in group.members:
            indices = gather_indices([replace(group, members=(member,))], wrong, shapes)
            gather_tensors(tensors, indices)
            if relative_difference(before, outputs_of(model, inputs)) < 1e-6:
                unseen.add((group.axis, member.tensor.rpartition(".")[0].rpartition(".")[2], member.span))
            gather_tensors(tensors, invert_indices(indices))
    assert outputs_of(model, inputs)["output.logits"].equal(before["output.logits"])
    # Without rotation the bias of k adds the same to all logits of a query, which softmax takes out again.
    keys = {("k_proj", None), ("key", None), ("k_lin", None), ("c_attn", (24, 48, 72))}
    allowed = {(axis, *key) for axis in ("qk", "heads") for key in keys} if name not in ROTARY else set()
    # Only pretraining uses the token for masked patches.
    assert unseen <= allowed | {("hidden", "embeddings", None)} if name.startswith("dinov2") else unseen <= allowed


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gpt2", "t5"])
def test_greedy_generation_with_cache(name):
    model = build_model(name)
    reordered = copy.deepcopy(model)
    apply_spp(reordered, SPPConfig(axes=legal_axes(model), metric="random"))
    inputs = build_inputs(model, labels=False)
    inputs.pop("decoder_input_ids", None)
    inputs["attention_mask"] = inputs["attention_mask"].flip(-1)
    options = {
        "max_new_tokens": 16,
        "min_new_tokens": 16,
        "do_sample": False,
        "use_cache": True,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    expected, found = model.generate(**inputs, **options), reordered.generate(**inputs, **options)
    assert expected.past_key_values is not None
    assert found.sequences.equal(expected.sequences)
    assert len(expected.sequences.unique()) > 2
    before, after = torch.stack(expected.logits), torch.stack(found.logits)
    assert float((after - before).abs().max() / before.abs().max()) <= 1e-5


def test_cache_of_the_original_suits_the_reordered_heads_only_if_keys_stay():
    """The control of generation: key rows did move, so a cache filled before the reordering is worthless after it."""
    model = build_model("gpt2")
    inputs = build_inputs(model, labels=False)
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        expected = model(**inputs, use_cache=True).past_key_values
        apply_spp(model, SPPConfig(axes=("qk",), metric="random"))
        found = model(**inputs, use_cache=True).past_key_values
    keys, moved = cache.layers[0].keys, found.layers[0].keys
    assert keys.equal(expected.layers[0].keys)
    assert not torch.allclose(keys, moved)
    torch.testing.assert_close(keys.sort(-1).values, moved.sort(-1).values)


def test_training_step_is_equal_too():
    """Gradients of a reordered model are the reordered gradients, so training goes the same way."""
    model = build_model("bert", "sequence-classification", torch.float64)
    reordered = copy.deepcopy(model)
    reordering = apply_spp(reordered, SPPConfig(axes=AXES, metric="random"))
    inputs = build_inputs(model)
    for each in (model, reordered):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        each(**inputs).loss.backward()
        optimizer.step()
    reordering.undo(reordered)
    for (name, expected), found in zip(model.named_parameters(), reordered.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12, msg=name)
