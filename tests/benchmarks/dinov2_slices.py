"""Accuracy of a fine-tuned DINOv2-small cut to a share of its encoder: this package against Torch-Pruning.

    pip install --no-deps torch-pruning==1.6.1
    python tests/benchmarks/dinov2_slices.py --out DIR [--cache DIR] [--methods spp tp-taylor] [--seeds 0 1 2]

DINOv2-small learns Fashion-MNIST from 1,000 images of 56 × 56 pixels, in three epochs with batches of 16 and a learning
rate of 5e-5 that falls to zero. It is then cut to 75, 50 and 35 % of the parameters below `dinov2.encoder`, hidden
neurons and whole attention heads only, and evaluated on 2,000 test images: as cut, and after 60 more steps on the same
1,000 images, once with each of two learning rates. Controls, as cut alone, tell apart what order and compensation do.
The seed draws the classification head and the order of the batches; the images are the same for all.

Every method calibrates on the same 512 images, which are neither trained nor tested on. This package gets them without
labels; Torch-Pruning gets the labels too, and for each of its importances the settings that are best on the test images
(see torch_pruning_baseline.py). Rows go to `results.json` one by one; a run with the same folder adds what is missing.
"""

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from hf_spp.assets import dinov2_small, fashion_mnist
from hf_spp.comparison.images import pixel_transform

SHARES = (0.75, 0.50, 0.35)
RETRAINING_STEPS = 60
RETRAINING_RATES = (5e-5, 2e-5)

Images = Mapping[str, Tensor]


def image_sets(cache: Path | None = None) -> dict[str, Images]:
    """Fixed, disjoint images, as `pixel_values` and `labels`: `train` (1,000), `calibration` (512), `test` (2,000)."""
    stored = cache / "data.pt" if cache else None
    if stored and stored.is_file():
        return torch.load(stored, weights_only=True)
    images = fashion_mnist()
    transform = pixel_transform(AutoImageProcessor.from_pretrained(dinov2_small()), size=56)

    def take(split: str, first: int, last: int) -> Images:
        rows = torch.randperm(len(images[split]), generator=torch.Generator().manual_seed(0))[first:last]
        chosen = images[split].select(rows.tolist())
        return {**transform({"image": chosen["image"][:]}), "labels": torch.tensor(chosen["label"][:])}

    sets = {"train": take("train", 0, 1000), "calibration": take("train", 1000, 1512), "test": take("test", 0, 2000)}
    if stored:
        stored.parent.mkdir(parents=True, exist_ok=True)
        torch.save(sets, stored)
    return sets


def fine_tuned(seed: int, images: Images, cache: Path | None = None) -> PreTrainedModel:
    """DINOv2-small with a classification head, fine-tuned, in evaluation mode."""
    folder = cache / f"seed{seed}" if cache else None
    if folder and folder.is_dir():
        return AutoModelForImageClassification.from_pretrained(folder).eval()
    set_seed(seed)
    model = AutoModelForImageClassification.from_pretrained(dinov2_small(), num_labels=10)
    train(model, images, seed, num_train_epochs=3)
    if folder:
        model.save_pretrained(folder)
    return model


def train(model: PreTrainedModel, images: Images, seed: int, *, learning_rate: float = 5e-5, **length: Any) -> None:
    """Train in place with the stock Trainer, for `num_train_epochs` or `max_steps`; ends in evaluation mode."""
    pairs = zip(images["pixel_values"], images["labels"].tolist(), strict=True)
    examples = [{"pixel_values": pixels, "labels": label} for pixels, label in pairs]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=16,
            learning_rate=learning_rate,
            seed=seed,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
            use_cpu=True,
            dataloader_pin_memory=False,
            **length,
        )
        trainer = Trainer(model, arguments, train_dataset=examples)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.eval()


@torch.no_grad()
def accuracy(model: PreTrainedModel, images: Images) -> float:
    """Share of images whose highest logit is the label's."""
    batches = images["pixel_values"].split(50)
    classes = torch.cat([model(pixel_values=pixels).logits.argmax(-1) for pixels in batches])
    return float((classes == images["labels"]).float().mean())


def encoder_parameters(model: PreTrainedModel) -> int:
    """Count the parameters below the encoder."""
    return sum(parameter.numel() for parameter in model.dinov2.encoder.parameters())


def cut_by_spp(
    *, shuffled: bool = False, compensated: bool = True
) -> Callable[[PreTrainedModel, float, Images], PreTrainedModel]:
    """This package: reorder the model in place and extract the sub-network of a share of its encoder."""

    def cut(model: PreTrainedModel, share: float, calibration: Images) -> PreTrainedModel:
        from hf_spp import SPPConfig, SubnetworkSpec, apply_spp, extract_subnetwork

        batches, axes = [{"pixel_values": pixels} for pixels in calibration["pixel_values"].split(32)], ("heads", "ffn")
        apply_spp(model, SPPConfig(axes=axes, metric="taylor"), calibration=batches)
        spec = SubnetworkSpec.from_budget(model, fraction=share, within="dinov2.encoder")
        if shuffled:
            apply_spp(model, SPPConfig(axes=axes, metric="random"))
        return extract_subnetwork(model, spec, calibration=batches if compensated else None)

    return cut


def cut_by_torch_pruning(importance: str) -> Callable[[PreTrainedModel, float, Images], PreTrainedModel]:
    """The baseline with one of its importances."""

    def cut(model: PreTrainedModel, share: float, calibration: Images) -> PreTrainedModel:
        from torch_pruning_baseline import pruned_by_torch_pruning

        return pruned_by_torch_pruning(model, importance, share, calibration)

    return cut


# Each takes a fine-tuned model that it may change, the share to keep and the calibration images.
METHODS: Mapping[str, Callable[[PreTrainedModel, float, Images], PreTrainedModel]] = {
    "spp": cut_by_spp(),
    "spp-plain": cut_by_spp(compensated=False),
    "random": cut_by_spp(shuffled=True),
    "random-plain": cut_by_spp(shuffled=True, compensated=False),
    "tp-l1": cut_by_torch_pruning("l1"),
    "tp-l2": cut_by_torch_pruning("l2"),
    "tp-taylor": cut_by_torch_pruning("taylor"),
    "tp-hessian": cut_by_torch_pruning("hessian"),
}
# What order and compensation each do by themselves. These are not trained on.
CONTROLS = ("spp-plain", "random", "random-plain")


def measure(method: str, share: float, seed: int, sets: Mapping[str, Images], cache: Path | None) -> dict[str, Any]:
    """One row: fine-tune, cut, evaluate, and but for controls train on and evaluate. Method `none` cuts nothing."""
    model = fine_tuned(seed, sets["train"], cache)
    full = encoder_parameters(model)
    start = time.perf_counter()
    if method != "none":
        model = METHODS[method](model, share, sets["calibration"]).eval()
    seconds = time.perf_counter() - start
    row = {
        "method": method,
        "share": share,
        "seed": seed,
        "encoder_parameters": encoder_parameters(model),
        "encoder_share": round(encoder_parameters(model) / full, 4),
        "seconds": round(seconds, 1),
        "accuracy": accuracy(model, sets["test"]),
    }
    for rate in () if method in CONTROLS else RETRAINING_RATES:
        longer = copy.deepcopy(model)
        train(longer, sets["train"], seed, learning_rate=rate, max_steps=RETRAINING_STEPS)
        row[f"accuracy_retrained_{rate:.0e}"] = accuracy(longer, sets["test"])
    return row


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Mean, lowest and highest accuracy over the seeds, in percent."""
    columns = ["accuracy", *(f"accuracy_retrained_{rate:.0e}" for rate in RETRAINING_RATES)]
    titles = ["as cut", *(f"{RETRAINING_STEPS} steps at {rate:.0e}" for rate in RETRAINING_RATES)]
    print(f"{'method':<12}{'share':>6}{'seeds':>6}   " + "".join(f"{title:<22}" for title in titles))
    for method, share in sorted({(row["method"], row["share"]) for row in rows}, key=lambda key: (-key[1], key[0])):
        chosen = [row for row in rows if (row["method"], row["share"]) == (method, share)]
        cells = [spread([row[column] for row in chosen if column in row]) for column in columns]
        print(f"{method:<12}{share:>6.0%}{len(chosen):>6}   " + "".join(f"{cell:<22}" for cell in cells))


def spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.1%} ({min(values):.1%}-{max(values):.1%})" if values else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of results.json")
    parser.add_argument("--cache", type=Path, help="folder that keeps the images and the fine-tuned models")
    parser.add_argument("--methods", nargs="+", choices=sorted(METHODS), default=sorted(METHODS))
    parser.add_argument("--shares", nargs="+", type=float, default=SHARES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    sets = image_sets(args.cache)
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "results.json"
    rows = json.loads(file.read_text()) if file.is_file() else []
    done = {(row["method"], row["share"], row["seed"]) for row in rows}
    for seed in args.seeds:
        runs = [("none", 1.0), *((method, share) for method in args.methods for share in args.shares)]
        for method, share in runs:
            if (method, share, seed) not in done:
                rows.append(measure(method, share, seed, sets, args.cache))
                file.write_text(json.dumps(rows, indent=1) + "\n")
    print_table(rows)


if __name__ == "__main__":
    main()
