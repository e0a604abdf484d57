"""Train in a loop of one's own with accelerate, and reorder the model in the middle of it.

    python examples/accelerate_loop.py [--max_steps 20] [--output_dir FOLDER]
    accelerate launch examples/accelerate_loop.py

DINOv2-small learns scikit-learn's digits; neither needs the Hub. The optimizer's state moves with the weights, so
training does not notice. Prints the mean loss of every five steps, and half-way how little the reordering changed the
outputs:

    step 5: loss 2.670
    step 10: loss 2.387
    reordered: outputs moved by 1e-06 of their scale
    step 15: loss 2.151
    step 20: loss 2.136
    accelerate-spp holds a stock checkpoint and its orders.
"""

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, AutoModelForImageClassification, HfArgumentParser, set_seed
from transformers.hf_argparser import HfArg

from hf_spp import SPPConfig, apply_spp
from hf_spp.assets import digits, dinov2_small
from hf_spp.comparison.images import pixel_transform


@dataclass
class Options:
    max_steps: int = HfArg(default=20, help="Steps of training.")
    output_dir: str = HfArg(default="accelerate-spp", help="Folder of what is written.")


(options,) = HfArgumentParser(Options).parse_args_into_dataclasses()
set_seed(0)
data = digits()["train"].with_transform(pixel_transform(AutoImageProcessor.from_pretrained(dinov2_small()), size=56))
model = AutoModelForImageClassification.from_pretrained(dinov2_small(), num_labels=10)
model.dinov2.embeddings.mask_token.requires_grad_(False)  # Pre-training alone uses it, and DDP waits for gradients.

accelerator = Accelerator()
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
loader = DataLoader(data, batch_size=16, shuffle=True)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
plain, losses = accelerator.unwrap_model(model), []
for step, batch in zip(range(1, options.max_steps + 1), loader, strict=False):
    loss = model(pixel_values=batch["pixel_values"], labels=batch["label"]).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
    if step % 5 == 0:
        accelerator.print(f"step {step}: loss {sum(losses[-5:]) / 5:.3f}")
    if step == options.max_steps // 2:  # Between two steps, where there are no gradients.
        reordering = apply_spp(plain, SPPConfig(metric="l1"))
        reordering.apply_to_optimizer(optimizer, plain)
        accelerator.print(f"reordered: outputs moved by {reordering.relative_diff:.0e} of their scale")

if accelerator.is_main_process:
    plain.save_pretrained(options.output_dir)
    reordering.save_pretrained(options.output_dir)
    print(f"{options.output_dir} holds a stock checkpoint and its orders.")
