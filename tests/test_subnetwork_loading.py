"""Sub-networks on disk: loaded by stock transformers, by this package, and as published widths."""

import json
import subprocess
import sys
import warnings

import pytest
import torch
from conftest import build_inputs, build_model, model_class, outputs_of, relative_difference
from safetensors.torch import load_file, save_file

from hf_spp import (
    CheckpointError,
    SPPConfig,
    SubnetworkError,
    SubnetworkSpec,
    apply_spp,
    extract_subnetwork,
    load_subnetwork,
    save_width,
)
from hf_spp.subnetworks.record import RECORD_NAME, record_of

# A process that cannot import this package loads each folder and writes its outputs.
STRANGER = """
import sys
sys.modules["hf_spp"] = None
import safetensors.torch, torch, transformers
for folder in sys.argv[1:]:
    model = getattr(transformers, open(folder + "/class").read()).from_pretrained(folder).eval()
    inputs = safetensors.torch.load_file(folder + "/inputs.safetensors")
    with torch.no_grad():
        logits = model(**inputs).logits
    safetensors.torch.save_file({"logits": logits.contiguous()}, folder + "/outputs.safetensors")
"""
STOCK = [
    ("vit", {"ffn": 0.5, "heads": 2}),
    ("vit", {"qk": 4, "vo": 4}),
    ("deit", {"heads": 1}),
    ("dinov2", {"ffn": 24, "heads": 2}),
    ("bert", {"ffn": 8}),
    ("bert", {"heads": 2, "hidden": 16}),
    ("roberta", {"ffn": 8}),
    ("distilbert", {"ffn": 16}),
    ("llama", {"ffn": 8, "heads": 1}),
    ("qwen2", {"query_heads": 2, "ffn": 16}),
    ("qwen3", {"heads": 1}),
    ("mistral", {"ffn": 8, "heads": 1}),
    ("gpt2", {"ffn": 8}),
    ("t5", {"ffn": 8, "heads": 2}),
    ("t5", {"qk": 4, "vo": 4}),
    ("vit", {"hidden": 16, "heads": 2}),
]
OWN = [
    ("vit", {"ffn": (8, 16)}),
    ("vit", {"vo": 4}),
    ("bert", {"heads": 2}),
    ("bert", {"heads": (2, 1), "vo": 3, "ffn": (8, 20)}),
    ("llama", {"heads": (1, 2)}),
    ("llama", {"vo": 2, "ffn": 8}),
    ("gpt2", {"heads": 2, "vo": 4}),
    ("t5", {"ffn": (8, 16, 8, 16, 8)}),
    ("distilbert", {"heads": 1}),
]


def ordered(name, folder=None):
    """A tiny reordered model, saved with its orders."""
    model = build_model(name)
    axes = None
    if name in ("bert", "vit"):
        axes = ("qk", "vo", "heads", "ffn", "hidden")
    reordering = apply_spp(model, SPPConfig(axes=axes, metric="random"))
    if folder is not None:
        model.save_pretrained(folder)
        reordering.save_pretrained(folder)
    return model


def data_for(model):
    return [build_inputs(model, 8, labels=model.config.is_encoder_decoder, seed=seed) for seed in range(4)]


def test_strangers_load_what_stock_configs_state(tmp_path):
    expected = {}
    for index, (name, cut) in enumerate(STOCK):
        model = ordered(name)
        small = extract_subnetwork(model, SubnetworkSpec(**cut, multiple_of=1), calibration=data_for(model))
        assert record_of(small).reason is None, record_of(small).reason
        folder = tmp_path / f"{index}-{name}"
        small.save_pretrained(folder)
        inputs = build_inputs(small, labels=small.config.is_encoder_decoder)
        (folder / "class").write_text(model_class(name).__name__)
        save_file(inputs, folder / "inputs.safetensors")
        expected[folder] = outputs_of(small, inputs)["output.logits"]
        assert relative_difference(outputs_of(small, inputs), outputs_of(load_subnetwork(folder), inputs)) == 0
    run = subprocess.run(
        [sys.executable, "-c", STRANGER, *map(str, expected)], capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr
    for folder, logits in expected.items():
        torch.testing.assert_close(
            load_file(folder / "outputs.safetensors")["logits"].double(), logits, rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize(("name", "cut"), OWN)
def test_what_no_config_states_is_loaded_here(name, cut, tmp_path, caplog):
    model = ordered(name)
    small = extract_subnetwork(model, SubnetworkSpec(**cut), calibration=data_for(model))
    reason = record_of(small).reason
    assert reason
    with caplog.at_level("WARNING", "hf_spp"):
        small.save_pretrained(tmp_path)
    inputs = build_inputs(small)
    loaded = load_subnetwork(tmp_path)
    assert type(loaded) is type(model)
    assert relative_difference(outputs_of(small, inputs), outputs_of(loaded, inputs)) == 0
    assert record_of(loaded) == record_of(small)
    with pytest.raises(RuntimeError, match="mismatch"):
        type(model).from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path / "again")
    again = load_subnetwork(tmp_path / "again", dtype="float64")
    assert again.dtype == torch.float64
    inputs = build_inputs(again)
    assert relative_difference(outputs_of(small.double(), inputs), outputs_of(again, inputs)) < 1e-12


@pytest.mark.parametrize(
    ("name", "cut"),
    [("vit", {"ffn": 0.5, "heads": 2}), ("bert", {"heads": (2, 1), "ffn": 8}), ("llama", {"ffn": 8, "heads": 1})],
)
def test_a_published_width_comes_with_its_compensation(name, cut, tmp_path):
    model = ordered(name, tmp_path)
    plain = extract_subnetwork(model, SubnetworkSpec(**cut))
    small = extract_subnetwork(model, SubnetworkSpec(**cut), calibration=data_for(model))
    path = save_width(tmp_path, "half", small)
    refitted = sum(small.state_dict()[tensor].nbytes for tensor in record_of(small).compensated)
    assert path == tmp_path / "spp_widths" / "half.safetensors"
    assert refitted <= path.stat().st_size < refitted + 6000
    inputs = build_inputs(model)
    loaded = load_subnetwork(tmp_path, "half")
    assert relative_difference(outputs_of(small, inputs), outputs_of(loaded, inputs)) == 0
    assert relative_difference(outputs_of(plain, inputs), outputs_of(loaded, inputs)) > 1e-3
    # Any other width is the plain prefix.
    other = load_subnetwork(tmp_path, SubnetworkSpec(ffn=16))
    expected = extract_subnetwork(model, SubnetworkSpec(ffn=16))
    assert relative_difference(outputs_of(expected, inputs), outputs_of(other, inputs)) == 0
    assert load_subnetwork(tmp_path, 0.5).num_parameters() < model.num_parameters()
    # The checkpoint itself is as before.
    assert (
        relative_difference(outputs_of(model, inputs), outputs_of(type(model).from_pretrained(tmp_path), inputs)) == 0
    )


def test_widths_that_are_not_there(tmp_path):
    model = ordered("vit", tmp_path)
    with pytest.raises(SubnetworkError, match="is no sub-network"):
        load_subnetwork(tmp_path)
    with pytest.raises(SubnetworkError, match="no width 'half'"):
        load_subnetwork(tmp_path, "half")
    small = extract_subnetwork(model, SubnetworkSpec(ffn=8))
    for name in ("", "../half", "a/b", ".half"):
        with pytest.raises(SubnetworkError, match="no name"):
            save_width(tmp_path, name, small)
    with pytest.raises(SubnetworkError, match="not cut out"):
        save_width(tmp_path, "half", model)
    small.save_pretrained(tmp_path / "small")
    with pytest.raises(SubnetworkError, match="sub-network itself"):
        load_subnetwork(tmp_path / "small", 0.5)
    with pytest.raises(CheckpointError, match="does not exist"):
        load_subnetwork(tmp_path / "nowhere", 0.5)


@pytest.mark.parametrize("damage", [
    {"widths": None}, {"widths": {"layers.0.ffn": 0}}, {"widths": {"layers.7.ffn": 8}},
    {"widths": {"layers.0.mlp.ffn": 999}},
    {"format_version": 2}, {"spec": {"format_version": 1, "ffn": -1}}, {"compensated": [3]}, {"reason": 3},
])  # fmt: skip
def test_damaged_records(damage, tmp_path):
    small = extract_subnetwork(ordered("vit"), SubnetworkSpec(ffn=(8, 16)))
    small.save_pretrained(tmp_path)
    record = json.loads((tmp_path / RECORD_NAME).read_text())
    (tmp_path / RECORD_NAME).write_text(json.dumps({**record, **damage}))
    with pytest.raises(CheckpointError):
        load_subnetwork(tmp_path)


def test_damaged_widths(tmp_path):
    model = ordered("vit", tmp_path)
    small = extract_subnetwork(model, SubnetworkSpec(ffn=8), calibration=data_for(model))
    path = save_width(tmp_path, "half", small)
    tensors = load_file(path)
    whole = path.read_bytes()
    metadata = {"subnetwork": json.dumps(record_of(small).to_dict())}
    first = next(iter(tensors))
    for broken in (
        {name: one for name, one in tensors.items() if name != first},
        {**tensors, first: torch.ones(3, 3)},
        {**tensors, first: torch.full_like(tensors[first], float("nan"))},
    ):
        save_file(broken, path, metadata)
        with pytest.raises(CheckpointError, match="does not fit"):
            load_subnetwork(tmp_path, "half")
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match="how wide"):
        load_subnetwork(tmp_path, "half")
    path.write_bytes(whole[:100])
    with pytest.raises(CheckpointError, match="safetensors"):
        load_subnetwork(tmp_path, "half")


def test_folders_are_known_to_be_in_order(tmp_path):
    ordered("vit", tmp_path)
    model = type(build_model("vit")).from_pretrained(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        extract_subnetwork(model, SubnetworkSpec(ffn=8))
    assert not caught
