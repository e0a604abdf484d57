"""The source's experiment by one command, with a model and data sets that a local Hub holds under the real ids."""

import json
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
from conftest import build_model
from hub_server import serving
from PIL import Image
from transformers import ViTImageProcessor

MODEL = "google/vit-base-patch16-224-in21k"
DATASETS = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100", "flowers102": "nelorth/oxford-flowers"}
PUBLISHED = "import sys; from hf_spp.cli import main; main()"


def add_dataset(server, repo_id, folder, classes):
    """A tiny set of images of one colour a class, as parquet, in the form of the real one."""
    draw = np.random.default_rng(classes)
    labels = np.arange(60) % classes
    shades = np.linspace(0, 255, classes).astype(np.uint8)
    noise = draw.integers(0, 20, (60, 8, 8, 3), dtype=np.uint8)
    images = [Image.fromarray(np.maximum(noise[i], shades[label])) for i, label in enumerate(labels)]
    image, label = ("image", "label") if "flowers" in repo_id else ("img", "label" if classes == 3 else "fine_label")
    features = datasets.Features(
        {image: datasets.Image(), label: datasets.ClassLabel(names=[f"class {number}" for number in range(classes)])}
    )
    for split in ("train", "test"):
        made = datasets.Dataset.from_dict({image: images, label: labels.tolist()}, features=features)
        (folder / "data").mkdir(parents=True, exist_ok=True)
        made.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    server.add_repository(repo_id, folder, kind="dataset")


@pytest.mark.slow
def test_the_papers_table_by_one_command(tmp_path):
    torch.manual_seed(0)
    build_model("vit", image_size=16).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    with serving(tmp_path / "hub", lfs_threshold=2000) as server:
        server.add_repository(MODEL, tmp_path / "vit")
        for number, repo_id in enumerate(DATASETS.values()):
            add_dataset(server, repo_id, tmp_path / f"data{number}", 3 + number)
        command = ["compare", "--preset", "raffm-table1", "--out", str(tmp_path / "out"), "--batch-size", "4"]
        done = subprocess.run(
            [sys.executable, "-c", PUBLISHED, *command],
            env={**server.environment("read"), "HF_DATASETS_CACHE": str(tmp_path / "datasets")},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert server.violations == []
        pushed = subprocess.run(
            [sys.executable, "-c", PUBLISHED, "push", str(tmp_path / "out" / "checkpoint"), "vit-spp"],
            env=server.environment("write"),
            capture_output=True,
            text=True,
        )
        assert "/tester/vit-spp\n" in pushed.stdout, pushed.stderr
        assert "spp_orders.safetensors" in server.files("tester/vit-spp")
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    methods = {"original", "pruning-rank", "spp-raffm", "spp"}
    assert {(row["dataset"], row["method"]) for row in rows} == {(d, m) for d in DATASETS for m in methods}
    of = {(row["dataset"], row["method"]): row["accuracy"] for row in rows}
    # Equal function: the same fine-tuning comes to the same place.
    assert all(of[name, "spp-raffm"] == pytest.approx(of[name, "original"], abs=0.17) for name in DATASETS)
    text = done.stdout
    assert all(name in text for name in DATASETS)
    assert "Pruning-Rank" in text
