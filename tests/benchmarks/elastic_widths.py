"""Four widths of DINOv2-small on Fashion-MNIST: one elastic training against four separate fine-tunings.

    python tests/benchmarks/elastic_widths.py --out DIR [--seeds 0 1 2] [--epochs 3]

Everything begins with the same pretrained model and learns the same 1,000 images of 56 × 56 pixels with batches of 16.
A separate fine-tuning puts the model in order on 512 unlabelled images, cuts its width out, compensated on them, and
trains it alone, for the given epochs and with a learning rate of 5e-5.

The elastic training begins as the first of these does, with the full model. Then that is put in order on the 512
images, and `ElasticTrainer` trains all four widths at once, for three quarters as many steps and with a learning rate
of 2e-5. So both make the same number of passes, of the full model more and of the small ones fewer. The
widths are then evaluated on 2,000 test images, as they are and compensated.

Prints accuracies by width, mean and range over the seeds, the seconds that both take, and the bytes of what is stored.
A run with the same folder adds seeds that are missing.
"""

import argparse
import copy
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from dinov2_slices import accuracy, image_sets, train
from transformers import AutoModelForImageClassification, PrinterCallback, TrainingArguments, set_seed
from transformers.utils import logging

from hf_spp import ElasticTrainer, SPPConfig, SubnetworkSpec, apply_spp, extract_subnetwork
from hf_spp.assets import dinov2_small

WIDTHS = (0.75, 0.5, 0.25)


def pretrained(seed):
    """The pretrained model with a new head."""
    set_seed(seed)
    return AutoModelForImageClassification.from_pretrained(dinov2_small(), num_labels=10).eval()


def put_in_order(model, batches):
    """Reorder a model, in place."""
    apply_spp(model, SPPConfig(axes=("heads", "ffn"), metric="taylor"), calibration=batches)


def train_elastic(model, images, seed, epochs):
    """Train all widths at once, in place."""
    pairs = zip(images["pixel_values"], images["labels"].tolist(), strict=True)
    examples = [{"pixel_values": pixels, "labels": label} for pixels, label in pairs]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=16,
            learning_rate=2e-5,
            num_train_epochs=epochs,
            seed=seed,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        trainer = ElasticTrainer(model, arguments, train_dataset=examples, widths=WIDTHS, sampled=len(WIDTHS))
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return model.eval()


def stored_bytes(model):
    """Bytes of a model's weights."""
    return sum(parameter.nbytes for parameter in model.parameters())


def run(seed, epochs, sets):
    """Rows of one seed."""
    batches = [{"pixel_values": pixels} for pixels in sets["calibration"]["pixel_values"].split(32)]
    start = pretrained(seed)
    put_in_order(start, batches)
    rows, stored, all_seconds, first_seconds = [], 0, 0.0, 0.0
    for width in (1.0, *WIDTHS):
        spec = SubnetworkSpec.uniform(start, width)
        model = extract_subnetwork(start, spec, calibration=batches) if width < 1 else pretrained(seed)
        begun = time.perf_counter()
        train(model, sets["train"], seed, num_train_epochs=epochs)
        all_seconds += time.perf_counter() - begun
        stored += stored_bytes(model)
        rows.append({"seed": seed, "width": width, "method": "separate", "accuracy": accuracy(model, sets["test"])})
        if width == 1:
            elastic, first_seconds = copy.deepcopy(model), all_seconds
    rows.append({"seed": seed, "method": "separate", "seconds": all_seconds, "bytes": stored})
    put_in_order(elastic, batches)
    rows += evaluated(elastic, seed, "fine-tuned, compensated", batches, sets["test"])
    begun = time.perf_counter()
    train_elastic(elastic, sets["train"], seed, epochs * (1 - 1 / (1 + len(WIDTHS))))
    seconds = first_seconds + time.perf_counter() - begun
    rows.append({"seed": seed, "method": "elastic", "seconds": seconds, "bytes": stored_bytes(elastic)})
    rows += evaluated(elastic, seed, "elastic", None, sets["test"])
    rows += evaluated(elastic, seed, "elastic, compensated", batches, sets["test"])
    return rows


def evaluated(model, seed, method, calibration, images):
    """Rows of slices of a model."""
    rows = []
    for width in (1.0, *WIDTHS):
        spec = SubnetworkSpec.uniform(model, width)
        small = extract_subnetwork(model, spec, calibration=calibration).eval()
        rows.append({"seed": seed, "width": width, "method": method, "accuracy": accuracy(small, images)})
    return rows


def print_table(rows):
    """Accuracies by width and method, and what each costs."""
    methods = ("separate", "fine-tuned, compensated", "elastic", "elastic, compensated")
    print(f"{'width':<8}" + "".join(f"{method:<26}" for method in methods))
    for width in (1.0, *WIDTHS):
        cells = []
        for method in methods:
            found = [row["accuracy"] for row in rows if row.get("width") == width and row["method"] == method]
            cells.append(f"{statistics.mean(found):.1%} ({min(found):.1%}-{max(found):.1%})")
        print(f"{width:<8}" + "".join(f"{cell:<26}" for cell in cells))
    for method in ("separate", "elastic"):
        costs = [row for row in rows if row["method"] == method and "seconds" in row]
        seconds = statistics.median(row["seconds"] for row in costs)
        print(f"{method}: {seconds:.0f} s of training, {costs[0]['bytes'] / 1e6:.1f} MB of weights")


def main():
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of results.json")
    parser.add_argument("--cache", type=Path, help="folder that keeps the images")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    sets = image_sets(args.cache)
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "results.json"
    rows = json.loads(file.read_text()) if file.is_file() else []
    for seed in args.seeds:
        if seed not in {row["seed"] for row in rows}:
            rows += run(seed, args.epochs, sets)
            file.write_text(json.dumps(rows, indent=1) + "\n")
    print_table(rows)


if __name__ == "__main__":
    main()
