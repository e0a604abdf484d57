"""`reorder_checkpoint` writes what `apply_spp` and saving would, bit for bit, and goes on after a kill."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import build_inputs, build_model, legal_axes
from damage import damaged_bytes, damaged_json
from hub_server import serving
from safetensors.torch import load_file, save_file
from test_stored_names import build

from hf_spp import (
    Reordering,
    SPPConfig,
    apply_spp,
    reorder_checkpoint,
    saliency,
    streaming,
    tensor_stream,
    unfinished_work,
)
from hf_spp.conversion import load_original, save_reordered, verify_checkpoint
from hf_spp.errors import (
    CalibrationError,
    CheckpointError,
    IllegalAxisError,
    NonFiniteWeightsError,
    OrdersError,
    SPPConfigError,
    UnsupportedModelError,
)
from hf_spp.sums import check_sums
from hf_spp.tensor_bytes import open_tensors, read_tensor
from hf_spp.tensor_files import INDEX_NAME, read_weights
from hf_spp.unfinished_work import work_folder

SCRIPT = Path(__file__).parent / "streamed_script.py"


def raw(folder):
    """Every stored tensor's bytes as integers, and its type."""
    found = {}
    for file, header in read_weights(folder).headers.items():
        with open_tensors(folder / file) as opened:
            found.update(
                {name: (one.dtype, read_tensor(opened, one, raw=True)) for name, one in header.tensors.items()}
            )
    return found


def same(one, other):
    one, other = raw(one), raw(other)
    return one.keys() == other.keys() and all(
        dtype == other[name][0] and torch.equal(values, other[name][1]) for name, (dtype, values) in one.items()
    )


def in_memory(source, target, config):
    model = load_original(source)
    reordering = apply_spp(model, config)
    save_reordered(model, reordering, source, target)
    return reordering


def unfinished(folder):
    return [path for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("metric", ["l1", "random"])
@pytest.mark.parametrize(
    "name", ["vit", "dinov2-swiglu", "bert", "t5", "llama", "gpt2", "mixtral", "qwen3_moe", "gpt_oss", "clip", "llava"]
)
def test_equal_to_the_path_in_memory(name, metric, tmp_path):
    model = build(name)
    model.save_pretrained(tmp_path / "source", max_shard_size="12KB")
    config = SPPConfig(metric=metric, axes=legal_axes(model), seed=5, verify=False)
    expected = in_memory(tmp_path / "source", tmp_path / "expected", config)
    found = reorder_checkpoint(tmp_path / "source", tmp_path / "found", config)
    assert found.changed
    assert found.digest == expected.digest
    assert all(torch.equal(values, expected.scores[name]) for name, values in found.scores.items())
    assert found.proof is None
    assert "NOT checked" in str(found)
    assert same(tmp_path / "found", tmp_path / "expected")
    source, target = read_weights(tmp_path / "source"), read_weights(tmp_path / "found")
    assert len(source.headers) > 1
    assert {file: list(header.tensors) for file, header in source.headers.items()} == {
        file: list(header.tensors) for file, header in target.headers.items()
    }
    assert [one.metadata for one in source.headers.values()] == [one.metadata for one in target.headers.values()]
    assert check_sums(tmp_path / "found")
    assert unfinished(tmp_path) == []
    if metric == "l1":
        assert verify_checkpoint(tmp_path / "found").equal


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["vit", "llama"])
def test_dtypes(name, dtype, tmp_path):
    build_model(name, dtype=dtype).save_pretrained(tmp_path / "source")
    config = SPPConfig(metric="l2", verify=False)
    expected = in_memory(tmp_path / "source", tmp_path / "expected", config)
    found = reorder_checkpoint(tmp_path / "source", tmp_path / "found", config)
    assert (found.dtype, found.digest) == (expected.dtype, expected.digest)
    assert same(tmp_path / "found", tmp_path / "expected")


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_stacks_that_are_read_entry_by_entry(name, tmp_path, monkeypatch):
    monkeypatch.setattr(saliency, "_LARGE_ENTRY_BYTES", 64)
    model = build(name)
    model.save_pretrained(tmp_path / "source")
    config = SPPConfig(axes=legal_axes(model), verify=False)
    expected = in_memory(tmp_path / "source", tmp_path / "expected", config)
    read = []
    live = tensor_stream.TensorStream.live
    monkeypatch.setattr(tensor_stream.TensorStream, "live", lambda *rest: read.append(live(*rest)) or read[-1])
    found = reorder_checkpoint(tmp_path / "source", tmp_path / "found", config)
    assert max(one.numel() for one in read if one.dim() > 2) <= 40 * 24
    assert all(torch.equal(values, expected.scores[name]) for name, values in found.scores.items())
    assert same(tmp_path / "found", tmp_path / "expected")


@pytest.mark.parametrize("metric", ["l1", "random"])
@pytest.mark.parametrize("name", ["bert", "mixtral"])
def test_source_that_was_reordered_before(name, metric, tmp_path):
    model = build(name)
    model.save_pretrained(tmp_path / "source")
    axes = legal_axes(model)
    reorder_checkpoint(tmp_path / "source", tmp_path / "first", SPPConfig(metric="random", axes=axes, seed=1))
    config = SPPConfig(metric=metric, axes=axes[:2], seed=2, verify=False)
    expected = in_memory(tmp_path / "first", tmp_path / "expected", config)
    found = reorder_checkpoint(tmp_path / "first", tmp_path / "found", config)
    assert found.digest == expected.digest
    assert same(tmp_path / "found", tmp_path / "expected")
    again = reorder_checkpoint(tmp_path / "source", tmp_path / "again", config)
    assert again.digest == found.digest
    assert same(tmp_path / "again", tmp_path / "found")
    reorder_checkpoint(tmp_path / "first", tmp_path / "first", config, overwrite=True)
    assert same(tmp_path / "first", tmp_path / "found")


def test_given_orders(tmp_path):
    model = build_model("vit")
    model.save_pretrained(tmp_path / "source")
    batches = [build_inputs(model, 4)]
    reordering = apply_spp(model, SPPConfig(metric="activation"), calibration=batches)
    save_reordered(model, reordering, tmp_path / "source", tmp_path / "expected")
    found = reorder_checkpoint(tmp_path / "source", tmp_path / "found", reordering=reordering)
    assert (found.digest, found.config.metric, found.proof) == (reordering.digest, "activation", None)
    assert same(tmp_path / "found", tmp_path / "expected")
    reorder_checkpoint(tmp_path / "source", tmp_path / "again", reordering=tmp_path / "expected")
    assert same(tmp_path / "again", tmp_path / "expected")
    stored = Reordering.from_pretrained(tmp_path / "found")
    assert not stored.summary()["verified"]
    assert "This was not verified" in (tmp_path / "found" / "README.md").read_text()


def test_other_files(tmp_path):
    source = tmp_path / "source"
    build_model("bert").save_pretrained(source, max_shard_size="20KB")
    for name in ("tokenizer.json", "1_Pooling/config.json", "notes.txt", "LICENSE"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(f"this is {name}")
    left = ("pytorch_model.bin", "onnx/model.onnx", "trainer_state.json", ".hidden", "checkpoint-5/x.txt", "SHA256SUMS")
    for name in left:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("old")
    save_file({"a": torch.zeros(3)}, source / "adapter_model.safetensors")
    reorder_checkpoint(source, tmp_path / "target")
    files = {path.relative_to(tmp_path / "target").as_posix() for path in (tmp_path / "target").rglob("*")}
    for name in ("tokenizer.json", "1_Pooling/config.json", "notes.txt", "LICENSE", "config.json"):
        assert (tmp_path / "target" / name).read_bytes() == (source / name).read_bytes()
    assert json.loads((source / INDEX_NAME).read_text()) == json.loads((tmp_path / "target" / INDEX_NAME).read_text())
    assert files.isdisjoint({*left, "adapter_model.safetensors"} - {"SHA256SUMS"})
    assert {"README.md", "spp_config.json", "spp_orders.safetensors", "SHA256SUMS"} <= files
    assert check_sums(tmp_path / "target")


def test_weights_that_the_model_does_not_use_stay_behind(tmp_path, caplog):
    model = build_model("llama")
    model.save_pretrained(tmp_path / "source", max_shard_size="20KB")
    index = json.loads((tmp_path / "source" / INDEX_NAME).read_text())
    index["weight_map"]["model.layers.9.odd.weight"] = "odd.safetensors"
    save_file({"model.layers.9.odd.weight": torch.ones(3, 3)}, tmp_path / "source" / "odd.safetensors")
    (tmp_path / "source" / INDEX_NAME).write_text(json.dumps(index))
    expected = in_memory(tmp_path / "source", tmp_path / "expected", SPPConfig(verify=False))
    found = reorder_checkpoint(tmp_path / "source", tmp_path / "found")
    assert found.digest == expected.digest
    assert same(tmp_path / "found", tmp_path / "expected")
    index = json.loads((tmp_path / "found" / INDEX_NAME).read_text())
    assert index["metadata"]["total_size"] == sum(values.nbytes for _, values in raw(tmp_path / "found").values())
    assert not (tmp_path / "found" / "odd.safetensors").exists()


def test_refusals(tmp_path):
    model = build_model("bert")
    model.save_pretrained(tmp_path / "source")
    source, target = tmp_path / "source", tmp_path / "target"
    with pytest.raises(CalibrationError, match="needs the model in memory"):
        reorder_checkpoint(source, target, SPPConfig(metric="taylor"))
    with pytest.raises(CalibrationError, match="needs the model in memory"):
        reorder_checkpoint(source, target, SPPConfig(metric=lambda group, tensors: torch.zeros(1)))
    with pytest.raises(IllegalAxisError):
        reorder_checkpoint(source, target, SPPConfig(axes=("experts",)))
    with pytest.raises(SPPConfigError, match="got a config and a reordering"):
        reorder_checkpoint(source, target, SPPConfig(), reordering=source)
    with pytest.raises(SPPConfigError, match="an SPPConfig is needed"):
        reorder_checkpoint(source, target, "l1")
    with pytest.raises(OrdersError, match="belong to a vit model"):
        reorder_checkpoint(source, target, reordering=apply_spp(build_model("vit")))
    target.mkdir()
    (target / "file").write_text("kept")
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        reorder_checkpoint(source, target)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(UnsupportedModelError, match="holds quantized weights"):
        reorder_checkpoint(source, target, overwrite=True)
    assert (target / "file").read_text() == "kept"
    assert unfinished(tmp_path) == []


@pytest.mark.parametrize("metric", ["l1", "random"])
@pytest.mark.parametrize("where", ["encoder.layer.1.output.dense.weight", "embeddings.position_embeddings.weight"])
def test_weights_that_are_not_finite(where, metric, tmp_path):
    model = build_model("bert")
    model.get_parameter(f"bert.{where}").data[3, 4] = float("inf")
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(NonFiniteWeightsError, match=f"{where} holds NaN or infinity, first at"):
        reorder_checkpoint(tmp_path / "source", tmp_path / "target", SPPConfig(metric=metric))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_missing_weights(tmp_path):
    model = build_model("bert")
    tensors = model.state_dict()
    model.save_pretrained(tmp_path / "source")
    stored = load_file(tmp_path / "source" / "model.safetensors")
    left = next(name for name in stored if name.endswith("layer.0.output.dense.weight"))
    save_file({name: one for name, one in stored.items() if name != left}, tmp_path / "source" / "model.safetensors")
    assert left in tensors
    with pytest.raises(CheckpointError, match=r"do not hold .*output\.dense\.weight"):
        reorder_checkpoint(tmp_path / "source", tmp_path / "target")


def test_progress(tmp_path):
    build_model("llama").save_pretrained(tmp_path / "source")
    seen = []
    reorder_checkpoint(tmp_path / "source", tmp_path / "target", progress=lambda *pair: seen.append(pair))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1]


class Stop(BaseException):
    """As unforeseen as a kill, for a process that a test can look into."""


def stop_after(monkeypatch, count):
    """Let the process die before it writes one more file of weights."""
    write, written = unfinished_work.write_tensors, []

    def limited(path, head, data):
        if len(written) == count:
            raise Stop
        written.append(Path(path).name)
        return write(path, head, data)

    monkeypatch.setattr(unfinished_work, "write_tensors", limited)
    return written


def test_finished_shards_are_not_written_again(tmp_path, monkeypatch):
    source, target = tmp_path / "source", tmp_path / "target"
    build_model("llama").save_pretrained(source, max_shard_size="12KB")
    shards = list(read_weights(source).headers)
    assert len(shards) == 4
    reorder_checkpoint(source, tmp_path / "whole")
    for kept in (2, len(shards)):
        with monkeypatch.context() as patch:
            first = stop_after(patch, 2)
            with pytest.raises(Stop):
                reorder_checkpoint(source, target)
        assert first == shards[:2]
        assert not target.exists()
        built = tmp_path / ".target.spp-stream" / "checkpoint"
        if kept > 2:
            (built / shards[0]).write_bytes((built / shards[0]).read_bytes()[:-1] + b"x")
        with monkeypatch.context() as patch:
            second = stop_after(patch, 99)
            patch.delattr(streaming, "weight_scores")
            reorder_checkpoint(source, target)
        assert second == (shards[2:] if kept == 2 else [shards[0], *shards[2:]])
        assert same(target, tmp_path / "whole")
        assert check_sums(target)
        shutil.rmtree(target)
    assert unfinished(tmp_path) == []


@pytest.mark.parametrize("change", ["config", "source", "orders", "manifest"])
def test_work_on_something_else_is_not_gone_on_with(change, tmp_path, monkeypatch):
    source, target = tmp_path / "source", tmp_path / "target"
    build_model("llama").save_pretrained(source, max_shard_size="12KB")
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stop):
            reorder_checkpoint(source, target, SPPConfig(metric="l2"))
    config, work = SPPConfig(metric="l2"), tmp_path / ".target.spp-stream"
    if change == "config":
        config = SPPConfig(metric="l1")
    elif change == "source":
        build_model("llama", seed=7).save_pretrained(source, max_shard_size="12KB")
    elif change == "orders":
        other = apply_spp(build_model("llama"), SPPConfig(metric="random"))
        other.save_pretrained(work / "checkpoint")
    else:
        (work / "manifest.json").write_text("[]")
    written = stop_after(monkeypatch, 99)
    reorder_checkpoint(source, target, config)
    assert written == list(read_weights(source).headers)
    reorder_checkpoint(source, tmp_path / "whole", config)
    assert same(target, tmp_path / "whole")


def test_damaged_work_is_done_again(tmp_path, monkeypatch):
    """Whatever a crash has made of the unfinished work, the result is the same."""
    source, target = tmp_path / "source", tmp_path / "target"
    build_model("llama").save_pretrained(source, max_shard_size="12KB")
    reorder_checkpoint(source, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stop):
            reorder_checkpoint(source, target)
    work, kept = tmp_path / ".target.spp-stream", tmp_path / "kept"
    shutil.copytree(work, kept)
    names = ["manifest.json"] * 3 + [f"checkpoint/{path.name}" for path in sorted((kept / "checkpoint").iterdir())]
    for seed in range(30):
        draw = random.Random(seed)
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(kept, work)
        name = names[seed % len(names)]
        data = (work / name).read_bytes()
        as_values = name.endswith(".json") and draw.random() < 0.7
        broken = damaged_json(json.loads(data), draw).encode() if as_values else damaged_bytes(data, draw)
        (work / name).write_bytes(broken)
        reorder_checkpoint(source, target)
        assert same(target, tmp_path / "whole")
        assert check_sums(target)
    assert unfinished(tmp_path) == []


def test_two_processes_do_not_write_one_target(tmp_path):
    build_model("llama").save_pretrained(tmp_path / "source")
    with (
        work_folder(tmp_path / "target"),
        pytest.raises(CheckpointError, match="Another process is reordering"),
    ):
        reorder_checkpoint(tmp_path / "source", tmp_path / "target")


def start(*arguments):
    paths = [str(SCRIPT.parent.parent), str(SCRIPT.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, SCRIPT, *map(str, arguments)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path):
    """50 kills: the target is the old or the new checkpoint, whole, and what was finished is kept."""
    source, target, old = tmp_path / "source", tmp_path / "target", tmp_path / "old"
    build_model("llama", num_hidden_layers=6).save_pretrained(source, max_shard_size="12KB")
    reorder_checkpoint(source, tmp_path / "new", SPPConfig(metric="l1"))
    reorder_checkpoint(source, old, SPPConfig(metric="random"))
    draw, kills, resumed, states = random.Random(0), 0, 0, []
    manifest = tmp_path / ".target.spp-stream" / "manifest.json"
    # One process serves all runs: it imports once and forks, and the children are killed.
    with start(source, target) as server:

        def told(line=None):
            if line is not None:
                server.stdin.write(f"{line}\n")
                server.stdin.flush()
            return server.stdout.readline().strip()

        assert told() == "ready"
        began = time.monotonic()
        told("run")
        assert told("wait") == "0"
        length = time.monotonic() - began
        while kills < 50:
            if not target.exists() or same(target, tmp_path / "new"):
                shutil.rmtree(target, ignore_errors=True)
                shutil.copytree(old, target)
            resumed += manifest.is_file() and bool(json.loads(manifest.read_text())["sums"])
            child = int(told("run"))
            time.sleep(draw.random() * length)
            os.kill(child, signal.SIGKILL)
            kills += told("wait") == str(int(signal.SIGKILL))
            check_sums(target)
            states.append(same(target, tmp_path / "new"))
            assert states[-1] or same(target, old)
            whole = tmp_path / "new" if states[-1] else old
            assert Reordering.from_pretrained(target).digest == Reordering.from_pretrained(whole).digest
        told("run")
        assert told("wait") == "0"
    assert same(target, tmp_path / "new")
    assert resumed > 10


@pytest.mark.slow
def test_memory_does_not_grow_with_the_checkpoint(tmp_path):
    peaks = {}
    for layers in (2, 16):
        model = build_model(
            "llama",
            dtype=torch.bfloat16,
            num_hidden_layers=layers,
            hidden_size=1024,
            intermediate_size=8192,
            num_attention_heads=8,
            num_key_value_heads=2,
        )
        model.save_pretrained(tmp_path / "source", max_shard_size="100MB")
        size = sum(path.stat().st_size for path in (tmp_path / "source").glob("*.safetensors"))
        with start(tmp_path / "source", tmp_path / "target", "once") as process:
            found, _ = process.communicate()
        peaks[size] = int(found.splitlines()[-1])
        shutil.rmtree(tmp_path / "source")
        shutil.rmtree(tmp_path / "target")
    (small, low), (large, high) = sorted(peaks.items())
    assert large - small > 500e6
    assert high - low < 0.1 * (large - small)


def test_checkpoint_of_the_hub(tmp_path):
    build_model("bert").save_pretrained(tmp_path / "source", max_shard_size="20KB")
    (tmp_path / "source" / "pytorch_model.bin").write_bytes(b"old")
    script = "import sys; from hf_spp import reorder_checkpoint; reorder_checkpoint('some/bert', sys.argv[1])"
    with serving(tmp_path / "hub") as server:
        server.add_repository("some/bert", tmp_path / "source")
        command = [sys.executable, "-c", script, tmp_path / "target"]
        subprocess.run(command, env=server.environment("read"), check=True)
        assert not any("pytorch_model.bin" in request.path and "resolve" in request.path for request in server.requests)
    reorder_checkpoint(tmp_path / "source", tmp_path / "expected")
    assert same(tmp_path / "target", tmp_path / "expected")
    assert len(read_weights(tmp_path / "target").headers) > 1
