"""Remake the picture of the page in the README: DINOv2-small, fine-tuned on Fashion-MNIST for a few minutes and
trained at all widths.

python tests/benchmarks/app_screenshot.py FOLDER [--picture examples/app.png]

The checkpoint and its widths are made once and kept in FOLDER. Prints how long the page takes to answer. Needs Chromium
and the packages of the extra `dev`.
"""

import argparse
import dataclasses
import io
import itertools
import statistics
import subprocess
import sys
import time
from pathlib import Path

# The tests' browser, however this file is reached.
sys.path.insert(0, str(Path(__file__).parents[1]))

from browser import Visit, visited
from PIL import Image
from transformers import Trainer, TrainingArguments, set_seed

from hf_spp import ElasticTrainer, SPPConfig, apply_spp
from hf_spp.assets import dinov2_small
from hf_spp.comparison.classification import load_classification_data, prepare_task
from hf_spp.comparison.presets import PRESETS
from hf_spp.conversion import write_checkpoint

DATASET = "fashion-mnist"
WIDTHS = "0.25,0.5,0.75"
MOVES = 5
EXAMPLE = 2


def fine_tuned(folder: Path) -> Path:
    """A checkpoint that was fine-tuned, put in order by the loss, and trained at all widths."""
    if (folder / "spp_orders.safetensors").is_file():
        return folder
    preset = PRESETS["demo"]
    recipe = dataclasses.replace(preset.recipe, max_train_samples=2400)
    task = prepare_task(load_classification_data(DATASET, preset.datasets[DATASET], recipe), dinov2_small(), recipe)
    set_seed(123)
    model = task.load_model()
    arguments = TrainingArguments(
        str(folder),
        num_train_epochs=1,
        per_device_train_batch_size=16,
        learning_rate=5e-5,
        warmup_steps=10,
        logging_steps=25,
        remove_unused_columns=False,
        save_strategy="no",
        report_to="none",
    )
    options = {"args": arguments, "train_dataset": task.train, "data_collator": task.collate}
    Trainer(model, **options).train()
    batches = itertools.islice(task.calibration_batches(), 32)
    reordering = apply_spp(model, SPPConfig(metric="taylor"), calibration=batches)
    ElasticTrainer(model, **options, widths=list(map(float, WIDTHS.split(",")))).train()
    write_checkpoint(folder, model, reordering, source=dinov2_small(), processing_class=task.processor, fine_tuned=True)
    return folder


def measured(folder: Path) -> Path:
    """The quality of some of its widths, with compensation and random orders beside."""
    results = folder.with_name(f"{folder.name}-widths")
    if not (results / "results.json").is_file():
        words = [
            "curve",
            str(folder),
            "--dataset",
            DATASET,
            "--widths",
            WIDTHS,
            "--latency-runs",
            "0",
            "--out",
            str(results),
        ]
        subprocess.run([sys.executable, "-c", "from hf_spp.cli import main; main()", *words], check=True)
    return results


def seconds_to(visit: Visit, key: str, stays: str) -> tuple[float, float]:
    """Seconds from a press of a key on the slider to the answers of a width, and to its times."""
    start = time.perf_counter()
    visit.page.locator("#width input[type=range]").press(key)
    visit.wait_for("#stays", stays)
    answered = time.perf_counter() - start
    visit.wait_for("#times", "as fast")
    return answered, time.perf_counter() - start


def take_picture(folder: Path, results: Path, picture: Path) -> None:
    """Open the page, measure how long it takes to answer, and save it as seen at half the width."""
    words = (folder.name, "--dataset", DATASET, "--widths", results.name)
    with visited(*words, folder=folder.parent) as visit:
        visit.wait_for("#times", "as fast")
        moves = [("ArrowLeft", "of 6 heads and 688"), ("ArrowRight", "of 6 heads and 768")] * MOVES
        found = [seconds_to(visit, *move) for move in moves]
        for what, taken in zip(("answers", "times"), zip(*found, strict=True), strict=True):
            print(f"slider to {what}: {statistics.median(taken):.2f} s ({min(taken):.2f} to {max(taken):.2f})")
        visit.choose_example(EXAMPLE)
        visit.page.mouse.move(0, 0)
        # What fades in and out needs a moment.
        visit.page.wait_for_timeout(3000)
        visit.wait_for("#times", "as fast")
        taken = Image.open(io.BytesIO(visit.page.screenshot(full_page=True))).convert("RGB")
        print("errors:", visit.errors, "requests elsewhere:", visit.foreign)
    taken.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(picture, optimize=True)
    print(f"{picture}: {taken.width} x {taken.height}, {picture.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--picture", type=Path, default=Path("examples/app.png"))
    given = parser.parse_args()
    kept = fine_tuned(given.folder / "dinov2-fashion-spp")
    take_picture(kept, measured(kept), given.picture)
