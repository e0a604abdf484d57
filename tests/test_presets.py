import json

import datasets
import numpy as np
import pytest
from PIL import Image
from transformers import Dinov2Config, Dinov2Model, ViTImageProcessor, set_seed

from hf_spp.cards.results import METHODS
from hf_spp.comparison import presets
from hf_spp.comparison.classification import Recipe
from hf_spp.comparison.presets import PRESETS, Preset, run_preset
from hf_spp.errors import AssetError, SPPConfigError


@pytest.fixture
def tiny(tmp_path):
    set_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4)
    Dinov2Model(config).save_pretrained(tmp_path / "model")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def shades():
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["dark", "light"])})
    pictures = [Image.fromarray(np.full((8, 8), 200 * (index % 2), dtype=np.uint8)) for index in range(40)]
    rows = datasets.Dataset.from_dict({"image": pictures, "label": [i % 2 for i in range(40)]}, features=features)
    return datasets.DatasetDict(train=rows, test=rows)


def unreachable():
    raise AssetError("shoes-1.0.whl could not be fetched.\nConnect to the network.")


def install(monkeypatch, model, sources, **changes):
    values = {
        "description": "Tiny.",
        "model_name": "tiny/model",
        "model": lambda: model,
        "datasets": sources,
        "recipe": Recipe(0.25, 1.0),
        "learning_rate": 1e-3,
        "methods": ("original", "spp"),
        "quick": {"methods": ("spp",)},
    }
    monkeypatch.setattr(presets, "PRESETS", {"tiny": Preset(**{**values, **changes})})


def test_a_preset_runs_and_hides_the_cache_folder(monkeypatch, tiny, tmp_path):
    install(monkeypatch, tiny, {"shades": shades})
    results = run_preset("tiny", tmp_path / "out")
    assert [(row["dataset"], row["method"], row["model"]) for row in results.rows] == [
        ("shades", "original", "tiny/model"),
        ("shades", "spp", "tiny/model"),
    ]
    assert str(tmp_path) not in (tmp_path / "out" / "results.json").read_text()


def test_quick_replaces_fields(monkeypatch, tiny, tmp_path):
    install(monkeypatch, tiny, {"shades": shades})
    assert [row["method"] for row in run_preset("tiny", tmp_path / "out", quick=True).rows] == ["spp"]


def test_what_cannot_be_fetched_is_named(monkeypatch, tiny, tmp_path):
    install(monkeypatch, tiny, {"shoes": unreachable, "shades": shades})
    results = run_preset("tiny", tmp_path / "out")
    said = {"shoes": "shoes-1.0.whl could not be fetched. Connect to the network."}
    assert results.left_out == said
    assert {row["dataset"] for row in results.rows} == {"shades"}
    assert json.loads((tmp_path / "out" / "results.json").read_text())["settings"]["left_out"] == said
    assert "**shoes**" in (tmp_path / "out" / "results.md").read_text()


def test_a_later_call_fills_in_what_was_left_out(monkeypatch, tiny, tmp_path):
    install(monkeypatch, tiny, {"shoes": unreachable, "shades": shades})
    first = run_preset("tiny", tmp_path / "out")
    install(monkeypatch, tiny, {"shoes": shades, "shades": shades})
    second = run_preset("tiny", tmp_path / "out")
    assert second.left_out == {}
    assert [row for row in second.rows if row["dataset"] == "shades"] == first.rows
    assert len(second.rows) == 4


def test_nothing_fetched_is_an_error(monkeypatch, tiny, tmp_path):
    install(monkeypatch, tiny, {"shoes": unreachable})
    with pytest.raises(AssetError, match=r"No data set of the comparison on .* could be fetched: shoes: shoes-1\.0"):
        run_preset("tiny", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unknown_preset_is_refused(tmp_path):
    with pytest.raises(SPPConfigError, match=r"'table2' in run_preset is unknown\. Accepted: raffm-table1, demo"):
        run_preset("table2", tmp_path)


def test_the_source_experiment_is_its_recipe():
    preset = PRESETS["raffm-table1"]
    assert preset.recipe == Recipe(validation_fraction=0.1, train_fraction=0.2, split_seed=123)
    assert preset.learning_rate == 2e-4
    assert list(preset.datasets) == ["cifar10", "cifar100", "flowers102"]
    assert {"original", "pruning-rank", "spp-raffm"} <= set(preset.methods)


def test_published_results_are_fractions_of_known_methods():
    published = PRESETS["raffm-table1"].published
    assert len(published) == 9
    assert {(row["dataset"], row["method"]) for row in published} == {
        (dataset, method)
        for dataset in PRESETS["raffm-table1"].datasets
        for method in ("original", "pruning-rank", "spp-raffm")
    }
    by_run = {(row["dataset"], row["method"]): (row["accuracy"], row["f1"]) for row in published}
    assert by_run["cifar10", "spp-raffm"] == (0.9678, 0.9653)
    assert by_run["cifar100", "pruning-rank"] == (0.154, 0.1488)
    assert PRESETS["raffm-table1"].source.startswith("Yu, Muñoz and Jannesari")


@pytest.mark.parametrize("name", list(PRESETS))
def test_quick_variants_are_smaller_presets(name):
    preset = PRESETS[name]
    assert len(preset.quick["datasets"]) == 1
    assert set(preset.quick["datasets"]) <= set(preset.datasets)
    assert set(preset.quick["methods"]) < set(preset.methods) <= set(METHODS)


def test_the_demo_is_small():
    recipe = PRESETS["demo"].recipe
    assert (recipe.max_train_samples, recipe.max_eval_samples, recipe.image_size) == (1000, 1000, 56)
    assert list(PRESETS["demo"].datasets) == ["fashion-mnist", "mnist-5k", "digits"]
    assert list(PRESETS["demo-text"].datasets) == ["fortunes"]
