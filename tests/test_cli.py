import dataclasses
import json
import re
import subprocess
import sys

import pytest
import torch
import transformers
from command_line import refused, run, save
from conftest import build_inputs, build_model, outputs_of, relative_difference, same_bits, weights_of
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from hf_spp import Reordering, SPPConfig, apply_spp, conversion
from hf_spp.checkpoint import pack_tensors
from hf_spp.conversion import load_original
from hf_spp.curves.named_data import load_named_data

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
        (["reorder", "m", "o", "--image-size", "7"], "--image-size 7 is about data, and none is named"),
        (["slice", "m", "o", "--width", "0.5", "--calibration-samples", "7"], "--calibration-samples 7 is about data"),
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
    assert "# bert-spp\n" in card.text
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


@pytest.mark.parametrize(
    ("words", "samples", "side"),
    [([], 512, None), (["--calibration-samples", 8], 8, None), (["--image-size", 16], 512, 16)],
)
def test_reorder_runs_the_model_on_a_data_set(dinov2, tiny_demo, tmp_path, words, samples, side):
    options = ["--metric", "taylor", "--dataset", "shades", *words]
    assert "by taylor" in run("reorder", dinov2, tmp_path / "out", *options).stdout
    written = Reordering.from_pretrained(tmp_path / "out")
    batches = load_named_data("shades", dinov2, image_size=side).calibration_batches(samples)
    assert sum(len(batch["pixel_values"]) for batch in batches) == min(samples, 30)
    assert written.config.calibration_batches == len(batches)
    wanted = apply_spp(load_original(dinov2), SPPConfig(metric="taylor"), calibration=batches)
    assert written.scores.keys() == wanted.scores.keys()
    for name, scores in wanted.scores.items():
        torch.testing.assert_close(written.scores[name], scores)


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


# card


def test_card_is_written_anew_with_what_the_header_said(reordered):
    card = reordered / "README.md"
    text = card.read_text()
    card.write_text(text.replace("tags:\n", "tags:\n- mine\n").replace("# bert-spp", "# My title"))
    assert run("card", reordered).stdout == f"Card  {card}\n"
    again = ModelCard.load(card)
    assert again.data.tags == ["hf_spp", "salient-parameter-prioritization", "mine"]
    assert (again.data.license, again.data.base_model) == ("mit", "someone/tiny-bert")
    assert "# My title\n" in again.text
    assert "bit for bit" in again.text
    run("card", reordered, "--fine-tuned")
    assert "bit for bit" not in card.read_text()


def test_card_of_a_fine_tuned_model_keeps_the_task_that_its_owner_wrote(reordered):
    card = reordered / "README.md"
    card.write_text(card.read_text().replace("pipeline_tag: fill-mask", "pipeline_tag: text-ranking"))
    run("card", reordered, "--fine-tuned")
    assert ModelCard.load(card).data.pipeline_tag == "text-ranking"


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


def test_architectures_suggests_model_types():
    line = refused("architectures", "qwen3_mo")
    assert "Model 'qwen3_mo' is no folder here" in line
    assert "Model types of transformers with a similar name: qwen3_moe, " in line
    assert "with a similar name" not in refused("architectures", "someone/qwen3_moe")
