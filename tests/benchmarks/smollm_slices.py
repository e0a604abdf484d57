"""Perplexity of SmolLM2-135M cut to a share of its decoder: this package against LLM-Pruner.

    python tests/benchmarks/smollm_slices.py --out DIR [--methods spp spp-plain llm-pruner-taylor] [--seeds 0 1 2]
    python tests/benchmarks/smollm_slices.py --tune

The model is cut to 90, 80 and 70 % of the parameters below `model.layers`, along feed-forward neurons and attention
heads, and is not trained afterwards. Perplexity is of next tokens on 12,288 tokens of topics of Python's documentation,
in blocks of 256. Every method calibrates on the same 128 sequences of 128 tokens from other topics, which the seed
draws. LLM-Pruner (llm_pruner.py) has the settings that `--tune` found best at 80 %, on a third set of topics that also
chose the settings of this package. Rows go to `results.json` one by one; a run with the same folder adds what is
missing.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from llm_pruner import Settings, decoder_parameters, loss_gradients, pruned_by_llm_pruner
from search import best_settings
from texts import PYTHON, drawn, token_blocks
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.utils import logging

from hf_spp.assets import smollm2

SHARES = (0.90, 0.80, 0.70)
TUNED_SHARE = 0.80
SEQUENCES, SEQUENCE_LENGTH = 128, 128
TEST_BLOCKS, TUNING_BLOCKS, BLOCK_LENGTH = 48, 12, 256

Batches = Sequence[Mapping[str, Tensor]]
Cut = Callable[[float], LlamaForCausalLM]

# What the search found.
BEST: Mapping[str, Settings] = {
    "magnitude": Settings(importance="l2", heads="none", first=2, last=4),
    "taylor": Settings(importance="element1", heads="none", first=2, last=0),
}

# What the search tries, in this order; 30 layers stand for the paper's 32.
CHOICES: Mapping[str, Mapping[str, Sequence[Any]]] = {
    name: {
        "importance": importances,
        "heads": ("key-value", "query", "none"),
        "scope": ("layer", "global"),
        "by_size": (False, True),
        "first": (0, 2, 4),
        "last": (0, 1, 2, 4),
    }
    for name, importances in {"magnitude": ("l1", "l2"), "taylor": ("vector", "element1", "element2", "second")}.items()
}


def language_model() -> LlamaForCausalLM:
    """SmolLM2-135M-Instruct in float32, in evaluation mode."""
    return AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32).eval()


def text(split: str, length: int) -> Tensor:
    """Tokens of a split, `[blocks, length]`."""
    return token_blocks(AutoTokenizer.from_pretrained(smollm2()), split, length)


def calibration_batches(seed: int) -> Batches:
    """The sequences of a seed, four in a batch."""
    blocks = text("calibration", SEQUENCE_LENGTH)
    return [{"input_ids": tokens} for tokens in drawn(blocks, SEQUENCES, seed).split(4)]


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, blocks: Tensor) -> float:
    """Perplexity of the next tokens inside each block."""
    total = 0.0
    for tokens in blocks.split(8):
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
        total += functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").item()
    return math.exp(total / blocks[:, 1:].numel())


@lru_cache(1)
def ordered_model(seed: int) -> LlamaForCausalLM:
    """The model, reordered by this package; no labels are used."""
    from hf_spp import SPPConfig, apply_spp

    model = language_model()
    config = SPPConfig(axes=("heads", "ffn"), metric="taylor")
    apply_spp(model, config, calibration=calibration_batches(seed))
    return model


def cutting_by_spp(seed: int, *, compensate: bool) -> Cut:
    """This package."""
    from hf_spp import SubnetworkSpec, extract_subnetwork

    model, batches = ordered_model(seed), calibration_batches(seed)

    def cut(share: float) -> LlamaForCausalLM:
        spec = SubnetworkSpec.from_budget(model, fraction=share, within="model.layers")
        return extract_subnetwork(model, spec, calibration=batches if compensate else None)

    return cut


def cutting_by_llm_pruner(seed: int, settings: Settings) -> Cut:
    """The baseline."""
    model, batches = language_model(), calibration_batches(seed)
    squared = settings.importance in ("element2", "second")
    gradients = None if settings.importance in ("l1", "l2") else loss_gradients(model, batches, squared=squared)
    return lambda share: pruned_by_llm_pruner(model, share, settings, gradients)


# Each takes a seed and returns what cuts to a share.
METHODS: Mapping[str, Callable[[int], Cut]] = {
    "spp": lambda seed: cutting_by_spp(seed, compensate=True),
    "spp-plain": lambda seed: cutting_by_spp(seed, compensate=False),
    "llm-pruner-taylor": lambda seed: cutting_by_llm_pruner(seed, BEST["taylor"]),
    "llm-pruner-magnitude": lambda seed: cutting_by_llm_pruner(seed, BEST["magnitude"]),
}
# These calibrate on nothing, so one seed is all.
UNSEEDED = ("none", "llm-pruner-magnitude")


def tune(name: str, batches: Batches, blocks: Tensor) -> None:
    """Print the negative perplexity of whatever settings are tried, and the best."""
    model = language_model()
    gradients = loss_gradients(model, batches, squared=True) if name == "taylor" else None
    print(name)
    best_settings(
        Settings(importance=CHOICES[name]["importance"][0]),
        CHOICES[name],
        lambda settings: -perplexity(pruned_by_llm_pruner(model, TUNED_SHARE, settings, gradients), blocks),
    )


def measure(method: str, seed: int) -> list[dict[str, Any]]:
    """Rows of a method, one of each share; method `none` cuts nothing."""
    test = text("test", BLOCK_LENGTH)[:TEST_BLOCKS]
    if method == "none":
        return [{"method": method, "share": 1.0, "seed": seed, "perplexity": perplexity(language_model(), test)}]
    cut = METHODS[method](seed)
    full = decoder_parameters(language_model())
    rows = []
    for share in SHARES:
        start = time.perf_counter()
        model = cut(share).eval()
        seconds = time.perf_counter() - start
        rows.append(
            {
                "method": method,
                "share": share,
                "seed": seed,
                "decoder_share": round(decoder_parameters(model) / full, 4),
                "seconds": round(seconds, 1),
                "perplexity": perplexity(model, test),
            }
        )
    return rows


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Mean, lowest and highest perplexity over the seeds."""
    print(f"{'method':<24}{'share':>6}{'seeds':>6}   perplexity")
    for method, share in sorted({(row["method"], row["share"]) for row in rows}, key=lambda key: (-key[1], key[0])):
        values = [row["perplexity"] for row in rows if (row["method"], row["share"]) == (method, share)]
        spread = f"{statistics.mean(values):,.1f} ({min(values):,.1f}-{max(values):,.1f})"
        print(f"{method:<24}{share:>6.0%}{len(values):>6}   {spread}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of results.json")
    parser.add_argument("--tune", nargs="*", choices=sorted(BEST), help="search for the best settings of LLM-Pruner")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    if args.tune is not None:
        for name in args.tune or sorted(BEST):
            tune(name, calibration_batches(0), text("tuning", BLOCK_LENGTH)[:TUNING_BLOCKS])
        return
    if args.out is None:
        parser.error("--out is needed")
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "results.json"
    stored = json.loads(file.read_text()) if file.is_file() else {"python": PYTHON, "rows": []}
    if stored["python"] != PYTHON:
        parser.error(f"{file} has rows of the text of Python {stored['python']}; this is {PYTHON}")
    rows = stored["rows"]
    for seed in args.seeds:
        for method in ("none", *args.methods):
            known = {(row["method"], row["seed"]) for row in rows}
            if (method, seed) not in known and (method not in UNSEEDED or seed == args.seeds[0]):
                rows += measure(method, seed)
                file.write_text(json.dumps(stored, indent=1) + "\n")
    print_table(rows)


if __name__ == "__main__":
    main()
