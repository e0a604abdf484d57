"""Damaged files: every reader gives a result or an `SPPError`, soon, in little memory, and writes nowhere else."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import build_inputs, build_model
from damage import damaged_bytes, damaged_json, damaged_tensors, joined_tensors, places_in, replaced, split_tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model_card import SUMMARY, full_row
from test_width_plots import rows as width_rows

from hf_spp import (
    Reordering,
    SPPConfig,
    SPPError,
    SubnetworkSpec,
    apply_spp,
    checkpoint,
    extract_subnetwork,
    load_subnetwork,
    save_width,
    write_prefix_layout,
)
from hf_spp.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, write_adapter
from hf_spp.cards.model_card import CardContent, license_of, render_card, update_card_with_evaluation
from hf_spp.cards.published_card import published_card
from hf_spp.cards.reports import write_card
from hf_spp.cards.results import RESULTS_NAME, ResultsFile, load_results
from hf_spp.cards.width_results import WidthReport
from hf_spp.cards.width_section import update_card_with_widths, width_section
from hf_spp.errors import CheckpointError
from hf_spp.loading import load_model
from hf_spp.orders_file import ORDERS_NAME, _seal
from hf_spp.stored_state import STATE_NAME, pack_text, read_state
from hf_spp.subnetworks.prefix_layout import PREFIX_FOLDER, PREFIX_INDEX, usable_copies
from hf_spp.subnetworks.record import RECORD_NAME, SubnetworkRecord
from hf_spp.sums import SUMS_NAME, check_sums, write_sums
from hf_spp.tensor_files import INDEX_NAME, read_header, read_weights

SECONDS = 10
SHARD = "model-00001-of-00005.safetensors"
COPIES = f"{PREFIX_FOLDER}/model-00002-of-00005.safetensors"
WIDTH = "spp_widths/half.safetensors"
CARD = """---
license: apache-2.0
language: en
tags: &tags
- one
- "two: three"
other: {a: [1, 2.5, no], b: *tags, date: 2024-01-01}
model-index:
- name: theirs
  results:
  - task: {type: image-classification}
    dataset: {name: Theirs, type: theirs}
    metrics:
    - {type: accuracy, value: 0.5}
---
# A card

Text.

<!-- hf_spp:start -->
old
<!-- hf_spp:end -->
"""


@dataclass(frozen=True)
class Files:
    """Folders of whole files, the model that they belong to, and the SHA-256 sums of its weights."""

    model: object
    folder: Path
    small: Path
    sums: dict[str, str]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A reordered checkpoint with everything that this package writes or reads beside it, and a saved sub-network."""
    root = tmp_path_factory.mktemp("whole")
    folder, small = root / "folder", root / "small"
    model = build_model("vit")
    reordering = apply_spp(model, SPPConfig(metric="random"))
    model.save_pretrained(folder, max_shard_size="8KB")
    reordering.save_pretrained(folder)
    spec = SubnetworkSpec(ffn=0.5, multiple_of=1)
    spec.save(folder / "spec.json")
    batches = [build_inputs(model, 8, labels=False)]
    save_width(folder, "half", extract_subnetwork(model, spec, calibration=batches))
    extract_subnetwork(model, SubnetworkSpec(ffn=(8, 16), vo=4, multiple_of=1)).save_pretrained(small)
    rows = [full_row("cifar-10", "original", 0.9, 0.8), full_row("cifar-10", "spp", 0.5, 0.25)]
    shared = {"model": "a/b", "seed": 1, "recipe": {"image_size": None}, "config": None, "training_arguments": {"a": 1}}
    described = {"datasets": {"cifar-10": {"kind": "image"}}, "left_out": {"x": "no network"}}
    results = ResultsFile.open(folder, {**shared, **described})
    for one in rows:
        results.add_row({**one, "fingerprint": "f"})
    shared = {"dataset": "a", "samples": 10, "ordered": True, "dtype": "float32", "versions": {"torch": "2"}}
    WidthReport(width_rows(), {**shared, "calibration_samples": 3, "random_seeds": [0]}).save(folder / "report")
    (folder / "README.md").write_text(CARD)
    stored = {"step": 1, "evaluations": 0, "adapters": "original", "beside": [], "fingerprint": None}
    stored["orders"] = pack_text(reordering.to_bytes())
    attributes = {"given_before": {}, "stored": stored}
    state = {"global_step": 1, "stateful_callbacks": {"SPPCallback": {"args": {}, "attributes": attributes}}}
    (folder / STATE_NAME).write_text(json.dumps(state))
    write_adapter(folder / "adapter", adapter_of(model), {"format": "pt"}, {"peft_type": "LORA", "r": 2})
    write_prefix_layout(folder)
    write_sums(folder)
    sums = {name: checkpoint.sha256_of(folder / name) for name in read_weights(folder).headers}
    return Files(model, folder, small, sums)


def adapter_of(model):
    """Tensors as PEFT saves a LoRA."""
    tensors = {}
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "fc1")):
            tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(2, module.in_features)
            tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(module.out_features, 2)
    return tensors


# --- readers ----------------------------------------------------------------------------------------------------------


def read_orders(files, folder):
    reordering = Reordering.from_pretrained(folder)
    _use(files, reordering)


def _use(files, reordering):
    assert str(reordering)
    assert Reordering.from_bytes(reordering.to_bytes()).digest == reordering.digest
    render_card(CardContent("name", reordering.summary()))
    reordering.indices(files.model)


def read_results(files, folder):
    results = load_results(folder)
    results.to_markdown()
    write_card(folder, overwrite=True)


def read_report(files, folder):
    report = WidthReport.load(folder / "report")
    report.to_markdown()
    update_card_with_widths(CARD, width_section(report.rows, report.settings, {"a": "b.png"}))


def read_card(files, folder):
    text = checkpoint.read_text(folder / "README.md")
    license_of(text)
    rows = [full_row("cifar-10", "spp", 0.5, 0.25)]
    updated = update_card_with_evaluation(text, rows, task="image-classification", model_name="x")
    assert update_card_with_evaluation(updated, rows, task="image-classification", model_name="x") == updated
    own = str(render_card(CardContent("x", SUMMARY, rows=rows, pipeline_tag="image-classification")))
    both = published_card(own, text, repo_id="a/b")
    assert published_card(own, both, repo_id="a/b") == both


def read_record(files, folder):
    SubnetworkRecord.from_dict(checkpoint.read_json(folder / RECORD_NAME), RECORD_NAME).to_dict()


def read_spec(files, folder):
    SubnetworkSpec.load(folder / "spec.json").widths(files.model)


def read_adapter(files, folder):
    Reordering.from_pretrained(folder).remap_adapter(folder / "adapter", save_directory=folder / "remapped")


def read_prefix_index(files, folder):
    remote = {name: SimpleNamespace(sha256=one) for name, one in files.sums.items()}
    for path, copies in usable_copies(folder, remote).items():
        tensors = read_header(files.folder / copies.source).tensors
        for name, copy in read_header(folder / path).tensors.items():
            copies.check(name, copy, tensors.get(name))


def read_stored_state(files, folder):
    stored = read_state(folder)
    if stored is not None and stored.reordering is not None:
        _use(files, stored.reordering)


# What is damaged, and what reads it.
READERS = {
    ORDERS_NAME: read_orders,
    "spp_config.json": read_orders,
    "spec.json": read_spec,
    RECORD_NAME: read_record,
    SUMS_NAME: lambda files, folder: check_sums(folder),
    RESULTS_NAME: read_results,
    f"report/{RESULTS_NAME}": read_report,
    "README.md": read_card,
    STATE_NAME: read_stored_state,
    f"adapter/{ADAPTER_WEIGHTS}": read_adapter,
    f"adapter/{ADAPTER_CONFIG}": read_adapter,
    INDEX_NAME: lambda files, folder: read_weights(folder),
    SHARD: lambda files, folder: read_weights(folder),
    PREFIX_INDEX: read_prefix_index,
    COPIES: read_prefix_index,
}
# These build models, which takes longer.
LOADERS = {
    "config.json": lambda files, folder: load_model(folder),
    INDEX_NAME: lambda files, folder: load_model(folder),
    SHARD: lambda files, folder: load_model(folder),
    WIDTH: lambda files, folder: load_subnetwork(folder, "half"),
    RECORD_NAME: lambda files, folder: load_subnetwork(folder),
}


def damaged(name, data, rng):
    if name.endswith(".safetensors"):
        return damaged_tensors(data, rng)
    if name.endswith(".json") and rng.random() < 0.7:
        return damaged_json(json.loads(data), rng).encode("utf-8", "surrogatepass")
    return damaged_bytes(data, rng)


def resealed(name, data, rng):
    """Orders or a width whose metadata say something else, under a checksum that fits."""
    header, rest = split_tensors(data)
    metadata = dict(header["__metadata__"])
    key = rng.choice([one for one in metadata if one not in ("format", "format_version", "sha256")])
    metadata[key] = damaged_json(json.loads(metadata[key]), rng)
    if "sha256" in metadata:
        tensors, _ = checkpoint.unpack_tensors(data, ORDERS_NAME)
        metadata["sha256"] = _seal(tensors, metadata)
    return joined_tensors(json.dumps({**header, "__metadata__": metadata}), rest)


# --- watching ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def time_limit(what):
    def ring(*_):
        raise BaseException(f"{what} took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome_of(read, files, folder, what):
    """`refused` or `read`; anything else than an `SPPError` fails, with its case."""
    said = None
    try:
        with time_limit(what), warnings.catch_warnings():
            # Models of odd configs warn as they are built.
            warnings.simplefilter("ignore")
            read(files, folder)
    except SPPError as error:
        said = str(error)
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}, which is no SPPError, for {what}") from error
    if said is None:
        return "read"
    assert said.strip(), what
    said.encode()
    return "refused"


@contextlib.contextmanager
def copy_beside_traps(source, root):
    """A copy to damage, in a place where a file written elsewhere shows."""
    home = root / "home"
    (home / "cwd").mkdir(parents=True)
    (home / "outside").write_text("untouched")
    target = home / "target"
    shutil.copytree(source, target)
    before = Path.cwd()
    os.chdir(home / "cwd")
    try:
        yield target
    finally:
        os.chdir(before)
        found = {path.relative_to(home).as_posix() for path in home.rglob("*") if target not in (path, *path.parents)}
        untouched = (home / "outside").read_text() == "untouched"
        shutil.rmtree(home)
    assert found == {"cwd", "outside"}
    assert untouched


def attack(name, read, files, root, seeds, damage=damaged):
    """How many of the damaged versions of a file are refused and how many read, each without harm."""
    outcomes = Counter()
    source = home_of(name, files)
    data = (source / name).read_bytes()
    with copy_beside_traps(source, root) as folder:
        card = (folder / "README.md").read_bytes() if (folder / "README.md").exists() else None
        for seed in seeds:
            changed = damage(name, data, random.Random(f"{name} {seed}"))
            if changed == data:
                continue
            (folder / name).write_bytes(changed)
            if name != "README.md" and card is not None:
                (folder / "README.md").write_bytes(card)
            outcomes[outcome_of(read, files, folder, f"{name}, seed {seed}: {changed[:2000]!r}")] += 1
    return outcomes


def home_of(name, files):
    return files.small if name == RECORD_NAME else files.folder


def show(table):
    total = sum(table.values(), Counter())
    for name, one in {**table, "malformed inputs": total}.items():
        print(f"{name:<45}{one['refused']:>6} refused{one['read']:>6} read")
    return total["refused"]


@pytest.mark.parametrize("name", READERS)
def test_whole_files_are_read(name, whole, tmp_path):
    with copy_beside_traps(home_of(name, whole), tmp_path) as folder:
        READERS[name](whole, folder)


@pytest.mark.parametrize("name", LOADERS)
def test_whole_models_are_loaded(name, whole):
    LOADERS[name](whole, home_of(name, whole))


def test_two_thousand_malformed_files_are_refused(whole, tmp_path, capsys):
    table = {name: attack(name, read, whole, tmp_path, range(220)) for name, read in READERS.items()}
    table["orders under a fitting checksum"] = attack(ORDERS_NAME, read_orders, whole, tmp_path, range(220), resealed)
    with capsys.disabled():
        print()
        refused = show(table)
    assert refused >= 2000
    assert all(one["refused"] > 60 for one in table.values())


def test_malformed_models_are_refused(whole, tmp_path, capsys):
    table = {name: attack(name, read, whole, tmp_path, range(40)) for name, read in LOADERS.items()}
    table["width under a fitting record"] = attack(WIDTH, LOADERS[WIDTH], whole, tmp_path, range(40), resealed)
    with capsys.disabled():
        print()
        assert show(table) > 100


@pytest.mark.slow
def test_many_more_malformed_files_are_refused(whole, tmp_path, capsys):
    table = {name: attack(name, read, whole, tmp_path, range(220, 2000)) for name, read in READERS.items()}
    table["sealed"] = attack(ORDERS_NAME, read_orders, whole, tmp_path, range(220, 2000), resealed)
    models = {name: attack(name, read, whole, tmp_path, range(40, 400)) for name, read in LOADERS.items()}
    models["recorded"] = attack(WIDTH, LOADERS[WIDTH], whole, tmp_path, range(40, 400), resealed)
    with capsys.disabled():
        print()
        assert show({**table, **{f"loaded by {name}": one for name, one in models.items()}}) > 15_000


# --- values of any kind at any place ----------------------------------------------------------------------------------

leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["ffn", "spp"])
json_values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize("name", [name for name in READERS if name.endswith(".json") and "adapter" not in name])
def test_any_value_at_any_place_is_read_or_refused(name, whole, tmp_path):
    value = json.loads((home_of(name, whole) / name).read_bytes())
    places = sorted(places_in(value), key=len)
    outcomes = Counter()

    @settings(max_examples=60)
    @given(st.sampled_from(places), json_values)
    def change(path, other):
        text = replaced(value, path, json.dumps(other))
        (folder / name).write_text(text, "utf-8", "surrogatepass")
        outcomes[outcome_of(READERS[name], whole, folder, text[:2000])] += 1

    with copy_beside_traps(home_of(name, whole), tmp_path) as folder:
        change()
    assert outcomes["refused"] > 5


# --- single traps -----------------------------------------------------------------------------------------------------


def test_links_out_of_the_folder_are_not_followed(whole, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(whole.folder, folder)
    before = (folder / SUMS_NAME).read_text()
    (folder / SHARD).rename(tmp_path / "elsewhere")
    (folder / SHARD).symlink_to(tmp_path / "elsewhere")
    for read in (check_sums, write_sums, read_weights):
        with pytest.raises(CheckpointError, match="outside of the folder"):
            read(folder)
    assert (folder / SUMS_NAME).read_text() == before


def test_links_of_the_cache_are_followed(whole, tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / ("0" * 40)
    shutil.copytree(whole.folder, snapshot)
    repository = snapshot.parent.parent
    (repository / "blobs").mkdir()
    (repository.parent / "blobs").mkdir()
    for name, blob in ((SHARD, repository / "blobs" / "x"), (INDEX_NAME, repository.parent / "blobs" / "y")):
        (snapshot / name).rename(blob)
        (snapshot / name).symlink_to(blob)
    assert {SHARD, INDEX_NAME} <= set(check_sums(snapshot))
    assert SHARD in read_weights(snapshot).headers


HUGE = """
import json, resource, sys
from pathlib import Path
from damage import damaged_bytes, damaged_json, damaged_tensors, joined_tensors, places_in, replaced, split_tensors
from hf_spp import SPPError, checkpoint
from hf_spp.loading import load_model
from hf_spp.reordering import Reordering
from hf_spp.tensor_files import read_weights

folder = Path(sys.argv[1])
config = json.loads((folder / "config.json").read_text())
load_model(folder)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
refused = 0


def refuse(read, *given):
    global refused
    try:
        read(*given)
    except SPPError:
        refused += 1


for name in ("num_hidden_layers", "hidden_size", "intermediate_size", "num_channels", "image_size", "num_labels"):
    for value in (2**20, 2**27, 2**33, 2**40, 2**60):
        (folder / "config.json").write_text(json.dumps({**config, name: value}))
        refuse(load_model, folder)
(folder / "config.json").write_text(json.dumps(config))
for shape in ([2**60], [2**31, 2**31], [2**40, 0], [2**62, 2**62, 0], [1] * 1000):
    for end in (0, 16, 2**60):
        header = json.dumps({"orders.a": {"dtype": "I32", "shape": shape, "data_offsets": [0, end]}})
        data = joined_tensors(header, bytes(16))
        (folder / "model.safetensors").write_bytes(data)
        refuse(Reordering.from_bytes, data)
        refuse(checkpoint.unpack_tensors, data, "x")
        refuse(read_weights, folder)
for length in (2**63, 2**60, 2**40, 2**27):
    refuse(Reordering.from_bytes, length.to_bytes(8, "little") + bytes(64))
print(refused, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_claims_of_size_take_no_memory(whole, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(whole.folder, folder)
    run = subprocess.run(
        [sys.executable, "-c", HUGE, str(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    refused, megabytes = map(int, run.stdout.split()[-2:])
    assert refused > 60
    assert megabytes < 100
