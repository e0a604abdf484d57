import hashlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hf_spp import hub
from hf_spp.errors import AssetError, CheckpointError, HubError

CONTENT = b"the whole file"
SHA256 = hashlib.sha256(CONTENT).hexdigest()
WRITE_WHEEL = f"open('tiny-1.0-py3-none-any.whl', 'wb').write({CONTENT!r})"
WRITE_PACKAGE = f"open('tiny_2%3a1.0_all.deb', 'wb').write({CONTENT!r})"


@pytest.fixture
def client(monkeypatch):
    """Run a Python script in place of pip or apt-get; the list holds the commands that were asked for."""
    asked = []
    popen = subprocess.Popen

    def install(script):
        def start(command, **settings):
            asked.append(list(command))
            return popen([sys.executable, "-c", script], **settings)

        monkeypatch.setattr(hub.subprocess, "Popen", start)
        monkeypatch.setattr(hub.shutil, "which", lambda name: f"/usr/bin/{name}")
        return asked

    return install


def fails_with(output):
    return f"import sys; print({output!r}); sys.exit(1)"


# --- files of repositories -------------------------------------------------------------------------------------------


def test_file_of_local_folder(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "config.json").write_text("{}")
    assert hub.resolve_file(tmp_path, "sub/config.json") == tmp_path / "sub" / "config.json"
    assert hub.resolve_file(str(tmp_path), "sub/config.json") == tmp_path / "sub" / "config.json"


def test_local_folder_without_the_file_says_what_it_holds(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(CheckpointError, match=r"no file 'config.json'; it holds notes\.txt\."):
        hub.resolve_file(tmp_path, "config.json")


@pytest.mark.parametrize("filename", ["../secret.json", "/etc/hostname", "a/../../b", ""])
def test_file_name_stays_inside(tmp_path, filename):
    with pytest.raises(CheckpointError, match="does not stay inside"):
        hub.resolve_file(tmp_path, filename)


def test_neither_folder_nor_repository():
    with pytest.raises(HubError, match="neither a folder on this machine nor a repository id"):
        hub.resolve_file("./no/such/folder", "config.json")


def answer(kind, message="refused"):
    # The constructors want a response of the HTTP client, which differs between versions of huggingface_hub.
    error = kind.__new__(kind)
    error.args = (message,)
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (answer(RepositoryNotFoundError), "'user/model' was not found on the Hub"),
        (answer(GatedRepoError), "'user/model' is gated"),
        (answer(RevisionNotFoundError), "no revision None"),
        (answer(RemoteEntryNotFoundError), "'user/model' has no file 'config.json'"),
        (answer(HfHubHTTPError, "status 503"), "could not be downloaded: status 503"),
        (OSError("disk full"), "could not be downloaded: disk full"),
        (RuntimeError("connection reset"), "could not be downloaded: connection reset"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_refusals_of_the_hub(monkeypatch, error, message):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(HubError, match=message) as caught:
        hub.resolve_file("user/model", "config.json")
    assert "Accepted:" in str(caught.value)
    assert caught.value.__cause__ is error


def test_offline_without_cached_file(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="not in the local cache, and the Hub cannot be reached"):
        hub.resolve_file("user/model", "config.json", cache_dir=tmp_path)


def test_offline_with_cached_file(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    commit = "0" * 40
    repo = tmp_path / "models--user--model"
    for folder in (repo / "refs", repo / "snapshots" / commit):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "snapshots" / commit / "config.json").write_text("{}")
    assert hub.resolve_file("user/model", "config.json", cache_dir=tmp_path).read_text() == "{}"
    with pytest.raises(HubError, match=r"File 'other.json' of 'user/model' \(revision 'main'\) is not in the local"):
        hub.resolve_file("user/model", "other.json", revision="main", cache_dir=tmp_path)


# --- wheels and Debian packages --------------------------------------------------------------------------------------


def test_wheel_arrives_whole(client, tmp_path):
    asked = client(WRITE_WHEEL)
    path = hub.download_wheel("tiny", "1.0", SHA256, tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "tiny-1.0-py3-none-any.whl"
    assert path.read_bytes() == CONTENT
    assert list(path.parent.iterdir()) == [path]
    assert asked[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:"} < set(asked[0])
    assert asked[0][-1] == "tiny==1.0"


def test_debian_package_arrives_under_its_plain_name(client, tmp_path):
    asked = client(WRITE_PACKAGE)
    path = hub.download_debian_package("tiny", "2:1.0", SHA256, tmp_path)
    assert path == tmp_path / "tiny_2:1.0_all.deb"
    assert path.read_bytes() == CONTENT
    assert asked == [["apt-get", "download", "tiny=2:1.0"]]


def test_download_replaces_an_older_file(client, tmp_path):
    client(WRITE_WHEEL)
    (tmp_path / "tiny-1.0-py3-none-any.whl").write_bytes(b"old")
    assert hub.download_wheel("tiny", "1.0", SHA256, tmp_path).read_bytes() == CONTENT


def test_wrong_checksum_leaves_nothing(client, tmp_path):
    client(WRITE_WHEEL)
    with pytest.raises(AssetError, match=f"wrong checksum: SHA-256 {SHA256}. Accepted: 0000"):
        hub.download_wheel("tiny", "1.0", "0" * 64, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_client_that_succeeds_without_a_file(client, tmp_path):
    client("pass")
    with pytest.raises(AssetError, match=r"pip failed.*\(status 0\) was: no output"):
        hub.download_wheel("tiny", "1.0", SHA256, tmp_path)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("WARNING: Retrying after NewConnectionError\nERROR: No matching distribution found", "cannot reach its pack"),
        ("ERROR: No matching distribution found for tiny==1.0", "does not offer this version"),
        ("ERROR: disk", "Run its command by hand to see why.*was: ERROR: disk"),
    ],
)
def test_failures_of_pip(client, tmp_path, output, message):
    client(fails_with(output))
    with pytest.raises(AssetError, match=message) as caught:
        hub.download_wheel("tiny", "1.0", SHA256, tmp_path)
    assert f"Accepted: that file in '{tmp_path}'" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("E: Unable to locate package tiny", "has no package lists.*Run `apt-get update`"),
        ("E: Version '1.0' for 'tiny' was not found", "lists offer another version"),
        ("E: Failed to fetch x  404  Not Found", "lists offer another version"),
        ("E: Failed to fetch x  Temporary failure resolving 'mirror'", "cannot reach its mirror"),
        ("E: odd", "apt-get failed.*was: E: odd"),
    ],
)
def test_failures_of_apt(client, tmp_path, output, message):
    client(fails_with(output))
    with pytest.raises(AssetError, match=message):
        hub.download_debian_package("tiny", "1.0", SHA256, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_missing_pip(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(AssetError, match=r"has no pip module.*ensurepip"):
        hub.download_wheel("tiny", "1.0", SHA256, tmp_path)


def test_missing_apt(monkeypatch, tmp_path):
    monkeypatch.setattr(hub.shutil, "which", lambda name: None)
    with pytest.raises(AssetError, match="this machine has no apt-get"):
        hub.download_debian_package("tiny", "1.0", SHA256, tmp_path)


def test_crash_in_the_middle_leaves_nothing(client, monkeypatch, tmp_path):
    client("import time; open('tiny-1.0-py3-none-any.whl', 'wb').write(b'the'); time.sleep(60)")
    seen = []

    def interrupt(_):
        process_folders = list(tmp_path.iterdir())
        if any(any(folder.iterdir()) for folder in process_folders):
            seen.extend(process_folders)
            raise KeyboardInterrupt

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(hub.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        hub.download_wheel("tiny", "1.0", SHA256, tmp_path)
    assert len(seen) == 1
    assert list(tmp_path.iterdir()) == []


def test_terminal_gets_a_progress_bar(client, monkeypatch, tmp_path, capsys):
    client(WRITE_WHEEL)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    hub.download_wheel("tiny", "1.0", SHA256, tmp_path, size=len(CONTENT))
    shown = capsys.readouterr().err
    assert shown.rsplit("tiny", 1)[-1].strip()
    assert "14/14 bytes" in shown


def test_log_gets_one_line_without_a_terminal(client, tmp_path, caplog):
    client(WRITE_WHEEL)
    with caplog.at_level("INFO", logger="hf_spp.hub"):
        hub.download_wheel("tiny", "1.0", SHA256, tmp_path)
    assert [record.getMessage() for record in caplog.records] == ["Downloading the wheel tiny==1.0"]


def test_bytes_in_survives_a_file_that_goes_away(monkeypatch, tmp_path):
    (tmp_path / "here").write_bytes(b"1234")
    monkeypatch.setattr(hub.os, "walk", lambda folder: [(str(tmp_path), [], ["here", "gone"])])
    assert hub._bytes_in(Path(tmp_path)) == 4


def test_files_of_a_folder_are_found_by_pattern(tmp_path):
    for name in ("tokenizer.json", "tokenizer/inner.json", "1_Pooling/config.json", "other.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    found = hub.find_files(tmp_path, ["tokenizer*", "[0-9]_*/*", "missing"])
    assert found == {name: tmp_path / name for name in ("tokenizer.json", "1_Pooling/config.json")}


def test_files_of_a_repository_that_is_not_there_are_refused(tmp_path):
    with pytest.raises(HubError, match="The files of 'not a repository' could not be downloaded"):
        hub.find_files("not a repository", ["*"])
