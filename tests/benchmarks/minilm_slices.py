"""Sentence embeddings of MiniLM cut to a share of its encoder: how close they stay to the full model's.

    python tests/benchmarks/minilm_slices.py --out DIR [--methods spp spp-plain random] [--seeds 0 1 2]

all-MiniLM-L6-v2 is cut to 75 and 50 % of the parameters below `encoder`, along feed-forward neurons and heads,
and is not trained afterwards. Embeddings are the normalized mean over tokens. The text is Python's documentation:
calibration on 512 paragraphs without labels, drawn by the seed, and evaluation on those paragraphs of other topics that
have two sentences or more. Reported are the mean cosine between the slice's and the full model's embedding of the
paragraphs, and recall@10: of how many first sentences the rest of the same paragraph is among the ten rests of the
highest cosine.

`spp-plain` leaves out compensation; `magnitude` orders by L1 norms, `random` at random, both with equal widths in all
layers and uncompensated. Rows go to `results.json` one by one; a run with the same folder adds what is missing.
"""

import argparse
import json
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from texts import PYTHON, passages
from torch import Tensor
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from hf_spp import SPPConfig, SubnetworkSpec, apply_spp, extract_subnetwork
from hf_spp.assets import minilm

SHARES = (0.75, 0.50)
CALIBRATION, LENGTH = 512, 128
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"*`])")


def sentence_model() -> PreTrainedModel:
    """all-MiniLM-L6-v2 in float32, in evaluation mode."""
    return AutoModel.from_pretrained(minilm(), dtype=torch.float32).eval()


def encoder_parameters(model: PreTrainedModel) -> int:
    """Count the parameters below the encoder."""
    return sum(parameter.numel() for parameter in model.encoder.parameters())


@torch.no_grad()
def embeddings(model: PreTrainedModel, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Normalized mean over tokens, `[texts, hidden]`."""
    found = []
    for start in range(0, len(texts), 32):
        batch = encoded(tokenizer, texts[start : start + 32])
        states, mask = model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
        found.append(functional.normalize((states * mask).sum(1) / mask.sum(1)))
    return torch.cat(found)


def encoded(tokenizer: Any, texts: Sequence[str]) -> Mapping[str, Tensor]:
    return dict(tokenizer(list(texts), padding=True, truncation=True, max_length=LENGTH, return_tensors="pt"))


def cut(method: str, share: float, seed: int, tokenizer: Any) -> PreTrainedModel:
    """The model of a share of the encoder."""
    model = sentence_model()
    texts = passages("calibration")
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))[:CALIBRATION].tolist()
    chosen = [texts[place] for place in order]
    batches = [encoded(tokenizer, chosen[start : start + 16]) for start in range(0, CALIBRATION, 16)]
    metric = {"magnitude": "l1", "random": "random"}.get(method, "taylor")
    config = SPPConfig(axes=("heads", "ffn"), metric=metric, seed=seed)
    apply_spp(model, config, calibration=batches if metric == "taylor" else None)
    spec = SubnetworkSpec.from_budget(model, fraction=share, within="encoder")
    return extract_subnetwork(model, spec, calibration=batches if method == "spp" else None).eval()


METHODS = ("spp", "spp-plain", "magnitude", "random")


def measure(method: str, share: float, seed: int, tokenizer: Any) -> dict[str, Any]:
    """One row; method `none` cuts nothing."""
    full = sentence_model()
    start = time.perf_counter()
    model = full if method == "none" else cut(method, share, seed, tokenizer)
    seconds = time.perf_counter() - start
    pairs = [_SENTENCE_END.split(one, maxsplit=1) for one in passages("test")]
    pairs = [pair for pair in pairs if len(pair) == 2]
    whole = [" ".join(pair) for pair in pairs]
    cosine = (embeddings(model, tokenizer, whole) * embeddings(full, tokenizer, whole)).sum(-1).mean()
    queries, rests = (embeddings(model, tokenizer, texts) for texts in zip(*pairs, strict=True))
    nearest = (queries @ rests.T).topk(10).indices
    found = (nearest == torch.arange(len(pairs)).unsqueeze(1)).any(1).double().mean()
    return {
        "method": method,
        "share": share,
        "seed": seed,
        "encoder_share": round(encoder_parameters(model) / encoder_parameters(full), 4),
        "paragraphs": len(pairs),
        "seconds": round(seconds, 1),
        "cosine": round(float(cosine), 4),
        "recall_at_10": round(float(found), 4),
    }


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Means, lowest and highest values over the seeds."""
    print(f"{'method':<12}{'share':>6}{'seeds':>6}   {'cosine':<24}recall@10")
    for method, share in sorted({(row["method"], row["share"]) for row in rows}, key=lambda key: (-key[1], key[0])):
        chosen = [row for row in rows if (row["method"], row["share"]) == (method, share)]
        cosine, recall = ([row[name] for row in chosen] for name in ("cosine", "recall_at_10"))
        spread = f"{statistics.mean(cosine):.3f} ({min(cosine):.3f}-{max(cosine):.3f})"
        print(
            f"{method:<12}{share:>6.0%}{len(chosen):>6}   {spread:<24}"
            f"{statistics.mean(recall):.1%} ({min(recall):.1%}-{max(recall):.1%})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of results.json")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "results.json"
    stored = json.loads(file.read_text()) if file.is_file() else {"python": PYTHON, "rows": []}
    if stored["python"] != PYTHON:
        parser.error(f"{file} has rows of the text of Python {stored['python']}; this is {PYTHON}")
    rows = stored["rows"]
    for seed in args.seeds:
        for method, share in [("none", 1.0), *((method, share) for method in args.methods for share in SHARES)]:
            if (method, share, seed) not in {(row["method"], row["share"], row["seed"]) for row in rows}:
                rows.append(measure(method, share, seed, tokenizer))
                file.write_text(json.dumps(stored, indent=1) + "\n")
    print_table(rows)


if __name__ == "__main__":
    main()
