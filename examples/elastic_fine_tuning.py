"""Fine-tune a model so that its sub-networks of every width are good ones.

    python examples/elastic_fine_tuning.py [--max_steps 20] [--output_dir FOLDER]

DINOv2-small learns scikit-learn's digits; neither needs the Hub. First the full model is fine-tuned and put in order
by what its channels are worth, then all widths are trained at once, for twice as many steps. The arguments of
TrainingArguments are arguments here. Prints the accuracy of each width before and after the second training, and how
many parameters the smallest has:

    width     before   after
    full       0.690   0.790
    0.75       0.535   0.785
    0.5        0.120   0.605
    22,064,266 parameters, and 11,431,306 at a width of 0.5
    elastic-spp holds the model, its orders, and the width half for load_subnetwork.
"""

import dataclasses

import torch
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_spp import ElasticTrainer, SPPConfig, apply_spp, extract_subnetwork, save_width
from hf_spp.assets import digits, dinov2_small
from hf_spp.comparison.images import pixel_transform
from hf_spp.comparison.metrics import classification_metrics

parser = HfArgumentParser(TrainingArguments)
parser.set_defaults(
    output_dir="elastic-spp",
    max_steps=20,
    per_device_train_batch_size=16,
    learning_rate=5e-5,
    warmup_steps=10,
    logging_steps=10,
    save_strategy="no",
    report_to="none",
    dataloader_pin_memory=torch.cuda.is_available(),
    remove_unused_columns=False,  # Pixels are made from the images when a batch is read.
)
(args,) = parser.parse_args_into_dataclasses()
set_seed(args.seed)  # The new head is drawn here.
data = digits().with_transform(pixel_transform(AutoImageProcessor.from_pretrained(dinov2_small()), size=56))
model = AutoModelForImageClassification.from_pretrained(dinov2_small(), num_labels=10)

Trainer(model, args, train_dataset=data["train"]).train()
batches = [{"pixel_values": data["train"][start : start + 32]["pixel_values"]} for start in range(0, 256, 32)]
reordering = apply_spp(model, SPPConfig(metric="taylor"), calibration=batches)

trainer = ElasticTrainer(
    model,
    dataclasses.replace(args, max_steps=2 * args.max_steps),
    train_dataset=data["train"],
    eval_dataset=data["test"].select(range(200)),
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

model.save_pretrained(args.output_dir)
reordering.save_pretrained(args.output_dir)
save_width(args.output_dir, "half", small)
print(f"{args.output_dir} holds the model, its orders, and the width half for load_subnetwork.")
