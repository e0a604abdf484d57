"""Cost of `SPPCallback` in training: DINOv2-small with a classification head, AdamW, batches of 16.

    python tests/benchmarks/callback_cost.py [--steps 200] [--size 56] [--device cuda]

Prints two figures of runs with the stock Trainer: the share of the wall time that the callback with its default
strategy takes of a whole run, everything in it timed, and the median cost of a reordering of every axis in the middle
of training with the optimizer's state, with and without its proof, against the median training step. Channels are
scored by their L1 norm times noise, so that nearly all move every time. Weights are pretrained, images random.
"""

import argparse
import statistics
import tempfile
import time
from collections import defaultdict

import torch
from transformers import Dinov2ForImageClassification, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

from hf_spp import SPPCallback, SPPConfig
from hf_spp.assets.models import dinov2_small

BATCH = 16
EVENTS = ("on_init_end", "on_train_begin", "on_step_end", "on_train_end")


class TimedCallback(SPPCallback):
    """The callback, with the seconds that each of its calls takes."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seconds = defaultdict(list)
        for event in EVENTS:
            setattr(self, event, self._timed(event, getattr(self, event)))

    def _timed(self, event, method):
        def call(*args, **kwargs):
            synchronize()
            start = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                synchronize()
                self.seconds[event].append(time.perf_counter() - start)

        return call


class StepTimes(TrainerCallback):
    """Seconds from the beginning of each step to its end, before other callbacks see it."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, args, state, control, **kwargs):
        synchronize()
        self._start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        synchronize()
        self.seconds.append(time.perf_counter() - self._start)


def noisy_norm(group, weights):
    norms = torch.stack([weight.abs().flatten(2).sum(-1) for weight in weights]).mean(0)
    return norms * torch.rand(norms.shape, device=norms.device)


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def train(callback, steps, size, device):
    generator = torch.Generator().manual_seed(0)
    examples = [
        {"pixel_values": torch.randn(3, size, size, generator=generator), "labels": i % 10} for i in range(BATCH * 4)
    ]
    model = Dinov2ForImageClassification.from_pretrained(dinov2_small(), num_labels=10)
    # The pages of a mapped file are copied by whoever writes first, without the callback by the first step.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
            use_cpu=device == "cpu",
            dataloader_pin_memory=False,
        )
        trainer = Trainer(model, arguments, train_dataset=examples, callbacks=[times, callback])
        trainer.remove_callback(PrinterCallback)
        start = time.perf_counter()
        trainer.train()
        return time.perf_counter() - start, times.seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--size", type=int, default=56)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    name = torch.cuda.get_device_name() if options.device != "cpu" else f"{torch.get_num_threads()} CPU threads"
    print(f"DINOv2-small, {options.size} x {options.size} pixels, batches of {BATCH}, float32, AdamW, {name}")

    callback = TimedCallback()
    whole, steps = train(callback, options.steps, options.size, options.device)
    spent = sum(sum(seconds) for seconds in callback.seconds.values())
    step = statistics.median(steps)
    share = f"{spent:.3f} s of {whole:.1f} s, {spent / whole:.2%}"
    print(f"default strategy: {share} ({options.steps} steps of {step:.3f} s)")

    axes = ("qk", "vo", "heads", "ffn", "hidden")
    for verify in (True, False):
        config = SPPConfig(axes=axes, metric=noisy_norm, verify=verify)
        callback = TimedCallback(config, strategy="steps", every=2)
        _, steps = train(callback, 24, options.size, options.device)
        # The first one resolves the map and builds the inputs of the proof.
        reorderings = callback.seconds["on_step_end"][1::2][1:]
        step, cost = statistics.median(steps), statistics.median(reorderings)
        proof = "with its proof" if verify else "without the proof"
        print(f"reordering {'+'.join(axes)} {proof}: {cost:.3f} s, {cost / step:.2f} of a step of {step:.3f} s")


if __name__ == "__main__":
    main()
