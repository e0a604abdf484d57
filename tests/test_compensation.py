"""Compensation against least squares of this file's own, and what it must never do."""

import copy

import pytest
import torch
from conftest import build_inputs, build_model, outputs_of, relative_difference, same_bits, weights_of
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.pytorch_utils import Conv1D

from hf_spp import (
    CalibrationError,
    SPPConfig,
    SubnetworkError,
    SubnetworkSpec,
    apply_spp,
    channel_groups,
    extract_subnetwork,
    subnetwork_view,
)
from hf_spp._compat import eager_experts
from hf_spp.subnetworks import compensation
from hf_spp.subnetworks.extraction import cut_out


def batches(model, count=6, size=8):
    return [build_inputs(model, size, labels=False, seed=seed) for seed in range(10, 10 + count)]


def ordered(name, **changes):
    model = build_model(name, dtype=torch.float64, **changes)
    apply_spp(model, SPPConfig(axes=("heads", "ffn"), metric="l1", verify=False))
    return model


def cut_and_fit(model, spec, data, **options):
    groups = channel_groups(model)
    widths = spec.widths(model)
    small, kept, _ = cut_out(model, groups, widths)
    names = compensation.compensate(model, small, groups, widths, kept, data, **options)
    return small, names


def seen_by(model, path, data, *, reads):
    """What a layer reads or writes on all tokens that are no padding."""
    found, mask = [], [None]

    def keep(features):
        features = (
            features[mask[0].bool()] if mask[0] is not None and mask[0].shape == features.shape[:-1] else features
        )
        found.append(features.reshape(-1, features.shape[-1]).detach().clone())

    layer = model.get_submodule(path)
    if reads:
        handle = layer.register_forward_pre_hook(lambda _, args: keep(args[0]))
    else:
        handle = layer.register_forward_hook(lambda _, args, output: keep(output))
    with torch.no_grad():
        for batch in data:
            mask[0] = batch.get("attention_mask")
            model(**batch)
    handle.remove()
    return torch.cat(found)


def token_weights(targets):
    """What each token counts, of the targets of one batch."""
    sizes = targets.square().sum(-1)
    return 1 / (sizes + 0.1 * sizes.median())


def least_squares(features, targets, before, ridge, *, intercept, weights=None):
    """Ridge towards the weights before, by an augmented system; weights `[features, outputs]` and bias."""
    weights = torch.ones(len(features), dtype=features.dtype) if weights is None else weights
    count = weights.sum()
    shift, target_shift = weights @ features / count, weights @ targets / count
    if not intercept:
        shift, target_shift = torch.zeros_like(shift), torch.zeros_like(target_shift)
    roots = weights.sqrt().unsqueeze(1)
    centred = (features - shift) * roots
    pull = (ridge * centred.square().sum(0).mean()).sqrt()
    system = torch.cat([centred, pull * torch.eye(features.shape[1], dtype=features.dtype)])
    missing = (targets - target_shift) * roots - centred @ before
    rest = torch.cat([missing, torch.zeros(features.shape[1], before.shape[1])])
    fitted = before + torch.linalg.lstsq(system, rest).solution
    return fitted, target_shift - shift @ fitted


def kept_of(small, path, read):
    """The channels of what the uncut model's projection reads that the cut one keeps: neurons, or whole heads."""
    layer = small.get_submodule(path)
    return read[:, : len(layer.weight) if isinstance(layer, Conv1D) else layer.in_features]


FIRST = {
    "vit": "vit.layers.{}.attention.o_proj vit.layers.{}.mlp.fc2",
    "bert": "bert.encoder.layer.{}.attention.output.dense bert.encoder.layer.{}.output.dense",
    "llama": "model.layers.{}.self_attn.o_proj model.layers.{}.mlp.down_proj",
    "gpt2": "transformer.h.{}.attn.c_proj transformer.h.{}.mlp.c_proj",
}


@pytest.mark.parametrize(
    ("name", "bias"), [("vit", True), ("bert", True), ("gpt2", True), ("llama", True), ("llama", False)]
)
def test_every_projection_is_the_least_squares_of_what_it_reads(name, bias):
    changes = {"mlp_bias": bias, "attention_bias": bias} if name == "llama" else {}
    model = ordered(name, **changes)
    data = batches(model)
    spec = SubnetworkSpec(ffn=8, heads=1 if name == "llama" else 2)
    plain = extract_subnetwork(model, spec)
    small, names = cut_and_fit(model, spec, data, ridge=0.03)
    paths = [path for layer in (0, 1) for path in FIRST[name].format(layer, layer).split()]
    assert {one.rpartition(".")[0] for one in names} == set(paths)
    for path in paths:
        features, targets = seen_by(small, path, data, reads=True), seen_by(model, path, data, reads=False)
        layer, before = small.get_submodule(path), plain.get_submodule(path).weight
        turn = (lambda weight: weight) if isinstance(layer, Conv1D) else (lambda weight: weight.T)
        read = kept_of(small, path, seen_by(model, path, data, reads=True))
        intercept = layer.bias is not None
        counted = torch.cat([token_weights(seen_by(model, path, [batch], reads=False)) for batch in data])
        weights, offset = least_squares(
            torch.cat([read, features]), torch.cat([targets, targets]), turn(before), 0.03, intercept=intercept,
            weights=torch.cat([counted, counted]),
        )  # fmt: skip
        torch.testing.assert_close(turn(layer.weight), weights, rtol=1e-8, atol=1e-9)
        if layer.bias is not None:
            torch.testing.assert_close(layer.bias, offset, rtol=1e-8, atol=1e-9)
    changed = {one for one, tensor in small.named_parameters() if not tensor.equal(plain.get_parameter(one))}
    assert changed == set(names)


LAST_NEURONS = {
    "vit": "vit.layers.1.mlp.fc2",
    "bert": "bert.encoder.layer.1.output.dense",
    "llama": "model.layers.1.mlp.down_proj",
    "t5": "decoder.block.1.layer.2.DenseReluDense.wo",
    "gpt2": "transformer.h.1.mlp.c_proj",
    "dinov2-swiglu": "dinov2.encoder.layer.1.mlp.down_proj",
    "qwen3": "model.layers.1.mlp.down_proj",
}


@pytest.mark.parametrize("name", LAST_NEURONS)
def test_it_comes_nearer_to_the_model(name):
    model = ordered(name)
    data, fresh = batches(model, count=20), [build_inputs(model, 32, labels=False, seed=3)]
    weights = weights_of(model)
    spec = SubnetworkSpec(ffn=8)
    plain = extract_subnetwork(model, spec)
    better = extract_subnetwork(model, spec, calibration=data)
    path = LAST_NEURONS[name]
    whole = seen_by(model, path, fresh, reads=False)
    distances = [(seen_by(one, path, fresh, reads=False) - whole).square().mean() for one in (plain, better)]
    assert distances[1] < 0.95 * distances[0]
    assert same_bits(model, weights)
    assert same_bits(extract_subnetwork(model, spec, calibration=data, compensate=False), weights_of(plain))


def test_a_few_tokens_that_write_much_do_not_outweigh_the_others():
    """Separators do so in trained models; the norm behind them takes their size away again."""
    model = ordered("bert")
    separator, path = 3, "bert.encoder.layer.0.output.dense"
    with torch.no_grad():
        words = model.bert.embeddings.word_embeddings.weight
        words.normal_()
        words[separator] = 0
        words[separator, 0] = 50
        layer = model.bert.encoder.layer[0]
        layer.intermediate.dense.weight[-4:, 0] += 100
    data = batches(model, count=20)
    for batch in data:
        batch["input_ids"][:, 0] = separator
    spec = SubnetworkSpec(ffn=8)
    plain = extract_subnetwork(model, spec)
    small, _ = cut_and_fit(model, spec, data)
    whole = seen_by(model, path, data, reads=False)
    sizes = whole.square().sum(-1)
    usual = sizes < 10 * sizes.median()
    assert 0.5 < usual.double().mean() < 0.95
    assert sizes[~usual].sum() > 10 * sizes[usual].sum()
    distances = [(seen_by(one, path, data, reads=False) - whole)[usual].square().mean() for one in (plain, small)]
    assert distances[1] < 0.8 * distances[0]


def test_passes_that_do_not_fit_in_memory_run_again():
    model = ordered("bert")
    data, spec = batches(model), SubnetworkSpec(ffn=8, heads=2)
    held, _ = cut_and_fit(model, spec, data)
    again, _ = cut_and_fit(model, spec, data, held_bytes=0)
    for one, other in zip(held.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_little_data_is_trusted_little():
    model = ordered("vit", intermediate_size=128)
    data = batches(model, count=1, size=2)
    fresh = [build_inputs(model, 32, labels=False, seed=3)]
    spec = SubnetworkSpec(ffn=96)
    path = LAST_NEURONS["vit"]
    whole = seen_by(model, path, fresh, reads=False)

    def distance(small):
        return float((seen_by(small, path, fresh, reads=False) - whole).square().mean())

    plain = distance(extract_subnetwork(model, spec))
    assert distance(cut_and_fit(model, spec, data)[0]) < 1.1 * plain
    fixed = [distance(cut_and_fit(model, spec, data, ridge=ridge)[0]) for ridge in compensation.RIDGES]
    assert distance(cut_and_fit(model, spec, data)[0]) < 1.2 * min(fixed) < max(fixed)


@pytest.mark.parametrize("fixture", ["llama", "mixture"])
def test_a_single_token_is_enough_to_run(fixture, request):
    model = request.getfixturevalue("mixture") if fixture == "mixture" else ordered("llama")
    data = [{"input_ids": torch.tensor([[3]])}]
    small = extract_subnetwork(model, SubnetworkSpec(ffn=8), calibration=data)
    with torch.no_grad(), eager_experts(small):
        assert bool(small(**data[0]).logits.isfinite().all())


def test_nothing_is_changed_where_nothing_flows():
    model = ordered("vit")
    with torch.no_grad():
        model.vit.layers[0].mlp.fc1.weight.zero_()
        model.vit.layers[0].mlp.fc1.bias.zero_()
    small = extract_subnetwork(model, SubnetworkSpec(ffn=8), calibration=batches(model))
    assert all(bool(tensor.isfinite().all()) for tensor in small.parameters())
    torch.testing.assert_close(small.vit.layers[0].mlp.fc2.weight, model.vit.layers[0].mlp.fc2.weight[:, :8])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_fitted_in_float64(dtype):
    model = ordered("vit").to(dtype)
    small = extract_subnetwork(model, SubnetworkSpec(ffn=8, heads=2), calibration=batches(model))
    assert {tensor.dtype for tensor in small.parameters()} == {dtype}
    assert all(bool(tensor.isfinite().all()) for tensor in small.parameters())


def test_single_precision_is_enough_where_features_vary_little():
    model = ordered("vit")
    with torch.no_grad():
        for layer in model.vit.layers:
            layer.mlp.fc1.bias += 3000
            layer.mlp.fc2.bias -= 3000 * layer.mlp.fc2.weight.sum(1)
    data, spec = batches(model), SubnetworkSpec(ffn=8)
    exact, _ = cut_and_fit(model, spec, data, ridge=0.03)
    model.float()
    single = [{name: one.float() if one.is_floating_point() else one for name, one in batch.items()} for batch in data]
    fitted, _ = cut_and_fit(model, spec, single, ridge=0.03)
    for layer, expected in zip(fitted.vit.layers, exact.vit.layers, strict=True):
        torch.testing.assert_close(layer.mlp.fc2.weight.double(), expected.mlp.fc2.weight, rtol=1e-2, atol=1e-3)


def test_layers_that_run_several_times():
    from transformers import AlbertConfig, AlbertForMaskedLM

    config = AlbertConfig(
        vocab_size=40, embedding_size=12, hidden_size=24, num_hidden_layers=3, num_attention_heads=3,
        intermediate_size=32, max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AlbertForMaskedLM(config).double().eval()
    apply_spp(model, SPPConfig(axes=("ffn",), verify=False))
    generator = torch.Generator().manual_seed(1)
    data = [{"input_ids": torch.randint(0, 40, (8, 7), generator=generator)} for _ in range(6)]
    spec = SubnetworkSpec(ffn=16)
    plain = extract_subnetwork(model, spec)
    small, names = cut_and_fit(model, spec, data)
    assert len(names) == 2
    path = "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn_output"
    whole = seen_by(model, path, data, reads=False)
    distances = [(seen_by(one, path, data, reads=False) - whole).square().mean() for one in (plain, small)]
    assert distances[1] < distances[0]


@pytest.fixture
def mixture():
    config = MixtralConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MixtralForCausalLM(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.dim() > 1 else 1)
    apply_spp(model, SPPConfig(axes=("ffn", "heads"), verify=False))
    return model


def test_experts_are_fitted_one_by_one(mixture):
    generator = torch.Generator().manual_seed(1)
    data = [{"input_ids": torch.randint(0, 40, (8, 12), generator=generator)} for _ in range(10)]
    spec = SubnetworkSpec(ffn=16)
    plain = extract_subnetwork(mixture, spec)
    small, names = cut_and_fit(mixture, spec, data, ridge=0.03)
    assert sorted(names) == [f"model.layers.{layer}.mlp.experts.down_proj" for layer in (0, 1)]
    for layer in (0, 1):
        experts = mixture.model.layers[layer].mlp.experts
        read = routed_states(mixture, layer, data)
        for expert in range(4):
            gate, up = (read[expert] @ experts.gate_up_proj[expert].T).chunk(2, -1)
            neurons = torch.nn.functional.silu(gate) * up
            weights, _ = least_squares(
                neurons[:, :16], neurons @ experts.down_proj[expert].T,
                plain.model.layers[layer].mlp.experts.down_proj[expert].T, 0.03, intercept=False,
            )  # fmt: skip
            fitted = small.model.layers[layer].mlp.experts.down_proj[expert].T
            torch.testing.assert_close(fitted, weights, rtol=1e-7, atol=1e-8)


def routed_states(model, layer, data):
    """What each expert of a layer reads."""
    found = [[] for _ in range(4)]

    def keep(_, args):
        states, chosen = args[0], args[1]
        for expert in range(4):
            found[expert].append(states[(chosen == expert).any(-1)])

    handle = model.model.layers[layer].mlp.experts.register_forward_pre_hook(keep)
    with torch.no_grad(), eager_experts(model):
        for batch in data:
            model(**batch)
    handle.remove()
    return [torch.cat(one) for one in found]


def test_fewer_experts(mixture):
    apply_spp(mixture, SPPConfig(axes=("experts",), verify=False))
    small = extract_subnetwork(mixture, SubnetworkSpec(experts=3))
    assert small.config.num_local_experts == 3
    inputs = {"input_ids": torch.arange(12).reshape(2, 6)}
    with torch.no_grad(), eager_experts(small):
        logits = small(**inputs).logits
    with torch.no_grad(), eager_experts(mixture), subnetwork_view(mixture, SubnetworkSpec(experts=3)):
        torch.testing.assert_close(mixture(**inputs).logits, logits, rtol=1e-10, atol=1e-10)
        assert mixture(**inputs, labels=inputs["input_ids"], output_router_logits=True).aux_loss.isfinite()
    assert mixture.num_experts == 4
    with pytest.raises(SubnetworkError, match="at least 2"):
        extract_subnetwork(mixture, SubnetworkSpec(experts=1))


@pytest.mark.parametrize(("calibration", "compensate", "words"), [
    (None, True, "needs calibration data"), ([], None, "no batch"), ([torch.ones(2)], None, "dict of forward"),
    (3, None, "iterable"), ([{"tokens": torch.ones(2, 3)}], None, "does not run"),
])  # fmt: skip
def test_bad_calibration(calibration, compensate, words):
    model = ordered("vit")
    weights = weights_of(model)
    with pytest.raises(CalibrationError, match=words):
        extract_subnetwork(model, SubnetworkSpec(ffn=8), calibration=calibration, compensate=compensate)
    assert same_bits(model, weights)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_labels_do_not_matter():
    model = ordered("vit")
    data = [build_inputs(model, 8, seed=seed) for seed in range(4)]
    other = copy.deepcopy(data)
    for batch in other:
        batch["labels"] = batch["labels"].flip(0)
    spec = SubnetworkSpec(ffn=8)
    one, two = (extract_subnetwork(model, spec, calibration=each) for each in (data, iter(other)))
    assert relative_difference(outputs_of(one, data[0]), outputs_of(two, data[0])) == 0
