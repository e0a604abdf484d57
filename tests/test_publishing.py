"""Pushes and pulls by the real client against a local Hub, and what faults make of them."""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import build_model, same_bits, weights_of
from hub_client import client
from hub_server import FAULTS, serving
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageClassification

from hf_spp import (
    OrdersError,
    Reordering,
    SPPConfig,
    UnsupportedModelError,
    apply_spp,
    load_reordered,
    push_to_hub,
    width_report,
)
from hf_spp.conversion import write_checkpoint
from hf_spp.sums import check_sums

needs_xet = pytest.mark.skipif(importlib.util.find_spec("hf_xet") is None, reason="hf_xet is not installed")
STRATEGIES = [
    "every_save",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("end", "checkpoint", "all_checkpoints")),
]
WAYS = [False, pytest.param(True, marks=needs_xet)]


def make(folder, seed, **sizes):
    """A reordered checkpoint with weights of its own."""
    torch.manual_seed(seed)
    model = build_model("vit", **sizes)
    reordering = apply_spp(model, SPPConfig(metric="random", seed=seed))
    folder.mkdir(parents=True)
    write_checkpoint(folder, model, reordering)
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Two checkpoints of the same kind, the old and the new."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return make(folder / "old", 0), make(folder / "new", 1)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("hub"), lfs_threshold=2000) as server, client(server) as ask:
        yield server, ask


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def is_whole(files, folder):
    """Whether files of a repository or a folder are those of a checkpoint, whole; the card may name the repository."""
    wanted = content(folder)
    sums = dict(reversed(line.split("  ")) for line in files["SHA256SUMS"].decode().splitlines())
    return (
        files.keys() - {".gitattributes"} == wanted.keys()
        and all(files[name] == wanted[name] for name in wanted.keys() - {"README.md", "SHA256SUMS"})
        and all(hashlib.sha256(files[name]).hexdigest() == sum for name, sum in sums.items())
        and sums.keys() == wanted.keys() - {"SHA256SUMS"}
    )


# --- round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("xet", WAYS, ids=["lfs", "xet"])
@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_pushed_and_pulled_is_the_same(xet, sharded, tmp_path, monkeypatch):
    if sharded:
        monkeypatch.setattr("hf_spp.conversion.SHARD_SIZE", "20KB")
    source = make(tmp_path / "source", 3)
    assert (source / "model.safetensors.index.json").is_file() is sharded
    with serving(tmp_path / "hub", lfs_threshold=2000) as server:
        with client(server, xet=xet) as ask:
            pushed = ask("push", folder=str(source), repo_id="model", private=True)
            assert (pushed["error"], pushed["repo_id"], pushed["note"]) == (None, "tester/model", None)
        assert is_whole(server.files("tester/model"), source)
        with client(server, "read", xet=xet) as ask:
            assert ask("pull", repo_id="tester/model", target=str(tmp_path / "out"))["error"] is None
            assert ask("load", repo_id="tester/model")["digest"] == Reordering.from_pretrained(source).digest
        assert server.violations == []
    assert is_whole(content(tmp_path / "out"), source)
    assert check_sums(tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.to_dict() == ModelCard.load(source / "README.md").data.to_dict()
    assert 'from_pretrained("tester/model")' in card.text
    one, other = (AutoModelForImageClassification.from_pretrained(folder) for folder in (source, tmp_path / "out"))
    assert same_bits(one, weights_of(other))


STOCK = """
import sys
sys.modules["hf_spp"] = None
import torch
from transformers import AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained("tester/stock").eval()
torch.manual_seed(0)
print(model(pixel_values=torch.randn(2, 3, 12, 12)).logits.double().flatten().tolist())
"""


def test_stock_transformers_load_what_was_pushed(hub, checkpoints):
    server, ask = hub
    assert ask("push", folder=str(checkpoints[0]), repo_id="tester/stock")["error"] is None
    done = subprocess.run(
        [sys.executable, "-c", STOCK], env=server.environment("read"), capture_output=True, text=True, check=True
    )
    model = AutoModelForImageClassification.from_pretrained(checkpoints[0]).eval()
    torch.manual_seed(0)
    expected = model(pixel_values=torch.randn(2, 3, 12, 12)).logits.double().flatten()
    assert torch.allclose(torch.tensor(json.loads(done.stdout.splitlines()[-1])).double(), expected, atol=1e-5)


def test_push_of_a_model_shows_its_evaluation_and_is_the_same_twice(hub, checkpoints):
    server, ask = hub
    evaluation = {"cifar10": {"accuracy": 0.9, "f1": 0.8, "top5": 0.99}}
    order = {"folder": str(checkpoints[0]), "repo_id": "shown", "evaluation": evaluation}
    first, second = ask("push_model", **order), ask("push_model", **order)
    assert (first["error"], first["note"]) == (None, None)
    assert (second["files"], second["note"]) == (0, "The repository held these files already.")
    assert second["commit"] == first["commit"]
    card = ModelCard(server.read("tester/shown", "README.md").decode())
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found == {"accuracy": 0.9, "f1": 0.8, "top5": 0.99}
    assert "| SPP | 90.00 / 80.00 |" in card.text
    assert "![Saliency" in card.text
    assert "saliency.png" in server.files("tester/shown")


def test_prefix_layout_is_pushed_and_used(hub, checkpoints):
    server, ask = hub
    order = {"folder": str(checkpoints[0]), "repo_id": "tester/tiers"}
    assert "layout='tiers' is unknown" in ask("push_model", **order, layout="tiers")["message"]
    assert ask("push_model", **order, layout="prefix")["error"] is None
    assert "spp_prefix/index.json" in server.files("tester/tiers")
    assert ask("slice", repo_id="tester/tiers", width=0.5)["class"] == "ViTForImageClassification"
    assert any("spp_prefix/model.safetensors" in exchange.path for exchange in server.requests)
    found = ask("info", repo_id="tester/tiers")
    assert (found["prefix_layout"], found["summed"], found["files"]) == (True, True, 1)
    assert found["bytes"] == (checkpoints[0] / "model.safetensors").stat().st_size
    # New weights without copies make the old ones void.
    assert ask("push", folder=str(checkpoints[1]), repo_id="tester/tiers")["error"] is None
    assert is_whole(server.files("tester/tiers"), checkpoints[1])


def test_benchmarks_get_entries_beside_those_of_others(hub, checkpoints, tmp_path):
    server, ask = hub
    theirs = "- dataset:\n    id: other/data\n    task_id: other\n  value: 1\n"
    (tmp_path / "repo" / ".eval_results").mkdir(parents=True)
    (tmp_path / "repo" / ".eval_results" / "hf_spp.yaml").write_text(theirs)
    server.add_repository("tester/ranked", tmp_path / "repo")
    order = {
        "folder": str(checkpoints[0]),
        "repo_id": "tester/ranked",
        "benchmarks": {"cifar10": {"dataset_id": "uoft-cs/cifar10", "task_id": "test"}},
    }
    for accuracy in (0.9, 0.8):
        assert ask("push_model", **order, evaluation={"cifar10": {"accuracy": accuracy, "f1": 0.8}})["error"] is None
        text = server.read("tester/ranked", ".eval_results/hf_spp.yaml").decode()
        assert text.startswith(theirs)
        assert text.count("uoft-cs/cifar10") == 1
        assert f"value: {accuracy}" in text
    assert ask("push_model", **order)["error"] is None
    assert server.read("tester/ranked", ".eval_results/hf_spp.yaml").decode() == theirs


def test_widths_beside_other_results(hub, checkpoints, tmp_path):
    server, ask = hub
    model, _ = load_reordered(checkpoints[0])
    batches = [{"pixel_values": torch.randn(4, 3, 12, 12), "labels": torch.arange(4) % 2}]
    width_report(model, batches, 0.5, latency_runs=0, output_dir=tmp_path / "widths")
    order = {"folder": str(checkpoints[0]), "repo_id": "tester/both", "widths": [str(tmp_path / "widths")]}
    results = [{"cifar10": {"accuracy": 0.5, "f1": 0.25}}]
    assert ask("push_model", **order, evaluation=results)["error"] is None
    found = server.files("tester/both")
    card = found["README.md"].decode()
    assert "## Widths" in card
    assert "50.00 / 25.00" in card
    assert "widths_parameters.png" in found
    assert "1 width reports and 2 other results" in ask("push_model", **order, evaluation=results * 2)["message"]


def test_new_weights_leave_nothing_of_the_old_behind(hub, checkpoints, tmp_path, monkeypatch):
    server, ask = hub
    monkeypatch.setattr("hf_spp.conversion.SHARD_SIZE", "20KB")
    sharded = make(tmp_path / "sharded", 3)
    (sharded / "spp_widths").mkdir()
    (sharded / "spp_widths" / "0.5.safetensors").write_bytes(b"of the old weights")
    (sharded / "SHA256SUMS").unlink()
    assert ask("push", folder=str(sharded), repo_id="tester/renewed")["error"] is None
    assert "spp_widths/0.5.safetensors" in server.files("tester/renewed")
    assert ask("push", folder=str(checkpoints[1]), repo_id="tester/renewed")["error"] is None
    assert is_whole(server.files("tester/renewed"), checkpoints[1])


def test_branches_and_pull_requests(hub, checkpoints):
    server, ask = hub
    old, new = map(str, checkpoints)
    main = ask("push", folder=old, repo_id="tester/branched")["commit"]
    branch = ask("push", folder=new, repo_id="tester/branched", revision="next")
    opened = ask("push", folder=new, repo_id="tester/branched", create_pr=True)
    again = ask("push", folder=new, repo_id="tester/branched", create_pr=True)
    assert server.refs("tester/branched") == {
        "refs/heads/main": main,
        "refs/heads/next": branch["commit"],
        "refs/pr/1": opened["commit"],
    }
    assert opened["url"].endswith("/tester/branched/discussions/1")
    assert (again["url"], again["note"]) == (opened["url"], "The pull request held these files already.")
    assert is_whole(server.files("tester/branched", "refs/pr/1"), checkpoints[1])
    digests = [Reordering.from_pretrained(folder).digest for folder in checkpoints]
    assert ask("load", repo_id="tester/branched")["digest"] == digests[0]
    assert ask("load", repo_id="tester/branched", revision="next")["digest"] == digests[1]


def test_a_strangers_card_and_results_stay(hub, checkpoints, tmp_path):
    server, ask = hub
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "README.md").write_text(
        "---\nlicense: mit # keep\ntags: [mine]\nmodel-index:\n- name: theirs\n  results:\n  - task:\n      type: t\n"
        "    dataset:\n      type: d\n      name: D\n    metrics:\n    - type: bleu\n      value: 3\n---\n# Mine\n\n"
        "Words.\n"
    )
    (theirs / "notes.txt").write_text("keep")
    server.add_repository("tester/theirs", theirs)
    for folder in (*checkpoints, checkpoints[1]):
        assert ask("push", folder=str(folder), repo_id="tester/theirs")["error"] is None
        text = server.read("tester/theirs", "README.md").decode()
        card = ModelCard(text)
        assert card.content.count("# Mine\n\nWords.\n") == 1
        assert card.text.count("## What was reordered") == 1
        assert "license: mit # keep" in text
        assert card.data.tags == ["mine", "hf_spp", "salient-parameter-prioritization"]
        assert [(one.metric_type, one.metric_value) for one in card.data.eval_results] == [("bleu", 3)]
    assert server.read("tester/theirs", "notes.txt") == b"keep"
    assert len(server.commits("tester/theirs")) == 3


def test_load_from_the_cache_when_offline(hub, checkpoints, tmp_path):
    _, ask = hub
    ask("push", folder=str(checkpoints[0]), repo_id="tester/cached")
    order = {"repo_id": "tester/cached", "cache": str(tmp_path / "cache")}
    assert "cannot be reached, and the local cache lacks the" in ask("load", **order, offline=True)["message"]
    online = ask("load", **order)
    assert online["name"] == "tester/cached"
    assert ask("load", **order, offline=True) == online
    target = str(tmp_path / "out")
    assert ask("pull", repo_id="tester/cached", target=target, cache=order["cache"])["error"] is None


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_trainer_pushes_whole_states(strategy, tmp_path):
    """Every commit of a run holds weights with their own orders; the card keeps both parts, the sums hold."""
    script = Path(__file__).parent / "pushed_training.py"
    with serving(tmp_path / "hub", lfs_threshold=2000) as server, client(server) as ask:
        environment = {**server.environment(), "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, script, tmp_path / "run", strategy], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        commits = server.commits("tester/run")[:-1]
        assert len(commits) == {"end": 1, "every_save": 4}.get(strategy, 7)
        found = [ask("load", repo_id="tester/run", revision=commit.id) for commit in commits]
        assert [one["error"] for one in found] == [None] * len(commits)
        assert found[0]["digest"] == done.stdout.split()[-1]
        assert len({one["digest"] for one in found}) == {"end": 1}.get(strategy, 3)
        card = ModelCard(server.read("tester/run", "README.md").decode())
        assert "generated_from_trainer" in card.data.tags
        assert "### Training hyperparameters" in card.text
        assert card.text.count("## What was reordered") == card.text.count("## Evaluation") == 1
        assert {"loss", "accuracy"} <= {one.metric_type for one in card.data.eval_results}
        assert ask("pull", repo_id="tester/run", target=str(tmp_path / "out"))["error"] is None
        assert {"README.md", "model.safetensors", "training_args.bin"} <= set(check_sums(tmp_path / "out"))


# --- bad input --------------------------------------------------------------------------------------------------------


def test_refused_by_the_hub(hub, checkpoints):
    server, ask = hub
    ask("push", folder=str(checkpoints[0]), repo_id="tester/guarded")
    before = server.files("tester/guarded")
    for token, message in (
        ("read", "may not be written with this token"),
        ("foreign", "may not be written"),
        (None, ""),
    ):
        with client(server, token) as other:
            found = other("push", folder=str(checkpoints[1]), repo_id="tester/guarded")
            assert found["ours"], found["trace"]
            assert message in found["message"]
    assert server.files("tester/guarded") == before
    for order, arguments, message in (
        ("load", {"repo_id": "tester/none"}, "was not found on the Hub"),
        ("load", {"repo_id": "tester/guarded", "revision": "no"}, "has no revision 'no'"),
        ("pull", {"repo_id": "tester/none", "target": "/nowhere"}, "was not found on the Hub"),
        ("push", {"folder": str(checkpoints[0]), "repo_id": "no/such/id"}, "neither a folder"),
    ):
        found = ask(order, **arguments)
        assert found["ours"], found
        assert message in found["message"]


def test_damaged_folder_is_not_pushed(hub, checkpoints, tmp_path):
    server, ask = hub
    folder = shutil.copytree(checkpoints[0], tmp_path / "damaged")
    (folder / "config.json").write_text("{}")
    assert "its bytes differ" in ask("push", folder=str(folder), repo_id="tester/damaged")["message"]
    folder = make(tmp_path / "other", 5)
    apply_spp(build_model("vit", intermediate_size=28)).save_pretrained(folder)
    assert ask("push", folder=str(folder), repo_id="tester/damaged")["error"] == "OrdersError"
    assert "holds no spp_orders" in ask("push", folder=str(tmp_path), repo_id="tester/damaged")["message"]
    assert not (server.folder / "repositories" / "model" / "tester--damaged").exists()


def test_model_and_reordering_must_belong_together():
    model = build_model("vit")
    first, second = apply_spp(model), apply_spp(model, SPPConfig(metric="random"))
    with pytest.raises(OrdersError, match="in another order than this reordering made"):
        push_to_hub("a/b", model, second)
    with pytest.raises(OrdersError, match="belong to a vit model"):
        push_to_hub("a/b", build_model("bert"), first.then(second))
    second.undo(model)
    first.undo(model)
    with pytest.raises(OrdersError, match="is in its original order"):
        push_to_hub("a/b", model, first)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_are_not_pushed():
    model = build_model("vit")
    reordering = apply_spp(model)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UnsupportedModelError, match="holds adapters"):
        push_to_hub("a/b", adapted, reordering)


# --- faults -----------------------------------------------------------------------------------------------------------


def tried(server, kind, nth, times):
    """Let one or more requests from the nth on fail."""
    server.faults.clear()
    return server.faults.add(kind, nth=nth, times=times, seconds=0.05 if kind == "slow" else 0)


def requests_of(server, act):
    """How many requests something makes."""
    before = len(server.requests)
    assert act()["error"] is None
    return len(server.requests) - before


def push_under_faults(server, ask, checkpoints, kinds, places, times):
    """Push over an older state while requests fail, then once more without faults; what came of each try."""
    old, new = checkpoints
    outcomes = Counter()
    for kind in kinds:
        for nth in places:
            repo_id = f"tester/{kind}-{nth}-{times}"
            server.add_repository(repo_id, old)
            before = server.files(repo_id)
            fault = tried(server, kind, nth, times)
            found = ask("push", folder=str(new), repo_id=repo_id)
            server.faults.clear()
            state = server.files(repo_id)
            whole = is_whole(state, new) if found["error"] is None else state == before or is_whole(state, new)
            assert whole, (kind, nth, found)
            assert found["error"] is None or found["ours"], (kind, nth, found["trace"])
            again = ask("push", folder=str(new), repo_id=repo_id)
            assert again["error"] is None, (kind, nth, again)
            assert is_whole(server.files(repo_id), new)
            assert len(server.commits(repo_id)) == 2, (kind, nth)
            outcomes["not reached" if not fault.struck else "refused" if found["error"] else "survived"] += 1
    return outcomes


def pull_under_faults(server, ask, repo_id, checkpoints, folder, kinds, places, times):
    """Pull over an older folder while requests fail, then once more without faults; what came of each try."""
    old, new = checkpoints
    outcomes = Counter()
    for kind in kinds:
        for nth in places:
            place = folder / f"{kind}-{nth}-{times}"
            target = shutil.copytree(old, place / "out")
            order = {"repo_id": repo_id, "target": str(target), "overwrite": True, "cache": str(place / "cache")}
            fault = tried(server, kind, nth, times)
            found = ask("pull", **order)
            server.faults.clear()
            state = content(target)
            whole = is_whole(state, new) if found["error"] is None else state == content(old)
            assert whole, (kind, nth, found)
            assert found["error"] is None or found["ours"], (kind, nth, found["trace"])
            again = ask("pull", **order)
            assert again["error"] is None, (kind, nth, again)
            assert is_whole(content(target), new)
            outcomes["not reached" if not fault.struck else "refused" if found["error"] else "survived"] += 1
            shutil.rmtree(place)
    return outcomes


def table(title, outcomes):
    tried = outcomes["survived"] + outcomes["refused"]
    came = f"survived {outcomes['survived']}, refused clearly {outcomes['refused']}, lost 0"
    print(f"{title:<24} faults tried {tried}, {came}")


def test_an_answer_that_is_lost_makes_no_second_commit(hub, checkpoints):
    server, ask = hub
    server.add_repository("tester/lost", checkpoints[0])
    server.faults.clear()
    server.faults.add("drop_after", path="/commit/")
    found = ask("push", folder=str(checkpoints[1]), repo_id="tester/lost")
    assert found["note"] == "The connection broke after the commit had landed."
    assert len(server.commits("tester/lost")) == 2
    server.faults.add("drop_after", path="/commit/")
    found = ask("push", folder=str(checkpoints[0]), repo_id="tester/lost", create_pr=True)
    server.faults.clear()
    assert found["note"] == "The connection broke after the commit had landed."
    assert list(server.refs("tester/lost")) == ["refs/heads/main", "refs/pr/1"]


def test_wrong_bytes_of_the_right_length_are_noticed_and_not_kept(hub, checkpoints, tmp_path):
    server, ask = hub
    ask("push", folder=str(checkpoints[0]), repo_id="tester/wrong")
    order = {"repo_id": "tester/wrong", "cache": str(tmp_path / "cache")}
    server.faults.add("corrupt", method="GET", origin="storage", times=1)
    assert ask("load", **order)["error"] is None
    shutil.rmtree(tmp_path / "cache")
    server.faults.add("corrupt", method="GET", origin="storage", times=100)
    found = ask("load", **order)
    server.faults.clear()
    assert (found["ours"], "arrived twice with other bytes" in found["message"]) == (True, True)
    assert ask("load", **order)["error"] is None


@pytest.mark.parametrize("times", [1, 1000], ids=["once", "from-then-on"])
def test_a_few_faults(hub, checkpoints, tmp_path, times):
    server, ask = hub
    outcomes = push_under_faults(server, ask, checkpoints, ["drop_after", "500"], [2, 9], times)
    ask("push", folder=str(checkpoints[1]), repo_id="tester/few")
    outcomes += pull_under_faults(server, ask, "tester/few", checkpoints, tmp_path, ["truncate", "503"], [2, 9], times)
    assert outcomes["not reached"] == 0
    assert (outcomes["survived"] >= 6) if times == 1 else outcomes["refused"]


@pytest.mark.slow
@pytest.mark.parametrize("xet", WAYS, ids=["lfs", "xet"])
def test_every_fault_at_every_request(xet, checkpoints, tmp_path, capsys):
    """A push and a pull end in the old or the new state, and another try finishes, whatever fails and for how long."""
    total = Counter()
    with serving(tmp_path / "hub", lfs_threshold=2000) as server, client(server, xet=xet) as ask:
        server.add_repository("tester/model", checkpoints[0])
        pushes = requests_of(server, lambda: ask("push", folder=str(checkpoints[1]), repo_id="tester/model"))
        order = {"repo_id": "tester/model", "target": str(tmp_path / "o"), "cache": str(tmp_path / "c")}
        pulls = requests_of(server, lambda: ask("pull", **order))
        for times in (1, 1000):
            places = range(1, pushes + 1)
            total += push_under_faults(server, ask, checkpoints, FAULTS, places, times)
            places = range(1, pulls + 1)
            total += pull_under_faults(server, ask, "tester/model", checkpoints, tmp_path, FAULTS, places, times)
        assert server.violations == []
    with capsys.disabled():
        print()
        table(f"push and pull by {'Xet' if xet else 'LFS'}", total)
    assert total["survived"] > total.total() / 3
