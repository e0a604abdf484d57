"""Where channels lie in tensors: parts of fused dimensions, heads side by side, experts in a first dimension."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_spp import ChannelGroup, ChannelMap, Member, Refusal
from hf_spp.apply import gather_tensors, invert_indices
from hf_spp.permutation import compose_orders, gather_indices, invert_orders
from hf_spp.saliency import weight_scores


def group(*members, axis="vo", blocks=1, size=3, name="group", parent=None):
    return ChannelGroup(name, axis, 0, blocks, size, members, parent)


def positions(member, length, **sizes):
    return member.positions(length, group(member, **sizes)).tolist()


def random_orders(groups, seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        one.name: torch.stack([torch.randperm(one.size, generator=generator) for _ in range(one.blocks)])
        for one in groups
    }


def moved(tensors, groups, orders):
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    gather_tensors(copies, gather_indices(groups, orders, shapes))
    return copies


def test_a_span_is_one_block_of_a_stack():
    assert positions(Member("w", "(b c) i", span=(4, 8, 12)), 12, blocks=2, size=2) == [[[4], [5]], [[6], [7]]]


def test_a_span_out_of_every_few_is_a_part_of_each_head():
    """Rows of q, k and v side by side for each of two heads: k is the second pair of every six."""
    assert positions(Member("w", "(b c) i", span=(2, 4, 6)), 12, blocks=2, size=2) == [[[2], [3]], [[8], [9]]]


def test_a_span_of_several_query_heads_for_each_key_head():
    member = Member("w", "(b r c) i", span=(0, 4, 8))
    assert positions(member, 16, blocks=2, size=2) == [[[0, 2], [1, 3]], [[8, 10], [9, 11]]]


def test_view_and_positions_agree_on_spans():
    member = Member("w", "(b r c) i", span=(2, 6, 8))
    one = group(member, blocks=2, size=2)
    tensor = torch.arange(16 * 3).reshape(16, 3)
    by_view = member.view(tensor, one)
    by_positions = tensor[member.positions(16, one)]
    assert by_view.sort(dim=2).values.equal(by_positions.sort(dim=2).values)


@given(seed=st.integers(0, 1000))
def test_experts_and_their_neurons_move_as_a_loop_over_experts_would(seed):
    experts, neurons, width = 3, 4, 5
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "up": torch.randn(experts, 2 * neurons, width, generator=generator),
        "up_bias": torch.randn(experts, 2 * neurons, generator=generator),
        "down": torch.randn(experts, width, neurons, generator=generator),
        "router": torch.randn(experts, width, generator=generator),
    }
    inner = [Member("up", "b (t c) i"), Member("up_bias", "b (t c)"), Member("down", "b o c")]
    outer = [Member("up", "c u i"), Member("up_bias", "c u"), Member("down", "c o u"), Member("router", "c i")]
    groups = ChannelMap(
        (
            group(*inner, axis="ffn", blocks=experts, size=neurons, name="ffn", parent="experts"),
            group(*outer, axis="experts", size=experts, name="experts"),
        )
    )
    orders = random_orders(groups, seed)
    found = moved(tensors, groups, orders)
    expected = {name: tensor.clone() for name, tensor in tensors.items()}
    for expert, order in enumerate(orders["ffn"]):
        rows = torch.cat([order, order + neurons])
        expected["up"][expert] = tensors["up"][expert][rows]
        expected["up_bias"][expert] = tensors["up_bias"][expert][rows]
        expected["down"][expert] = tensors["down"][expert][:, order]
    place = orders["experts"][0]
    for name, tensor in expected.items():
        assert found[name].equal(tensor[place])

    indices = gather_indices(groups, orders, {name: tensor.shape for name, tensor in tensors.items()})
    gather_tensors(found, invert_indices(indices))
    assert all(found[name].equal(tensors[name]) for name in tensors)


@given(seed=st.integers(0, 1000))
def test_orders_of_experts_compose_and_invert(seed):
    tensors = {"up": torch.randn(3, 4, 2), "down": torch.randn(3, 2, 4)}
    inner, outer = (Member("up", "b c i"), Member("down", "b o c")), (Member("up", "c u i"), Member("down", "c o u"))
    groups = ChannelMap(
        (
            group(*inner, axis="ffn", blocks=3, size=4, name="ffn", parent="experts"),
            group(*outer, axis="experts", size=3, name="experts"),
        )
    )
    first, second = random_orders(groups, seed), random_orders(groups, seed + 1)
    after_first = moved(tensors, groups, first)
    stepwise = moved(after_first, groups, second)
    at_once = moved(tensors, groups, compose_orders(groups, first, second))
    back = moved(after_first, groups, invert_orders(groups, first))
    for name, tensor in tensors.items():
        assert at_once[name].equal(stepwise[name])
        assert back[name].equal(tensor)


def test_heads_in_one_dimension_and_their_rows_in_another():
    """A bias per head and row, `[query heads, rows]`, with two query heads for each key-value head."""
    tensor = torch.arange(8).reshape(4, 2)
    member = Member("bias", "(b r) c")
    order = {"group": torch.tensor([[1, 0], [0, 1]])}
    found = moved({"bias": tensor}, [group(member, blocks=2, size=2)], order)["bias"]
    assert found.tolist() == [[1, 0], [3, 2], [4, 5], [6, 7]]
    values = member.take_channels(tensor, group(member, blocks=2, size=2))
    assert values.tolist() == [[[0, 2], [1, 3]], [[4, 6], [5, 7]]]


@pytest.mark.parametrize("metric", ["l1", "l2"])
def test_scores_of_experts_are_the_norms_of_each_expert(metric):
    up, down = torch.randn(3, 8, 5, dtype=torch.float64), torch.randn(3, 5, 4, dtype=torch.float64)
    one = group(Member("up", "b (t c) i"), Member("down", "b o c"), blocks=3, size=4)
    power = {"l1": 1, "l2": 2}[metric]
    rows = up.norm(dim=-1, p=power).unflatten(1, (2, 4)).norm(dim=1, p=power)
    expected = (rows + down.norm(dim=1, p=power)) / 2
    torch.testing.assert_close(weight_scores([one], {"up": up, "down": down}, metric)["group"], expected)


def test_a_tower_is_chosen_by_its_path():
    groups = ChannelMap(
        (
            group(Member("a", "c i"), axis="ffn", name="vision_tower.layers.0.mlp.ffn"),
            group(Member("b", "c i"), axis="ffn", name="language_model.layers.0.mlp.ffn"),
            group(Member("c", "c i"), axis="hidden", name="hidden"),
        ),
        (Refusal("qk", "language_model.layers.*.self_attn", "rotary"), Refusal("qk", "vision_tower", "rotary")),
    )
    assert groups.towers == ("vision_tower", "language_model")
    chosen = groups.select(("ffn", "qk", "hidden"), ["vision_tower"])
    assert [one.name for one in chosen] == ["vision_tower.layers.0.mlp.ffn"]
    assert [refusal.where for refusal in chosen.refused] == ["vision_tower"]
    assert len(groups.select(("ffn",), ["vision"])) == 0
