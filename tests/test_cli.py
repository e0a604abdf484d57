import dataclasses
import json
import re
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
import transformers
from conftest import build_inputs, build_model, outputs_of, relative_difference, same_bits, weights_of
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    Dinov2Config,
    Dinov2Model,
    ViTImageProcessor,
)
from typer.testing import CliRunner

from hf_spp import OrdersError, Reordering, SPPConfig, SubnetworkSpec, apply_spp, conversion, extract_subnetwork
from hf_spp.assets import fortunes
from hf_spp.cards.results import load_results
from hf_spp.cards.width_results import WidthReport
from hf_spp.cards.width_rows import KINDS
from hf_spp.checkpoint import pack_tensors
from hf_spp.cli import app
from hf_spp.comparison import presets
from hf_spp.comparison.classification import Recipe
from hf_spp.comparison.presets import Preset
from hf_spp.conversion import load_original
from hf_spp.curves.named_data import load_named_data
from hf_spp.subnetworks import load_subnetwork

COMMANDS = (
    "demo",
    "compare",
    "reorder",
    "verify",
    "push",
    "pull",
    "info",
    "slice",
    "curve",
    "card",
    "app",
    "architectures",
)
BASE_CARD = "---\nlicense: mit\nlanguage: en\nbase_model: someone/tiny-bert\npipeline_tag: fill-mask\n---\n# Tiny\n"


def run(*words, code=0):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output
    return result


def refused(*words):
    """The one line that a bad call prints."""
    result = run(*words, code=2)
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def save(name, folder, **changes):
    model = build_model(name, **changes)
    model.save_pretrained(folder)
    return model


@pytest.fixture
def bert(tmp_path):
    save("bert", tmp_path / "bert")
    (tmp_path / "bert" / "README.md").write_text(BASE_CARD)
    (tmp_path / "bert" / "vocab.txt").write_text("[PAD]\n")
    (tmp_path / "bert" / "LICENSE").write_text("Do as you like.\n")
    (tmp_path / "bert" / "1_Pooling").mkdir()
    (tmp_path / "bert" / "1_Pooling" / "config.json").write_text("{}")
    (tmp_path / "bert" / "notes.txt").write_text("not part of the checkpoint")
    return tmp_path / "bert"


@pytest.fixture
def reordered(bert, tmp_path):
    run("reorder", bert, tmp_path / "out")
    return tmp_path / "out"


# The program


def run_without_torch(*words):
    """What a call prints in a process of its own, in which torch must not be imported."""
    code = f"import sys; from hf_spp.cli import app; app({words!r})"
    program = f"import sys\ntry:\n    exec({code!r})\nfinally:\n    assert 'torch' not in sys.modules"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout


def test_help_answers_without_torch():
    text = run_without_torch("--help")
    assert all(name in text for name in COMMANDS)


def test_version_and_bare_call():
    assert run("--version").stdout == "hf-spp 0.1.0\n"
    assert "Usage" in run().stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(command):
    text = run(command, "--help").stdout
    assert "Examples" in text
    assert f"hf-spp {command}" in text.partition("Examples")[2]


@pytest.mark.parametrize("words", [["--debug", "verify"], ["verify", "--debug"]])
def test_debug_shows_the_traceback(words, tmp_path):
    lines = run(*words, tmp_path, code=2).stderr.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert "holds no spp_orders.safetensors" in lines[-1]


def test_an_interruption_is_quiet(monkeypatch, tmp_path):
    def interrupted(folder, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(conversion, "verify_checkpoint", interrupted)
    assert run("verify", tmp_path, code=130).output == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing"], "No such command 'nothing'. See `hf-spp --help`."),
        (["reorder"], "Missing argument 'MODEL'. See `hf-spp reorder --help`."),
        (["reorder", "m", "o", "--seed", "-1"], "Invalid value for '--seed'"),
        (["reorder", "m", "o", "--metric", "l3"], "metric='l3' is unknown"),
        (["reorder", "m", "o", "--metric", "taylor"], "--metric taylor runs the model on data, and none is named"),
        (["reorder", "m", "o", "--dataset", "digits"], "--metric l1 uses no data"),
        (["reorder", "m", "o", "--metric", "taylor", "--dataset", "digits", "--stream"], "--stream does not"),
        (["reorder", "m", "o", "--axes", "qk,arms"], "unknown axis 'arms'"),
        (["reorder", "./missing", "{}/o"], "Folder './missing' does not exist"),
        (["reorder", "some one/else", "{}/o"], "Model 'some one/else' is no folder here"),
        (["architectures", "./missing"], "Folder './missing' does not exist"),
        (["verify", "{}"], "holds no spp_orders.safetensors"),
        (["slice", "m", "o"], "slice got no width. Accepted: exactly one of --width, --params, --fraction, --flops"),
        (["slice", "m", "o", "--width", "0.5", "--latency-ms", "3"], "slice got --width and --latency-ms. Accepted"),
        (["slice", "m", "o", "--width", "half"], "Invalid value for '--width'"),
        (["slice", "m", "o", "--width", "1.5"], "--width has 1.5. Accepted: shares above 0 and up to 1"),
        (["slice", "m", "o", "--fraction", "0"], "--fraction has 0.0. Accepted: shares above 0 and up to 1"),
        (["slice", "{}", "{}/o", "--width", "0.5"], "holds no spp_orders.safetensors"),
        (["slice", "./missing", "{}/o", "--width", "0.5"], "Folder './missing' does not exist"),
        (["slice", "m", "{}/o", "--spec", "{}/missing.json"], "missing.json cannot be read as text"),
        (["slice", "m", __file__, "--width", "0.5"], "is a file; a folder is written there"),
        (["curve", "m"], "Missing option '--dataset'"),
        (["curve", "{}", "--dataset", "digits", "--out", "{}/o"], "holds no spp_orders.safetensors"),
        (["curve", "m", "--dataset", "digits", "--widths", "0.5,half"], "--widths has 'half'"),
        (["card", "{}"], "holds neither spp_orders.safetensors nor results.json"),
        (["compare"], "compare got no model and 0 data sets"),
        (["compare", "--model", "m"], "compare got a model and 0 data sets"),
        (["compare", "--preset", "table2"], "--preset table2 is unknown. Accepted: raffm-table1, demo"),
        (["compare", "--preset", "demo", "--epochs", "-1"], "Invalid value for '--epochs'"),
        (["demo", "--out", __file__], "is a file"),
    ],
)
def test_bad_input_gives_one_line(words, message, tmp_path):
    assert message in refused(*(word.format(tmp_path) for word in words))


# reorder


def test_reorder_writes_a_whole_stock_checkpoint(bert, tmp_path):
    result = run("reorder", bert, tmp_path / "out")
    assert "Reordering of BertForMaskedLM by l1 (float32)" in result.stdout
    assert f"Checkpoint  {tmp_path / 'out'}\n" in result.stdout
    assert sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")) == [
        "1_Pooling/config.json",
        "README.md",
        "config.json",
        "model.safetensors",
        "saliency.png",
        "spp_config.json",
        "spp_orders.safetensors",
        "vocab.txt",
    ]
    assert (tmp_path / "out" / "LICENSE").read_text() == "Do as you like.\n"
    original = AutoModelForMaskedLM.from_pretrained(bert)
    stock = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    inputs = build_inputs(original)
    assert relative_difference(outputs_of(original, inputs), outputs_of(stock, inputs)) < 1e-5
    assert not same_bits(stock, weights_of(original))
    Reordering.from_pretrained(tmp_path / "out").undo(stock)
    assert same_bits(stock, weights_of(original))


def test_reorder_writes_a_card_from_the_models_own(reordered):
    card = ModelCard.load(reordered / "README.md")
    assert card.data.to_dict() == {
        "base_model": "someone/tiny-bert",
        "language": "en",
        "library_name": "transformers",
        "license": "mit",
        "pipeline_tag": "fill-mask",
        "tags": ["hf_spp", "salient-parameter-prioritization"],
    }
    assert "# tiny-bert-spp\n" in card.text
    assert 'AutoModelForMaskedLM.from_pretrained(".")' in card.text


def test_reorder_goes_on_without_a_damaged_card(bert, tmp_path):
    (bert / "README.md").write_text("---\na: b: c\n---\n")
    result = run("reorder", bert, tmp_path / "out")
    assert "Note: The card of" in result.stderr
    assert "# bert-spp\n" in (tmp_path / "out" / "README.md").read_text()


def test_reorder_takes_axes_metric_seed_and_dtype(bert, tmp_path):
    options = ["--axes", "ffn,vo", "--axes", "heads", "--metric", "random", "--seed", "3", "--dtype", "float64"]
    run("reorder", bert, tmp_path / "out", *options)
    reordering = Reordering.from_pretrained(tmp_path / "out")
    assert reordering.config == SPPConfig(axes=("vo", "heads", "ffn"), metric="random", seed=3)
    assert AutoModelForMaskedLM.from_pretrained(tmp_path / "out").dtype == torch.float64


def test_reorder_streams(bert, tmp_path):
    run("reorder", bert, tmp_path / "whole", "--metric", "l2")
    result = run("reorder", bert, tmp_path / "out", "--metric", "l2", "--stream")
    assert "Reordering of BertForMaskedLM by l2 (float32)" in result.stdout
    assert "NOT checked" in result.stdout
    whole, streamed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert streamed.keys() == whole.keys()
    assert all(torch.equal(streamed[name], one) for name, one in whole.items())
    text = refused("reorder", bert, tmp_path / "other", "--stream", "--dtype", "float16")
    assert "--stream keeps every dtype" in text


def test_reorder_takes_towers(tmp_path):
    save("t5", tmp_path / "t5")
    run("reorder", tmp_path / "t5", tmp_path / "out", "--towers", "decoder", "--axes", "ffn,vo")
    orders = Reordering.from_pretrained(tmp_path / "out").orders
    assert orders
    assert all(name.startswith("decoder.") for name in orders)
    text = refused("reorder", tmp_path / "t5", tmp_path / "other", "--towers", "vision_tower")
    assert "Towers here: encoder, decoder" in text


def test_reorder_runs_the_model_on_a_data_set(dinov2, tiny_demo, tmp_path):
    words = ["--metric", "taylor", "--dataset", "shades", "--calibration-samples", 40]
    assert "by taylor" in run("reorder", dinov2, tmp_path / "out", *words).stdout
    written = Reordering.from_pretrained(tmp_path / "out")
    model = load_original(dinov2)
    calibration = load_named_data("shades", dinov2).calibration_batches(40)
    wanted = apply_spp(model, SPPConfig(metric="taylor"), calibration=calibration)
    assert {name: order.tolist() for name, order in written.orders.items()} == {
        name: order.tolist() for name, order in wanted.orders.items()
    }
    assert written.config.metric == "taylor"


def test_reorder_keeps_the_dtype_when_told(tmp_path):
    save("gpt2", tmp_path / "gpt2", dtype=torch.bfloat16)
    run("reorder", tmp_path / "gpt2", tmp_path / "out", "--dtype", "auto")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_reorder_says_when_nothing_was_proved(bert, tmp_path):
    assert "NOT checked" in run("reorder", bert, tmp_path / "out", "--no-verify").stdout
    assert "**This was not verified.**" in (tmp_path / "out" / "README.md").read_text()


def test_reordering_again_starts_from_the_original(bert, reordered, tmp_path):
    run("reorder", reordered, tmp_path / "again", "--metric", "l2")
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "again")
    Reordering.from_pretrained(tmp_path / "again").undo(model)
    assert same_bits(model, weights_of(AutoModelForMaskedLM.from_pretrained(bert)))


def test_reorder_replaces_a_folder_only_when_told(bert, reordered):
    before = (reordered / "spp_config.json").read_text()
    assert "exists and is not empty" in refused("reorder", bert, reordered, "--metric", "l2")
    assert (reordered / "spp_config.json").read_text() == before
    run("reorder", bert, reordered, "--metric", "l2", "--overwrite")
    assert Reordering.from_pretrained(reordered).config.metric == "l2"
    assert [path.name for path in reordered.parent.iterdir() if path.name.startswith(".")] == []


def test_reorder_refuses_an_illegal_axis_and_leaves_no_folder(tmp_path):
    save("llama", tmp_path / "llama")
    line = refused("reorder", tmp_path / "llama", tmp_path / "out", "--axes", "qk")
    assert "Axis 'qk' may not move in LlamaForCausalLM" in line
    assert "rotary position embedding" in line
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def test_reorder_refuses_damaged_quantized_and_unknown_models(bert, tmp_path):
    config = json.loads((bert / "config.json").read_text())

    def with_config(**changes):
        (bert / "config.json").write_text(json.dumps({**config, **changes}))
        return refused("reorder", bert, tmp_path / "out")

    assert "holds quantized weights" in with_config(quantization_config={"quant_method": "gptq", "bits": 4})
    assert "names no model type" in with_config(model_type="no-such-type")
    assert "cannot be loaded into BertForMaskedLM" in with_config(intermediate_size=24)
    (bert / "config.json").write_text("{")
    assert "config.json is no valid JSON" in refused("reorder", bert, tmp_path / "out")
    (bert / "config.json").write_text(json.dumps(config))
    (bert / "model.safetensors").write_bytes(b"no tensors")
    assert "model.safetensors is no readable safetensors file" in refused("reorder", bert, tmp_path / "out")
    (bert / "model.safetensors").unlink()
    assert "cannot be loaded into BertForMaskedLM" in refused("reorder", bert, tmp_path / "out")
    (bert / "config.json").unlink()
    assert "has no config.json" in refused("reorder", bert, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_reorder_names_weights_that_do_not_fit_the_class(bert, tmp_path):
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps({**config, "architectures": ["BertForTokenClassification"]}))
    notes = run("reorder", bert, tmp_path / "out").stderr
    assert f"weights of {bert} are not used by BertForTokenClassification and left out: cls.predictions" in notes
    assert "weights of BertForTokenClassification are not in" in notes
    (bert / "config.json").write_text(json.dumps({**config, "architectures": ["OurOwnBert"]}))
    assert "Reordering of BertModel" in run("reorder", bert, tmp_path / "out2").stdout


# verify


def test_verify_states_what_was_found(reordered):
    lines = run("verify", reordered).stdout.splitlines()
    titles = ["Model", "Files", "Orders", "Scores", "Outputs moved", "Accepted"]
    assert [line.split("  ")[0] for line in lines[:6]] == titles
    assert "as their SHA256SUMS say" in lines[1]
    assert "match the weights" in lines[3]
    assert lines[6] == "Equal: undoing the order changes nothing that the model computes."


def test_verify_follows_the_residual_stream(tmp_path):
    save("t5", tmp_path / "t5")
    run("reorder", tmp_path / "t5", tmp_path / "out", "--axes", "hidden,ffn")
    assert "Equal" in run("verify", tmp_path / "out").stdout


def test_verify_fails_when_the_outputs_differ(tmp_path):
    model = build_model("vit")
    reordering = apply_spp(model)
    model.save_pretrained(tmp_path / "out")
    strict = dataclasses.replace(reordering.config, tolerance=1e-30)
    dataclasses.replace(reordering, config=strict).save_pretrained(tmp_path / "out")
    assert "Differs: undoing the order changes what" in run("verify", tmp_path / "out", code=1).stdout


def test_verify_sees_that_weights_were_trained_since(tmp_path):
    model = build_model("vit")
    reordering = apply_spp(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    model.save_pretrained(tmp_path / "out")
    reordering.save_pretrained(tmp_path / "out")
    assert "are not those of the weights" in run("verify", tmp_path / "out").stdout


def test_verify_refuses_what_is_no_order(reordered, monkeypatch):
    path = reordered / "spp_orders.safetensors"
    reordering = Reordering.from_pretrained(reordered)
    data = reordering.to_bytes()
    name = next(iter(reordering.orders))
    reordering.orders[name][0, 0] = reordering.orders[name][0, 1]
    reordering.save_pretrained(reordered)
    assert f"The order of '{name}' in spp_orders.safetensors is no permutation" in refused("verify", reordered)
    path.write_bytes(data[:-8])
    assert "no readable safetensors file" in refused("verify", reordered)
    path.write_bytes(pack_tensors({"a": torch.ones(1)}, {}))
    assert "states no format_version" in refused("verify", reordered)
    path.unlink()
    assert "holds no spp_orders.safetensors" in refused("verify", reordered)


def test_verify_sees_orders_beside_weights_that_never_moved(tmp_path):
    model = build_model("vit")
    model.save_pretrained(tmp_path / "out")
    apply_spp(model).save_pretrained(tmp_path / "out")
    assert f"The weights of '{tmp_path / 'out'}' are in their original order" in refused("verify", tmp_path / "out")


def test_verify_refuses_the_orders_of_another_model(reordered):
    model = build_model("bert", num_hidden_layers=3)
    apply_spp(model).save_pretrained(reordered)
    assert "belongs to another model" in refused("verify", reordered)


# info


def test_info_says_what_a_checkpoint_holds(reordered):
    text = run("info", reordered).stdout
    assert re.search(r"^Weights +[\d,]+ \([\d,]+ in F32\), [\d.]+ kB in 1 files", text, flags=re.MULTILINE)
    assert "Reordering of BertForMaskedLM by l1 (float32)" in text
    assert re.search(r"^Sums +yes", text, flags=re.MULTILINE)
    (reordered / "spp_orders.safetensors").unlink()
    assert "holds no spp_orders.safetensors" in refused("info", reordered)


# slice


def cells_of(text):
    """Cells of the lines of a table."""
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]


@pytest.fixture
def dinov2(tmp_path):
    save("dinov2", tmp_path / "dinov2", num_labels=2, image_size=8)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "dinov2")
    run("reorder", tmp_path / "dinov2", tmp_path / "dinov2-spp")
    return tmp_path / "dinov2-spp"


def test_slice_writes_a_stock_checkpoint_with_what_belongs_to_it(dinov2, tmp_path):
    text = run("slice", dinov2, tmp_path / "small", "--width", 0.5).stdout
    assert cells_of(text) == [["heads", "2", "2", "3"], ["ffn", "2", "24", "48"]]
    whole, small = (AutoModelForImageClassification.from_pretrained(path) for path in (dinov2, tmp_path / "small"))
    before, after = whole.num_parameters(), small.num_parameters()
    assert f"Parameters {before:,} → {after:,} ({100 * after / before:.1f} %), 0.045 → 0.03 MB\n" in text
    assert "Not compensated; --dataset NAME refits" in text
    call = f"Dinov2ForImageClassification.from_pretrained('{tmp_path / 'small'}')"
    assert f"Stock transformers loads it: {call}\n" in text
    assert text.endswith(f"Checkpoint  {tmp_path / 'small'}\n")
    assert {path.name for path in (tmp_path / "small").iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "spp_subnetwork.json",
    }
    wanted = extract_subnetwork(whole, SubnetworkSpec.uniform(whole, 0.5))
    inputs = {"pixel_values": torch.ones(1, 3, 8, 8)}
    assert relative_difference(outputs_of(wanted, inputs), outputs_of(small, inputs)) < 1e-6


def test_slice_says_when_stock_transformers_cannot_load_it(reordered, tmp_path):
    result = run("slice", reordered, tmp_path / "small", "--width", 0.5)
    call = f"hf_spp.load_subnetwork('{tmp_path / 'small'}')"
    assert f"Needs hf_spp to load: {call}\n" in result.stdout
    assert result.stdout.count(str(tmp_path / "small")) == 2
    assert ".tmp" not in result.output
    assert (tmp_path / "small" / "LICENSE").read_text() == "Do as you like.\n"
    assert (tmp_path / "small" / "vocab.txt").is_file()
    small = load_subnetwork(tmp_path / "small")
    whole = AutoModelForMaskedLM.from_pretrained(reordered)
    wanted = extract_subnetwork(whole, SubnetworkSpec.uniform(whole, 0.5))
    assert same_bits(small, weights_of(wanted))


def parameters(folder):
    return sum(parameter.numel() for parameter in load_subnetwork(folder).parameters())


def test_slice_keeps_within_a_budget(reordered, tmp_path):
    full = AutoModelForMaskedLM.from_pretrained(reordered).num_parameters()
    run("slice", reordered, tmp_path / "a", "--fraction", 0.7)
    run("slice", reordered, tmp_path / "b", "--params", f"{0.7 * full / 1e3}K")
    assert 0.5 * full < parameters(tmp_path / "a") <= 0.7 * full
    assert parameters(tmp_path / "a") == parameters(tmp_path / "b")
    run("slice", reordered, tmp_path / "c", "--flops", "9K")
    assert parameters(tmp_path / "c") < full
    assert "is below the smallest slice" in refused("slice", reordered, tmp_path / "d", "--flops", "10")
    assert "--fraction has 0.0. Accepted: shares above 0" in refused(
        "slice", reordered, tmp_path / "d", "--fraction", 0
    )
    assert "keep every channel of BertForMaskedLM" in refused("slice", reordered, tmp_path / "d", "--latency-ms", 1e6)
    assert not (tmp_path / "d").exists()


def test_slice_takes_a_spec(reordered, tmp_path):
    SubnetworkSpec(ffn=[8, 16]).save(tmp_path / "spec.json")
    text = run("slice", reordered, tmp_path / "small", "--spec", tmp_path / "spec.json").stdout
    assert cells_of(text) == [["ffn", "2", "8–16", "20"]]
    assert load_subnetwork(tmp_path / "small").bert.encoder.layer[1].intermediate.dense.out_features == 16
    (tmp_path / "spec.json").write_text('{"format_version": 1, "arms": 2}')
    assert "unknown keys ['arms']" in refused("slice", reordered, tmp_path / "b", "--spec", tmp_path / "spec.json")


def test_slice_knows_the_scores_of_the_checkpoint(dinov2, tmp_path):
    model = AutoModelForImageClassification.from_pretrained(dinov2)
    Reordering.from_pretrained(dinov2).undo(model)
    batches = [build_inputs(model, 4, labels=False)]
    reordering = apply_spp(model, SPPConfig(metric="taylor"), calibration=batches)
    model.save_pretrained(dinov2)
    reordering.save_pretrained(dinov2)
    run("slice", dinov2, tmp_path / "small", "--fraction", 0.6)
    wanted = SubnetworkSpec.from_budget(model, fraction=0.6, allocation="global")
    stored = json.loads((tmp_path / "small" / "spp_subnetwork.json").read_text())
    assert SubnetworkSpec.from_dict(stored["spec"]) == wanted


def test_slice_compensates_on_a_data_set(dinov2, tiny_demo, tmp_path):
    words = ["--width", 0.5, "--dataset", "shades", "--calibration-samples", 8]
    text = run("slice", dinov2, tmp_path / "small", *words).stdout
    assert "Compensated on shades: 4 layers refitted.\n" in text
    run("slice", dinov2, tmp_path / "plain", *words[:2])
    full, small, plain = (
        AutoModelForImageClassification.from_pretrained(path)
        for path in (dinov2, tmp_path / "small", tmp_path / "plain")
    )
    data = load_named_data("shades", dinov2)
    inputs = next(iter(data.evaluation_batches(full, 10)))
    apart = [(model(**inputs).logits - full(**inputs).logits).norm() for model in (small, plain)]
    assert apart[0] < 0.9 * apart[1]


def test_slice_replaces_a_folder_only_when_told(reordered, tmp_path):
    run("slice", reordered, tmp_path / "small", "--width", 0.5)
    before = parameters(tmp_path / "small")
    assert "exists and is not empty" in refused("slice", reordered, tmp_path / "small", "--width", 0.2)
    assert parameters(tmp_path / "small") == before
    run("slice", reordered, tmp_path / "small", "--width", 0.2, "--overwrite")
    assert parameters(tmp_path / "small") < before
    assert "is a sub-network itself" in refused("slice", tmp_path / "small", tmp_path / "b", "--width", 0.5)


def test_slice_needs_a_known_order(bert, tmp_path):
    line = refused("slice", bert, tmp_path / "small", "--width", 0.5)
    assert "holds no spp_orders.safetensors" in line
    assert "hf-spp reorder MODEL OUT" in line


# curve


def test_curve_measures_a_fine_tuned_classifier(tiny_demo, tmp_path):
    run("compare", "--preset", "demo", "--dataset", "shades", "--save-models", "--out", tiny_demo / "out")
    (row,) = (row for row in load_results(tiny_demo / "out").rows if row["method"] == "spp")
    model = tiny_demo / "out" / "models" / "shades-spp"
    words = ["--widths", "0.25,0.5", "--out", tmp_path / "widths", "--latency-runs", 1, "--batch-size", 4]
    text = run("curve", model, "--dataset", "shades", *words).stdout
    report = WidthReport.load(tmp_path / "widths")
    assert report.rows[0]["metrics"] == {"accuracy": row["accuracy"], "f1": row["f1"]}
    assert report.settings["dataset"] == "shades"
    assert report.settings["calibration_samples"] == 30
    assert report.settings["ordered"]
    assert {(r["width"], r["kind"]) for r in report.rows[1:]} == {
        (width, kind) for width in ("25 %", "50 %") for kind in KINDS if kind != "full"
    }
    assert "Accuracy / macro F1, in percent" in text
    assert [line[0] for line in cells_of(text) if line[0]] == ["full", "25 %", "50 %"]
    assert f"Results  {tmp_path / 'widths' / 'results.json'}\n" in text
    assert "Card" not in text
    assert text.count(".png\n") == 2


def test_curve_goes_into_the_card_of_a_local_checkpoint(tiny_demo, tmp_path):
    run("reorder", tiny_demo / "model", tmp_path / "spp")
    card = tmp_path / "spp" / "README.md"
    before = card.read_text()
    words = ["curve", tmp_path / "spp", "--dataset", "shades", "--widths", 0.5, "--out", tmp_path / "widths"]
    text = run(*words, "--calibration-samples", 0, "--latency-runs", 0).stdout
    assert f"Card     {card}\n" in text
    assert "Cosine to the full model" in text
    section = card.read_text().partition("<!-- hf_spp widths:start -->")[2].partition("<!-- hf_spp widths:end -->")[0]
    assert "| full |" in section
    assert (tmp_path / "spp" / "widths_parameters.png").is_file()
    assert (
        card.read_text().replace(section, "").replace("<!-- hf_spp widths:start --><!-- hf_spp widths:end -->\n\n", "")
        == before
    )
    run(*words, "--max-eval-samples", 3, "--latency-runs", 1)
    assert "on 3 examples of shades" in card.read_text()
    assert card.read_text().count("## Widths") == 1


def test_curve_refuses_what_it_cannot_measure(tiny_demo, reordered, dinov2, tmp_path):
    folder = ["--out", tmp_path / "widths"]
    assert "has model_type 'bert', for which" in refused("curve", reordered, "--dataset", "shades", *folder)
    line = refused("curve", dinov2, "--dataset", "no/such-data", *folder)
    assert "Data set 'no/such-data': datasets.load_dataset" in line
    assert "--widths has '2'" in refused("curve", dinov2, "--dataset", "shades", "--widths", "2", *folder)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "results.json").write_text("{}")
    line = refused("curve", dinov2, "--dataset", "shades", "--out", tmp_path / "other")
    assert "holds results of something else" in line


# card


def test_card_is_written_anew_with_what_the_header_said(reordered):
    card = reordered / "README.md"
    text = card.read_text()
    card.write_text(text.replace("tags:\n", "tags:\n- mine\n").replace("# tiny-bert-spp", "# My title"))
    assert run("card", reordered).stdout == f"Card  {card}\n"
    again = ModelCard.load(card)
    assert again.data.tags == ["hf_spp", "salient-parameter-prioritization", "mine"]
    assert (again.data.license, again.data.base_model) == ("mit", "someone/tiny-bert")
    assert "# My title\n" in again.text
    assert "bit for bit" in again.text
    run("card", reordered, "--fine-tuned")
    assert "bit for bit" not in card.read_text()


def test_card_of_somebody_else_stays(reordered):
    (reordered / "README.md").write_text("# Mine\n")
    assert "was not written by hf_spp" in refused("card", reordered)
    assert (reordered / "README.md").read_text() == "# Mine\n"
    run("card", reordered, "--overwrite")
    assert "## What was reordered" in (reordered / "README.md").read_text()


def test_card_takes_a_base(reordered, bert):
    (reordered / "README.md").unlink()
    run("card", reordered, "--base", bert)
    assert ModelCard.load(reordered / "README.md").data.license == "mit"


# architectures


def narrow(monkeypatch, *words, width=80):
    """Lines of a call on a terminal of that width, none of them wider."""
    monkeypatch.setenv("COLUMNS", str(width))
    lines = [line.rstrip() for line in run(*words).stdout.splitlines()]
    assert max(map(len, lines)) <= width
    return lines


def test_architectures_lists_families_without_torch():
    assert "rotary position embedding" in run_without_torch("architectures")


@pytest.mark.parametrize("width", [80, 120])
def test_architectures_lists_families_by_equal_verdicts(monkeypatch, width):
    lines = narrow(monkeypatch, "architectures", width=width)
    assert lines[0].split() == ["qk", "vo", "heads", "ffn", "experts", "hidden"]
    text = " ".join(" ".join(lines).split())
    for verdicts, family in (("yes yes yes yes – yes", "bert"), ("no [1] yes yes yes – yes", "llama")):
        names = text.partition(f"families {verdicts} ")[2].partition(" families ")[0]
        assert f" {family}," in names
    assert "[1] rotary position embedding: each frequency belongs to a fixed row of q and k" in text
    assert len(lines) < 150


def test_architectures_lists_each_type_with_a_text_in_its_name(monkeypatch):
    lines = narrow(monkeypatch, "architectures", "--filter", "Qwen3_moe")
    assert lines[1].split() == ["qwen3_moe", "no", "[1]", "yes", "yes", "yes", "yes", "yes"]
    assert lines[2:4] == ["", "[1]  rotary position embedding: each frequency belongs to a fixed row of q and k"]
    assert (
        "timm_backbone is not in the table: it needs the library timm"
        in run("architectures", "--filter", "timm").stdout
    )
    names = {line.split()[0] for line in run("architectures", "--filter", "").stdout.splitlines() if line}
    assert {"bert", "clip_vision_model", "qwen2_vl_text"} <= names


def test_architectures_refuses_a_text_in_no_name():
    assert "--filter qwertz is in no model type" in refused("architectures", "--filter", "qwertz")
    assert "got the model bert and --filter" in refused("architectures", "bert", "--filter", "bert")


def test_architectures_of_a_model_reads_its_config_only(tmp_path):
    config = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    config = transformers.LlamaConfig(**config, num_key_value_heads=8, vocab_size=128256)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path / "llama")
    lines = run("architectures", tmp_path / "llama").stdout.splitlines()
    assert lines[0] == "LlamaForCausalLM, 70.6 B parameters"
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    assert cells == [
        ["vo", "80", "81,920", "160"],
        ["heads", "160", "5,760", "320"],
        ["ffn", "80", "2,293,760", "240"],
        ["hidden", "1", "8,192", "723"],
    ]
    text = " ".join(" ".join(lines).split())
    assert "Stays in place qk rotary position embedding: each frequency belongs to a fixed row of q and k" in text
    assert "at layers.*.self_attn No such channels: experts" in text


def test_architectures_takes_a_model_type(tmp_path, monkeypatch):
    assert run("architectures", "mixtral").stdout.startswith("MixtralForCausalLM, default config of mixtral, 46.7 B")
    monkeypatch.chdir(tmp_path)
    save("bert", tmp_path / "mixtral")
    assert run("architectures", "mixtral").stdout.startswith("BertForMaskedLM, 0.0 M parameters")
    assert "describes no model: it has no model of its own" in refused("architectures", "sam_prompt_encoder")


@pytest.mark.parametrize("name", ["qwen2_5_omni", "qwen3_vl", "sam2", "speecht5"])
def test_architectures_of_a_composite_model_is_short(monkeypatch, name):
    lines = narrow(monkeypatch, "architectures", name)
    assert "Stays in place" in lines
    assert len(lines) < 45


def test_architectures_of_a_model_without_channels_is_refused(tmp_path):
    transformers.ResNetConfig(architectures=["ResNetModel"]).save_pretrained(tmp_path / "resnet")
    assert "has no channel group" in refused("architectures", tmp_path / "resnet")


def test_architectures_of_a_config_that_describes_no_model_is_refused(bert):
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps({**config, "num_attention_heads": 7}))
    line = refused("architectures", bert)
    assert "(model_type 'bert') describes no model: it raises ValueError: The hidden size" in line


# compare and demo


def shades(name="shades"):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["dark", "light"])})
    pictures = [Image.fromarray(np.full((8, 8), 200 * (index % 2), dtype=np.uint8)) for index in range(40)]
    rows = datasets.Dataset.from_dict({"image": pictures, "label": [i % 2 for i in range(40)]}, features=features)
    return datasets.DatasetDict(train=rows)


@pytest.fixture
def tiny_demo(monkeypatch, tmp_path):
    """The preset `demo` in small: the same command, a tiny model and data set."""
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4)
    Dinov2Model(config).save_pretrained(tmp_path / "model")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: facebook/dinov2-small\n---\n")
    preset = Preset(
        description="Tiny.",
        model_name="facebook/dinov2-small",
        model=lambda: tmp_path / "model",
        datasets={"fashion-mnist": shades, "shades": shades},
        recipe=Recipe(0.25, 1.0),
        learning_rate=1e-3,
        methods=("original", "pruning-rank", "spp"),
        quick={"datasets": {"shades": shades}},
    )
    monkeypatch.setattr(presets, "PRESETS", {"demo": preset})
    return tmp_path


def test_demo_leaves_everything(tiny_demo):
    folder = tiny_demo / "out"
    text = run("demo", "--out", folder).stdout
    assert "Accuracy / macro F1, %" in text
    assert "Pruning-Rank" in text
    assert f"Card        {folder / 'README.md'}\n" in text
    assert f"Checkpoint  {folder / 'checkpoint'}\n" in text
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "accuracy.png",
        "checkpoint",
        "models",
        "ordered",
        "results.json",
        "results.md",
        "saliency.png",
        "widths",
    }
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.base_model == "facebook/dinov2-small"
    assert card.data.datasets == ["zalando-datasets/fashion_mnist"]
    assert len(card.data.eval_results) == 2 * 3 * 2
    assert card.text.count("![") == 2
    assert 'from_pretrained("checkpoint")' in card.text
    assert "Yes, measured." in card.text
    checkpoint = folder / "checkpoint"
    assert (checkpoint / "preprocessor_config.json").is_file()
    assert 'from_pretrained(".")' in (checkpoint / "README.md").read_text()
    original, stock = (Dinov2Model.from_pretrained(path) for path in (tiny_demo / "model", checkpoint))
    inputs = {"pixel_values": torch.ones(1, 3, 8, 8)}
    assert relative_difference(outputs_of(original, inputs), outputs_of(stock, inputs)) < 1e-5
    assert "Equal" in run("verify", checkpoint).stdout


def test_demo_ends_with_what_is_left_of_a_cut_model(tiny_demo):
    folder = tiny_demo / "out"
    text = run("demo", "--out", folder).stdout.partition("What is left of the model of fashion-mnist")[2]
    report = WidthReport.load(folder / "widths")
    assert {(row["width"], row["kind"]) for row in report.rows[1:]} == {
        ("50 %", kind) for kind in KINDS if kind != "full"
    }
    assert [line[0] for line in cells_of(text) if line[0]] == ["full", "50 %"]
    (row,) = (r for r in load_results(folder).rows if (r["dataset"], r["method"]) == ("fashion-mnist", "spp"))
    assert report.rows[0]["metrics"] == {"accuracy": row["accuracy"], "f1": row["f1"]}
    assert Reordering.from_pretrained(folder / "ordered").config.metric == "taylor"
    assert "## Widths" in (folder / "ordered" / "README.md").read_text()
    assert f"hf-spp slice {folder / 'ordered'} ./half --width 0.5 --dataset fashion-mnist\n" in text
    assert "Equal" in run("verify", folder / "ordered").stdout


def test_demo_quick_continues(tiny_demo):
    folder = tiny_demo / "out"
    run("demo", "--quick", "--out", folder)
    first = load_results(folder).rows
    assert [row["dataset"] for row in first] == ["shades"] * 3
    run("demo", "--quick", "--out", folder)
    assert load_results(folder).rows == first


def test_compare_takes_options_over_a_preset(tiny_demo):
    options = ["--dataset", "shades", "--method", "original,spp-raffm", "--epochs", 2, "--batch-size", 5]
    options += ["--learning-rate", 0.01, "--max-train-samples", 10, "--max-eval-samples", 6, "--seed", 7]
    run("compare", "--preset", "demo", "--out", tiny_demo / "out", *options)
    results = load_results(tiny_demo / "out")
    assert [(row["method"], row["train_samples"], row["eval_samples"], row["seed"]) for row in results.rows] == [
        ("original", 10, 6, 7),
        ("spp-raffm", 10, 6, 7),
    ]
    arguments = results.settings["training_arguments"]
    assert (arguments["num_train_epochs"], arguments["per_device_train_batch_size"]) == (2, 5)
    assert arguments["learning_rate"] == 0.01
    assert Reordering.from_pretrained(tiny_demo / "out" / "checkpoint").config.axes == ("qk",)


def test_compare_without_spp_writes_a_card_of_results_alone(tiny_demo):
    words = ["compare", "--preset", "demo", "--dataset", "shades", "--method", "original"]
    text = run(*words, "--out", tiny_demo / "out").stdout
    assert "Checkpoint" not in text
    card = ModelCard.load(tiny_demo / "out" / "README.md")
    assert len(card.data.eval_results) == 2
    run("card", tiny_demo / "out")
    assert ModelCard.load(tiny_demo / "out" / "README.md").data.eval_results == card.data.eval_results


def test_compare_refuses_other_settings_in_the_same_folder(tiny_demo):
    words = ["compare", "--preset", "demo", "--dataset", "shades", "--method", "original", "--out", tiny_demo / "out"]
    run(*words)
    assert "holds results of other settings" in refused(*words, "--seed", 5)
    assert "unknown method 'magic'" in refused(*words, "--method", "magic")


def test_compare_takes_a_model_and_a_data_set_of_ones_own(bert, tmp_path, monkeypatch):
    asked = {}

    def note(preset, folder, **options):
        asked.update(preset=preset, folder=folder, **options)
        raise OrdersError("Stop here.")

    monkeypatch.setattr(presets, "run_preset", note)
    refused("compare", "--model", bert, "--dataset", "a/b,c/d", "--image-size", 32, "--save-models")
    assert asked["preset"].model() == str(bert)
    assert dict(asked["preset"].datasets) == {"a/b": "a/b", "c/d": "c/d"}
    assert asked["preset"].recipe == Recipe(image_size=32)
    assert asked["save_models"] is True
    refused("compare", "--model", bert, "--dataset", "fortunes")
    assert dict(asked["preset"].datasets) == {"fortunes": fortunes}


def test_a_misspelt_built_in_name_is_pointed_out(dinov2, tmp_path):
    result = run("curve", dinov2, "--dataset", "fashion_mnist", "--out", tmp_path / "widths", code=2)
    assert "Note: Data set 'fashion_mnist' is looked for on the Hub; built in is 'fashion-mnist'.\n" in result.stderr
