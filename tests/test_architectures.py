"""What may move together in each family, what may not and why, and that the reference's defects are absent."""

import copy
import random

import numpy as np
import pytest
import torch
import transformers
from conftest import (
    ARCHITECTURES,
    ROTARY,
    build_config,
    build_inputs,
    build_model,
    default_head,
    heads_of,
    legal_axes,
    model_class,
    outputs_of,
    relative_difference,
    same_bits,
    weights_of,
)
from torch import nn

from hf_spp import (
    IllegalAxisError,
    SPPConfig,
    SPPError,
    UnsupportedArchitectureError,
    UnsupportedModelError,
    apply_spp,
    channel_groups,
)
from hf_spp.architectures.patterns import HEADLESS_REASON, ROTARY_REASON
from hf_spp.config import AXES

# Per axis: number of groups, then blocks and size of each.
ENCODER = {"qk": (2, {(3, 8)}), "vo": (2, {(3, 8)}), "heads": (2, {(1, 3)}), "ffn": (2, {(1, 20)})}
ENCODER["hidden"] = (1, {(1, 24)})
DECODER = {"vo": (2, {(2, 6)}), "heads": (4, {(1, 2), (2, 3)}), "ffn": (2, {(1, 20)}), "hidden": (1, {(1, 24)})}
# Three encoder and two decoder layers, two of them with cross-attention; self-attention heads are tied per stack.
T5 = {"qk": (7, {(3, 4)}), "vo": (7, {(3, 4)}), "heads": (4, {(1, 3)}), "ffn": (5, {(1, 20)}), "hidden": (1, {(1, 28)})}
EXPECTED = {
    "vit": ENCODER,
    "deit": ENCODER,
    "dinov2": {**ENCODER, "ffn": (2, {(1, 48)})},
    "dinov2-swiglu": {**ENCODER, "ffn": (2, {(1, 16)})},
    "bert": ENCODER,
    "roberta": ENCODER,
    "distilbert": ENCODER,
    "t5": T5,
    "t5-gated": T5,
    "llama": DECODER,
    "qwen2": DECODER,
    "qwen3": DECODER,
    "mistral": DECODER,
    "gpt2": ENCODER,
}
ALL_HEADS = [(name, head) for name in ARCHITECTURES for head in heads_of(name)]


def members(model, group):
    """Tensors of a group, each with the dimension that moves and its part of that dimension."""
    return {(member.tensor, member.dim, member.span) for member in channel_groups(model).by_name[group].members}


def whole(prefix, *places):
    return {(prefix + place[:-2], int(place[-1]), None) for place in places}


# --- groups -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_groups_of_each_axis(name):
    groups = channel_groups(build_model(name))
    found = {
        axis: (len(groups.select((axis,))), {(group.blocks, group.size) for group in groups.select((axis,))})
        for axis in AXES
        if axis in groups.axes
    }
    assert found == EXPECTED[name]


@pytest.mark.parametrize(("name", "head"), ALL_HEADS)
def test_map_of_every_head_is_sound(name, head):
    model = build_model(name, head)
    groups = channel_groups(model)
    shapes = {key: tensor.shape for key, tensor in model.named_parameters()}
    assert len({group.name for group in groups}) == len(groups)
    seen = set()
    for group in groups:
        seen.add(group.name)
        assert group.size > 1
        assert group.members
        assert group.scored_members
        if group.parent is not None:
            assert group.parent not in seen, "blocks come before the groups that move those blocks"
            assert groups.by_name[group.parent].channels == group.blocks
        for member in group.members:
            length = shapes[member.tensor][member.dim]
            places = member.positions(length, group)
            assert places.shape[:2] == (group.blocks, group.size)
            start, stop, _ = member.span or (0, length, length)
            assert places.flatten().sort().values.equal(torch.arange(start, stop))
    usual = channel_groups(build_model(name))
    assert {group.axis for group in usual} - {"hidden"} <= set(groups.axes)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_names_are_the_same_with_and_without_a_head(name):
    with_head, base = channel_groups(build_model(name)), channel_groups(build_model(name, "base"))
    assert {group.name for group in with_head} - {"hidden"} == {group.name for group in base}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_hidden_reaches_every_layer_embedding_and_head(name):
    """All that stays are biases of what writes heads, neurons, classes or tokens, and tensors that heads share."""
    model = build_model(name)
    moved = {member.tensor for member in channel_groups(model).by_name["hidden"].members}
    stays = (
        *("q_proj.bias", "k_proj.bias", "v_proj.bias", "query.bias", "key.bias", "value.bias", "c_attn.bias"),
        *("q_lin.bias", "k_lin.bias", "v_lin.bias", "q_norm.weight", "k_norm.weight", "relative_attention_bias.weight"),
        *("fc1.bias", "gate_proj.bias", "up_proj.bias", "intermediate.dense.bias", "lin1.bias", "c_fc.bias"),
        *("classifier.bias", "predictions.bias", "lm_head.bias", "vocab_projector.bias"),
    )
    assert [key for key, _ in model.named_parameters() if key not in moved and not key.endswith(stays)] == []


def test_members_of_bert():
    model, layer = build_model("bert"), "bert.encoder.layer.1."
    attention, output = f"{layer}attention.self.", f"{layer}attention.output."
    qk = whole(attention, "query.weight 0", "query.bias 0", "key.weight 0", "key.bias 0")
    vo = whole(attention, "value.weight 0", "value.bias 0") | whole(output, "dense.weight 1")
    assert members(model, "encoder.layer.1.attention.qk") == qk
    assert members(model, "encoder.layer.1.attention.vo") == vo
    assert members(model, "encoder.layer.1.attention.heads") == qk | vo
    assert members(model, "encoder.layer.1.ffn") == whole(
        layer, "intermediate.dense.weight 0", "intermediate.dense.bias 0", "output.dense.weight 1"
    )


def test_members_of_llama():
    """One order of value rows per key-value head, shared by the query heads it serves; q and k rows stay."""
    model, layer = build_model("llama"), "model.layers.0."
    q, k, v = (whole(f"{layer}self_attn.", f"{x}_proj.weight 0", f"{x}_proj.bias 0") for x in "qkv")
    o = whole(f"{layer}self_attn.", "o_proj.weight 1")
    assert members(model, "layers.0.self_attn.vo") == v | o
    assert members(model, "layers.0.self_attn.heads") == q | k | v | o
    assert members(model, "layers.0.self_attn.query_heads") == q | o
    assert members(model, "layers.0.mlp.ffn") == whole(
        f"{layer}mlp.",
        "gate_proj.weight 0",
        "gate_proj.bias 0",
        "up_proj.weight 0",
        "up_proj.bias 0",
        "down_proj.weight 1",
    )
    groups = channel_groups(model)
    assert groups.by_name["layers.0.self_attn.vo"].parent == "layers.0.self_attn.heads"
    assert groups.by_name["layers.0.self_attn.query_heads"].parent == "layers.0.self_attn.heads"


def test_members_of_gpt2():
    """Fused q, k and v: each third of the columns is a member of its own, in the transposed weight and in the bias."""
    model, layer = build_model("gpt2"), "transformer.h.0."
    q, k, v = (
        {(f"{layer}attn.c_attn.weight", 1, span), (f"{layer}attn.c_attn.bias", 0, span)}
        for span in ((0, 24, 72), (24, 48, 72), (48, 72, 72))
    )
    o = whole(layer, "attn.c_proj.weight 0")
    assert members(model, "h.0.attn.qk") == q | k
    assert members(model, "h.0.attn.vo") == v | o
    assert members(model, "h.0.attn.heads") == q | k | v | o
    assert members(model, "h.0.mlp.ffn") == whole(layer, "mlp.c_fc.weight 1", "mlp.c_fc.bias 0", "mlp.c_proj.weight 0")
    hidden = members(model, "hidden")
    assert (f"{layer}attn.c_attn.weight", 0, None) in hidden
    assert (f"{layer}attn.c_attn.bias", 0, None) not in hidden
    assert ("transformer.wte.weight", 1, None) in hidden


def test_members_of_t5_heads():
    """The first layer's table of relative positions serves the whole stack, so its heads have one order."""
    model = build_model("t5")
    groups = channel_groups(model)
    encoder = groups.by_name["encoder.block.*.layer.*.SelfAttention.heads"]
    decoder = groups.by_name["decoder.block.*.layer.*.SelfAttention.heads"]
    for stack, group, layers in (("encoder", encoder, 3), ("decoder", decoder, 2)):
        assert group.layer is None
        expected = whole(f"{stack}.block.0.layer.0.SelfAttention.", "relative_attention_bias.weight 1")
        for layer in range(layers):
            expected |= whole(
                f"{stack}.block.{layer}.layer.0.SelfAttention.", "q.weight 0", "k.weight 0", "v.weight 0", "o.weight 1"
            )
        assert members(model, group.name) == expected
    cross = [group for group in groups if group.axis == "heads" and "EncDecAttention" in group.name]
    assert [group.layer for group in cross] == [0, 1]
    assert groups.by_name["encoder.block.2.layer.0.SelfAttention.vo"].parent == encoder.name
    reordering = apply_spp(model, SPPConfig(axes=("heads",), metric="random"))
    assert len({tuple(order.flatten().tolist()) for order in reordering.orders.values()}) > 1


def test_a_head_table_per_layer_ties_nothing():
    config = transformers.UMT5Config(vocab_size=40, d_model=28, d_kv=4, d_ff=20, num_layers=2, num_heads=3)
    groups = channel_groups(transformers.UMT5EncoderModel(config)).select(("heads",))
    assert [group.layer for group in groups] == [0, 1]


@pytest.mark.parametrize(
    ("heads", "shapes"), [(1, {"heads": {(1, 6)}}), (2, {"heads": {(1, 2), (2, 3)}}), (6, {"heads": {(1, 6)}})]
)
def test_grouped_query_heads(heads, shapes):
    groups = channel_groups(build_model("llama", num_key_value_heads=heads))
    assert {(group.blocks, group.size) for group in groups.select(("heads",))} == shapes["heads"]
    assert {(group.blocks, group.size) for group in groups.select(("vo",))} == {(heads, 6)}


def test_one_head_is_no_axis():
    groups = channel_groups(build_model("bert", num_attention_heads=1))
    assert "heads" not in groups.axes
    assert all(group.parent is None for group in groups)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_meta_device_resolves_alike(name):
    with torch.device("meta"):
        empty = model_class(name)(build_config(name))
    full = build_model(name)
    assert channel_groups(empty) == channel_groups(full)
    assert channel_groups(empty).refused == channel_groups(full).refused


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_training_mode_grad_state_and_dtype_do_not_matter(name):
    expected = channel_groups(build_model(name))
    assert channel_groups(build_model(name, dtype=torch.bfloat16).train().requires_grad_(False)) == expected


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROTARY)
def test_rotary_rows_are_refused_with_the_reason(name):
    model = build_model(name)
    refusals = channel_groups(model).refused
    assert [(refusal.axis, refusal.where) for refusal in refusals] == [("qk", "layers.*.self_attn")]
    assert refusals[0].reason == ROTARY_REASON
    before = weights_of(model)
    with pytest.raises(IllegalAxisError, match=r"'qk' may not move in .*rotary.*Legal axes here: "):
        apply_spp(model, SPPConfig(axes=("ffn", "qk")))
    assert same_bits(model, before)
    assert "qk     stays in place at layers.*.self_attn: rotary" in str(apply_spp(model))


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in ROTARY])
def test_nothing_else_is_refused(name):
    assert channel_groups(build_model(name)).refused == ()


@pytest.mark.parametrize(
    ("name", "head"), [*((name, "base") for name in ARCHITECTURES), ("t5", "encoder"), ("dinov2", "backbone")]
)
def test_hidden_of_a_model_without_head_is_refused(name, head):
    refusals = [refusal for refusal in channel_groups(build_model(name, head)).refused if refusal.axis == "hidden"]
    assert [refusal.reason for refusal in refusals] == [HEADLESS_REASON]


@pytest.mark.parametrize("name", ["t5", "t5-gated"])
def test_hidden_of_t5_for_question_answering(name):
    assert "hidden" in legal_axes(build_model(name, "question-answering"))


def test_hidden_of_a_base_model_with_a_linear_child():
    """ELECTRA projects its embeddings; its output is the residual stream all the same."""
    config = transformers.ElectraConfig(
        vocab_size=40,
        embedding_size=16,
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=3,
        intermediate_size=20,
    )
    assert "hidden" in channel_groups(transformers.ElectraForMaskedLM(config)).axes
    assert "hidden" not in channel_groups(transformers.ElectraModel(config)).axes


@pytest.mark.parametrize("name", ["vit", "deit"])
def test_hidden_of_masked_image_modelling(name):
    assert "hidden" in legal_axes(build_model(name, "masked-image"))
    # As many outputs as inputs: which of them are the stream cannot be told from shapes.
    refusals = channel_groups(build_model(name, "masked-image", hidden_size=48)).refused
    assert [(refusal.axis, refusal.where) for refusal in refusals] == [("hidden", "decoder.*")]


@pytest.mark.parametrize(
    ("where", "axes"),
    [
        ("vit.layers.0.attention", {"qk", "vo", "heads"}),
        ("vit.layers.0.mlp", {"ffn"}),
        ("vit.layers.0.mlp.activation_fn", {"ffn"}),
    ],
)
def test_a_module_with_an_unexplained_parameter_is_refused(where, axes):
    model = build_model("vit")
    model.get_submodule(where).register_parameter("scale", nn.Parameter(torch.ones(8)))
    groups = channel_groups(model)
    refused = {refusal.axis: refusal.reason for refusal in groups.refused if refusal.axis != "hidden"}
    name = f"{where.removeprefix('vit.').replace('.0.', '.*.')}.scale"
    assert refused == dict.fromkeys(axes, f"parameter {name} is not understood")
    assert {group.axis for group in groups if group.layer == 0} == set(AXES) - axes - {"experts", "hidden"}
    assert {group.axis for group in groups if group.layer == 1} == set(AXES) - {"experts", "hidden"}


@pytest.mark.parametrize(
    ("where", "axis"),
    [("layers.0.attention.q_proj", "qk"), ("layers.0.attention.v_proj", "vo"), ("layers.0.mlp.fc1", "ffn")],
)
def test_a_projection_with_an_unexplained_parameter_is_refused(where, axis):
    model = build_model("vit")
    module = model.vit.get_submodule(where)
    module.register_parameter("scale", nn.Parameter(torch.ones(module.out_features)))
    assert axis not in {group.axis for group in channel_groups(model) if group.layer == 0}


@pytest.mark.parametrize("kind", ["weight_norm", "pruned"])
def test_a_parametrized_projection_is_refused(kind):
    from torch.nn.utils import parametrizations, prune

    model = build_model("vit")
    if kind == "pruned":
        prune.l1_unstructured(model.vit.layers[0].mlp.fc1, "weight", amount=0.5)
    else:
        parametrizations.weight_norm(model.vit.layers[0].mlp.fc1)
    try:
        axes = {group.axis for group in channel_groups(model) if group.layer == 0}
    except SPPError:
        return
    assert "ffn" not in axes


class Wrapped(nn.Module):
    """A projection inside another module, as adapters put it."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer

    def forward(self, features):
        return self.base_layer(features)


@pytest.mark.parametrize(
    ("parent", "child", "axes"),
    [
        ("attention", "q_proj", {"qk", "vo", "heads"}),
        ("attention", "o_proj", {"qk", "vo", "heads"}),
        ("mlp", "fc2", {"ffn"}),
    ],
)
def test_a_wrapped_projection_is_refused_and_not_overlooked(parent, child, axes):
    """Otherwise a model with adapters is reordered in part, and nobody is told."""
    model = build_model("vit", "base")
    for layer in model.layers:
        module = getattr(layer, parent)
        setattr(module, child, Wrapped(getattr(module, child)))
    groups = channel_groups(model)
    assert set(groups.axes).isdisjoint(axes)
    refused = {refusal.axis for refusal in groups.refused if refusal.where.startswith(f"layers.*.{parent}")}
    assert refused == axes | {"hidden"}


@pytest.mark.parametrize(
    "config",
    [
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_channels=3),
        transformers.MambaConfig(vocab_size=40, hidden_size=8, state_size=4, num_hidden_layers=1),
    ],
    ids=lambda config: config.model_type,
)
def test_unknown_architecture_raises(config):
    model = transformers.AutoModel.from_config(config)
    with pytest.raises(UnsupportedArchitectureError, match=rf"'{config.model_type}' \({type(model).__name__}\) has no"):
        channel_groups(model)
    with pytest.raises(UnsupportedArchitectureError):
        apply_spp(model)


@pytest.mark.parametrize("given", [None, "bert", transformers.ViTModel, nn.Linear(2, 2)], ids=str)
def test_no_transformers_model(given):
    with pytest.raises(UnsupportedModelError, match="a transformers PreTrainedModel is needed"):
        channel_groups(given)


# --- known defects of the reference -----------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["vit", "distilbert", "llama"])
def test_defect_1_no_layer_is_left_unchanged(name, attention):
    """The reference looks for class names and leaves models with SDPA attention as they were."""
    model = build_model(name, attn_implementation=attention)
    before = weights_of(model)
    reordering = apply_spp(model, SPPConfig(axes=legal_axes(model), metric="random"))
    after = model.state_dict()
    matrices = [key for key, value in before.items() if value.dim() == 2 and "position" not in key]
    assert [key for key in matrices if after[key].equal(before[key])] == []
    assert {reordering.layer_of[group] for group in reordering.orders} == {0, 1, None}


def test_defect_1_class_names_do_not_matter():
    model = build_model("vit")
    expected = channel_groups(model)
    for module in model.modules():
        module.__class__ = type("Renamed", (type(module),), {})
    assert channel_groups(model) == expected


@pytest.mark.parametrize("name", ROTARY)
def test_defect_2_rotary_rows_do_not_move(name):
    """With eager attention the reference moves them, and the model computes something else."""
    model = build_model(name, attn_implementation="eager")
    before, inputs = weights_of(model), build_inputs(model)
    expected = outputs_of(model, inputs)
    reordering = apply_spp(model, SPPConfig(axes=("vo", "heads", "ffn")))
    found = outputs_of(model, inputs)
    assert relative_difference(expected, found) < 1e-5
    assert found["output.logits"].argmax(-1).equal(expected["output.logits"].argmax(-1))
    key_heads = reordering.orders["layers.0.self_attn.heads"][0]
    weight = "model.layers.0.self_attn.k_proj.weight"
    assert model.state_dict()[weight].equal(before[weight].view(2, 6, 24)[key_heads].reshape(12, 24))


def test_defect_2_moving_rotary_rows_would_show():
    """The control: the rows of q and k, moved together inside each head, change what Llama computes."""
    model = build_model("llama", attn_implementation="eager")
    inputs = build_inputs(model)
    expected = outputs_of(model, inputs)
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        for projection in (attention.q_proj, attention.k_proj):
            for tensor in projection.parameters():
                tensor.copy_(tensor.clone().unflatten(0, (-1, 6))[:, [1, 0, 2, 3, 4, 5]].flatten(0, 1))
    assert relative_difference(expected, outputs_of(model, inputs)) > 1e-2


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_defect_4_feed_forward_is_ordered(name):
    """The reference slices feed-forward blocks that it never put in order."""
    model = build_model(name)
    reordering = apply_spp(model)
    feed_forward = {group.name: group for group in channel_groups(model) if group.axis == "ffn"}
    assert feed_forward
    assert set(feed_forward) <= set(reordering.orders)
    tensors = dict(model.named_parameters())
    for group in feed_forward.values():
        matrices = [tensors[member.tensor] for member in group.scored_members]
        dims = [member.dim for member in group.scored_members]
        norms = sum(matrix.detach().double().abs().sum(1 - dim) for matrix, dim in zip(matrices, dims, strict=True))
        assert norms.diff().le(1e-6).all()
        assert float(norms[: group.size // 2].sum()) > float(norms[group.size // 2 :].sum()) * 1.1


@pytest.mark.parametrize("metric", ["l1", "random", "activation", "taylor"])
def test_defect_8_global_generators_stay_untouched(metric):
    model = build_model("bert").train()
    calibration = [build_inputs(model)] if metric in ("activation", "taylor") else None
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    apply_spp(model, SPPConfig(metric=metric), calibration=calibration).undo(model)
    assert torch.get_rng_state().equal(states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]


def test_defect_8_the_clock_does_not_matter():
    model = build_model("bert")
    one, two = (apply_spp(copy.deepcopy(model), SPPConfig(metric="random", seed=3)) for _ in range(2))
    other = apply_spp(copy.deepcopy(model), SPPConfig(metric="random", seed=4))
    assert one.digest == two.digest != other.digest


def test_default_heads_exist():
    assert {default_head(name) for name in ARCHITECTURES} == {
        "image-classification",
        "masked-lm",
        "seq2seq",
        "causal-lm",
    }
