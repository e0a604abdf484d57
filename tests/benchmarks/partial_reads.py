"""Bytes that a slice with half of the neurons and heads takes from the Hub, and memory that it takes from disk.

    python tests/benchmarks/partial_reads.py [--models dinov2 smollm2 minilm] [--gigabytes 2] [--folder DIR]

Each real model is reordered and served by the tests' Hub, once as stock files alone and once with the prefix layout.
A fresh client with an empty cache loads the slice, and another one a second time. Printed are the bytes of weight files
that the server sent, in how many requests, and their ratio to the slice's and to the whole weights.

For memory, a random Llama in bfloat16 is written in shards, and a fresh process loads the slice. Printed is the largest
growth of its resident memory after all libraries were imported, beside the bytes of the slice; and the same for loading
all and cutting.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

# The tests' Hub, however this file is reached.
sys.path.insert(0, str(Path(__file__).parents[1]))

from hub_server import serving
from transformers import LlamaConfig, LlamaForCausalLM

from hf_spp import SPPConfig, apply_spp, write_prefix_layout

CLIENT = """
import json, sys, time
from transformers.utils import logging
from hf_spp import load_subnetwork, plan_read
logging.disable_progress_bar()
report = plan_read(sys.argv[1], 0.5)
start = time.perf_counter()
small = load_subnetwork(sys.argv[1], 0.5)
seconds = time.perf_counter() - start
print(json.dumps({**vars(report), "report": str(report), "seconds": seconds}))
"""
MEMORY = """
import json, sys, time
from transformers.models.llama import modeling_llama
from transformers.utils import logging
from hf_spp import SubnetworkSpec, extract_subnetwork, load_subnetwork
from hf_spp.loading import load_model
logging.set_verbosity_error()
logging.disable_progress_bar()

def resident(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

open("/proc/self/clear_refs", "w").write("5")
before, start = resident("VmRSS"), time.perf_counter()
if sys.argv[2] == "parts":
    small = load_subnetwork(sys.argv[1], 0.5)
else:
    model = load_model(sys.argv[1])
    small = extract_subnetwork(model, SubnetworkSpec.uniform(model, 0.5), allow_unordered=True)
seconds, peak = time.perf_counter() - start, resident("VmHWM") - before
tensors = {one.data_ptr(): one.nbytes for one in small.state_dict().values()}
print(json.dumps({"peak": peak, "slice": sum(tensors.values()), "seconds": seconds}))
"""


def real_model(name):
    from transformers import AutoModel, AutoModelForCausalLM, Dinov2ForImageClassification

    from hf_spp.assets import models

    if name == "dinov2":
        return Dinov2ForImageClassification.from_pretrained(models.dinov2_small(), dtype="float32")
    if name == "smollm2":
        return AutoModelForCausalLM.from_pretrained(models.smollm2(), dtype="bfloat16")
    return AutoModel.from_pretrained(models.minilm(), dtype="float32")


def client(server, repo, cache):
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, repo], env=server.environment("read", cache), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def sent(server):
    """Bytes and number of the ranges that the server sent."""
    spans = [one.range.removeprefix("bytes=").split("-") for one in server.requests if one.range and one.status == 206]
    server.requests.clear()
    return sum(int(stop) - int(start) + 1 for start, stop in spans), len(spans)


def from_the_hub(name, folder):
    """Print what half of a real model takes from the Hub."""
    model = real_model(name)
    reordering = apply_spp(model, SPPConfig(axes=("heads", "ffn")))
    model.save_pretrained(folder / "files")
    reordering.save_pretrained(folder / "files")
    stock = (folder / "files" / "model.safetensors").stat().st_size
    with serving(folder / "hub") as server:
        server.add_repository("user/stock", folder / "files")
        write_prefix_layout(folder / "files")
        server.add_repository("user/prefix", folder / "files")
        copies = sum(path.stat().st_size for path in (folder / "files" / "spp_prefix").iterdir())
        print(f"{name}: weights {stock / 1e6:.1f} MB, the prefix layout {copies / 1e6:.1f} MB ({copies / stock:.0%})")
        for layout in ("stock", "prefix"):
            server.requests.clear()
            found = client(server, f"user/{layout}", folder / layout)
            moved, requests = sent(server)
            client(server, f"user/{layout}", folder / layout)
            again = sent(server)[0]
            print(
                f"  {layout:<7} {moved / 1e6:7.1f} MB in {requests:3d} requests: {moved / found['slice_bytes']:.3f} "
                f"times the slice ({found['slice_bytes'] / 1e6:.1f} MB), {moved / stock:.3f} times all weights; "
                f"{found['seconds']:.1f} s; a second time {again} bytes"
            )


def from_disk(gigabytes, folder):
    """Print what half of a large random model takes in memory."""
    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=8192, num_attention_heads=16, num_key_value_heads=8,
        num_hidden_layers=max(1, round((gigabytes * 1e9 - 262e6) / 126e6)), dtype=torch.bfloat16,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(config)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.uniform_(-0.02, 0.02)
    model.save_pretrained(folder / "llama", max_shard_size="500MB")
    whole = sum(path.stat().st_size for path in (folder / "llama").glob("*.safetensors"))
    del model, parameter
    gc.collect()
    for way in ("parts", "whole"):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", MEMORY, folder / "llama", way], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout.splitlines()[-1])
        print(
            f"  {way:<6} peak {found['peak'] / 1e6:7.1f} MB for a slice of {found['slice'] / 1e6:.1f} MB out of "
            f"{whole / 1e6:.1f} MB: {found['peak'] / found['slice']:.3f} times; {found['seconds']:.1f} s"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["dinov2", "smollm2", "minilm"])
    parser.add_argument("--gigabytes", type=float, default=2)
    parser.add_argument("--folder", help="where files go while it runs")
    arguments = parser.parse_args()
    for name in arguments.models:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            from_the_hub(name, Path(folder))
    if arguments.gigabytes:
        print("random Llama, bfloat16, from disk:")
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            from_disk(arguments.gigabytes, Path(folder))


if __name__ == "__main__":
    main()
