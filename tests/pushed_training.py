"""A training run that pushes: python tests/pushed_training.py FOLDER HUB_STRATEGY

Prints the digest of the orders that the model is in at the end.
"""

import sys
from pathlib import Path

# The client reads whether it is offline when it is imported, and conftest says that it is.
import huggingface_hub.constants  # noqa: F401
from conftest import build_model
from test_callback import trainer_of

from hf_spp import SPPCallback, SPPConfig


def main(folder, strategy):
    callback = SPPCallback(SPPConfig(metric="random"), strategy="steps", every=2)
    trainer = trainer_of(
        Path(folder),
        callback,
        model=build_model("vit"),
        push_to_hub=True,
        hub_model_id="tester/run",
        hub_strategy=strategy,
        hub_always_push=True,
        save_strategy="steps",
        save_steps=3,
        max_steps=9,
        eval_strategy="no",
    )
    trainer.train()
    trainer.evaluate()
    trainer.push_to_hub()
    print(callback.reordering.digest)


if __name__ == "__main__":
    main(*sys.argv[1:])
