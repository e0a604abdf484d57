"""Cost of `reorder_checkpoint` against `cp -r` of the same folder, in one run.

    python tests/benchmarks/stream_cost.py FOLDER [--gigabytes 8] [--repeats 3] [--warm]

Writes a sharded Llama checkpoint of random bfloat16 weights into FOLDER, tensor by tensor, then copies and reorders it
in turn. Prints the median seconds of `cp -r`, of `cp -r` with the copy forced to the disk, which a reordering always
is, and of `reorder_checkpoint` by l1 over every legal axis; their ratios; and the peak of resident memory above the
largest tensor. Before each of them the source leaves the page cache, so that all read from the disk; with `--warm` it
stays as far as memory allows. FOLDER needs room for the checkpoint three times; all of it is removed.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import LlamaConfig

from hf_spp.loading import meta_model
from hf_spp.tensor_bytes import pieces_of, write_tensors
from hf_spp.tensor_files import INDEX_NAME, StoredTensor, pack_header

SHARD = 1 << 30
REORDER = """
import json, resource, sys, time
from hf_spp import SPPConfig
from hf_spp.streaming import reorder_checkpoint

def peak():
    # Not ru_maxrss, which begins with what the parent process held.
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10

idle, start = peak(), time.perf_counter()
reorder_checkpoint(*sys.argv[1:], SPPConfig(metric="l1"))
took, used = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps([took, used.ru_utime + used.ru_stime, idle, peak()]))
"""


def config_of(gigabytes: float) -> LlamaConfig:
    """The shapes of Llama 3 8B, with as many layers as fit."""
    layer, ends = 218_112_000, 2 * 128256 * 4096 + 4096
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=max(1, round((gigabytes * 1e9 / 2 - ends) / layer)),
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )


def write_checkpoint(folder: Path, config: LlamaConfig) -> list[StoredTensor]:
    """Write random weights shard by shard, one tensor in memory at a time."""
    folder.mkdir()
    config.save_pretrained(folder)
    tensors = [
        StoredTensor(name, "BF16", tuple(one.shape), 0, one.numel() * 2)
        for name, one in meta_model(config).state_dict().items()
    ]
    shards: list[list[StoredTensor]] = [[]]
    for one in tensors:
        if shards[-1] and sum(other.nbytes for other in shards[-1]) + one.nbytes > SHARD:
            shards.append([])
        shards[-1].append(one)
    generator = torch.Generator().manual_seed(0)

    def values(shard: list[StoredTensor]) -> Iterator[memoryview]:
        for one in shard:
            yield from pieces_of(torch.empty(one.shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator))

    homes = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_tensors(folder / file, pack_header(shard, {"format": "pt"}), values(shard))
        homes.update({one.name: file for one in shard})
    total = sum(one.nbytes for one in tensors)
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": homes}))
    return tensors


def forget(folder: Path) -> None:
    """Let the files of a folder leave the page cache."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def force(folder: Path) -> None:
    """Wait until the files of a folder are on the disk."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def copied(source: Path, target: Path) -> tuple[float, float]:
    start = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    plain = time.perf_counter() - start
    force(target)
    forced = time.perf_counter() - start
    shutil.rmtree(target)
    return plain, forced


def reordered(source: Path, target: Path) -> tuple[float, float, int, int]:
    found = subprocess.run([sys.executable, "-c", REORDER, source, target], check=True, stdout=subprocess.PIPE)
    shutil.rmtree(target)
    took, busy, idle, peak = json.loads(found.stdout.splitlines()[-1])
    return took, busy, idle, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--warm", action="store_true")
    arguments = parser.parse_args()
    home = arguments.folder / "stream_cost"
    home.mkdir(parents=True)
    try:
        source, target = home / "source", home / "target"
        tensors = write_checkpoint(source, config_of(arguments.gigabytes))
        total, largest = sum(one.nbytes for one in tensors), max(one.nbytes for one in tensors)
        shards = len(list(source.glob("*.safetensors")))
        print(f"{total / 1e9:.2f} GB in {shards} shards, largest tensor {largest / 1e9:.2f} GB", flush=True)
        rows = []
        for _ in range(arguments.repeats):
            runs = []
            for run in (copied, reordered):
                if not arguments.warm:
                    forget(source)
                runs.append(run(source, target))
            rows.append((runs[0][0], runs[0][1], *runs[1]))
            plain, forced, took, busy, idle, peak = rows[-1]
            print(
                f"cp -r {plain:.1f} s, on the disk {forced:.1f} s; reorder {took:.1f} s, {busy:.1f} s of processor; "
                f"resident {peak / 1e9:.2f} GB, {(peak - largest) / 1e9:.2f} above the largest tensor, "
                f"{idle / 1e9:.2f} before the start",
                flush=True,
            )
        for name, place in (("cp -r", 0), ("cp -r on the disk", 1)):
            print(f"median ratio to {name}: {statistics.median(row[2] / row[place] for row in rows):.2f}")
    finally:
        shutil.rmtree(home)


if __name__ == "__main__":
    main()
