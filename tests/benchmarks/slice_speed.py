"""Speed of a slice with half of the neurons and heads: throughput, extraction, switching of views.

    python tests/benchmarks/slice_speed.py [--repeats 15] [--device cuda]

Prints, as medians of alternating runs: how many times the full model's throughput the slice has at batch 8 and 1, for
images of 56 and 224 pixels and prompts of 128 tokens; how long extraction takes, the first time and later, in copies
of the slice by `copy.deepcopy` and in bare copies of its weights; and how long a view takes to enter and leave, per
layer. Weights are pretrained, inputs random.
"""

import argparse
import copy
import statistics
import time

import torch
from transformers import AutoModelForCausalLM, Dinov2ForImageClassification
from transformers.utils import logging

from hf_spp import SPPConfig, SubnetworkSpec, apply_spp, extract_subnetwork, subnetwork_view
from hf_spp.assets.models import dinov2_small, smollm2


def timed(function, device):
    """Seconds that a call takes."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def medians(functions, repeats, device):
    """Median seconds of several functions, which take turns."""
    for function in functions:
        function()
    times = [[timed(function, device) for function in functions] for _ in range(repeats)]
    return [statistics.median(column) for column in zip(*times, strict=True)]


@torch.no_grad()
def report(name, model, spec, inputs, repeats, device):
    """Print the figures of a model."""
    model = model.to(device).eval()
    apply_spp(model, SPPConfig(axes=("heads", "ffn")))
    small = []
    first = timed(lambda: small.append(extract_subnetwork(model, spec)), device)
    small = small[0]
    share = sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in model.parameters())
    print(f"{name}: {spec.ffn} of the neurons, {spec.heads} of the heads, {share:.1%} of all parameters")
    for label, values in inputs.items():
        values = {key: value.to(device) for key, value in values.items()}
        full, cut = medians([lambda v=values: model(**v), lambda v=values: small(**v)], repeats, device)
        print(f"  {label:<28} {1e3 * full:8.1f} ms, slice {1e3 * cut:8.1f} ms: {full / cut:.2f} times the throughput")
    extract, deep, bare = medians(
        [
            lambda: extract_subnetwork(model, spec),
            lambda: copy.deepcopy(small),
            lambda: [parameter.clone() for parameter in small.parameters()],
        ],
        repeats,
        device,
    )
    print(
        f"  extraction {1e3 * extract:.0f} ms, the first {1e3 * first:.0f} ms: {extract / deep:.2f} deep copies of the "
        f"slice ({1e3 * deep:.0f} ms), "
        f"{extract / bare:.2f} bare copies of its weights ({1e3 * bare:.0f} ms)"
    )

    def switch():
        with subnetwork_view(model, spec):
            pass

    layers = model.config.num_hidden_layers
    (seconds,) = medians([switch], repeats, device)
    print(f"  view entered and left in {1e3 * seconds:.2f} ms, {1e6 * seconds / layers:.0f} µs per layer")


def main():
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.device}")
    images = {
        f"batch {batch}, {size} pixels": {"pixel_values": torch.randn(batch, 3, size, size)}
        for size in (56, 224)
        for batch in (8, 1)
    }
    model = Dinov2ForImageClassification.from_pretrained(dinov2_small(), num_labels=10)
    report("DINOv2-small", model, SubnetworkSpec(ffn=0.5, heads=0.5), images, args.repeats, args.device)
    tokens = {f"batch {batch}, 128 tokens": {"input_ids": torch.randint(0, 40000, (batch, 128))} for batch in (8, 1)}
    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32).model
    report("SmolLM2-135M, layers", model, SubnetworkSpec(ffn=0.5, heads=1), tokens, args.repeats, args.device)


if __name__ == "__main__":
    main()
