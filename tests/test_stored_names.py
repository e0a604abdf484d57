from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import build_model, randomize
from safetensors.torch import load_file
from transformers.core_model_loading import Interleave, PermuteForRope

from hf_spp import channel_groups
from hf_spp.apply import gather_model, gather_tensors, named_tensors
from hf_spp.errors import CheckpointError, UnsupportedModelError
from hf_spp.layouts import Layout, Traced, as_tensor, layout_of
from hf_spp.permutation import gather_indices
from hf_spp.stored_names import stored_names

_TEXT = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
}
_EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "decoder_sparse_step": 1}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
BUILT = {
    "mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**_TEXT, num_local_experts=5)),
    "qwen3_moe": lambda: transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**_TEXT, **_EXPERTS)),
    "gpt_oss": lambda: transformers.GptOssForCausalLM(transformers.GptOssConfig(**_TEXT, num_local_experts=5)),
    "clip": lambda: transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={**_VISION, "vocab_size": 40, "max_position_embeddings": 16},
            vision_config=_VISION,
            projection_dim=12,
        )
    ),
    "llava": lambda: transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**_VISION),
            text_config=transformers.LlamaConfig(**_TEXT),
            image_token_index=3,
        )
    ),
}
NAMES = ("vit", "dinov2-swiglu", "bert", "llama", "gpt2", "t5", "roberta", *BUILT)


def build(name, **changes):
    if name not in BUILT:
        return build_model(name, **changes)
    with torch.random.fork_rng(devices=[]):
        return randomize(BUILT[name]()).eval()


def meta_copy(model):
    """The model without values, as the config describes it."""
    with torch.device("meta"):
        return type(model)._from_config(model.config)


def assembled(reads, stored, shape):
    """What reads give, put together as their places say."""
    whole = torch.zeros(shape)
    for read in reads:
        values = stored[read.source]
        for dim, positions in sorted(read.index.items(), key=lambda item: -as_tensor(item[1]).dim()):
            index = as_tensor(positions)
            if index.dim() == 1:
                values = values.index_select(dim, index)
        for dim, positions in read.index.items():
            index = as_tensor(positions)
            if index.dim() == 2:
                values = torch.stack([one.index_select(dim - 1, own) for one, own in zip(values, index, strict=True)])
        values = values.permute([dim for dims in read.dims for dim in dims])
        places = torch.meshgrid(*map(as_tensor, read.places), indexing="ij") if shape else ()
        whole[places] = values.reshape([len(one) for one in read.places])
    return whole


@pytest.mark.parametrize("name", NAMES)
def test_gathers_and_reads_carry_over(name, tmp_path):
    model = build(name)
    model.save_pretrained(tmp_path / "before")
    stored = load_file(tmp_path / "before" / "model.safetensors")
    names = stored_names(meta_copy(model), {key: one.shape for key, one in stored.items()})
    assert names.unused == ()
    assert names.missing == ()
    loaded = type(model).from_pretrained(tmp_path / "before")
    values = named_tensors(loaded)
    for key in names.layouts:
        shape = tuple(names.layout(key).shape)
        assert torch.equal(assembled(names.reads(key, {}), stored, shape), loaded.state_dict()[key]), key

    groups, draw = channel_groups(meta_copy(model)), torch.Generator().manual_seed(0)
    orders = {
        group.name: torch.stack([torch.randperm(group.size, generator=draw) for _ in range(group.blocks)])
        for group in groups
    }
    indices = gather_indices(groups, orders, {key: one.shape for key, one in values.items()})
    gather_model(loaded, indices)
    loaded.save_pretrained(tmp_path / "after")
    expected = load_file(tmp_path / "after" / "model.safetensors")
    assert any(names.gather(key, indices).dims for key in stored)
    for key, before in expected.items():
        gather = names.gather(key, indices)
        found = {key: stored[gather.source].clone()}
        gather_tensors(found, {key: gather.dims})
        assert torch.equal(found[key], before), key

    # A prefix of what moved, in the model's form: what a smaller model reads.
    for key, dims in indices.items():
        part = {dim: index[..., : index.shape[-1] // 2] for dim, index in dims.items()}
        wanted = named_tensors(loaded)[key]
        for dim, index in part.items():
            wanted = wanted.narrow(dim, 0, index.shape[-1])
        assert torch.equal(assembled(names.reads(key, part), stored, wanted.shape), wanted), key


def test_experts_that_change_places_take_each_others_tensors(tmp_path):
    model = build("mixtral")
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    names = stored_names(meta_copy(model), {key: one.shape for key, one in stored.items()})
    layout = names.layout("model.layers.0.mlp.experts.gate_up_proj")
    assert layout.shape == (5, 40, 24)
    assert len(layout.pieces) == 10
    order = torch.tensor([3, 1, 0, 2, 4])
    indices = {"model.layers.0.mlp.experts.gate_up_proj": {0: order}}
    for place, expert in enumerate(order.tolist()):
        for kind in ("w1", "w3"):
            key = f"model.layers.0.block_sparse_moe.experts.{{}}.{kind}.weight"
            gather = names.gather(key.format(place), indices)
            assert (gather.source, dict(gather.dims)) == (key.format(expert), {})
    crossing = torch.arange(40).roll(1).repeat(5, 1)
    with pytest.raises(UnsupportedModelError, match="would cross"):
        names.gather(key.format(0), {"model.layers.0.mlp.experts.gate_up_proj": {1: crossing}})


def traced(*shape):
    return Traced(Layout.of("stored", shape))


@pytest.mark.parametrize("dim", [0, 1])
def test_interleaved_halves(dim):
    shape = (6, 8)
    found = Interleave(dim).convert({"a": [traced(*shape)]}, ["a"], ["b"])["b"].chunk(2, dim)
    values = torch.arange(48).view(shape).float()
    expected = Interleave(dim).convert({"a": [values]}, ["a"], ["b"])["b"].chunk(2, dim)
    for half, whole in zip(found, expected, strict=True):
        layout = layout_of(half)
        assert torch.equal(assembled(layout.reads({}), {"stored": values}, whole.shape), whole)
        chosen = torch.tensor([2, 0])
        part = assembled(layout.reads({dim: chosen}), {"stored": values}, whole.index_select(dim, chosen).shape)
        assert torch.equal(part, whole.index_select(dim, chosen))


@pytest.mark.parametrize("shape", [(24, 5), (24,)])
def test_rotary_rows(shape):
    config, operation = SimpleNamespace(num_attention_heads=3), PermuteForRope(permute_layer_names=["a"])
    values = torch.arange(120)[: torch.Size(shape).numel()].view(shape).float()
    # Versions differ in the name that they give the result.
    expected, found = (
        next(iter(operation.convert({"a": [one]}, ["a"], ["b"], config=config).values()))
        for one in (values, traced(*shape))
    )
    assert not torch.equal(expected, values)
    assert torch.equal(assembled(layout_of(found).reads({}), {"stored": values}, shape), expected)


def test_flattened_dimensions_stay_whole():
    layout = layout_of(traced(4, 3, 2, 5).reshape(4, -1))
    values = torch.arange(120).view(4, 3, 2, 5).float()
    rows = layout.reads({0: torch.tensor([2, 1])})
    assert torch.equal(assembled(rows, {"stored": values}, (2, 30)), values[[2, 1]].flatten(1))
    with pytest.raises(UnsupportedModelError, match="flattened while it is loaded"):
        layout.reads({1: torch.tensor([2, 1])})


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (lambda one: one.add(1), "converts stored .* by add"),
        (lambda one: one.flip(0), r"flip\(\)"),
        (lambda one: one.reshape(2, 12), "reshape"),
        (lambda one: one.view(torch.int32), "another type"),
        (lambda one: layout_of(one.reshape(2, 2, 6)), "in pieces"),
    ],
)
def test_unknown_operations(operation, message):
    with pytest.raises(UnsupportedModelError, match=message):
        operation(traced(4, 6))


def test_checkpoints_that_do_not_fit():
    model = meta_copy(build_model("bert"))
    shapes = {name: one.shape for name, one in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"make a tensor \[3, 3\], and .*word_embeddings"):
        stored_names(model, {**shapes, "bert.embeddings.word_embeddings.weight": (3, 3)})
    more = stored_names(model, {**shapes, "odd.weight": (3, 3)})
    assert more.unused == ("odd.weight",)
    name = "bert.encoder.layer.0.output.dense.weight"
    less = stored_names(model, {key: one for key, one in shapes.items() if key != name})
    assert less.missing == (name,)
    with pytest.raises(CheckpointError, match=f"do not hold {name}"):
        less.layout(name)


def test_tied_weights_under_either_name():
    model = meta_copy(build_model("llama"))
    shapes = {name: one.shape for name, one in model.state_dict().items()}
    for left in ("lm_head.weight", "model.embed_tokens.weight"):
        names = stored_names(model, {key: one for key, one in shapes.items() if key != left})
        assert names.missing == ()
        kept = {"lm_head.weight", "model.embed_tokens.weight"} - {left}
        assert set(names.layout(left).sources) == kept
    both = stored_names(model, shapes)
    index = {0: torch.arange(40).flip(0)}
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(both.gather(name, {"model.embed_tokens.weight": index}).dims[0], index[0])


def test_model_that_is_known_by_its_base(tmp_path):
    build_model("bert", "base").save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    model = meta_copy(build_model("bert"))
    names = stored_names(model, {key: one.shape for key, one in stored.items()})
    layout = names.layout("bert.encoder.layer.0.output.dense.weight")
    assert layout.sources == ("encoder.layer.0.output.dense.weight",)
    assert all(name.startswith("cls.") for name in names.missing)
