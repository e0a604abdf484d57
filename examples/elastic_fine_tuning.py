"""Fine-tune DINOv2-small on handwritten digits so that its sub-networks of every width are good ones.

python examples/elastic_fine_tuning.py [FOLDER]
"""

import sys

from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer, TrainingArguments, set_seed

from hf_spp import ElasticTrainer, SPPConfig, apply_spp, extract_subnetwork, save_width
from hf_spp.assets import digits, dinov2_small
from hf_spp.comparison.images import pixel_transform
from hf_spp.comparison.metrics import classification_metrics

folder = sys.argv[1] if len(sys.argv) > 1 else "digits-elastic"
data = digits().with_transform(pixel_transform(AutoImageProcessor.from_pretrained(dinov2_small()), size=56))
data = data.rename_column("label", "labels")
set_seed(0)  # The weights of the new head.
model = AutoModelForImageClassification.from_pretrained(dinov2_small(), num_labels=10)


def settings(steps: int) -> TrainingArguments:
    return TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=5e-5,
        warmup_steps=10,
        logging_steps=20,
        save_strategy="no",
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
    )


Trainer(model, settings(40), train_dataset=data["train"]).train()
batches = [{"pixel_values": data["train"][start : start + 32]["pixel_values"]} for start in range(0, 256, 32)]
reordering = apply_spp(model, SPPConfig(metric="taylor"), calibration=batches)

trainer = ElasticTrainer(
    model,
    settings(80),
    train_dataset=data["train"],
    eval_dataset=data["test"].select(range(256)),
    compute_metrics=classification_metrics,
    widths=[0.5, 0.75],
)
before = trainer.evaluate()
trainer.train()
after = trainer.evaluate()

print(f"{'width':<8}{'before':>8}{'after':>8}")
for name in ("full", *reversed(trainer.widths)):
    key = "eval_accuracy" if name == "full" else f"eval_width_{name}_accuracy"
    print(f"{name:<8}{before[key]:>8.3f}{after[key]:>8.3f}")

small = extract_subnetwork(model, trainer.widths["0.5"], calibration=batches)
print(f"{model.num_parameters():,} parameters, and {small.num_parameters():,} at a width of 0.5")

model.save_pretrained(folder)
reordering.save_pretrained(folder)
save_width(folder, "0.5", small)
print(f"{folder} holds the model, its orders, and what load_subnetwork({folder!r}, '0.5') needs.")
