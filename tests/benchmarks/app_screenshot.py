"""Remake the picture of the page in the README: DINOv2-small, fine-tuned on Fashion-MNIST for a few minutes.

python tests/benchmarks/app_screenshot.py FOLDER [--picture examples/app.png]

The checkpoint and its widths are made once and kept in FOLDER. Needs Chromium and the packages of the extra `test`.
"""

import dataclasses
import itertools
import sys
from pathlib import Path

from transformers import Trainer, TrainingArguments, set_seed

from hf_spp import ElasticTrainer, SPPConfig, apply_spp
from hf_spp.assets import dinov2_small
from hf_spp.comparison.classification import load_classification_data, prepare_task
from hf_spp.comparison.presets import PRESETS
from hf_spp.conversion import write_checkpoint

DATASET = "fashion-mnist"
WIDTHS = "0.25,0.5,0.75"


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


if __name__ == "__main__":
    print(fine_tuned(Path(sys.argv[1]) / "dinov2-fashion-spp"))
