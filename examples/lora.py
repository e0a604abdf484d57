"""Train a LoRA adapter on a reordered base model, and carry it back to the original one.

    python examples/lora.py [--max_steps 20] [--output_dir FOLDER]

all-MiniLM-L6-v2 learns the topics of Debian's fortunes; neither needs the Hub. Prints how far the outputs on the
original base model are from those of the training: nothing with the adapter that was carried over, much with the
adapter as it was trained:

    step 1: loss 1.945
    step 20: loss 1.035
    logits up to 4.3, on the original base model with the adapter
      carried over: largest difference 1.1e-06
      as it was trained: largest difference 3.2e+00

In a Trainer, SPPCallback does this by itself: it saves adapters for the original base model.
"""

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser, set_seed
from transformers.hf_argparser import HfArg

from hf_spp import SPPConfig, apply_spp
from hf_spp.assets import fortunes, minilm


@dataclass
class Options:
    max_steps: int = HfArg(default=20, help="Steps of training.")
    output_dir: str = HfArg(default="lora-spp", help="Folder of what is written.")


# PEFT 0.21 asks transformers 5.23 for an attribute by its old name.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
(options,) = HfArgumentParser(Options).parse_args_into_dataclasses()
folder = Path(options.output_dir)
data, tokenizer = fortunes(), AutoTokenizer.from_pretrained(minilm())
set_seed(0)  # The new head is drawn here.
original = AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=7).eval()


def tokens(rows):
    batch = tokenizer(rows["text"], padding=True, truncation=True, max_length=128, return_tensors="pt")
    return {**batch, "labels": torch.tensor(rows["label"])}


base = copy.deepcopy(original)
reordering = apply_spp(base, SPPConfig(metric="l1"))
lora = LoraConfig("SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "key", "value", "dense"])
model = get_peft_model(base, lora)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
rows = data["train"].shuffle(seed=0).iter(16)
for step in range(1, options.max_steps + 1):
    loss = model(**tokens(next(rows))).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step in (1, options.max_steps):
        print(f"step {step}: loss {loss.item():.3f}")

model.save_pretrained(folder / "reordered")
reordering.remap_adapter(folder / "reordered", "to_original", save_directory=folder / "original")

batch = tokens(data["test"][:32])
with torch.no_grad():
    trained = model.eval()(**batch).logits
    print(f"logits up to {trained.abs().max():.1f}, on the original base model with the adapter")
    for name, kind in (("original", "carried over"), ("reordered", "as it was trained")):
        logits = PeftModel.from_pretrained(copy.deepcopy(original), folder / name).eval()(**batch).logits
        print(f"  {kind}: largest difference {(logits - trained).abs().max():.1e}")
