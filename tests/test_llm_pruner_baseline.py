"""The baseline after LLM-Pruner cuts what it says: whole groups, down to the budget, by the paper's importances."""

import itertools

import pytest
import torch
from benchmarks.llm_pruner import (
    IMPORTANCES,
    Settings,
    decoder_parameters,
    loss_gradients,
    pruned_by_llm_pruner,
)
from transformers import LlamaConfig, LlamaForCausalLM

LAYERS, FIRST, LAST = 5, 2, 1
TOKENS = torch.randint(0, 40, (3, 7), generator=torch.Generator().manual_seed(0))
BATCHES = [{"input_ids": TOKENS[:2]}, {"input_ids": TOKENS[2:]}]


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=4,
        intermediate_size=200,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def settings(**changes: object) -> Settings:
    return Settings(**{"first": FIRST, "last": LAST, **changes})


@pytest.mark.parametrize(
    ("importance", "scope", "heads"),
    list(itertools.product(IMPORTANCES, ("layer", "global"), ("key-value", "query", "none"))),
)
def test_cut_meets_the_budget_and_leaves_the_outer_layers_whole(model, importance, scope, heads) -> None:
    gradients = loss_gradients(model, BATCHES, squared=True)
    cut = pruned_by_llm_pruner(model, 0.8, settings(importance=importance, scope=scope, heads=heads), gradients)
    assert decoder_parameters(cut) == pytest.approx(0.8 * decoder_parameters(model), rel=0.01)
    for index in (0, 1, LAYERS - 1):
        whole = model.model.layers[index].state_dict()
        assert all(torch.equal(tensor, whole[name]) for name, tensor in cut.model.layers[index].state_dict().items())
    assert cut(input_ids=TOKENS).logits.isfinite().all()


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("heads", ["key-value", "query"])
def test_groups_that_do_nothing_leave_first_and_the_function_stays(model, importance, heads) -> None:
    # A key-value head with its three query heads, or the second query head of each; and 30 neurons.
    queries = torch.tensor([0, 1, 2] if heads == "key-value" else [1, 4])
    rows = (4 * queries.unsqueeze(1) + torch.arange(4)).flatten()
    with torch.no_grad():
        for layer in model.model.layers[FIRST:-LAST]:
            attention = layer.self_attn
            attention.q_proj.weight[rows] = attention.o_proj.weight[:, rows] = 0
            if heads == "key-value":
                attention.k_proj.weight[:4] = attention.v_proj.weight[:4] = 0
            layer.mlp.gate_proj.weight[5:35] = layer.mlp.up_proj.weight[5:35] = 0
            layer.mlp.down_proj.weight[:, 5:35] = 0
    idle = 2 * 24 * (30 * 3 + len(rows) * 2 + (8 if heads == "key-value" else 0))
    share = 1 - idle / decoder_parameters(model)
    gradients = loss_gradients(model, BATCHES, squared=True)
    chosen = settings(importance=importance, heads=heads, scope="global")
    cut = pruned_by_llm_pruner(model, share, chosen, gradients)
    for layer in cut.model.layers[FIRST:-LAST]:
        assert layer.self_attn.o_proj.in_features == 24 - len(rows)
        assert layer.self_attn.k_proj.out_features == (4 if heads == "key-value" else 8)
        assert layer.mlp.down_proj.in_features == 170
    torch.testing.assert_close(cut(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits)


def test_importances_are_those_of_the_paper(model) -> None:
    gradients = loss_gradients(model, BATCHES, squared=True)
    layer, path = model.model.layers[FIRST].mlp, f"model.layers.{FIRST}.mlp"

    def best(importance: str) -> torch.Tensor:
        """Neurons by importance, from the definition."""
        totals = torch.zeros(200, dtype=torch.float64)
        for name, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            weight = getattr(layer, name).weight.detach().double()
            slope = gradients.mean[f"{path}.{name}.weight"].double()
            fisher = gradients.squared[f"{path}.{name}.weight"].double()
            terms = {
                "l1": weight.abs(),
                "l2": weight * weight,
                "vector": slope * weight,
                "element1": (slope * weight).abs(),
                "element2": (slope * weight - 0.5 * weight * fisher * weight).abs(),
                "second": 0.5 * weight * fisher * weight,
            }
            total = terms[importance].sum(1 - dim)
            totals += total.abs()
        return totals.argsort(descending=True)

    for importance in IMPORTANCES:
        cut = pruned_by_llm_pruner(model, 0.8, settings(importance=importance, heads="none"), gradients)
        kept = cut.model.layers[FIRST].mlp.gate_proj
        expected = best(importance)[: kept.out_features].sort().values
        assert torch.equal(kept.weight, layer.gate_proj.weight[expected])


def test_gradients_are_of_the_mean_loss_and_squares_of_each_sample(model) -> None:
    whole = loss_gradients(model, BATCHES, squared=False)
    each = loss_gradients(model, BATCHES, squared=True)
    assert not whole.squared
    name = f"model.layers.{FIRST}.mlp.up_proj.weight"
    model.zero_grad()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    expected = model.get_parameter(name).grad
    torch.testing.assert_close(whole.mean[name], expected)
    torch.testing.assert_close(each.mean[name], expected)
    squares = torch.zeros_like(expected)
    for tokens in TOKENS.split(1):
        model.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        squares += model.get_parameter(name).grad.square() / 3
    torch.testing.assert_close(each.squared[name], squares)


def test_a_global_ranking_takes_the_lowest_of_all_layers(model) -> None:
    with torch.no_grad():
        for projection in (model.model.layers[2].mlp.gate_proj, model.model.layers[2].mlp.up_proj):
            projection.weight.mul_(1e-3)
        model.model.layers[2].mlp.down_proj.weight.mul_(1e-3)
    cut = pruned_by_llm_pruner(model, 0.9, settings(importance="l1", scope="global", heads="none"))
    assert cut.model.layers[3].mlp.down_proj.in_features == 200
    assert cut.model.layers[2].mlp.down_proj.in_features < 200


def test_taylor_needs_gradients(model) -> None:
    with pytest.raises(ValueError, match="needs gradients"):
        pruned_by_llm_pruner(model, 0.8, settings())
    with pytest.raises(ValueError, match="importance='hessian' is unknown"):
        Settings(importance="hessian")
