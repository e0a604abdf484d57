"""A training run that may be killed at any moment: python tests/killed_script.py FOLDER MODEL [CHECKPOINT]

Trains a tiny model (`plain` or `adapted`) with reorderings, writes the number of each step into FOLDER/step as it
begins, and the final weights in their original order into FOLDER/final.safetensors.
"""

import os
import sys
import time
from pathlib import Path

import torch
from conftest import build_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from test_callback import trainer_of
from transformers import TrainerCallback

from hf_spp import SPPCallback, SPPConfig

STEPS, PAUSE = 60, 0.02


class Progress(TrainerCallback):
    def __init__(self, folder):
        self.file = folder / "step"

    def on_step_begin(self, args, state, control, **kwargs):
        self.file.write_text(str(state.global_step))
        time.sleep(PAUSE)


def main(folder, kind, checkpoint=None):
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    model = build_model("vit")
    if kind == "adapted":
        model = get_peft_model(model, LoraConfig(r=3, target_modules=["q_proj", "fc1"], modules_to_save=["classifier"]))
    callback = SPPCallback(SPPConfig(metric="random", seed=2), strategy="steps", every=7)
    changes = {
        "max_steps": STEPS,
        "save_steps": 4,
        "eval_strategy": "no",
        "save_total_limit": 3,
        "full_determinism": True,
    }
    trainer = trainer_of(folder, callback, Progress(folder), model=model, **changes)
    trainer.train(resume_from_checkpoint=checkpoint)
    callback.reordering.undo(model)
    save_file({name: one.contiguous() for name, one in model.state_dict().items()}, folder / "final.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
    sys.stdout.flush()
    os._exit(0)
