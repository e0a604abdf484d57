"""A representative of every structure in transformers: what may move is proved, and what must not is refused."""

import dataclasses

import pytest
import torch
import transformers
import zoo
from judgement import judge_model

from hf_spp import SPPConfig, SPPError, UnsupportedArchitectureError, apply_spp, channel_groups
from hf_spp.config import AXES

# Some modules of transformers compile functions when they are imported.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

# Axes that may move, and compute the same in any order, in a model with a task head where there is one.
STRUCTURES = {
    # Separate projections of q, k, v and the output, under all kinds of names.
    "llama": "vo heads ffn hidden",
    "opt": "qk vo heads ffn hidden",
    "mpnet": "qk vo heads ffn hidden",
    "xlm": "qk vo heads ffn hidden",
    "albert+groups": "qk vo heads ffn hidden",
    "cvt": "qk vo heads ffn",
    "bert+decoder": "qk vo heads ffn",
    # Norms of q and k: over one head, over all heads, of each head.
    "qwen3_moe": "vo heads ffn experts hidden",
    "olmo2": "vo heads ffn hidden",
    "cohere+qknorm": "vo heads ffn hidden",
    # Biases of the scores per head: in each layer, in the first for all, outside of the layers, none that is learned.
    "umt5": "qk vo heads ffn hidden",
    "t5": "qk vo heads ffn hidden",
    "beit+relpos": "qk vo heads ffn hidden",
    "swinv2": "qk vo heads ffn",
    "layoutlmv3": "qk vo heads ffn hidden",
    "sam3_detr_decoder": "qk vo heads ffn",
    "bloom": "qk vo ffn hidden",
    "parakeet_ctc": "qk vo heads ffn",
    # Sinks, gates and sub-norms.
    "gpt_oss": "vo heads ffn experts hidden",
    "qwen3_next": "vo heads ffn experts",
    "laguna+headgate": "vo heads ffn experts hidden",
    "bitnet": "vo heads ffn hidden",
    # Fused q, k and v: in blocks, transposed, side by side for each head or group, in four parts.
    "phi3": "vo heads ffn hidden",
    "gpt2": "qk vo heads ffn hidden",
    "gpt_neox": "vo heads ffn hidden",
    "falcon+new": "vo ffn hidden",
    "gpt_bigcode+mha": "qk vo heads ffn hidden",
    "codegen": "vo heads ffn hidden",
    "deberta": "qk vo heads ffn hidden",
    # torch's own attention, latent attention, parameters in place of layers.
    "siglip_vision_model": "qk vo heads ffn",
    "deepseek_v3": "qk vo heads ffn experts hidden",
    "xlnet": "heads ffn",
    # A second set of projections for some tokens only; positions in keys; rotation before the projection.
    "longformer": "qk vo heads ffn hidden",
    "luke": "qk vo heads ffn",
    "deberta-v2+noshare": "qk vo heads ffn hidden",
    # Encoder-decoder, several towers.
    "bart": "qk vo heads ffn",
    "llava": "vo heads ffn",
    # Feed-forward: fused gate, convolution or norm between, in one module with the rest, experts in one matrix.
    "modernbert": "vo heads ffn hidden",
    "segformer": "qk vo heads ffn",
    "convnextv2": "ffn",
    "dbrx": "vo heads ffn hidden",
    "mixtral": "vo heads ffn experts hidden",
    # State-space mixers beside attention.
    "jamba": "qk vo heads ffn experts",
}


def build(model_type):
    classes = zoo.model_classes(model_type) if model_type in zoo.all_types() else []
    if not classes:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    heads = [one for one in classes if "For" in one.__name__ or "LMHead" in one.__name__]
    return zoo.build(model_type, [*heads, *classes][0])


def reasons(groups, axis):
    return " ".join(refusal.reason for refusal in groups.refused if refusal.axis == axis)


@pytest.mark.parametrize("model_type", STRUCTURES)
def test_what_may_move_computes_the_same(model_type):
    built = build(model_type)
    findings = judge_model(built.model, built.inputs)
    wrong = {axis: str(one) for axis, one in findings.items() if one.verdict in ("wrong", "error")}
    assert wrong == {}
    assert [axis for axis in AXES if findings[axis].verdict == "equal"] == STRUCTURES[model_type].split()


@pytest.mark.parametrize(
    ("model_type", "axis", "reason"),
    [
        ("llama", "qk", "rotary"),
        ("bloom", "heads", "alibi"),
        ("falcon+alibi", "heads", "alibi"),
        ("autoformer", "heads", "averages over heads"),
        ("clvp_encoder", "vo", "turns the values"),
        ("diffllama", "vo", "is not understood"),
        ("wavlm", "heads", "gate per head"),
        ("convbert", "vo", "key_conv_attn_layer"),
        ("zamba2", "ffn", "adapter"),
        ("d_fine", "ffn", "no pattern explains layers.0, layers.1"),
        ("deepseek_v3", "qk", "rotary rows of q and k stay"),
        ("deepseek_v4", "vo", "no pattern explains"),
        ("m2m_100", "hidden", "no parameter"),
        ("videomae", "hidden", "no parameter"),
        ("pegasus_x", "hidden", "no parameter"),
        ("swin", "hidden", "several widths"),
        ("llava", "hidden", "made of several"),
    ],
)
def test_what_must_not_move_is_refused_with_the_reason(model_type, axis, reason):
    assert reason in reasons(channel_groups(build(model_type).model), axis)


def test_a_model_without_any_channels_is_refused_with_the_reason():
    with pytest.raises(UnsupportedArchitectureError, match="state-space or linear-attention mixer"):
        channel_groups(build("mamba").model)


@pytest.mark.parametrize(
    ("model_type", "axis", "tensor"),
    [
        ("longformer", "qk", "query_global"),
        ("longformer", "vo", "value_global"),
        ("luke", "qk", "w2e_query"),
        ("qwen3_next", "vo", "self_attn.q_proj"),
        ("gpt_oss", "heads", "sinks"),
        ("deberta-v2+noshare", "qk", "pos_key_proj"),
        ("bitnet", "vo", "attn_sub_norm"),
        ("parakeet_ctc", "qk", "bias_u"),
        ("deepseek_v3", "experts", "e_score_correction_bias"),
        ("gpt_oss", "ffn", "gate_up_proj_bias"),
        ("sam3_detr_decoder", "heads", "box_rpb_embed_x"),
    ],
)
def test_what_hangs_on_the_channels_moves_with_them(model_type, axis, tensor):
    """Some of these never run on usual inputs, so that an output which is the same proves nothing about them."""
    groups = channel_groups(build(model_type).model)
    assert any(tensor in member.tensor for group in groups if group.axis == axis for member in group.members)


def test_random_blocks_of_each_head_keep_heads_in_place():
    """Short inputs attend to everything, and would not show it."""
    model = build("big_bird").model
    for attention_type, legal in (("original_full", True), ("block_sparse", False)):
        model.config.attention_type = attention_type
        assert ("heads" in channel_groups(model).axes) is legal


def test_experts_that_the_router_chooses_in_groups_move_inside_their_group():
    built = build("deepseek_v3")
    for module in built.model.modules():
        if hasattr(module, "num_group"):
            module.num_group, module.topk_group = 2, 1
    blocks = {(group.blocks, group.size) for group in channel_groups(built.model) if group.axis == "experts"}
    assert blocks == {(2, 2)}
    findings = judge_model(built.model, built.inputs)
    assert findings["experts"].verdict == findings["ffn"].verdict == "equal"
    model = build("deepseek_v3").model.double()
    assert apply_spp(model, SPPConfig(axes=("ffn", "experts"), metric="random"), example_inputs=built.inputs).changed


def test_a_rotation_of_the_values_keeps_them_in_place():
    model = build("roformer").model
    assert "vo" in channel_groups(model).axes
    for module in model.modules():
        if hasattr(module, "rotary_value"):
            module.rotary_value = True
    assert "vo" not in channel_groups(model).axes


def test_an_unknown_table_per_head_outside_of_the_attention_keeps_heads_in_place():
    model = build("bert").model
    heads = model.config.num_attention_heads
    model.bert.encoder.register_parameter("relative_bias_values", torch.nn.Parameter(torch.randn(9, heads)))
    groups = channel_groups(model)
    assert "heads" not in groups.axes
    assert "may hold a bias per head" in reasons(groups, "heads")


def test_a_buffer_per_head_keeps_heads_in_place():
    model = build("bert").model
    attention = model.bert.encoder.layer[0].attention.self
    attention.register_buffer("slopes", torch.randn(model.config.num_attention_heads))
    assert "slopes may hold a value per head" in reasons(channel_groups(model), "heads")


@pytest.mark.parametrize("model_type", ["llava", "clip"])
def test_one_tower_is_reordered_and_the_others_are_not(model_type):
    built = zoo.build(model_type, zoo.model_classes(model_type)[0])
    model = built.model.double()
    tower = next(one for one in channel_groups(model).towers if "vision" in one)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    config = SPPConfig(towers=(tower,), metric="random", verify=False)
    reordering = apply_spp(model, config)
    assert reordering.config.towers == (tower,)
    changed = {name for name, parameter in model.named_parameters() if not parameter.equal(before[name])}
    assert changed
    assert all(tower in name for name in changed)
    assert SPPConfig.from_dict(reordering.config.to_dict()) == reordering.config


def test_a_tower_that_does_not_exist_is_an_error():
    model = zoo.build("clip", zoo.model_classes("clip")[0]).model
    with pytest.raises(SPPError, match=r"Tower 'vision'.*Towers here: text_model, vision_model"):
        apply_spp(model, SPPConfig(towers=("vision",)))


def test_tied_layers_of_a_shared_table_have_one_order():
    groups = channel_groups(build("t5").model)
    tied = [group for group in groups if group.axis == "heads" and group.layer is None]
    assert {group.name for group in tied} == {
        "encoder.block.*.layer.*.SelfAttention.heads",
        "decoder.block.*.layer.*.SelfAttention.heads",
    }


def test_groups_have_distinct_names_and_fit_their_tensors():
    for model_type in ("qwen3_moe", "gpt_oss", "deepseek_v3", "siglip_vision_model", "deberta", "dbrx"):
        model = build(model_type).model
        shapes = {name: tensor.shape for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
        groups = channel_groups(model)
        assert len({group.name for group in groups}) == len(groups)
        for group in groups:
            for member in group.members:
                places = member.positions(shapes[member.tensor][member.dim], group)
                assert places.shape[:2] == (1 if member.stacked else group.blocks, group.size)
                assert places.unique().numel() == places.numel()
            assert dataclasses.replace(group) == group


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "dbrx"])
def test_experts_read_the_stream_where_they_write_neurons(model_type):
    groups = channel_groups(build(model_type).model)
    stream = {member.tensor: member.role for member in groups.by_name["hidden"].members}
    for group in groups:
        for member in group.members if group.axis == "ffn" else ():
            if member.is_matrix and member.role != "other":
                assert stream[member.tensor] == {"producer": "consumer", "consumer": "producer"}[member.role]
