"""Fine-tune DINOv2-small on handwritten digits with the stock Trainer, reordered when training begins.

python examples/train_with_callback.py [FOLDER]
"""

import sys

from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer, TrainingArguments

from hf_spp import SPPCallback, SPPConfig
from hf_spp.assets import digits, dinov2_small
from hf_spp.comparison.images import pixel_transform
from hf_spp.comparison.metrics import classification_metrics

folder = sys.argv[1] if len(sys.argv) > 1 else "digits-spp"
data = digits().with_transform(pixel_transform(AutoImageProcessor.from_pretrained(dinov2_small()), size=56))
data = data.rename_column("label", "labels")
trainer = Trainer(
    AutoModelForImageClassification.from_pretrained(dinov2_small(), num_labels=10),
    TrainingArguments(
        folder,
        max_steps=20,
        per_device_train_batch_size=16,
        learning_rate=5e-5,
        logging_steps=5,
        remove_unused_columns=False,
        report_to="none",
    ),
    train_dataset=data["train"],
    eval_dataset=data["test"].select(range(64)),
    compute_metrics=classification_metrics,
    callbacks=[SPPCallback(SPPConfig(metric="l1"))],
)
trainer.train()
print(trainer.evaluate())
