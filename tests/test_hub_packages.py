import hashlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from hf_spp.errors import AssetError
from hf_spp.hub import packages

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

        monkeypatch.setattr(packages.subprocess, "Popen", start)
        monkeypatch.setattr(packages.shutil, "which", lambda name: f"/usr/bin/{name}")
        return asked

    return install


def fails_with(output):
    return f"import sys; print({output!r}); sys.exit(1)"


def test_wheel_arrives_whole(client, tmp_path):
    asked = client(WRITE_WHEEL)
    path = packages.download_wheel("tiny", "1.0", SHA256, tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "tiny-1.0-py3-none-any.whl"
    assert path.read_bytes() == CONTENT
    assert list(path.parent.iterdir()) == [path]
    assert asked[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:"} < set(asked[0])
    assert asked[0][-1] == "tiny==1.0"


def test_debian_package_arrives_under_its_plain_name(client, tmp_path):
    asked = client(WRITE_PACKAGE)
    path = packages.download_debian_package("tiny", "2:1.0", SHA256, tmp_path)
    assert path == tmp_path / "tiny_2:1.0_all.deb"
    assert path.read_bytes() == CONTENT
    assert asked == [["apt-get", "download", "tiny=2:1.0"]]


def test_download_replaces_an_older_file(client, tmp_path):
    client(WRITE_WHEEL)
    (tmp_path / "tiny-1.0-py3-none-any.whl").write_bytes(b"old")
    assert packages.download_wheel("tiny", "1.0", SHA256, tmp_path).read_bytes() == CONTENT


def test_wrong_checksum_leaves_nothing(client, tmp_path):
    client(WRITE_WHEEL)
    with pytest.raises(AssetError, match=f"wrong checksum: SHA-256 {SHA256}. Accepted: 0000"):
        packages.download_wheel("tiny", "1.0", "0" * 64, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_client_that_succeeds_without_a_file(client, tmp_path):
    client("pass")
    with pytest.raises(AssetError, match=r"pip failed.*\(status 0\) was: no output"):
        packages.download_wheel("tiny", "1.0", SHA256, tmp_path)


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
        packages.download_wheel("tiny", "1.0", SHA256, tmp_path)
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
        packages.download_debian_package("tiny", "1.0", SHA256, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_missing_pip(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(AssetError, match=r"has no pip module.*ensurepip"):
        packages.download_wheel("tiny", "1.0", SHA256, tmp_path)


def test_missing_apt(monkeypatch, tmp_path):
    monkeypatch.setattr(packages.shutil, "which", lambda name: None)
    with pytest.raises(AssetError, match="this machine has no apt-get"):
        packages.download_debian_package("tiny", "1.0", SHA256, tmp_path)


def test_crash_in_the_middle_leaves_nothing(client, monkeypatch, tmp_path):
    client("import time; open('tiny-1.0-py3-none-any.whl', 'wb').write(b'the'); time.sleep(60)")
    seen = []

    def interrupt(_):
        process_folders = list(tmp_path.iterdir())
        if any(any(folder.iterdir()) for folder in process_folders):
            seen.extend(process_folders)
            raise KeyboardInterrupt

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(packages.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        packages.download_wheel("tiny", "1.0", SHA256, tmp_path)
    assert len(seen) == 1
    assert list(tmp_path.iterdir()) == []


def test_terminal_gets_a_progress_bar(client, monkeypatch, tmp_path, capsys):
    client(WRITE_WHEEL)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    packages.download_wheel("tiny", "1.0", SHA256, tmp_path, size=len(CONTENT))
    shown = capsys.readouterr().err
    assert shown.rsplit("tiny", 1)[-1].strip()
    assert "14/14 bytes" in shown


def test_log_gets_one_line_without_a_terminal(client, tmp_path, caplog):
    client(WRITE_WHEEL)
    with caplog.at_level("INFO", logger="hf_spp.hub.packages"):
        packages.download_wheel("tiny", "1.0", SHA256, tmp_path)
    assert [record.getMessage() for record in caplog.records] == ["Downloading the wheel tiny==1.0"]


def test_bytes_in_survives_a_file_that_goes_away(monkeypatch, tmp_path):
    (tmp_path / "here").write_bytes(b"1234")
    monkeypatch.setattr(packages.os, "walk", lambda folder: [(str(tmp_path), [], ["here", "gone"])])
    assert packages._bytes_in(Path(tmp_path)) == 4
