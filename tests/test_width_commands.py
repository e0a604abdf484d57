"""The commands `slice` and `curve`."""

import json

import torch
from command_line import cells_of, refused, run
from conftest import build_inputs, outputs_of, relative_difference, same_bits, weights_of
from transformers import AutoModelForImageClassification, AutoModelForMaskedLM

from hf_spp import Reordering, SPPConfig, SubnetworkSpec, apply_spp, extract_subnetwork
from hf_spp.cards.results import load_results
from hf_spp.cards.width_results import WidthReport
from hf_spp.cards.width_rows import KINDS
from hf_spp.curves.named_data import load_named_data
from hf_spp.subnetworks import load_subnetwork

# slice


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
    assert f"Card     {model / 'README.md'}\n" in text
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
