"""Apply and undo, save and load, compose and invert: every way there leads back, bit for bit."""

import copy
import subprocess
import sys
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
import transformers
from conftest import (
    ARCHITECTURES,
    build_inputs,
    build_model,
    default_head,
    heads_of,
    legal_axes,
    outputs_of,
    relative_difference,
    same_bits,
    weights_of,
)
from hypothesis import given

from hf_spp import ChannelGroup, ChannelMap, Member, OrdersError, Reordering, SPPConfig, apply_spp, channel_groups
from hf_spp.apply import gather_tensors, invert_indices, named_tensors
from hf_spp.permutation import (
    compose_orders,
    gather_indices,
    identity_orders,
    invert_orders,
    moved_channels,
    salient_order,
)

RANDOM = SPPConfig(metric="random")
AUTO_CLASSES = {
    "base": "AutoModel",
    "image-classification": "AutoModelForImageClassification",
    "masked-image": "AutoModelForMaskedImageModeling",
    "backbone": "AutoBackbone",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "masked-lm": "AutoModelForMaskedLM",
    "multiple-choice": "AutoModelForMultipleChoice",
    "next-sentence": "AutoModelForNextSentencePrediction",
    "pretraining": "AutoModelForPreTraining",
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
}


def random_everything(model):
    return replace(RANDOM, axes=legal_axes(model))


# --- apply, undo ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_undo_restores_every_bit(name, dtype):
    model = build_model(name, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.view(-1)[0] = -0.0
            parameter.view(-1)[-1] = torch.finfo(dtype).smallest_normal / 2
    before = weights_of(model)
    addresses = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    reordering = apply_spp(model, random_everything(model))
    assert reordering.changed
    assert not same_bits(model, before)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == addresses
    reordering.undo(model)
    assert same_bits(model, before)


def test_undo_keeps_what_training_did():
    model = build_model("bert")
    before = weights_of(model)
    reordering = apply_spp(model, random_everything(model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    reordering.undo(model)
    assert same_bits(model, {n: w * 2 if w.is_floating_point() else w for n, w in before.items()})


def test_undo_of_several_in_reverse():
    model = build_model("gpt2")
    states, done = [weights_of(model)], []
    for metric in ("random", "l1", "l2"):
        done.append(apply_spp(model, SPPConfig(metric=metric, axes=legal_axes(model))))
        states.append(weights_of(model))
    for reordering in reversed(done):
        assert same_bits(model, states.pop())
        reordering.undo(model)
    assert same_bits(model, states.pop())


def test_double_undo_is_refused():
    model = build_model("vit")
    reordering = apply_spp(model, RANDOM)
    reordering.undo(model)
    before = weights_of(model)
    with pytest.raises(OrdersError, match="in its original order"):
        reordering.undo(model)
    assert same_bits(model, before)


def test_undo_of_another_reordering_is_refused():
    model = build_model("vit")
    first = apply_spp(model, RANDOM)
    apply_spp(model, replace(RANDOM, seed=1))
    before = weights_of(model)
    with pytest.raises(OrdersError, match="in the order of another reordering"):
        first.undo(model)
    assert same_bits(model, before)


def test_undo_on_a_copy_of_the_reordered_model():
    model = build_model("vit")
    before = weights_of(model)
    reordering = apply_spp(model, RANDOM)
    twin = copy.deepcopy(model)
    reordering.undo(twin)
    assert same_bits(twin, before)
    assert not same_bits(model, before)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_apply_on_a_fresh_copy(name):
    model = build_model(name)
    fresh = copy.deepcopy(model)
    reordering = apply_spp(model, random_everything(model))
    reordering.apply(fresh)
    assert same_bits(fresh, weights_of(model))
    after = weights_of(fresh)
    with pytest.raises(OrdersError, match="already in the order"):
        reordering.apply(fresh)
    assert same_bits(fresh, after)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_apply_on_the_base_model_and_on_another_head(name):
    model = build_model(name)
    base = build_model(name, "base")
    other_head = next(head for head in heads_of(name)[1:][::-1] if (name, head) != ("bert", "causal-lm"))
    other = build_model(name, other_head)
    for each in (base, other):
        each.base_model.load_state_dict(model.base_model.state_dict(), strict=False)
    reordering = apply_spp(model, RANDOM)
    for each in (base, other):
        reordering.apply(each)
        expected = model.base_model.state_dict()
        moved = {group.members[0].tensor for group in channel_groups(each)}
        assert moved
        found = each.base_model.state_dict()
        assert all(found[key].equal(expected[key]) for key in found if key in expected)


def test_hidden_does_not_fit_the_base_model():
    model, base = build_model("bert"), build_model("bert", "base")
    reordering = apply_spp(model, random_everything(model))
    before = weights_of(base)
    with pytest.raises(OrdersError, match="'hidden' belongs to another model"):
        reordering.apply(base)
    assert same_bits(base, before)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_model_already_in_order(name):
    model = build_model(name)
    config = SPPConfig(axes=legal_axes(model), metric="l1")
    first = apply_spp(model, config)
    before = weights_of(model)
    again = apply_spp(model, config)
    assert first.changed
    assert not again.changed
    assert again.max_abs_diff == 0
    assert "nothing moved: the model was already in this order" in str(again)
    assert same_bits(model, before)


# --- save, load -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_stock_checkpoint(name, tmp_path):
    model = build_model(name)
    original, inputs = weights_of(model), build_inputs(model)
    expected = outputs_of(model, inputs)
    reordering = apply_spp(model, random_everything(model))
    model.save_pretrained(tmp_path)
    reordering.save_pretrained(tmp_path)

    stock = getattr(transformers, AUTO_CLASSES[default_head(name)]).from_pretrained(tmp_path).eval()
    assert type(stock) is type(model)
    assert same_bits(stock, weights_of(model))
    found = outputs_of(stock, inputs)
    assert relative_difference({"logits": expected["output.logits"]}, {"logits": found["output.logits"]}) <= 1e-5

    loaded = Reordering.from_pretrained(tmp_path)
    assert loaded.config == reordering.config
    assert loaded.summary() == reordering.summary()
    assert str(loaded) == str(reordering)
    loaded.undo(stock)
    assert same_bits(stock, original)


@pytest.mark.parametrize(("name", "head"), [("bert", "base"), ("vit", "masked-image"), ("t5", "encoder")])
def test_stock_checkpoint_of_other_heads(name, head, tmp_path):
    model = build_model(name, head)
    original = weights_of(model)
    reordering = apply_spp(model, RANDOM)
    model.save_pretrained(tmp_path)
    reordering.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    Reordering.from_pretrained(str(tmp_path)).undo(loaded)
    assert same_bits(loaded, original)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_stock_checkpoint_in_low_precision(dtype, tmp_path):
    model = build_model("llama", dtype=dtype)
    original = weights_of(model)
    reordering = apply_spp(model, random_everything(model))
    model.save_pretrained(tmp_path)
    reordering.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert loaded.dtype == dtype
    Reordering.from_pretrained(tmp_path).undo(loaded)
    assert same_bits(loaded, original)


def test_stock_checkpoint_without_this_package(tmp_path):
    model = build_model("llama")
    apply_spp(model, random_everything(model)).save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    inputs = build_inputs(model, labels=False)
    torch.save({**inputs, "logits": outputs_of(model, inputs)["output.logits"]}, tmp_path / "expected.pt")
    script = """
import sys
sys.modules["hf_spp"] = None
import torch
from transformers import AutoModelForCausalLM
folder = sys.argv[1]
expected = torch.load(f"{folder}/expected.pt", weights_only=True)
logits = expected.pop("logits")
with torch.no_grad():
    found = AutoModelForCausalLM.from_pretrained(folder).eval()(**expected).logits
print((found - logits).abs().max().item() <= 1e-6 * logits.abs().max().item())
"""
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "True", done.stderr


def test_orders_as_bytes_stay_equal():
    model = build_model("t5")
    reordering = apply_spp(model, random_everything(model))
    loaded = Reordering.from_bytes(reordering.to_bytes())
    assert loaded.digest == reordering.digest
    for name, order in reordering.orders.items():
        assert loaded.orders[name].equal(order)
        assert loaded.orders[name].dtype == torch.int64
        assert loaded.scores[name].equal(reordering.scores[name])
    assert (loaded.axis_of, loaded.layer_of) == (reordering.axis_of, reordering.layer_of)


def test_callable_metric_is_stored_by_name(tmp_path):
    def my_metric(group, weights):
        return torch.stack([weight.flatten(2).sum(-1) for weight in weights]).sum(0)

    model = build_model("vit")
    before = weights_of(model)
    apply_spp(model, SPPConfig(metric=my_metric)).save_pretrained(tmp_path)
    loaded = Reordering.from_pretrained(tmp_path)
    assert loaded.config.metric_name == "my_metric"
    loaded.undo(model)
    assert same_bits(model, before)


# --- ties -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "t5", "bert", "roberta", "distilbert"])
def test_tied_embeddings_stay_tied(name, tmp_path):
    model = build_model(name)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    reordering = apply_spp(model, random_everything(model))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    reordering.undo(loaded)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


def test_untied_embeddings_stay_untied():
    model = build_model("qwen2")
    apply_spp(model, random_everything(model))
    assert not model.get_output_embeddings().weight.equal(model.get_input_embeddings().weight)


def share_module(model):
    model.vit.layers[1] = model.vit.layers[0]


def share_parameters(model):
    for module, twin in zip(model.vit.layers[0].modules(), model.vit.layers[1].modules(), strict=True):
        for name, parameter in module.named_parameters(recurse=False):
            setattr(twin, name, parameter)


@pytest.mark.parametrize("share", [share_module, share_parameters])
def test_shared_layers_are_ordered_once(share):
    model = build_model("vit", dtype=torch.float64)
    share(model)
    before, inputs = weights_of(model), build_inputs(model)
    expected = outputs_of(model, inputs)
    config = SPPConfig(axes=legal_axes(model), metric="l1")
    reordering = apply_spp(model, config)
    assert relative_difference(expected, outputs_of(model, inputs)) <= 1e-10
    first, second = model.vit.layers
    assert first.mlp.fc1.weight is second.mlp.fc1.weight
    assert not apply_spp(copy.deepcopy(model), config).changed
    reordering.undo(model)
    assert same_bits(model, before)


# --- compose and invert -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "t5", "llama", "gpt2"])
def test_two_reorderings_compose_to_one(name):
    model = build_model(name)
    fresh, groups = copy.deepcopy(model), channel_groups(model)
    axes = legal_axes(model)
    first = apply_spp(model, SPPConfig(axes=axes, metric="random"))
    second = apply_spp(model, SPPConfig(axes=axes, metric="random", seed=1))
    composed = compose_orders(groups, first.orders, second.orders)
    single = replace(first, orders=composed)
    single.apply(fresh)
    assert same_bits(fresh, weights_of(model))
    single.undo(fresh)
    first.apply(fresh)
    partly = compose_orders(groups.select(("ffn",)), first.orders, second.orders)
    assert set(partly) == {group.name for group in groups if group.axis == "ffn"}


def test_orders_name_channels_of_the_original_model():
    """Also in a head that moves, entry [b, i] of an order is the channel of the original head b at rank i."""
    model = build_model("vit")
    original = model.vit.layers[0].attention.v_proj.weight.detach().clone().view(3, 8, 24)
    reordering = apply_spp(model, SPPConfig(axes=("vo", "heads"), metric="random"))
    moved = model.vit.layers[0].attention.v_proj.weight.view(3, 8, 24)
    heads = reordering.orders["layers.0.attention.heads"][0]
    rows = reordering.orders["layers.0.attention.vo"]
    assert moved_channels(heads[None]) > 0
    for place, head in enumerate(heads.tolist()):
        assert moved[place].equal(original[head][rows[head]])


@st.composite
def layouts(draw):
    """Grouped-query attention and a feed-forward block of any size, as groups with parents, and three reorderings."""
    kv, repeats, dim = (draw(st.integers(1, 4)) for _ in range(3))
    heads = ChannelGroup(
        "heads",
        "heads",
        0,
        1,
        kv,
        (Member("q", "(c u) i"), Member("k", "(c u) i"), Member("v", "(c u) i"), Member("o", "o (c u)")),
    )
    query_heads = ChannelGroup(
        "query_heads", "heads", 0, kv, repeats, (Member("q", "(b c u) i"), Member("o", "o (b c u)")), "heads"
    )
    vo = ChannelGroup("vo", "vo", 0, kv, dim, (Member("v", "(b c) i"), Member("o", "o (b r c)")), "heads")
    qk = ChannelGroup("qk", "qk", 0, kv, dim, (Member("q", "(b r c) i"), Member("k", "(b c) i")), "heads")
    hidden = ChannelGroup(
        "hidden", "hidden", None, 1, 5, (Member("q", "o c"), Member("k", "o c"), Member("v", "o c"), Member("o", "c i"))
    )
    groups = ChannelMap((heads, query_heads, vo, qk, hidden))
    shapes = {
        name: torch.Size(shape)
        for name, shape in {
            "q": (kv * repeats * dim, 5),
            "k": (kv * dim, 5),
            "v": (kv * dim, 5),
            "o": (5, kv * repeats * dim),
        }.items()
    }
    return groups, shapes, [draw(orders_of(groups)) for _ in range(3)]


@st.composite
def orders_of(draw, groups):
    chosen = draw(st.lists(st.sampled_from(tuple(groups)), unique_by=lambda group: group.name))
    return {
        group.name: torch.tensor([draw(st.permutations(range(group.size))) for _ in range(group.blocks)])
        for group in chosen
    }


def moved(tensors, groups, orders):
    after = {name: tensor.clone() for name, tensor in tensors.items()}
    gather_tensors(after, gather_indices(groups, orders, {name: tensor.shape for name, tensor in after.items()}))
    return after


def numbered(shapes):
    return {name: torch.arange(shape.numel()).view(shape) for name, shape in shapes.items()}


def equal(one, other):
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


@given(layouts())
def test_composing_equals_the_sequence(layout):
    groups, shapes, (first, second, _) = layout
    tensors = numbered(shapes)
    expected = moved(moved(tensors, groups, first), groups, second)
    assert equal(moved(tensors, groups, compose_orders(groups, first, second)), expected)


@given(layouts())
def test_composing_is_associative(layout):
    groups, _, (first, second, third) = layout
    left = compose_orders(groups, compose_orders(groups, first, second), third)
    right = compose_orders(groups, first, compose_orders(groups, second, third))
    assert equal(left, right)


@given(layouts())
def test_inverse_leads_back(layout):
    groups, shapes, (orders, _, _) = layout
    tensors, inverse = numbered(shapes), invert_orders(groups, orders)
    assert equal(moved(moved(tensors, groups, orders), groups, inverse), tensors)
    assert equal(moved(moved(tensors, groups, inverse), groups, orders), tensors)
    stay = {name: order for name, order in identity_orders(groups).items() if name in orders}
    assert equal(compose_orders(groups, orders, inverse), stay)
    assert equal(compose_orders(groups, inverse, orders), stay)
    assert equal(invert_orders(groups, inverse), orders)
    assert equal(compose_orders(groups, orders, {}), orders)
    assert equal(compose_orders(groups, {}, orders), orders)


@given(layouts())
def test_inverted_indices_lead_back(layout):
    groups, shapes, (orders, _, _) = layout
    tensors, indices = numbered(shapes), gather_indices(groups, orders, shapes)
    after = {name: tensor.clone() for name, tensor in tensors.items()}
    gather_tensors(after, indices)
    gather_tensors(after, invert_indices(indices))
    assert equal(after, tensors)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30), st.integers(1, 3))
def test_salient_order_is_a_stable_sort(values, blocks):
    scores = torch.tensor([values] * blocks).double()
    expected = sorted(range(len(values)), key=lambda channel: -values[channel])
    assert salient_order(scores).tolist() == [expected] * blocks


def test_gather_of_strided_tensors():
    """Transposed weights, sliced weights and convolutions in another memory format hold their strides."""
    for tensor in (
        torch.arange(12.0).view(3, 4).t(),
        torch.arange(24.0).view(4, 6)[:, ::2],
        torch.arange(96.0).view(4, 3, 2, 4).to(memory_format=torch.channels_last),
    ):
        before, strides = tensor.clone(), tensor.stride()
        order = torch.tensor([2, 0, 3, 1])
        gather_tensors({"w": tensor}, {"w": {0: order}})
        assert tensor.equal(before[order])
        assert tensor.stride() == strides
        gather_tensors({"w": tensor}, {"w": {0: order.argsort(), 1: torch.tensor([2, 0, 1])}})
        assert tensor.equal(before[:, [2, 0, 1]])


def test_named_tensors_write_through():
    model = build_model("gpt2")
    tensors = named_tensors(model)
    tensors["transformer.wte.weight"].zero_()
    assert not model.lm_head.weight.any()


def test_gradients_move_with_their_weights():
    model = build_model("bert", "sequence-classification", torch.float64)
    inputs = build_inputs(model)
    model(**inputs).loss.backward()
    before = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    reordering = apply_spp(model, SPPConfig(axes=legal_axes(model)))
    moved = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model(**inputs).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(moved[name], parameter.grad, rtol=1e-9, atol=1e-12)
    assert any(not moved[name].equal(before[name]) for name in before)
    model.zero_grad()
    reordering.undo(model)
    assert all(parameter.grad is None for parameter in model.parameters())
