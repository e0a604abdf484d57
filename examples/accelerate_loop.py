"""Train DINOv2-small on handwritten digits in a loop of one's own with accelerate, reordered in the middle.

Prints the loss before and after the reordering, which training does not notice. On one process or several:

python examples/accelerate_loop.py [FOLDER]
accelerate launch examples/accelerate_loop.py [FOLDER]
"""

import sys

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_spp import SPPConfig, apply_spp
from hf_spp.assets import digits, dinov2_small
from hf_spp.comparison.images import pixel_transform

folder = sys.argv[1] if len(sys.argv) > 1 else "digits-accelerate"
data = digits()["train"].with_transform(pixel_transform(AutoImageProcessor.from_pretrained(dinov2_small()), size=56))
model = AutoModelForImageClassification.from_pretrained(dinov2_small(), num_labels=10)

accelerator = Accelerator()
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, batch_size=16, shuffle=True))
for step, batch in enumerate(loader, 1):
    loss = model(pixel_values=batch["pixel_values"], labels=batch["label"]).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    if step == 10:  # between two steps, where there are no gradients
        plain = accelerator.unwrap_model(model)
        reordering = apply_spp(plain, SPPConfig(metric="l1"))
        reordering.apply_to_optimizer(optimizer, plain)
    accelerator.print(f"step {step}: loss {loss.item():.3f}")
    if step == 20:
        break

if accelerator.is_main_process:
    plain.save_pretrained(folder)
    reordering.save_pretrained(folder)
