"""Cost of `apply_spp` against a plain copy of every matrix of the model, in one run.

    python tests/benchmarks/apply_cost.py [--models vit-base llama-1b] [--repeats 7]

Prints per model the median seconds of `for p in matrices: p.copy_(p.clone())`, of `apply_spp` with every weight-only
axis with and without its proof, their ratios, and the extra memory at the peak against the largest tensor. Weights are
random, float32; between runs the reordering is undone, untimed.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, ViTConfig, ViTForImageClassification
from transformers.utils import logging

from hf_spp import Reordering, SPPConfig, apply_spp

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "vit-base": lambda: ViTForImageClassification(ViTConfig()),
    "llama-1b": lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32000,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            tie_word_embeddings=True,
        )
    ),
}


def build(name: str) -> PreTrainedModel:
    with torch.device("meta"):
        model = MODELS[name]()
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.05, 0.05, generator=generator)
        for module in model.modules():
            if hasattr(module, "inv_freq"):
                module.inv_freq.copy_(1.0 / 10000 ** (torch.arange(len(module.inv_freq)) / len(module.inv_freq)))
    return model.eval()


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


@torch.no_grad()
def copy_matrices(model: PreTrainedModel) -> None:
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.copy_(parameter.clone())


def peak_beyond(action: Callable[[], object]) -> float:
    """MiB of resident memory at the peak of `action` beyond what was resident before it (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    action()
    return (resident("VmHWM") - before) / 1024


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def measure(name: str, repeats: int) -> None:
    model = build(name)
    done: list[Reordering] = []

    def apply(verify: bool) -> Callable[[], None]:
        return lambda: done.append(apply_spp(model, SPPConfig(metric="l1", verify=verify)))

    times: dict[str, list[float]] = {"copy": [], "apply_spp": [], "without proof": []}
    for _ in range(repeats + 1):
        times["copy"].append(seconds(lambda: copy_matrices(model)))
        for label, verify in (("apply_spp", True), ("without proof", False)):
            times[label].append(seconds(apply(verify)))
            done.pop().undo(model)
    largest = max(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    median = {label: statistics.median(values[1:]) for label, values in times.items()}
    print(f"{name}: {parameters:.0f} M parameters, {torch.get_num_threads()} threads, median of {repeats}")
    print(f"  copy of every matrix    {median['copy']:8.3f} s")
    for label in ("apply_spp", "without proof"):
        ratios = [mine / copy for mine, copy in zip(times[label][1:], times["copy"][1:], strict=True)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"  {label:<22}{median[label]:10.3f} s, {statistics.median(ratios):.2f} times the copy ({spread})")
    print(f"  the largest tensor has {largest:.1f} MiB", flush=True)
    # Every tensor in pages of its own, which go back when it is freed, so that resident memory is what is held.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    subprocess.run([sys.executable, __file__, "--memory", name], env=environment, check=True)


def measure_memory(name: str) -> None:
    model = build(name)
    for label, verify in (("apply_spp", True), ("without proof", False)):
        apply_spp(model, SPPConfig(metric="l1", verify=verify)).undo(model)
        done: list[Reordering] = []
        config = SPPConfig(metric="l1", verify=verify)
        extra = peak_beyond(lambda done=done, config=config: done.append(apply_spp(model, config)))
        done.pop().undo(model)
        print(f"  {label:<22}{extra:8.1f} MiB more at its peak")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=sorted(MODELS, reverse=True))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--memory", choices=sorted(MODELS), help="only measure the memory of one model")
    args = parser.parse_args()
    logging.set_verbosity_error()
    if args.memory:
        return measure_memory(args.memory)
    for name in args.models:
        measure(name, args.repeats)


if __name__ == "__main__":
    main()
