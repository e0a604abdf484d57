import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from hf_spp import CheckpointError, HubError, folders


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_folder_appears_whole(tmp_path):
    target = tmp_path / "deep" / "out"
    with folders.replacing_folder(target) as folder:
        (folder / "file").write_text("new")
        assert not target.exists()
        assert folder.parent == target.parent
    assert names(target.parent) == ["out"]
    assert (target / "file").read_text() == "new"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
@pytest.mark.parametrize("old", [True, False])
def test_crash_while_a_folder_is_built(error, old, tmp_path):
    target = tmp_path / "out"
    if old:
        target.mkdir()
        (target / "file").write_text("old")
    expected = CheckpointError if error is OSError else error

    def build():
        with folders.replacing_folder(target, overwrite=True) as folder:
            (folder / "file").write_text("new")
            raise error

    with pytest.raises(expected):
        build()
    assert names(tmp_path) == (["out"] if old else [])
    if old:
        assert (target / "file").read_text() == "old"


@pytest.mark.parametrize("crash_at", [1, 2])
def test_crash_while_a_folder_is_moved(crash_at, tmp_path, monkeypatch):
    target, replace, calls = tmp_path / "out", os.replace, []
    target.mkdir()
    (target / "file").write_text("old")

    def crash(source, destination):
        calls.append(source)
        if len(calls) == crash_at:
            raise OSError("crash")
        replace(source, destination)

    monkeypatch.setattr(os, "replace", crash)
    monkeypatch.setattr(folders, "_exchange", lambda one, other: False)
    with pytest.raises(CheckpointError, match="cannot be written"), folders.replacing_folder(target, overwrite=True):
        pass
    assert (target / "file").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_killed_while_a_folder_is_moved(tmp_path, monkeypatch):
    """Nothing is cleaned up after a kill; still one whole version lies there, if under another name."""
    target, replace = tmp_path / "out", os.replace
    target.mkdir()
    (target / "file").write_text("old")

    def killed(source, destination):
        if str(destination) == str(target):
            raise SystemExit
        replace(source, destination)

    monkeypatch.setattr(os, "replace", killed)
    monkeypatch.setattr(folders, "_exchange", lambda one, other: False)
    monkeypatch.setattr(shutil, "rmtree", lambda *arguments, **options: None)
    with pytest.raises(SystemExit), folders.replacing_folder(target, overwrite=True) as folder:
        (folder / "file").write_text("new")
    assert sorted(path.read_text() for path in tmp_path.rglob("file")) == ["new", "old"]


def test_errors_of_the_package_come_through(tmp_path):
    with pytest.raises(HubError, match="cannot be reached"), folders.replacing_folder(tmp_path / "out"):
        raise HubError("the Hub cannot be reached")


def test_what_may_be_replaced(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "empty").mkdir()
    folders.check_replaceable(tmp_path / "new")
    folders.check_replaceable(tmp_path / "empty")
    folders.check_replaceable(tmp_path / "full", overwrite=True)
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        folders.check_replaceable(tmp_path / "full")
    for overwrite in (True, False):
        with pytest.raises(CheckpointError, match="is a file"):
            folders.check_replaceable(tmp_path / "file", overwrite=overwrite)


def test_a_folder_is_replaced_in_one_step(tmp_path, monkeypatch):
    """Only a swap of two names leaves no moment without the target."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    monkeypatch.setattr(os, "replace", None)
    with folders.replacing_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "new").touch()
    assert names(tmp_path / "out") == ["new"]
    assert names(tmp_path) == ["out"]


def test_a_folder_is_replaced_where_names_cannot_be_swapped(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    monkeypatch.setattr(folders, "_exchange", lambda one, other: False)
    with folders.replacing_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "new").touch()
    assert names(tmp_path / "out") == ["new"]
    assert names(tmp_path) == ["out"]


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with folders.replacing_folder(tmp_path / "link") as folder:
        (folder / "file").touch()
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "real") == ["file"]


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_builds_is_not(tmp_path):
    script = """
import os, sys, time
from hf_spp import folders
with folders.replacing_folder(sys.argv[1]) as folder:
    (folder / "file").touch()
    os.utime(folder, (0, 0))
    print(folder, flush=True)
    time.sleep(60)
"""
    command = [sys.executable, "-c", script, str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        left = process.stdout.readline().strip()
        with folders.replacing_folder(tmp_path / "out", overwrite=True):
            pass
        assert os.path.isfile(os.path.join(left, "file"))
        process.send_signal(signal.SIGKILL)
        process.wait()
    with folders.replacing_folder(tmp_path / "out", overwrite=True):
        pass
    assert names(tmp_path) == ["out"]


def test_a_folder_that_was_just_made_is_not_taken_for_abandoned(tmp_path):
    (tmp_path / ".out.0123abcd.tmp").mkdir()
    with folders.replacing_folder(tmp_path / "out"):
        pass
    assert names(tmp_path) == [".out.0123abcd.tmp", "out"]
    assert time.time() - (tmp_path / ".out.0123abcd.tmp").stat().st_mtime < 60


@pytest.mark.parametrize("moved", range(5))
def test_files_come_between_those_that_give_them_meaning(moved, tmp_path, monkeypatch):
    """Whenever it stops, orders are never beside the weights of others."""
    for name in ("orders", "config", "weights-1", "weights-2", "other"):
        (tmp_path / name).write_text("old")
    replace, calls = os.replace, []

    def killed(source, destination):
        if len(calls) == moved:
            raise KeyboardInterrupt
        calls.append(destination)
        replace(source, destination)

    monkeypatch.setattr(os, "replace", killed)
    stopped = pytest.raises(KeyboardInterrupt) if moved < 4 else contextlib.nullcontext()
    with stopped, folders.replacing_files(tmp_path, ["config", "orders"], ["weights-*"]) as folder:
        for name in ("orders", "weights-1", "config", "sub/new"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("new")
    left = {name: (tmp_path / name).read_text() for name in names(tmp_path) if name != "sub"}
    assert left.pop("other") == "old"
    assert "weights-2" not in left
    if "orders" in left:
        assert left == {"orders": "new", "config": "new", "weights-1": "new"}
        assert (tmp_path / "sub" / "new").read_text() == "new"
    else:
        assert moved < 4
        assert "config" not in left or left == {"config": "new", "weights-1": "new"}


def test_files_of_a_kind_stay_where_none_of_it_is_built(tmp_path):
    (tmp_path / "weights").touch()
    with folders.replacing_files(tmp_path, ["orders"], ["weights*"]) as folder:
        (folder / "orders").touch()
    assert names(tmp_path) == ["orders", "weights"]


def test_files_that_cannot_be_built_change_nothing(tmp_path):
    (tmp_path / "orders").write_text("old")
    with pytest.raises(RuntimeError), folders.replacing_files(tmp_path, ["orders"], ["*"]):
        raise RuntimeError
    assert names(tmp_path) == ["orders"]
