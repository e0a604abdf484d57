"""The local Hub, driven by the real client: what it can do, and what that client makes of every fault."""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_server import FAULTS, serving

ROOT = Path(__file__).parent.parent
needs_xet = pytest.mark.skipif(importlib.util.find_spec("hf_xet") is None, reason="hf_xet is not installed")

# The client's waits are written down, not waited.
START = """
import json, os, pathlib, time, warnings
waits, results = [], {}
time.sleep = waits.append
import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
api = HfApi()

def attempt(name, action):
    try:
        results[name] = action()
    except Exception as error:
        results[name] = type(error).__name__
    results[f"waits of {name}"] = waits[:]
    waits.clear()

def content(*arguments, **options):
    return pathlib.Path(hf_hub_download(*arguments, **options)).read_bytes().decode("latin-1")

def tree(path):
    return {p.relative_to(path).as_posix(): len(p.read_bytes()) for p in pathlib.Path(path).rglob("*") if p.is_file()}
"""
END = "\nprint(json.dumps(results))"


def client(server, script, token="write", xet=False, cache=None, **variables):
    """Run a script with the real client; returns what it put into `results`."""
    environment = {**server.environment(token, cache, xet), **variables}
    done = subprocess.run(
        [sys.executable, "-c", START + script + END], env=environment, cwd=server.folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def write_files(folder, files):
    for name, content in files.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def sha256(name):
    """Name on the server of the large file for a fault."""
    return hashlib.sha256(b"\0" + name.encode()).hexdigest()


def asked(server, method, part):
    """How often a method was asked for with a path that holds `part`."""
    return sum(exchange.method == method and part in exchange.path for exchange in server.requests)


SMALL = {"README.md": "---\ntags: [tiny]\n---\nHello", "config.json": "{}", "sub/notes.txt": "words"}
LARGE = {"model.safetensors": b"\0" + os.urandom(2500), "sub/vocabulary.txt": b"word\n" * 1000}


# --- pushes ----------------------------------------------------------------------------------------------------------


def test_push_by_lfs(tmp_path):
    with serving(tmp_path / "hub", lfs_threshold=2000, part_size=3000) as server:
        write_files(server.folder / "source", {**SMALL, **LARGE})
        found = client(
            server,
            """
url = api.create_repo("model")
results["url"] = [url.repo_id, api.create_repo("tester/model", exist_ok=True).repo_id, str(url)]
attempt("again", lambda: api.create_repo("tester/model"))
results["first"] = api.upload_folder(repo_id="tester/model", folder_path="source", commit_message="all").oid
results["unchanged"] = api.upload_folder(repo_id="tester/model", folder_path="source").oid
api.create_tag("tester/model", tag="v1")
api.create_branch("tester/model", branch="next")
operations = [CommitOperationDelete("config.json"), CommitOperationDelete("sub/"), CommitOperationAdd("new", b"new")]
results["second"] = api.create_commit("tester/model", operations, commit_message="less", revision="next").oid
attempt("missing", lambda: api.delete_file("config.json", "tester/model", revision="next"))
attempt("stale", lambda: api.upload_file(repo_id="tester/model", path_in_repo="x", path_or_fileobj=b"x",
                                         revision="next", parent_commit=results["first"]))
attempt("card", lambda: api.upload_file(repo_id="tester/model", path_in_repo="README.md",
                                        path_or_fileobj=b"---\\ntags: [\\n---\\n"))
results["titles"] = [commit.title for commit in api.list_repo_commits("tester/model", revision="next")]
api.create_repo("gone")
api.delete_repo("tester/gone")
results["gone"] = api.repo_exists("tester/gone")
""",
        )
        assert found["url"] == ["tester/model", "tester/model", f"{server.endpoint}/tester/model"]
        assert found["again"] == "HfHubHTTPError"
        assert found["first"] == found["unchanged"]
        assert [commit.title for commit in server.commits("tester/model")] == ["all", "initial commit"]
        expected = {
            name: value if isinstance(value, bytes) else value.encode() for name, value in {**SMALL, **LARGE}.items()
        }
        files = server.files("tester/model", "v1")
        assert {name: files[name] for name in expected} == expected
        assert files.keys() - expected.keys() == {".gitattributes"}
        assert server.refs("tester/model") == {
            "refs/heads/main": found["first"],
            "refs/tags/v1": found["first"],
            "refs/heads/next": found["second"],
        }
        assert sorted(server.files("tester/model", "next")) == [
            ".gitattributes",
            "README.md",
            "model.safetensors",
            "new",
        ]
        assert server.read("tester/model", "new", found["second"][:10]) == b"new"
        assert (found["missing"], found["stale"], found["card"]) == (
            "RemoteEntryNotFoundError",
            "HfHubHTTPError",
            "ValueError",
        )
        assert found["titles"] == ["less", "all", "initial commit"]
        assert found["gone"] is False
        assert asked(server, "PUT", "/upload/") == 1
        assert asked(server, "PUT", "/part/") == 2
        assert server.violations == []


@needs_xet
def test_push_and_pull_by_xet(tmp_path):
    with serving(tmp_path / "hub", lfs_threshold=2000) as server:
        write_files(server.folder / "source", {**SMALL, **LARGE, "zeros.bin": bytes(300_000)})
        client(
            server,
            'api.create_repo("model"); api.upload_folder(repo_id="tester/model", folder_path="source")',
            xet=True,
        )
        files = server.files("tester/model")
        assert {name: files[name] for name in LARGE} == LARGE
        assert files["zeros.bin"] == bytes(300_000)
        assert asked(server, "POST", "/v1/xorbs/") > 0
        assert asked(server, "PUT", "") == 0
        for xet in (True, False):
            part = "/xorbs/" if xet else "/contents/"
            before = asked(server, "GET", part)
            found = client(server, 'results["files"] = tree(snapshot_download("tester/model"))', token="read", xet=xet)
            assert found["files"] == {name: len(content) for name, content in files.items()}
            assert asked(server, "GET", part) > before
        assert {exchange.token for exchange in server.requests if "/v1/" in exchange.path} == {"xet"}
        assert server.violations == []


@needs_xet
def test_large_folder_makes_several_commits(tmp_path):
    with serving(tmp_path / "hub") as server:
        write_files(server.folder / "source", {f"{index:03}.txt": str(index) for index in range(260)})
        server.add_repository("tester/model")
        client(
            server, 'api.upload_folder(repo_id="tester/model", folder_path="source", commit_message="all")', xet=True
        )
        commits = server.commits("tester/model")
        assert [commit.title for commit in commits] == ["all (part 2)", "all", "initial commit"]
        assert [len(server.files("tester/model", commit.id)) for commit in commits] == [261, 251, 1]


@pytest.mark.parametrize("xet", [False, pytest.param(True, marks=needs_xet)])
def test_pull_requests(tmp_path, xet):
    with serving(tmp_path / "hub", lfs_threshold=2000) as server:
        write_files(server.folder / "source", LARGE)
        head = server.add_repository("tester/model", write_files(tmp_path / "old", SMALL))
        found = client(
            server,
            """
first = api.create_commit("tester/model", [CommitOperationDelete("config.json")], commit_message="less", create_pr=True)
second = api.upload_folder(repo_id="tester/model", folder_path="source", create_pr=True)
results["urls"] = [first.pr_url, second.pr_url]
results["revisions"] = [first.pr_revision, second.pr_revision]
api.upload_file(repo_id="tester/model", path_in_repo="x", path_or_fileobj=b"x", revision=second.pr_revision)
results["refs"] = [ref.ref for ref in api.list_repo_refs("tester/model", include_pull_requests=True).pull_requests]
attempt("main", lambda: api.upload_file(repo_id="tester/model", path_in_repo="x", path_or_fileobj=b"x"))
""",
            token="foreign",
            xet=xet,
        )
        assert found["urls"] == [f"{server.endpoint}/tester/model/discussions/{number}" for number in (1, 2)]
        assert found["revisions"] == found["refs"] == ["refs/pr/1", "refs/pr/2"]
        assert found["main"] == "HfHubHTTPError"
        assert server.refs("tester/model")["refs/heads/main"] == head
        assert "config.json" not in server.files("tester/model", "refs/pr/1")
        assert server.files("tester/model", "refs/pr/2").keys() == {".gitattributes", "x", *SMALL, *LARGE}


# --- pulls -----------------------------------------------------------------------------------------------------------


def test_pull(tmp_path):
    with serving(tmp_path / "hub", lfs_threshold=2000, page_size=2) as server:
        head = server.add_repository("google/tiny", write_files(tmp_path / "source", {**SMALL, **LARGE}))
        found = client(
            server,
            """
attempt("file", lambda: len(content("google/tiny", "model.safetensors")))
attempt("files", lambda: tree(snapshot_download("google/tiny", ignore_patterns="*.json")))
attempt("top", lambda: [item.path for item in api.list_repo_tree("google/tiny")])
attempt("sub", lambda: [item.path for item in api.list_repo_tree("google/tiny", path_in_repo="sub")])
attempt("all", lambda: [item.path for item in api.list_repo_tree("google/tiny", recursive=True)])
info = api.repo_info("google/tiny", files_metadata=True)
results["info"] = [info.sha, info.private, info.card_data.tags, {s.rfilename: s.size for s in info.siblings}]
results["sha256"] = next(s.lfs.sha256 for s in info.siblings if s.rfilename == "model.safetensors")
found = api.get_paths_info("google/tiny", ["sub", "config.json", "x"])
results["paths"] = {item.path: getattr(item, "size", None) for item in found}
attempt("no file", lambda: hf_hub_download("google/tiny", "x"))
attempt("no folder", lambda: list(api.list_repo_tree("google/tiny", path_in_repo="x")))
attempt("no revision", lambda: snapshot_download("google/tiny", revision="x"))
attempt("no repository", lambda: snapshot_download("google/huge"))
""",
            token=None,
        )
        sizes = {".gitattributes": 92, **{name: len(content) for name, content in {**SMALL, **LARGE}.items()}}
        assert found["file"] == 2501
        assert found["files"] == {name: size for name, size in sizes.items() if name != "config.json"}
        assert found["top"] == [".gitattributes", "README.md", "config.json", "model.safetensors", "sub"]
        assert found["sub"] == ["sub/notes.txt", "sub/vocabulary.txt"]
        assert found["all"] == sorted([*found["top"], *found["sub"]])
        assert found["info"] == [head, False, ["tiny"], sizes]
        assert asked(server, "GET", found["sha256"]) == 1
        assert found["paths"] == {"sub": None, "config.json": 2}
        assert found["no file"] == found["no folder"] == "RemoteEntryNotFoundError"
        assert (found["no revision"], found["no repository"]) == ("RevisionNotFoundError", "RepositoryNotFoundError")
        assert server.violations == []


def test_revisions_and_data_sets(tmp_path):
    with serving(tmp_path / "hub", lfs_threshold=2000) as server:
        first = server.add_repository("tester/data", write_files(tmp_path / "source", LARGE), kind="dataset")
        found = client(
            server,
            """
data = {"repo_id": "tester/data", "repo_type": "dataset"}
api.create_branch(**data, branch="a/b")
api.create_tag(**data, tag="v1")
api.upload_file(**data, path_in_repo="rows.txt", path_or_fileobj=b"1\\n2\\n", commit_message="rows")
for name in ("main", "a/b", "v1", api.repo_info(**data, revision="v1").sha):
    attempt(name, lambda: tree(snapshot_download(**data, revision=name)))
attempt("file", lambda: content(**data, filename="rows.txt", revision="refs/heads/main"))
attempt("model", lambda: api.repo_info("tester/data"))
attempt("kind", lambda: type(api.repo_info(**data)).__name__)
""",
        )
        old = {".gitattributes": 92, **{name: len(content) for name, content in LARGE.items()}}
        assert found["a/b"] == found["v1"] == found[first] == old
        assert found["main"] == {**old, "rows.txt": 4}
        assert (found["file"], found["model"], found["kind"]) == ("1\n2\n", "RepositoryNotFoundError", "DatasetInfo")
        assert server.read("tester/data", "rows.txt", kind="dataset") == b"1\n2\n"


def test_ranges(tmp_path):
    with serving(tmp_path / "hub") as server:
        server.add_repository(
            "tester/model", write_files(tmp_path / "source", {"a.txt": "0123456789", "b.bin": b"\x00123456789"})
        )
        found = client(
            server,
            """
session = huggingface_hub.get_session()
for name in ("a.txt", "b.bin"):
    for span in ("0-3", "7-", "-2", "8-99", "10-", "5-3", ""):
        headers = {"Range": f"bytes={span}"} if span else {}
        answer = session.get(f"{api.endpoint}/tester/model/resolve/main/{name}", headers=headers)
        results[f"{name} {span}"] = [answer.status_code, answer.headers.get("content-range"), answer.text[-3:]]
""",
        )
        for name in ("a.txt", "b.bin"):
            assert found[f"{name} 0-3"] == [206, "bytes 0-3/10", "123"]
            assert found[f"{name} 7-"] == [206, "bytes 7-9/10", "789"]
            assert found[f"{name} -2"] == [206, "bytes 8-9/10", "89"]
            assert found[f"{name} 8-99"] == [206, "bytes 8-9/10", "89"]
            assert found[f"{name} 10-"][:2] == found[f"{name} 5-3"][:2] == [416, "bytes */10"]
            assert found[f"{name} "] == [200, None, "789"]


# --- tokens ----------------------------------------------------------------------------------------------------------

RIGHTS = """
attempt("read", lambda: bool(snapshot_download("tester/private")))
attempt("write", lambda: bool(api.upload_file(repo_id="tester/private", path_in_repo="x", path_or_fileobj=b"x")))
attempt("open", lambda: bool(api.upload_file(repo_id="tester/public", path_in_repo="x", path_or_fileobj=b"x")))
attempt("create", lambda: bool(api.create_repo("tester/new")))
attempt("exists", lambda: bool(api.create_repo("tester/public", exist_ok=True)))
attempt("delete", lambda: api.delete_repo("tester/public"))
attempt("name", lambda: api.whoami()["name"])
"""


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        ("write", [True, True, True, True, True, None, "tester"]),
        ("read", [True, *["HfHubHTTPError"] * 3, True, "HfHubHTTPError", "tester"]),
        ("foreign", [*["RepositoryNotFoundError"] * 2, *["HfHubHTTPError"] * 2, True, "HfHubHTTPError", "stranger"]),
        (
            None,
            [
                *["RepositoryNotFoundError"] * 2,
                *["HfHubHTTPError"] * 2,
                True,
                "HfHubHTTPError",
                "LocalTokenNotFoundError",
            ],
        ),
    ],
)
def test_rights(tmp_path, token, expected):
    with serving(tmp_path / "hub") as server:
        server.add_repository("tester/public")
        server.add_repository("tester/private", private=True)
        found = client(server, RIGHTS, token=token)
        assert [found[name] for name in ("read", "write", "open", "create", "exists", "delete", "name")] == expected


def test_wrong_token(tmp_path):
    with serving(tmp_path / "hub") as server:
        server.add_repository("tester/public")
        found = client(server, 'attempt("info", lambda: api.repo_info("tester/public"))', HF_TOKEN="hf_wrong")
        assert found["info"] == "HfHubHTTPError"
        assert [(exchange.status, exchange.token) for exchange in server.requests] == [(401, "unknown")]


def test_token_at_the_other_origin_is_a_violation(tmp_path):
    with serving(tmp_path / "hub") as server:
        server.add_repository("tester/model", write_files(tmp_path / "source", {"b.bin": b"\0"}))
        script = """
response = huggingface_hub.get_session().head(f"{api.endpoint}/tester/model/resolve/main/b.bin", follow_redirects=False)
for headers in ({}, {"Authorization": f"Bearer {os.environ['HF_TOKEN']}"}):
    huggingface_hub.get_session().get(response.headers["Location"], headers=headers)
results["unsigned"] = huggingface_hub.get_session().get(response.headers["Location"][:-1]).status_code
"""
        assert client(server, script)["unsigned"] == 403
        assert [exchange.token for exchange in server.violations] == ["write"]


# --- faults ----------------------------------------------------------------------------------------------------------

REMOTE = "RemoteProtocolError"
PLAIN = [fault for fault in FAULTS if fault != "corrupt"]


def counts(server, part, method=""):
    """How often each repository or file was asked for, by its name."""
    paths = [e.path.split("?")[0] for e in server.requests if part in e.path and e.method.startswith(method)]
    return Counter(name for path in paths for name in path.split("/") if name.startswith("at-"))


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    """What became of one small file for each fault, and how often it was asked for."""
    folder = tmp_path_factory.mktemp("downloads")
    names = [*FAULTS, "reset", "head-503", "head-slow", "head-drop", "always"]
    with serving(folder / "hub") as server:
        server.add_repository(
            "tester/model", write_files(folder / "source", {f"at-{name}": f"at {name}" for name in names})
        )
        for fault in FAULTS:
            server.faults.add(fault, method="GET", path=f"/at-{fault}$", seconds=2)
        server.faults.add("truncate", method="GET", path="/at-reset$", reset=True)
        server.faults.add("503", method="HEAD", path="/at-head-503$")
        server.faults.add("slow", method="HEAD", path="/at-head-slow$", seconds=2)
        server.faults.add("drop_before", method="HEAD", path="/at-head-drop$")
        server.faults.add("drop_before", method="GET", path="/at-always$", times=99)
        script = f"""
for name in {names}:
    attempt(name, lambda: "right" if content("tester/model", f"at-{{name}}") == f"at {{name}}" else "wrong")
"""
        found = client(server, script, HF_HUB_DOWNLOAD_TIMEOUT="1", HF_HUB_ETAG_TIMEOUT="1")
        tries = {method: counts(server, "/resolve/", method) for method in ("GET", "HEAD")}
        return SimpleNamespace(found=found, tries=tries)


@pytest.mark.parametrize(
    ("fault", "outcome", "tries", "waits"),
    [
        ("429", "right", 2, [3]),
        ("500", "HfHubHTTPError", 1, []),
        ("503", "HfHubHTTPError", 1, []),
        ("drop_before", "right", 2, [1]),
        ("drop_after", "right", 2, [1]),
        ("truncate", "right", 2, [1]),
        ("corrupt", "wrong", 1, []),
        ("slow", "right", 2, [1]),
        ("reset", "ReadError", 1, []),
        ("always", REMOTE, 6, [1, 1, 1, 1, 1]),
    ],
)
def test_client_downloads(downloads, fault, outcome, tries, waits):
    assert downloads.found[fault] == outcome
    assert downloads.tries["GET"][f"at-{fault}"] == tries
    assert downloads.found[f"waits of {fault}"] == waits


@pytest.mark.parametrize(
    ("fault", "outcome", "tries"), [("503", "right", 2), ("slow", "right", 2), ("drop", REMOTE, 1)]
)
def test_client_asks_for_a_file(downloads, fault, outcome, tries):
    assert downloads.found[f"head-{fault}"] == outcome
    assert downloads.tries["HEAD"][f"at-head-{fault}"] == tries


@pytest.fixture(scope="module")
def pushes(tmp_path_factory):
    """What became of one push to one repository for each fault: by create_commit, and by upload_folder with Xet."""
    folder = tmp_path_factory.mktemp("pushes")
    found = {}
    for call in ("create_commit", "upload_folder"):
        with serving(folder / call) as server:
            write_files(server.folder / "source", {"a.txt": "a"})
            for fault in PLAIN:
                server.add_repository(f"tester/at-{fault}")
                server.faults.add(fault, path=f"/at-{fault}/commit/", seconds=1)
            pushing = {
                "create_commit": 'api.create_commit(repo, [CommitOperationAdd("a.txt", b"a")], commit_message="a")',
                "upload_folder": 'api.upload_folder(repo_id=repo, folder_path="source", commit_message="a")',
            }
            script = f"""
for name in {PLAIN}:
    repo = f"tester/at-{{name}}"
    attempt(name, lambda: bool({pushing[call]}))
"""
            found[call] = SimpleNamespace(
                found=client(server, script, xet=importlib.util.find_spec("hf_xet") is not None),
                tries=counts(server, "/commit/"),
                commits={fault: len(server.commits(f"tester/at-{fault}")) - 1 for fault in PLAIN},
            )
    return found


@pytest.mark.parametrize(
    ("fault", "outcome", "commits"),
    [
        ("429", "HfHubHTTPError", 0),
        ("500", "HfHubHTTPError", 0),
        ("503", "HfHubHTTPError", 0),
        ("drop_before", REMOTE, 0),
        ("drop_after", REMOTE, 1),
        ("truncate", REMOTE, 1),
        ("slow", True, 1),
    ],
)
def test_client_never_repeats_create_commit(pushes, fault, outcome, commits):
    push = pushes["create_commit"]
    assert (push.found[fault], push.commits[fault], push.tries[f"at-{fault}"]) == (outcome, commits, 1)


@needs_xet
@pytest.mark.parametrize(
    ("fault", "commits", "tries", "waits"),
    [
        ("429", 1, 2, [2]),
        ("500", 1, 2, [1]),
        ("503", 1, 2, [1]),
        ("drop_before", 1, 2, [1]),
        ("drop_after", 2, 2, [1]),
        ("truncate", 2, 2, [1]),
        ("slow", 1, 1, []),
    ],
)
def test_client_repeats_upload_folder(pushes, fault, commits, tries, waits):
    push = pushes["upload_folder"]
    assert push.found[fault] is True
    assert (push.commits[fault], push.tries[f"at-{fault}"]) == (commits, tries)
    assert push.found[f"waits of {fault}"] == waits


@needs_xet
def test_lost_answer_with_a_parent_commit_looks_like_a_conflict(tmp_path):
    with serving(tmp_path / "hub") as server:
        write_files(server.folder / "source", {"a.txt": "a"})
        head = server.add_repository("tester/model")
        server.faults.add("drop_after", path="/commit/")
        push = f'api.upload_folder(repo_id="tester/model", folder_path="source", parent_commit="{head}")'
        found = client(server, f'attempt("push", lambda: {push})', xet=True)
        assert found["push"] == "HfHubHTTPError"
        assert [exchange.status for exchange in server.requests][-2:] == [None, 412]
        assert server.commits("tester/model")[0].parent == head


@needs_xet
def test_split_of_a_failing_commit_shows_half_a_push(tmp_path):
    with serving(tmp_path / "hub") as server:
        write_files(server.folder / "source", {f"{index:02}.txt": str(index) for index in range(30)})
        server.add_repository("tester/model")
        # Six tries each for 30 files in one commit of at most 250, 200, 125, 100, 75 and 50; then one commit has 20.
        server.faults.add("503", path="/commit/", times=36)
        server.faults.add("503", path="/commit/", nth=38, times=99)
        push = 'api.upload_folder(repo_id="tester/model", folder_path="source")'
        assert client(server, f'attempt("push", lambda: {push})', xet=True)["push"] == "HfHubHTTPError"
        assert len(server.files("tester/model")) == 21


def test_client_repeats_uploads_of_large_files(tmp_path):
    with serving(tmp_path / "hub") as server:
        names = ["429", "500", "drop_before", "drop_after", "batch", "preupload", "always"]
        for name in names:
            server.add_repository(f"tester/at-{name}")
        for fault in ("429", "500", "drop_before", "drop_after"):
            server.faults.add(fault, method="PUT", path=f"/{sha256(fault)}")
        server.faults.add("503", path="/at-batch.git/.*/batch$")
        server.faults.add("truncate", path="/at-preupload/preupload/")
        server.faults.add("500", method="PUT", path=f"/{sha256('always')}", times=99)
        found = client(
            server,
            f"""
for name in {names}:
    operations = [CommitOperationAdd("b.bin", b"\\0" + name.encode())]
    attempt(name, lambda: bool(api.create_commit(f"tester/at-{{name}}", operations, commit_message="b")))
""",
        )
        assert [found[name] for name in names] == [True] * 6 + ["RuntimeError"]
        assert found["waits of always"] == [1, 2, 4, 8, 8]
        assert {name: len(server.commits(f"tester/at-{name}")) - 1 for name in names} == {
            **dict.fromkeys(names, 1),
            "always": 0,
        }


@needs_xet
def test_faults_of_xet(tmp_path):
    with serving(tmp_path / "hub", lfs_threshold=2000) as server:
        write_files(server.folder / "source", {"model.safetensors": bytes(5000)})
        server.add_repository("tester/model")
        push = 'attempt("push", lambda: bool(api.upload_folder(repo_id="tester/model", folder_path="source")))'
        upload = [
            server.faults.add("503", path="/xet-write-token/"),
            server.faults.add("drop_before", path="/v1/xorbs/"),
            server.faults.add("truncate", path="/v1/xorbs/", nth=2),
            server.faults.add("drop_after", path="/v1/shards"),
        ]
        assert client(server, push, xet=True)["push"] is True
        assert [fault.struck for fault in upload] == [1, 1, 1, 1]
        assert server.read("tester/model", "model.safetensors") == bytes(5000)
        pull = """
for name in ("right", "wrong", "never"):
    attempt(name, lambda: content("tester/model", "model.safetensors", force_download=True) == chr(0) * 5000)
"""
        server.faults.add("503", path="/xorbs/")
        server.faults.add("drop_before", path="/xorbs/", nth=2)
        server.faults.add("truncate", path="/xorbs/", nth=3)
        server.faults.add("corrupt", path="/xorbs/", nth=5)
        server.faults.add("503", path="/xorbs/", nth=6, times=99)
        found = client(server, pull, xet=True)
        assert (found["right"], found["wrong"], found["never"]) == (True, False, "RuntimeError")


def test_client_answers_from_its_cache_when_the_hub_fails(tmp_path):
    with serving(tmp_path / "hub") as server:
        server.add_repository("tester/model", write_files(tmp_path / "source", {"a.txt": "old"}))
        read = 'content("tester/model", "a.txt")'
        everything = 'pathlib.Path(snapshot_download("tester/model"), "a.txt").read_text()'
        script = f'attempt("file", lambda: {read}); attempt("files", lambda: {everything})'
        cache = tmp_path / "cache"
        client(server, script, cache=cache)
        client(server, 'api.upload_file(repo_id="tester/model", path_in_repo="a.txt", path_or_fileobj=b"new")')
        server.faults.add("503", times=99)
        found = client(server, script, cache=cache)
        assert (found["file"], found["files"]) == ("old", "old")
        server.faults.clear()
        found = client(server, script, cache=cache)
        assert (found["file"], found["files"]) == ("new", "new")


def test_lost_answers_of_single_calls(tmp_path):
    with serving(tmp_path / "hub") as server:
        server.add_repository("tester/model")
        for path in ("/api/repos/create", "/branch/", "/tag/", "/discussions"):
            server.faults.add("drop_after", method="POST", path=path)
        found = client(
            server,
            """
attempt("create", lambda: api.create_repo("new"))
attempt("branch", lambda: api.create_branch("tester/model", branch="next"))
attempt("tag", lambda: api.create_tag("tester/model", tag="v1"))
attempt("discussion", lambda: api.create_pull_request("tester/model", title="a"))
api.create_tag("tester/model", tag="v1", exist_ok=True)
results["again"] = api.create_repo("new", exist_ok=True).repo_id
""",
        )
        assert {found[name] for name in ("create", "branch", "tag", "discussion")} == {REMOTE}
        assert found["again"] == "tester/new"
        assert server.refs("tester/model").keys() == {"refs/heads/main", "refs/heads/next", "refs/tags/v1", "refs/pr/1"}


# --- the server itself -----------------------------------------------------------------------------------------------


def test_faults_count_only_what_matches(tmp_path):
    with serving(tmp_path / "hub") as server:
        server.add_repository("tester/model")
        later = server.faults.add("500", method="GET", path="/api/models/", origin="hub", nth=2, times=2)
        other = server.faults.add("500", origin="storage")
        found = client(
            server,
            """
for index in range(5):
    api.whoami()
    attempt(str(index), lambda: bool(api.repo_info("tester/model")))
""",
        )
        assert [found[str(index)] for index in range(5)] == [True, "HfHubHTTPError", "HfHubHTTPError", True, True]
        assert (later.seen, later.struck, other.seen) == (5, 2, 0)
        assert [e.fault for e in server.requests if e.status != 200] == ["500", "500"]
        with pytest.raises(AssertionError, match="unknown fault '418'"):
            server.faults.add("418")


def test_server_keeps_its_state_and_reports_its_crashes(tmp_path):
    with serving(tmp_path / "hub") as server:
        head = server.add_repository("tester/model")
    with serving(tmp_path / "hub") as server:
        assert server.refs("tester/model") == {"refs/heads/main": head}
    (tmp_path / "hub/repositories/model/tester--model/repository.json").write_text("{")
    ask = 'attempt("info", lambda: api.repo_info("tester/model"))'
    with pytest.raises(json.JSONDecodeError), serving(tmp_path / "hub") as server:
        assert client(server, ask)["info"] == "HfHubHTTPError"


def test_environment(tmp_path, monkeypatch):
    for name in (
        "HF_HUB_OFFLINE",
        "HF_TOKEN",
        "TRANSFORMERS_OFFLINE",
        "HTTPS_PROXY",
        "all_proxy",
        "HF_SPP_CACHE",
        "OTHER",
    ):
        monkeypatch.setenv(name, "1")
    with serving(tmp_path / "hub") as server:
        plain, xet = server.environment(None), server.environment("read", tmp_path / "cache", xet=True)
    assert plain.keys() & {"HF_HUB_OFFLINE", "HF_TOKEN", "TRANSFORMERS_OFFLINE", "HTTPS_PROXY", "all_proxy"} == set()
    assert plain["HF_SPP_CACHE"] == plain["OTHER"] == plain["HF_HUB_DISABLE_XET"] == "1"
    assert (xet["HF_HOME"], xet["HF_TOKEN"]) == (str(tmp_path / "cache"), server.tokens["read"])
    assert "HF_HUB_DISABLE_XET" not in xet


IN_A_SHELL = """
import os, sys
from huggingface_hub import HfApi, hf_hub_download
from hf_spp.assets import cache_folder
api = HfApi()
print(api.whoami()["name"], sorted(api.list_repo_files("someone/tiny")))
print(open(hf_hub_download("someone/tiny", "sub/notes.txt")).read(), cache_folder())
api.create_repo("me/new")
api.upload_file(path_or_fileobj=b"words", path_in_repo="a.txt", repo_id="me/new")
print(sorted(api.list_repo_files("me/new")), sys.argv[1:])
sys.exit(7)
"""


def run_in_a_shell(*arguments, **variables):
    command = [sys.executable, ROOT / "tests" / "hub_server.py", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_a_command_runs_with_a_hub_of_its_own(tmp_path):
    folder = write_files(tmp_path / "tiny", SMALL)
    script = [sys.executable, "-c", IN_A_SHELL, "--model", "x"]
    done = run_in_a_shell("--user", "me", "--repo", f"someone/tiny={folder}", "--", *script, HF_SPP_CACHE="/assets")
    assert done.stdout.splitlines() == [
        f"me {sorted(['.gitattributes', *SMALL])}",
        "words /assets",
        "['.gitattributes', 'a.txt'] ['--model', 'x']",
    ], done.stderr
    assert done.returncode == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny"]


@pytest.mark.parametrize("repository", ["tiny={}", "me/tiny={}/absent", "me/tiny"])
def test_a_command_with_a_wrong_repository_does_not_run(tmp_path, repository):
    done = run_in_a_shell("--repo", repository.format(tmp_path), "--", "touch", str(tmp_path / "ran"))
    assert done.returncode == 2
    assert "give ME/NAME=FOLDER, with a folder that is there" in done.stderr
    assert list(tmp_path.iterdir()) == []
