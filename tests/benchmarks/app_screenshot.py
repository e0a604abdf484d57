"""Remake the picture of the page in the README: DINOv2-small, fine-tuned on Fashion-MNIST for a few minutes.

python tests/benchmarks/app_screenshot.py FOLDER [--picture examples/app.png]

The checkpoint and its widths are made once and kept in FOLDER. Needs Chromium and the packages of the extra `test`.
"""

import dataclasses
import sys
from pathlib import Path

from transformers import Trainer, TrainingArguments, set_seed

from hf_spp import SPPCallback, SPPConfig
from hf_spp.assets import dinov2_small
from hf_spp.comparison.classification import load_classification_data, prepare_task
from hf_spp.comparison.presets import PRESETS

DATASET = "fashion-mnist"


def fine_tuned(folder: Path) -> Path:
    """A checkpoint that was fine-tuned and put in order by what the loss says of each channel."""
    if (folder / "spp_orders.safetensors").is_file():
        return folder
    preset = PRESETS["demo"]
    recipe = dataclasses.replace(preset.recipe, max_train_samples=2400)
    task = prepare_task(load_classification_data(DATASET, preset.datasets[DATASET], recipe), dinov2_small(), recipe)
    set_seed(123)
    trainer = Trainer(
        task.load_model(),
        TrainingArguments(
            str(folder),
            num_train_epochs=1,
            per_device_train_batch_size=16,
            learning_rate=5e-5,
            logging_steps=25,
            remove_unused_columns=False,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=task.train,
        data_collator=task.collate,
        processing_class=task.processor,
        callbacks=[SPPCallback(SPPConfig(metric="taylor"), strategy="train_end")],
    )
    trainer.train()
    trainer.save_model()
    return folder


if __name__ == "__main__":
    print(fine_tuned(Path(sys.argv[1]) / "fashion-spp"))
