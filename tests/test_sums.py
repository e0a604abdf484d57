import hashlib
import subprocess

import pytest

from hf_spp.checkpoint import sha256_of
from hf_spp.errors import CheckpointError
from hf_spp.sums import SUMS_NAME, check_sums, read_sums, write_sums


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "wörds.txt").write_bytes(b"of a tokenizer")
    (tmp_path / "model.safetensors").write_bytes(bytes(range(256)) * 10_000)
    (tmp_path / "empty").touch()
    (tmp_path / ".hidden").write_text("not published")
    write_sums(tmp_path)
    return tmp_path


def test_every_file_has_its_sum(folder):
    sums = read_sums(folder / SUMS_NAME)
    assert set(sums) == {"empty", "model.safetensors", "sub/wörds.txt"}
    assert all(sums[name] == hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in sums)
    assert set(check_sums(folder)) == set(sums)
    assert check_sums(folder, ["empty"]) == ("empty",)
    before = (folder / SUMS_NAME).read_bytes()
    write_sums(folder)
    assert (folder / SUMS_NAME).read_bytes() == before


def test_the_usual_program_reads_it(folder):
    run = subprocess.run(["sha256sum", "--check", "--strict", SUMS_NAME], cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "model.safetensors: OK" in run.stdout


def test_other_bytes_of_the_same_length_are_found(folder):
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[1_000_000] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors in .* its bytes differ"):
        check_sums(folder)
    check_sums(folder, ["empty"])


def test_missing_files_and_sums_are_found(folder):
    with pytest.raises(CheckpointError, match="has no sum of config"):
        check_sums(folder, ["config.json"])
    (folder / "empty").unlink()
    with pytest.raises(CheckpointError, match="lacks empty"):
        check_sums(folder)
    with pytest.raises(CheckpointError, match="cannot be read"):
        sha256_of(folder / "empty")


SUM = "0" * 64


@pytest.mark.parametrize("text", [
    "no sum\n", f"{SUM}  \n", f"{SUM[:-1]}  a\n", f"{SUM.replace('0', 'G')}  a\n", f"{SUM}  a\n{SUM}  a\n", "\n",
    f"{SUM}  ../a\n", f"{SUM}  /etc/passwd\n", f"{SUM}  a/../../b\n", f"{SUM}  a\\b\n", f"{SUM}  a\tb\n",
    f"{SUM}  ./a\n", f"{SUM}  a//b\n",
])  # fmt: skip
def test_damaged_lists_are_refused(tmp_path, text):
    (tmp_path / SUMS_NAME).write_text(text)
    with pytest.raises(CheckpointError):
        read_sums(tmp_path / SUMS_NAME)


def test_names_that_the_format_cannot_hold_are_refused(tmp_path):
    (tmp_path / "two\nlines").touch()
    with pytest.raises(CheckpointError, match="no plain path"):
        write_sums(tmp_path)
    assert not (tmp_path / SUMS_NAME).exists()
