"""The commands `demo` and `compare`."""

import dataclasses

import torch
from command_line import cells_of, refused, run
from conftest import build_inputs, outputs_of, relative_difference
from huggingface_hub import ModelCard
from transformers import AutoModelForImageClassification, Dinov2Model

from hf_spp import AssetError, OrdersError, Reordering
from hf_spp.assets import fortunes
from hf_spp.cards.results import load_results
from hf_spp.cards.width_results import WidthReport
from hf_spp.cards.width_rows import KINDS
from hf_spp.comparison import presets
from hf_spp.comparison.classification import Recipe


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


def check_ending(folder, text, name, samples):
    """The demo ends with the model that learned a data set, in order, and half of it."""
    text = text.partition(f"What is left of the model of {name}")[2]
    report = WidthReport.load(folder / "widths")
    assert report.settings["dataset"] == name
    assert {(row["width"], row["kind"]) for row in report.rows[1:]} == {
        ("50 %", kind) for kind in KINDS if kind != "full"
    }
    assert [line[0] for line in cells_of(text) if line[0]] == ["full", "50 %"]
    (row,) = (row for row in load_results(folder).rows if (row["dataset"], row["method"]) == (name, "spp"))
    assert (row["eval_samples"], row["train_samples"]) == samples
    assert report.settings["calibration_samples"] == samples[1]
    assert report.rows[0]["metrics"] == {"accuracy": row["accuracy"], "f1": row["f1"]}
    assert Reordering.from_pretrained(folder / "ordered").config.metric == "taylor"
    assert f"hf-spp slice {folder / 'ordered'} ./half --width 0.5 --dataset {name}\n" in text
    ordered, trained = (
        AutoModelForImageClassification.from_pretrained(folder / path) for path in ("ordered", f"models/{name}-spp")
    )
    inputs = build_inputs(trained, 4, labels=False)
    assert relative_difference(outputs_of(trained, inputs), outputs_of(ordered, inputs)) < 1e-5


def test_demo_ends_with_half_of_a_model(tiny_demo):
    folder = tiny_demo / "out"
    check_ending(folder, run("demo", "--out", folder).stdout, "shades", (10, 30))
    card = ModelCard.load(folder / "ordered" / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.base_model == "facebook/dinov2-small"
    assert card.data.pipeline_tag == "image-classification"
    assert "# shades-spp\n" in card.text
    assert "A `Dinov2ForImageClassification` based on [facebook/dinov2-small]" in card.text
    assert "## Widths" in card.text
    assert "Equal" in run("verify", folder / "ordered").stdout
    # Results are read again, whose data sets are sorted by name.
    check_ending(folder, run("demo", "--out", folder).stdout, "shades", (10, 30))


def test_demo_ends_with_the_first_data_set_that_is_there(tiny_demo, monkeypatch):
    def absent():
        raise AssetError("It cannot be fetched.")

    preset = presets.PRESETS["demo"]
    sources = {**preset.datasets, "shades": absent}
    monkeypatch.setattr(presets, "PRESETS", {"demo": dataclasses.replace(preset, datasets=sources)})
    folder = tiny_demo / "out"
    check_ending(folder, run("demo", "--out", folder).stdout, "fashion-mnist", (6, 18))


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
