"""Calling `hf-spp` in the tests' own process, and what its tests call it on."""

import datasets
import numpy as np
import pytest
from conftest import build_model
from PIL import Image
from transformers import Dinov2Config, Dinov2Model, ViTImageProcessor
from typer.testing import CliRunner

from hf_spp.cli import app
from hf_spp.comparison import presets
from hf_spp.comparison.classification import Recipe
from hf_spp.comparison.presets import Preset

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


def cells_of(text):
    """Cells of the lines of a table."""
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]


@pytest.fixture
def dinov2(tmp_path):
    save("dinov2", tmp_path / "dinov2", num_labels=2, image_size=8)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "dinov2")
    run("reorder", tmp_path / "dinov2", tmp_path / "dinov2-spp")
    return tmp_path / "dinov2-spp"


def shades(count=40, light=200):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["dark", "light"])})
    pictures = [Image.fromarray(np.full((8, 8), light * (index % 2), dtype=np.uint8)) for index in range(count)]
    rows = datasets.Dataset.from_dict({"image": pictures, "label": [i % 2 for i in range(count)]}, features=features)
    return datasets.DatasetDict(train=rows)


def faint_shades():
    return shades(24, 20)


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
        datasets={"shades": shades, "fashion-mnist": faint_shades},
        recipe=Recipe(0.25, 1.0),
        learning_rate=1e-3,
        methods=("original", "pruning-rank", "spp"),
        quick={"datasets": {"shades": shades}},
    )
    monkeypatch.setattr(presets, "PRESETS", {"demo": preset})
    return tmp_path
