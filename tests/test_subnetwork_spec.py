"""Specs: widths, budgets, descriptions, JSON."""

import dataclasses
import json

import pytest
import torch
from conftest import build_inputs, build_model
from hypothesis import given
from hypothesis import strategies as st

from hf_spp import CheckpointError, SPPConfig, SubnetworkError, SubnetworkSpec, apply_spp, channel_groups
from hf_spp import extract_subnetwork as extract


def reordered(name="vit", metric="taylor", **changes):
    model = build_model(name, **changes)
    calibration = None if metric in ("l1", "random") else [build_inputs(model, 4)]
    apply_spp(model, SPPConfig(metric=metric, verify=False), calibration=calibration)
    return model


def parameters(model, within=""):
    return sum(p.numel() for name, p in model.named_parameters() if name.startswith(within))


@pytest.mark.parametrize(("asked", "multiple", "width"), [
    (0.5, 1, 10), (0.5, None, 8), (0.01, None, 8), (0.01, 1, 1), (1.0, None, 20), (0.95, None, 20), (0.85, None, 16),
    (7, None, 7), (20, None, 20), (0.6, 4, 12), (0.5, 64, 20),
])  # fmt: skip
def test_fractions_are_rounded_and_counts_are_not(asked, multiple, width):
    groups = channel_groups(build_model("vit"))
    widths = SubnetworkSpec(ffn=asked, multiple_of=multiple).widths(build_model("vit"), groups)
    assert {widths.get(group.name, group.size) for group in groups if group.axis == "ffn"} == {width}


def test_accelerators_want_wider_multiples(monkeypatch):
    model = build_model("vit", intermediate_size=256)
    assert set(SubnetworkSpec(ffn=0.3).widths(model).values()) == {80}
    monkeypatch.setattr("hf_spp.subnetworks.spec.device_of", lambda model: torch.device("cuda"))
    assert set(SubnetworkSpec(ffn=0.3, heads=0.5).widths(model).values()) == {64, 2}


@pytest.mark.parametrize("values", [
    {"ffn": 0}, {"ffn": -1}, {"ffn": 0.0}, {"ffn": 1.5}, {"ffn": True}, {"ffn": "0.5"}, {"ffn": []},
    {"ffn": [0.5, None]}, {"ffn": float("nan")},
    {"heads": 0.5, "multiple_of": 0}, {"multiple_of": {"mlp": 8}}, {"multiple_of": 1.5},
])  # fmt: skip
def test_values_that_are_no_widths(values):
    with pytest.raises(SubnetworkError):
        SubnetworkSpec(**values)


widths = st.one_of(st.integers(1, 4096), st.floats(0.01, 1.0), st.lists(st.integers(1, 64), min_size=1, max_size=4))


@given(st.dictionaries(st.sampled_from(["ffn", "heads", "vo", "qk", "experts", "hidden", "query_heads"]), widths))
def test_specs_come_back_from_json(cuts):
    spec = SubnetworkSpec(**cuts, multiple_of={"ffn": 16}, model_type="vit")
    assert SubnetworkSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_specs_are_saved_and_loaded(tmp_path):
    spec = SubnetworkSpec(ffn=(8, 16), heads=0.5)
    assert SubnetworkSpec.load(spec.save(tmp_path / "spec.json")) == spec
    (tmp_path / "spec.json").write_text(json.dumps({"format_version": 99}))
    with pytest.raises(CheckpointError, match="Upgrade"):
        SubnetworkSpec.load(tmp_path / "spec.json")
    for damaged in ('{"format_version": 1, "mlp": 3}', "[]", '{"format_version": 1, "ffn": 0}'):
        (tmp_path / "spec.json").write_text(damaged)
        with pytest.raises(SubnetworkError):
            SubnetworkSpec.load(tmp_path / "spec.json")


@pytest.mark.parametrize("allocation", ["global", "even"])
@pytest.mark.parametrize("name", ["vit", "bert", "llama"])
def test_a_budget_of_parameters_is_kept(name, allocation):
    model = reordered(name, intermediate_size=64)
    whole = parameters(model)
    for share in (0.9, 0.8, 0.7):
        spec = SubnetworkSpec.from_budget(model, fraction=share, allocation=allocation)
        kept = parameters(extract(model, spec))
        # A step of 8 neurons, or a head, in one layer; in both layers where they are kept alike.
        assert share - (0.2 if allocation == "even" else 0.06) < kept / whole <= share
    assert SubnetworkSpec.from_budget(model, params=whole) == SubnetworkSpec(model_type=model.config.model_type)
    spec = SubnetworkSpec.from_budget(model, params=f"{0.8 * whole / 1e3}K", allocation=allocation)
    assert spec == SubnetworkSpec.from_budget(model, params=int(0.8 * whole), allocation=allocation)


def test_a_budget_within_a_module():
    model = reordered("vit", intermediate_size=64)
    spec = SubnetworkSpec.from_budget(model, fraction=0.6, within="vit.layers")
    kept = parameters(extract(model, spec), "vit.layers") / parameters(model, "vit.layers")
    assert 0.5 < kept <= 0.6


def test_a_budget_of_operations():
    model = reordered("vit", intermediate_size=64)
    full = SubnetworkSpec(ffn=1.0).describe(model).total.flops
    spec = SubnetworkSpec.from_budget(model, flops=0.7 * full)
    assert 0.6 * full < spec.describe(model).total.flops <= 0.7 * full


def test_a_budget_of_time(monkeypatch):
    model = reordered("vit", intermediate_size=64)
    times = []

    def measured(model, inputs):
        times.append(parameters(model) / 1000)
        return dataclasses.make_dataclass("Time", ["milliseconds"])(times[-1])

    monkeypatch.setattr("hf_spp.subnetworks.spec.measure_latency", measured)
    spec = SubnetworkSpec.from_budget(model, latency_ms=0.8 * parameters(model) / 1000)
    assert 0.7 < parameters(extract(model, spec)) / parameters(model) <= 0.8
    assert len(set(times)) > 3


def test_the_budget_is_spent_where_channels_are_worth_most():
    model = build_model("vit", intermediate_size=64)
    with torch.no_grad():
        model.vit.layers[1].mlp.fc2.weight.mul_(1e-3)
    apply_spp(model, SPPConfig(metric="taylor", axes=("ffn",)), calibration=[build_inputs(model, 4)])
    spec = SubnetworkSpec.from_budget(model, fraction=0.8, axes=("ffn",))
    assert spec.ffn[1] < spec.ffn[0]
    assert spec.ffn[0] > 48
    assert SubnetworkSpec.from_budget(model, fraction=0.8, axes=("ffn",), allocation="even").ffn == 32


def test_scores_that_do_not_compare_spread_evenly():
    model = reordered(metric="l1", intermediate_size=64)
    spec = SubnetworkSpec.from_budget(model, fraction=0.7)
    assert isinstance(spec.ffn, int)
    with pytest.raises(SubnetworkError, match="taylor"):
        SubnetworkSpec.from_budget(model, fraction=0.7, allocation="global")


def test_scores_of_a_saved_reordering():
    model = reordered(intermediate_size=64)
    spec = SubnetworkSpec.from_budget(model, fraction=0.8)
    (reordering,) = model._spp_history
    other = build_model("vit", intermediate_size=64)
    reordering.apply(other)
    del other._spp_history
    assert SubnetworkSpec.from_budget(other, fraction=0.8, reordering=reordering) == spec


@pytest.mark.parametrize(("arguments", "words"), [
    ({}, "exactly one"), ({"params": 1000, "fraction": 0.5}, "exactly one"), ({"params": 10}, "below the smallest"),
    ({"fraction": 0.01}, "below the smallest"), ({"fraction": 1.5}, "up to 1"), ({"params": "many"}, "11M"),
    ({"params": 0}, "above 0"), ({"fraction": 0.5, "within": "vit.decoder"}, "no module"),
    ({"fraction": 0.5, "axes": ("mlp",)}, "unknown axis"), ({"fraction": 0.5, "axes": ("experts",)}, "none of"),
])  # fmt: skip
def test_budgets_that_cannot_be_met(arguments, words):
    with pytest.raises(SubnetworkError, match=words):
        SubnetworkSpec.from_budget(reordered(), **arguments)


@pytest.mark.parametrize("name", ["vit", "llama", "bert", "gpt2"])
def test_descriptions_count_what_is_there(name):
    model = reordered(name)
    spec = SubnetworkSpec(ffn=8, heads=1)
    small = extract(model, spec)
    found = spec.describe(model)
    assert found.total.parameters == parameters(small)
    assert found.total.bytes == 4 * parameters(small)
    assert found.full.parameters == parameters(model)
    assert len(found.layers) == 2
    assert sum(layer.parameters for layer in found.layers.values()) < found.total.parameters
    assert found.per == ("sample" if name == "vit" else "token")
    if name not in ("bert", "gpt2"):
        assert found.total.flops == SubnetworkSpec().describe(small).full.flops
    assert f"{parameters(small):,}" in str(found)


def test_operations_of_a_feed_forward_are_counted_exactly():
    model = reordered("vit")
    less = SubnetworkSpec(ffn=20).describe(model).total.flops - SubnetworkSpec(ffn=8).describe(model).total.flops
    tokens, layers, matrices = 10, 2, 2
    assert less == 2 * matrices * layers * tokens * 24 * 12
