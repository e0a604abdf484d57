"""Scores from weights alone, computed a second time here from the definitions."""

import copy

import pytest
import torch
from conftest import ARCHITECTURES, build_model, legal_axes, same_bits, weights_of

from hf_spp import IllegalAxisError, NonFiniteWeightsError, SPPConfig, SPPConfigError, apply_spp, channel_groups
from hf_spp.apply import named_tensors
from hf_spp.baselines import pruning_rank
from hf_spp.permutation import salient_order
from hf_spp.saliency import channel_sums, weight_scores


def query_and_key(name, model, layer):
    if name == "bert":
        attention = model.bert.encoder.layer[layer].attention.self
        return attention.query, attention.key
    attention = model.vit.layers[layer].attention
    return attention.q_proj, attention.k_proj


def paper_order(query, key, heads):
    """Rows of each head by the mean of the L1 norms of their query and key rows, descending, stable."""
    rows = len(query) // heads
    norms = (query.double().abs().sum(1) + key.double().abs().sum(1)) / 2
    return torch.tensor(
        [sorted(range(rows), key=lambda row: -float(norms[head * rows + row])) for head in range(heads)]
    )


# --- the paper's setting ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_raffm_is_the_papers_order(name):
    model = build_model(name)
    before = weights_of(model)
    pairs = [query_and_key(name, model, layer) for layer in range(2)]
    expected = [paper_order(q.weight.detach(), k.weight.detach(), heads=3) for q, k in pairs]
    originals = [
        [tensor.detach().clone() for tensor in (q.weight, q.bias, k.weight, k.bias)] for q, k in pairs
    ]  # fmt: skip
    reordering = apply_spp(model, SPPConfig.raffm())
    assert reordering.axes == ("qk",)
    assert list(reordering.layer_of.values()) == [0, 1]
    for order, (name_of_group, found), (q, k), original in zip(
        expected, reordering.orders.items(), pairs, originals, strict=True
    ):
        assert found.equal(order), name_of_group
        index = (order + 8 * torch.arange(3)[:, None]).flatten()
        for tensor, old in zip((q.weight, q.bias, k.weight, k.bias), original, strict=True):
            assert tensor.equal(old[index])
    changed = [key for key, value in model.state_dict().items() if not value.equal(before[key])]
    assert len(changed) == 8
    assert all(any(part in key for part in ("query.", "key.", "q_proj.", "k_proj.")) for key in changed)


def test_raffm_keeps_ties_in_place():
    model = build_model("vit")
    attention = model.vit.layers[0].attention
    with torch.no_grad():
        for projection in (attention.q_proj, attention.k_proj):
            projection.weight.fill_(0.5)
            # Only the signs differ, so the norms of all rows are equal.
            projection.weight.mul_(torch.randn(24, 24, generator=torch.Generator().manual_seed(0)).sign())
        attention.q_proj.weight[5].mul_(2)
    order = apply_spp(model, SPPConfig.raffm()).orders["layers.0.attention.qk"]
    assert order.tolist() == [[5, 0, 1, 2, 3, 4, 6, 7], [*range(8)], [*range(8)]]


def test_pruning_rank_sorts_queries_and_keys_apart():
    """The paper's strawman: rows sorted over the whole matrix, queries and keys each by their own norm."""
    model = build_model("bert")
    before = weights_of(model)
    pruning_rank(model)
    attention = model.bert.encoder.layer[1].attention.self
    for name, projection in (("query", attention.query), ("key", attention.key)):
        weight = before[f"bert.encoder.layer.1.attention.self.{name}.weight"]
        order = sorted(range(24), key=lambda row: -float(weight[row].double().abs().sum()))
        assert order != sorted(order)
        assert projection.weight.equal(weight[order])
        assert projection.bias.equal(before[f"bert.encoder.layer.1.attention.self.{name}.bias"][order])
    untouched = [key for key in before if ".query." not in key and ".key." not in key]
    assert all(model.state_dict()[key].equal(before[key]) for key in untouched)


def test_pruning_rank_of_fused_projections():
    model = build_model("gpt2")
    before = model.transformer.h[0].attn.c_attn.weight.detach().clone()
    pruning_rank(model)
    after = model.transformer.h[0].attn.c_attn.weight
    for start in (0, 24):
        norms = after[:, start : start + 24].abs().sum(0)
        assert norms.diff().le(1e-6).all()
    assert after[:, 48:].equal(before[:, 48:])


def test_pruning_rank_needs_rows_that_may_move():
    model = build_model("llama")
    before = weights_of(model)
    with pytest.raises(IllegalAxisError, match="'pruning-rank' is not defined"):
        pruning_rank(model)
    assert same_bits(model, before)


# --- norms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("metric", "power"), [("l1", 1), ("l2", 2)])
def test_norms_of_vit_by_hand(metric, power):
    model = build_model("vit", dtype=torch.float64)
    layer = model.vit.layers[0]
    q, k, v, o, up, down = (
        module.weight.detach().double().abs() ** power
        for module in (*(getattr(layer.attention, f"{x}_proj") for x in "qkvo"), layer.mlp.fc1, layer.mlp.fc2)
    )
    root = 1 / power
    rows = [(matrix.sum(1).view(3, 8)) ** root for matrix in (q, k, v)]
    columns = o.sum(0).view(3, 8) ** root
    whole = [matrix.view(3, -1).sum(1) ** root for matrix in (q, k, v)] + [o.view(24, 3, 8).sum((0, 2)) ** root]
    expected = {
        "qk": (rows[0] + rows[1]) / 2,
        "vo": (rows[2] + columns) / 2,
        "heads": sum(whole)[None] / 4,
        "ffn": ((up.sum(1) ** root + down.sum(0) ** root) / 2)[None],
    }
    groups = [group for group in channel_groups(model) if group.layer == 0]
    scores = weight_scores(groups, named_tensors(model), metric)
    for group in groups:
        torch.testing.assert_close(scores[group.name], expected[group.axis], rtol=1e-12, atol=0, msg=group.axis)


def test_norms_of_grouped_query_attention_by_hand():
    """A key-value head counts with all of its query heads; a value row with a column of each of them."""
    model = build_model("llama", dtype=torch.float64)
    attention = model.model.layers[0].self_attn
    q, k, v, o = (getattr(attention, f"{x}_proj").weight.detach().double().abs() for x in "qkvo")
    scores = weight_scores(channel_groups(model), named_tensors(model), "l1")
    columns = o.sum(0).view(2, 3, 6)
    assert scores["layers.0.self_attn.vo"].allclose((v.sum(1).view(2, 6) + columns.sum(1)) / 2)
    expected = (q.view(2, -1).sum(1) + k.view(2, -1).sum(1) + v.view(2, -1).sum(1) + columns.sum((1, 2))) / 4
    assert scores["layers.0.self_attn.heads"].allclose(expected[None])
    assert scores["layers.0.self_attn.query_heads"].allclose((q.view(2, 3, -1).sum(2) + columns.sum(2)) / 2)


def test_norms_of_fused_projections_by_hand():
    model = build_model("gpt2", dtype=torch.float64)
    fused = model.transformer.h[0].attn.c_attn.weight.detach().double().abs().sum(0).view(3, 3, 8)
    output = model.transformer.h[0].attn.c_proj.weight.detach().double().abs().sum(1).view(3, 8)
    scores = weight_scores(channel_groups(model), named_tensors(model), "l1")
    assert scores["h.0.attn.qk"].allclose((fused[0] + fused[1]) / 2)
    assert scores["h.0.attn.vo"].allclose((fused[2] + output) / 2)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("metric", ["l1", "l2", "random"])
def test_every_axis_has_scores_in_falling_order(name, metric):
    model = build_model(name)
    reordering = apply_spp(model, SPPConfig(axes=legal_axes(model), metric=metric))
    for group in channel_groups(model):
        scores = reordering.scores[group.name]
        assert scores.shape == (group.blocks, group.size)
        assert scores.gather(1, reordering.orders[group.name]).diff().le(0).all()


@pytest.mark.parametrize("name", ["vit", "llama", "gpt2"])
def test_scores_follow_the_channels(name):
    """After a reordering the same metric gives the same scores, in their new places."""
    model = build_model(name)
    axes = legal_axes(model)
    reordering = apply_spp(model, SPPConfig(axes=axes, metric="l2"))
    again = apply_spp(model, SPPConfig(axes=axes, metric="l2"))
    for group in channel_groups(model):
        rows = reordering.scores[group.name].gather(1, reordering.orders[group.name])
        blocks = reordering.orders[group.parent].flatten() if group.parent else torch.arange(group.blocks)
        torch.testing.assert_close(again.scores[group.name], rows[blocks])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(7, 5, 6), (4, 130), (130, 4), (64, 128), (1, 9), (9, 1)], ids=str)
@pytest.mark.parametrize("piece", [1, 100, 1 << 20])
def test_sums_do_not_depend_on_the_piece(shape, dtype, piece, monkeypatch):
    monkeypatch.setattr("hf_spp.saliency._PIECE_BYTES", piece)
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    before, exact = tensor.clone(), tensor.double()
    rounding = 1e-14 if dtype == torch.float64 else 1e-6
    for dim in range(tensor.dim()):
        rest = [axis for axis in range(tensor.dim()) if axis != dim]
        assert channel_sums(tensor, dim, 1).allclose(exact.abs().sum(rest), rtol=rounding, atol=0)
        assert channel_sums(tensor, dim, 2).allclose(exact.square().sum(rest), rtol=rounding, atol=0)
        assert channel_sums(tensor.mT, dim - 1, 1).shape == (tensor.mT.shape[dim - 1],)
    narrow = tensor.narrow(0, 0, len(tensor) - len(tensor) // 2)
    assert channel_sums(narrow, 0, 1).allclose(channel_sums(tensor, 0, 1)[: len(narrow)], rtol=rounding, atol=0)
    assert tensor.equal(before)


def test_sums_of_double_precision_leave_the_weights_alone():
    """`Tensor.to` does not copy what is float64 already."""
    model = build_model("vit", dtype=torch.float64)
    before = weights_of(model)
    for metric in ("l1", "l2"):
        weight_scores(channel_groups(model), named_tensors(model), metric)
    assert same_bits(model, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("metric", ["l1", "l2"])
def test_non_finite_weight_is_named(metric, value):
    model = build_model("bert")
    model.bert.encoder.layer[1].output.dense.weight.data[3, 5] = value
    message = r"encoder\.layer\.1\.output\.dense\.weight holds NaN or infinity"
    with pytest.raises(NonFiniteWeightsError, match=message):
        weight_scores(channel_groups(model).select(("ffn",)), named_tensors(model), metric)


# --- order ------------------------------------------------------------------------------------------------------------


def test_equal_scores_keep_their_order():
    scores = torch.tensor([[1.0, 3.0, 1.0, 3.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0, 0.0, -0.0]])
    assert salient_order(scores).tolist() == [[1, 3, 4, 0, 2, 5], [0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_channels_with_the_same_weights_in_another_order_tie(dtype):
    """So that a norm says nothing about the order of the channels that it sums over, which other axes move."""
    generator = torch.Generator().manual_seed(0)
    row = torch.randn(512, generator=generator)
    matrix = torch.stack([row[torch.randperm(512, generator=generator)] for _ in range(6)]).to(dtype)
    if dtype == torch.float64:
        matrix = (matrix * 2**20).round() / 2**20
    assert len(channel_sums(matrix, 0, 1).unique()) == 1
    assert len(channel_sums(matrix.t().contiguous(), 1, 1).unique()) == 1


@pytest.mark.parametrize("name", ["vit", "llama", "gpt2"])
def test_order_of_an_axis_does_not_depend_on_the_other_axes(name):
    model = build_model(name)
    expected = apply_spp(copy.deepcopy(model), SPPConfig(axes=("ffn",), metric="l1")).orders
    apply_spp(model, SPPConfig(axes=("hidden",), metric="random"))
    found = apply_spp(model, SPPConfig(axes=("ffn",), metric="l1")).orders
    assert all(found[key].equal(order) for key, order in expected.items())


def test_constant_model_stays_as_it_is():
    model = build_model("vit")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.1)
    before = weights_of(model)
    for metric in ("l1", "l2"):
        assert not apply_spp(model, SPPConfig(metric=metric, axes=legal_axes(model))).changed
    assert same_bits(model, before)


# --- random and callable metrics --------------------------------------------------------------------------------------


def test_random_depends_on_the_seed_and_the_groups_name_alone():
    """So that leaving out an axis, or adding a layer, does not change the other orders."""
    model, deeper = build_model("vit"), build_model("vit", num_hidden_layers=3)
    groups, tensors = channel_groups(model), named_tensors(model)
    scores = weight_scores(groups, tensors, "random", seed=5)
    only = weight_scores(groups.select(("ffn",)), tensors, "random", seed=5)
    assert only["layers.1.mlp.ffn"].equal(scores["layers.1.mlp.ffn"])
    assert not scores["layers.0.mlp.ffn"].equal(scores["layers.1.mlp.ffn"])
    more = weight_scores(channel_groups(deeper), named_tensors(deeper), "random", seed=5)
    assert all(more[name].equal(values) for name, values in scores.items())
    other = weight_scores(groups, tensors, "random", seed=6)
    assert not any(other[name].equal(values) for name, values in scores.items() if values.numel() > 3)


@pytest.mark.parametrize("name", ["vit", "llama", "gpt2", "t5"])
def test_callable_sees_the_groups_matrices_by_channel(name):
    model, seen = build_model(name), {}

    def metric(group, weights):
        seen[group.name] = [tuple(weight.shape[:2]) for weight in weights]
        return torch.stack([weight.flatten(2).abs().sum(-1) for weight in weights]).mean(0)

    groups, tensors = channel_groups(model), named_tensors(model)
    scores = weight_scores(groups, tensors, metric)
    expected = weight_scores(groups, tensors, "l1")
    for group in groups:
        assert seen[group.name] == [(group.blocks, group.size)] * len(group.scored_members)
        torch.testing.assert_close(scores[group.name].double(), expected[group.name], rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "returned NoneType for group"),
        ([[1.0]], "returned list for group"),
        (torch.ones(20), r"returned \[20\] for group .*; a tensor \[1, 20\] is needed"),
        (torch.full((1, 20), float("nan")), "returned NaN or infinity for group"),
        (torch.full((1, 20), float("inf")), "returned NaN or infinity for group"),
    ],
    ids=["none", "list", "shape", "nan", "inf"],
)
def test_callable_that_returns_no_scores(returned, message):
    model = build_model("vit")
    before = weights_of(model)
    with pytest.raises(SPPConfigError, match=message):
        apply_spp(model, SPPConfig(axes=("ffn",), metric=lambda group, weights: returned))
    assert same_bits(model, before)


def test_callable_may_return_integers():
    model = build_model("vit")
    scores = torch.arange(20)[None]
    reordering = apply_spp(model, SPPConfig(axes=("ffn",), metric=lambda group, weights: scores))
    assert reordering.orders["layers.0.mlp.ffn"].tolist() == [[*range(20)][::-1]]
