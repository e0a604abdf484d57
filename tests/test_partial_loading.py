"""Slices built from parts of weight files: the same as loading all and cutting, from folders and from a Hub."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import zoo
from conftest import build_inputs, build_model, model_class, outputs_of, relative_difference
from hub_client import scripted
from hub_server import serving
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_subnetwork_loading import OWN, STOCK, data_for, ordered
from torch import nn

import hf_spp.subnetworks.loading
from hf_spp import (
    CheckpointError,
    SPPConfigError,
    SubnetworkError,
    SubnetworkSpec,
    UnsupportedArchitectureError,
    UnsupportedModelError,
    channel_groups,
    extract_subnetwork,
    load_subnetwork,
    plan_read,
    save_width,
    write_prefix_layout,
)
from hf_spp.loading import load_model
from hf_spp.subnetworks.prefix_layout import PREFIX_FOLDER, PREFIX_INDEX
from hf_spp.subnetworks.reading import LocalFile, Place, Weights
from hf_spp.subnetworks.record import record_of
from hf_spp.subnetworks.weight_files import open_folder
from hf_spp.subnetworks.widths import cut_of
from hf_spp.tensor_files import read_header

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

# Fused projections, experts stored one by one or stacked, several towers, tied parts, a bias that two layers share.
STRUCTURES = [
    "phi3",
    "gpt_neox",
    "falcon+new",
    "gemma",
    "mixtral",
    "gpt_oss",
    "deepseek_v3",
    "llava",
    "bart",
    "camembert",
]


def built(model_type: str) -> nn.Module:
    """A tiny model of any type, with a head."""
    heads = [one for one in zoo.model_classes(model_type) if "For" in one.__name__ or "LMHead" in one.__name__]
    return zoo.build(model_type, heads[0]).model.eval()


def bits(model: nn.Module) -> dict[str, tuple]:
    """Every parameter and buffer, those that are not saved too, as what can be compared bit by bit."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {
        name: (one.dtype, one.shape, one.requires_grad, one.detach().contiguous().view(-1).view(torch.uint8).tolist())
        for name, one in named
    }


def attributes(module: nn.Module) -> dict[str, object]:
    """What a module keeps of its sizes and its source."""
    kinds = (int, float, str, tuple)
    return {name: value for name, value in vars(module).items() if isinstance(value, kinds) and name[0] != "_"}


def assert_same(expected, found):
    assert bits(found) == bits(expected)
    assert found.config.to_dict() == expected.config.to_dict()
    assert record_of(found) == record_of(expected)
    if expected.can_generate():
        assert found.generation_config.to_dict() == expected.generation_config.to_dict()
    for (path, one), (other_path, other) in zip(found.named_modules(), expected.named_modules(), strict=True):
        assert (path, type(one), one.training) == (other_path, type(other), other.training)
        assert attributes(one) == attributes(other), path
        assert len(one._forward_hooks) == len(other._forward_hooks)


@pytest.fixture(autouse=True)
def parts_only(monkeypatch):
    """Fail where all weights are loaded after all."""

    def refuse(self, dtype):
        raise AssertionError("all weights are loaded")

    monkeypatch.setattr(hf_spp.subnetworks.loading._Slice, "cut_from_whole", refuse)


@pytest.mark.parametrize(("name", "cut"), [*STOCK, *OWN], ids=str)
def test_parts_make_the_model_that_is_cut_out_of_the_whole(name, cut, tmp_path):
    model, spec = ordered(name, tmp_path), SubnetworkSpec(**cut, multiple_of=1)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    for dtype in ("auto", "bfloat16"):
        whole = type(model).from_pretrained(tmp_path, dtype=dtype)
        assert_same(extract_subnetwork(whole, spec), load_subnetwork(tmp_path, spec, dtype=dtype))


@pytest.mark.parametrize("model_type", STRUCTURES)
def test_parts_of_other_structures(model_type, tmp_path):
    model = built(model_type)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    whole, compared = load_model(tmp_path), 0
    for cut in dict.fromkeys(cut_of(group) for group in channel_groups(model)):
        spec = SubnetworkSpec(**{cut: 0.5}, multiple_of=1)
        with pytest.warns(UserWarning, match="not reordered"):
            expected = extract_subnetwork(whole, spec)
        with pytest.warns(UserWarning, match="not reordered"):
            assert_same(expected, load_subnetwork(tmp_path, spec))
        compared += 1
    assert compared >= 2


@pytest.mark.parametrize(("name", "cut"), [("vit", {"ffn": 0.5, "heads": 2}), ("bert", {"heads": (2, 1), "ffn": 8})])
def test_refitted_projections_are_not_read_twice(name, cut, tmp_path):
    model = ordered(name, tmp_path)
    small = extract_subnetwork(model, SubnetworkSpec(**cut), calibration=data_for(model))
    save_width(tmp_path, "half", small)
    loaded = load_subnetwork(tmp_path, "half")
    assert bits(loaded) == bits(small)
    assert record_of(loaded) == record_of(small)
    refitted = sum(small.state_dict()[name].nbytes for name in record_of(small).compensated)
    plain, published = plan_read(tmp_path, SubnetworkSpec(**cut)), plan_read(tmp_path, "half")
    assert published.slice_bytes == plain.slice_bytes - refitted


def test_a_slice_saves_under_the_names_of_its_files(tmp_path):
    model = ordered("vit", tmp_path / "whole")
    for place, cut in (("stock", {"ffn": 8}), ("own", {"ffn": (8, 16)})):
        load_subnetwork(tmp_path / "whole", SubnetworkSpec(**cut)).save_pretrained(tmp_path / place)
        files = [tmp_path / one / "model.safetensors" for one in ("whole", place)]
        assert load_file(files[0]).keys() == load_file(files[1]).keys()
        again = load_subnetwork(tmp_path / place)
        expected = extract_subnetwork(model, SubnetworkSpec(**cut))
        inputs = build_inputs(model)
        assert relative_difference(outputs_of(expected, inputs), outputs_of(again, inputs)) == 0


def test_buffers_that_follow_from_sizes_stay_those_of_the_whole_model(tmp_path):
    model = built("gemma")
    small = extract_subnetwork(model, SubnetworkSpec(hidden=0.5, multiple_of=1), allow_unordered=True)
    assert "computes" in record_of(small).reason
    small.save_pretrained(tmp_path)
    assert bits(load_subnetwork(tmp_path)) == bits(small)
    assert record_of(extract_subnetwork(model, SubnetworkSpec(ffn=8), allow_unordered=True)).reason is None


def test_the_report_counts_what_is_read(tmp_path, monkeypatch, caplog):
    model = ordered("llama", tmp_path)
    spec, counted = SubnetworkSpec(ffn=8, heads=1), []
    report = plan_read(tmp_path, spec)
    real = LocalFile.read_into

    def read_into(self, start, out):
        counted.append(len(out))
        real(self, start, out)

    monkeypatch.setattr(LocalFile, "read_into", read_into)
    with caplog.at_level("INFO", "hf_spp"):
        small = load_subnetwork(tmp_path, spec)
    weights = {one.data_ptr(): one.nbytes for one in small.state_dict().values()}
    assert report.slice_bytes == sum(weights.values())
    assert report.slice_bytes <= sum(counted) <= report.read_bytes + report.slice_bytes
    assert report.whole_bytes == (tmp_path / "model.safetensors").stat().st_size > report.slice_bytes
    assert (report.fetched_bytes, report.requests) == (0, 0)
    assert str(report) in caplog.text
    assert model.num_parameters() > small.num_parameters()


def test_weights_that_are_missing_or_not_used_are_named(tmp_path, caplog):
    ordered("vit", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    bias = tensors.pop("classifier.bias")
    save_file({**tensors, "odd.weight": bias}, tmp_path / "model.safetensors", {"format": "pt"})
    with caplog.at_level("WARNING", "hf_spp"):
        load_subnetwork(tmp_path, SubnetworkSpec(ffn=8))
    assert "1 weights of" in caplog.text
    assert "left out: odd.weight" in caplog.text
    assert "drawn at random: classifier.bias" in caplog.text


def test_what_cannot_be_read_in_parts_is_cut_out_of_the_whole(tmp_path, monkeypatch, caplog):
    monkeypatch.undo()
    model = ordered("vit", tmp_path)

    def refuse(*_):
        raise UnsupportedModelError("turned inside out")

    monkeypatch.setattr(hf_spp.subnetworks.loading, "stored_names", refuse)
    small = extract_subnetwork(model, SubnetworkSpec(ffn=8), calibration=data_for(model))
    save_width(tmp_path, "half", small)
    with caplog.at_level("WARNING", "hf_spp"):
        assert bits(load_subnetwork(tmp_path, "half")) == bits(small)
        plain = load_subnetwork(tmp_path, SubnetworkSpec(ffn=8))
    assert caplog.text.count("All weights of") == 2
    assert "turned inside out" in caplog.text
    whole = type(model).from_pretrained(tmp_path)
    assert_same(extract_subnetwork(whole, SubnetworkSpec(ffn=8)), plain)
    with pytest.raises(UnsupportedModelError):
        plan_read(tmp_path, 0.5)


def test_damaged_weights_and_wrong_arguments(tmp_path):
    ordered("vit", tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    with pytest.raises(SPPConfigError, match="float31"):
        load_subnetwork(tmp_path, 0.5, dtype="float31")
    with pytest.raises(SubnetworkError, match="Give a width"):
        plan_read(tmp_path, None)
    for broken in (whole[:-4], whole[:100], b"", whole.replace(b'"dtype":"F32"', b'"dtype":"F33"', 1)):
        path.write_bytes(broken)
        with pytest.raises(CheckpointError):
            load_subnetwork(tmp_path, SubnetworkSpec(ffn=8))
    other = {name: one[..., :1].clone() for name, one in load_file_of(whole, tmp_path).items()}
    save_file(other, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match="do not fit"):
        load_subnetwork(tmp_path, SubnetworkSpec(ffn=8))
    path.unlink()
    with pytest.raises(CheckpointError, match=r"has neither model\.safetensors"):
        load_subnetwork(tmp_path, SubnetworkSpec(ffn=8))


def load_file_of(data, folder):
    (folder / "copy.bin").write_bytes(data)
    return load_file(folder / "copy.bin")


# --- the prefix layout -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit", "llama", "gpt2", "t5"])
def test_copies_hold_the_same_values_with_the_channels_first(name, tmp_path):
    ordered(name, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    index = json.loads(write_prefix_layout(tmp_path).read_text())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    (entry,) = index["files"].values()
    stored, copies = (
        load_file(tmp_path / "model.safetensors"),
        load_file(tmp_path / PREFIX_FOLDER / "model.safetensors"),
    )
    assert copies.keys() == entry["dims"].keys()
    assert len(copies) >= 4
    for tensor, copy in copies.items():
        assert torch.equal(copy.movedim(0, entry["dims"][tensor]), stored[tensor])
    assert entry["sha256"] == hashlib.sha256(before["model.safetensors"]).hexdigest()


def test_reading_a_copy_gives_the_same_places(tmp_path):
    ordered("gpt2", tmp_path)
    write_prefix_layout(tmp_path)
    (dims,) = (one["dims"] for one in json.loads((tmp_path / PREFIX_INDEX).read_text())["files"].values())
    stock, path = open_folder(tmp_path), tmp_path / PREFIX_FOLDER / "model.safetensors"
    for name, tensor in read_header(path).tensors.items():
        copy, plain = Place(LocalFile(path), tensor, dims[name]), stock.places[name][0]
        kept = {dim: torch.arange(0, length - 3) for dim, length in enumerate(plain.tensor.shape)}
        assert torch.equal(copy.read(kept), plain.read(kept))
        narrow = {dims[name]: torch.arange(2)}
        both = Weights({name: [plain, copy]}, [], 1)
        assert len(copy.ranges(narrow)) == 1 < len(plain.ranges(narrow))
        assert both.best(name, narrow) is copy


def test_folders_without_weights_to_copy(tmp_path):
    with pytest.raises(CheckpointError):
        write_prefix_layout(tmp_path)
    zoo.build("resnet", zoo.model_classes("resnet")[0]).model.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedArchitectureError):
        write_prefix_layout(tmp_path)


# --- from a Hub ------------------------------------------------------------------------------------------------------

CLIENT = """
import hashlib, json, sys
from huggingface_hub import constants
from hf_spp import SPPError, SubnetworkSpec, load_subnetwork, plan_read
import logging
logging.disable(logging.NOTSET)
from transformers.utils import logging as transformers_logging

class Notes(logging.Handler):
    def emit(self, record):
        notes.append(record.getMessage())
logging.getLogger("hf_spp").addHandler(Notes())

for line in sys.stdin:
    notes, command = [], json.loads(line)
    constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE = command["cache"], command.get("offline", False)
    width = command.get("width", 0.5)
    width = SubnetworkSpec(**width) if isinstance(width, dict) else width
    try:
        options = {"revision": command.get("revision"), "token": command.get("token")}
        result = {}
        if width is not None:
            report = plan_read(command["repo"], width, **options)
            result = {**vars(report)}
        model = load_subnetwork(command["repo"], width, **options)
        state = {name: hashlib.sha256(one.contiguous().view(-1).numpy().tobytes()).hexdigest()
            for name, one in model.state_dict().items()}
        result |= {"state": state, "name": model.name_or_path}
    except SPPError as error:
        result = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps({**result, "notes": notes}), flush=True)
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A server, and a function that lets a client load a slice."""
    with serving(tmp_path_factory.mktemp("hub")) as server, scripted(server, CLIENT, None) as run:
        yield server, run
        assert server.violations == []


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A reordered checkpoint large enough for requests to count: 9 MB in three shards, with a published width."""
    from hf_spp import SPPConfig, apply_spp

    folder = tmp_path_factory.mktemp("files")
    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6, "num_hidden_layers": 2}
    model = build_model("vit", **sizes)
    reordering = apply_spp(model, SPPConfig(metric="random"))
    model.save_pretrained(folder, max_shard_size="6MB")
    reordering.save_pretrained(folder)
    small = extract_subnetwork(model, SubnetworkSpec(ffn=0.5, heads=0.5), calibration=data_for(model))
    save_width(folder, "half", small)
    save_width(folder, "other", extract_subnetwork(model, SubnetworkSpec(ffn=0.25)))
    return folder, model, small


def state_of(model):
    return {
        name: hashlib.sha256(one.contiguous().view(-1).numpy().tobytes()).hexdigest()
        for name, one in model.state_dict().items()
    }


def sent(server):
    """Bytes and number of the ranges that were sent since the last look."""
    spans = [one.range.removeprefix("bytes=").split("-") for one in server.requests if one.range and one.status == 206]
    server.requests.clear()
    return sum(int(stop) - int(start) + 1 for start, stop in spans), len(spans)


def test_a_slice_from_the_hub_takes_its_own_bytes(hub, files, tmp_path):
    (server, run), (folder, model, small) = hub, files
    server.add_repository("user/stock", folder)
    expected = state_of(extract_subnetwork(model, SubnetworkSpec(ffn=0.5, heads=0.5)))
    server.requests.clear()
    found = run(repo="user/stock", cache=tmp_path)
    stock, requests = sent(server)
    assert found["state"] == expected
    assert found["name"] == "user/stock"
    # What plan_read fetched are the headers; they are not fetched again.
    assert stock <= found["read_bytes"]
    assert found["fetched_bytes"] < stock < found["whole_bytes"]
    assert found["requests"] < requests < 40
    # A second load, also without network, takes nothing.
    assert run(repo="user/stock", cache=tmp_path)["state"] == expected
    assert sent(server) == (0, 0)
    offline = run(repo="user/stock", cache=tmp_path, offline=True)
    assert (offline["state"], offline["fetched_bytes"], offline["requests"]) == (expected, 0, 0)
    assert server.requests == []
    # The published width brings its projections, and only its own file comes along.
    published = run(repo="user/stock", cache=tmp_path, width="half")
    assert published["state"] == state_of(small)
    assert [one.path for one in server.requests if "other" in one.path] == []
    unknown = run(repo="user/stock", cache=tmp_path, width="none")
    assert "has no width 'none'. Published: half, other." in unknown["error"]
    assert "Give a width: a fraction, a spec, or one of half, other." in run(
        repo="user/stock", cache=tmp_path, width=None
    )["error"]  # fmt: skip


@pytest.mark.parametrize(
    "width", [0.5, 0.25, 0.75, {"ffn": 328, "heads": 2}, {"ffn": [40, 1536], "heads": [5, 1]}], ids=str
)
def test_with_the_prefix_layout_any_width_takes_its_own_bytes(hub, files, width, tmp_path):
    (server, run), (folder, model, _) = hub, files
    if not server._exists(server._place("model", "user/prefix")):
        copied = tmp_path / "files"
        shutil.copytree(folder, copied)
        write_prefix_layout(copied)
        server.add_repository("user/prefix", copied)
    server.requests.clear()
    found = run(repo="user/prefix", cache=tmp_path / "cache", width=width)
    moved, _ = sent(server)
    spec = SubnetworkSpec(**width) if isinstance(width, dict) else SubnetworkSpec.uniform(model, width)
    small = extract_subnetwork(model, spec)
    assert found["state"] == state_of(small)
    assert found["slice_bytes"] == sum(one.nbytes for one in small.state_dict().values())
    assert found["slice_bytes"] <= moved <= 1.25 * found["slice_bytes"] + 3 * 65536
    assert found["notes"] == []


def test_copies_of_other_weights_are_not_used(hub, files, tmp_path):
    (server, run), (folder, _, _) = hub, files
    copied = tmp_path / "files"
    shutil.copytree(folder, copied)
    write_prefix_layout(copied)
    first = sorted(copied.glob("model*.safetensors"))[0]
    with safe_open(first, "pt") as file:
        tensors = {name: file.get_tensor(name) * 2 for name in file.keys()}  # noqa: SIM118
    save_file(tensors, first, {"format": "pt"})
    last = copied / PREFIX_FOLDER / sorted(copied.glob("model*.safetensors"))[-1].name
    last.write_bytes(last.read_bytes()[:-1] + b"?")
    server.add_repository("user/stale", copied)
    found = run(repo="user/stale", cache=tmp_path / "cache")
    model = type(build_model("vit")).from_pretrained(copied)
    assert found["state"] == state_of(extract_subnetwork(model, SubnetworkSpec(ffn=0.5, heads=0.5)))
    assert any(f"made of another {first.name}, so they are not used" in note for note in found["notes"])
    assert any(f"{last.name} of user/stale is not the file" in note for note in found["notes"])
    index = json.loads((copied / PREFIX_INDEX).read_text())
    odd = {"x": {"sha256": "", "copies": "", "dims": {"a": "b"}}}
    damages = {"format_version": 99}, {"files": {}}, {"files": {"x": 3}}, {"files": odd}
    for number, damage in enumerate(damages):
        (copied / PREFIX_INDEX).write_text(json.dumps({**index, **damage}))
        server.add_repository(f"user/damaged{number}", copied)
        assert run(repo=f"user/damaged{number}", cache=tmp_path / "cache")["error"].startswith("CheckpointError")


def test_saved_slices_revisions_and_tokens(hub, files, tmp_path):
    (server, run), (folder, model, small) = hub, files
    small.save_pretrained(tmp_path / "small")
    server.add_repository("user/small", tmp_path / "small")
    assert run(repo="user/small", cache=tmp_path / "cache", width=None)["state"] == state_of(small)
    assert "sub-network itself" in run(repo="user/small", cache=tmp_path / "cache", width=0.5)["error"]
    server.add_repository("tester/private", folder, private=True)
    refused = run(repo="tester/private", cache=tmp_path / "cache")
    assert refused["error"].startswith("HubError")
    server.requests.clear()
    found = run(repo="tester/private", cache=tmp_path / "cache", token=server.tokens["read"], revision="main")
    assert found["state"] == state_of(extract_subnetwork(model, SubnetworkSpec(ffn=0.5, heads=0.5)))
    assert {one.token for one in server.requests if one.origin == "storage"} == {None}
    assert "no revision 'none'" in run(repo="user/small", cache=tmp_path, width=None, revision="none")["error"]
    assert run(repo="user/nothing", cache=tmp_path)["error"].startswith("HubError")


@pytest.mark.parametrize("kind", ["500", "drop_after", "truncate"])
def test_loading_survives_what_passes(hub, files, kind, tmp_path):
    (server, run), (folder, model, _) = hub, files
    name = f"user/faulty-{kind.replace('_', '-')}"
    server.add_repository(name, folder)
    fault = server.faults.add(kind, method="GET", path="/contents/", nth=2, times=1)
    found = run(repo=name, cache=tmp_path)
    assert fault.struck == 1
    assert found["state"] == state_of(extract_subnetwork(model, SubnetworkSpec(ffn=0.5, heads=0.5)))


def test_a_repository_that_was_downloaded_is_read_from_the_cache(hub, files, tmp_path):
    (server, run), (folder, model, _) = hub, files
    server.add_repository("user/whole", folder)
    script = "import sys\nfrom huggingface_hub import snapshot_download\nsnapshot_download(sys.argv[1])"
    environment = {**server.environment(None), "HF_HUB_CACHE": str(tmp_path)}
    subprocess.run([sys.executable, "-c", script, "user/whole"], env=environment, check=True)
    server.requests.clear()
    found = run(repo="user/whole", cache=tmp_path)
    assert found["state"] == state_of(extract_subnetwork(model, SubnetworkSpec(ffn=0.5, heads=0.5)))
    assert sent(server) == (0, 0)
    assert not (Path(tmp_path) / "models--user--whole" / "spp_ranges").exists()
    assert model_class("vit").__name__ == "ViTForImageClassification"
