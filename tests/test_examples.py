"""The example scripts: they print what their docstrings show, with figures that say what the scripts are about."""

import ast
import dataclasses
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import TrainingArguments

ROOT = Path(__file__).parent.parent
SCRIPTS = {path.stem: path for path in sorted((ROOT / "examples").glob("*.py"))}
# What a script runs after: a Hub that holds what another script wrote.
ON_A_HUB = {"slice_from_hub": ("me/fortunes", "text_classification", "text-classification-spp")}
NUMBER = r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]\d+)?"


def blocks(name):
    """The indented parts of a docstring: commands, and what the script prints."""
    docstring = ast.get_docstring(ast.parse(SCRIPTS[name].read_text()))
    found = re.findall(r"(?:^    .*\n?)+", docstring, flags=re.MULTILINE)
    return [[line[4:].rstrip() for line in block.splitlines()] for block in found]


def is_command(block):
    return block[0].startswith(("python ", "accelerate "))


def shape(line):
    """A pattern of a printed line in which figures, the gaps before them and what a model writes may differ."""
    parts = re.split(rf"({NUMBER}|'.*')", re.sub(" +", " ", line))
    return "".join(
        "'.*'" if part.startswith("'") else NUMBER if index % 2 else re.escape(part).replace(r"\ ", " +")
        for index, part in enumerate(parts)
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_docstrings_say_how_to_run_and_what_is_printed(name):
    source = SCRIPTS[name].read_text()
    assert len(source.splitlines()) < 120
    docstring = ast.get_docstring(ast.parse(source))
    assert "\n\n    python " in docstring
    assert "Prints " in docstring
    assert len([block for block in blocks(name) if not is_command(block)]) == 1
    commands = "\n".join("\n".join(block) for block in blocks(name) if is_command(block))
    assert f"examples/{name}.py" in commands
    fields = set(re.findall(r"^    (\w+): ", source, flags=re.MULTILINE))
    if "TrainingArguments" in source:
        fields |= {field.name for field in dataclasses.fields(TrainingArguments)}
    assert set(re.findall(r"--(\w+)", commands)) <= fields | {"repo"}
    if name not in ON_A_HUB:
        assert "output_dir" in fields


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """A function that runs a script, once, and gives the lines it prints about itself."""
    folder, known = tmp_path_factory.mktemp("examples"), {}

    def run(name):
        if name in known:
            return known[name]
        command = [sys.executable, str(SCRIPTS[name])]
        if name in ON_A_HUB:
            repo_id, before, checkpoint = ON_A_HUB[name]
            run(before)
            hub = [sys.executable, str(ROOT / "tests" / "hub_server.py"), "--repo", f"{repo_id}={checkpoint}", "--"]
            command = [*hub, *command, "--model", repo_id]
        start = time.perf_counter()
        done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)
        print(f"{name}: {time.perf_counter() - start:.0f} s")
        assert done.returncode == 0, done.stderr
        assert "Warning" not in done.stderr, done.stderr
        # The Trainer's log, and the greeting of DeepSpeed where it is installed.
        known[name] = folder, [line for line in done.stdout.splitlines() if not line.startswith(("{", "["))]
        return known[name]

    return run


def environment():
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}


def numbers(line):
    return [float(number.replace(",", "")) for number in re.findall(NUMBER, line)]


def check_reorder(folder, lines):
    assert numbers(lines[-2]).pop() < 1e-4
    assert lines[-1] == "undone bit for bit: True"
    assert_checkpoint(folder / "minilm-spp")


def check_image_classification(folder, lines):
    accuracy, f1 = numbers(lines[-2])[:1] + numbers(lines[-2])[2:3]
    assert accuracy > 0.3
    assert f1 > 0.3
    assert_checkpoint(folder / "image-classification-spp")
    assert "accuracy" in (folder / "image-classification-spp" / "README.md").read_text()


def check_text_classification(folder, lines):
    (_, parameters, whole), (_, half, cut, refitted), (_, quarter, *_) = (re.split(" +", line) for line in lines[1:4])
    assert float(whole) > 0.6
    assert float(refitted) > float(whole) - 0.1
    assert float(refitted) > float(cut) - 0.05
    assert numbers(parameters) > numbers(half) > numbers(quarter)
    assert_checkpoint(folder / "text-classification-spp")
    widths = sorted(path.name for path in (folder / "text-classification-spp" / "spp_widths").iterdir())
    assert widths == ["half.safetensors", "quarter.safetensors"]


def check_causal_language_model(folder, lines):
    before, after, small = lines[0], lines[-2], lines[-1]
    assert "Paris" in before
    assert after.removeprefix("after").split() == before.removeprefix("before").split()
    assert "qk     stays in place" in lines[-4]
    assert numbers(small)[0] < numbers(before)[0]
    assert numbers(before)[1] < numbers(small)[1] < 2 * numbers(before)[1]
    assert (folder / "causal-language-model-spp" / "model.safetensors").is_file()


def check_lora(folder, lines):
    assert numbers(lines[1])[1] < numbers(lines[0])[1]
    assert numbers(lines[-2])[0] < 1e-4
    assert numbers(lines[-1])[0] > 0.1
    assert (folder / "lora-spp" / "original" / "adapter_model.safetensors").is_file()


def check_elastic_fine_tuning(folder, lines):
    full, _, half = (numbers(line)[-2:] for line in lines[1:4])
    assert full[1] > 0.5
    assert half[1] > half[0]
    assert numbers(lines[4])[1] < numbers(lines[4])[0]
    assert_checkpoint(folder / "elastic-spp")
    assert (folder / "elastic-spp" / "spp_widths" / "half.safetensors").is_file()


def check_slice_from_hub(folder, lines):
    read, whole, _, share, *_ = numbers(lines[0])
    assert read < whole
    assert share < 1.5
    assert 0 < numbers(lines[1])[0] < 22_000_000
    assert lines[2].startswith("food: ")


def check_accelerate_loop(folder, lines):
    losses = [numbers(line)[1] for line in lines if line.startswith("step ")]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    (moved,) = (numbers(line)[0] for line in lines if line.startswith("reordered"))
    assert moved < 1e-4
    assert_checkpoint(folder / "accelerate-spp")


def check_compare_methods(folder, lines):
    accuracy = {line.split(" | ")[0].strip("| "): numbers(line)[0] for line in lines[2:5]}
    assert accuracy["Original"] == pytest.approx(accuracy["SPP"], abs=3)
    assert accuracy["Pruning-Rank"] < accuracy["Original"]
    moved = {line.split(":")[0]: numbers(line)[0] for line in lines if "logits moved" in line}
    assert moved["original"] == 0
    assert moved["spp"] < 1e-4
    assert moved["pruning-rank"] > 0.1
    assert (folder / "comparison-spp" / "results.json").is_file()


def assert_checkpoint(folder):
    assert (folder / "model.safetensors").is_file()
    assert (folder / "spp_orders.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_prints_what_its_docstring_shows(name, printed):
    folder, lines = printed(name)
    (shown,) = (block for block in blocks(name) if not is_command(block))
    lines = [line.rstrip() for line in lines if line.strip()]
    for line, wanted in zip(lines, shown, strict=False):
        assert re.fullmatch(shape(wanted), line)
    assert len(lines) == len(shown)
    globals()[f"check_{name}"](folder, lines)


@pytest.mark.distributed
def test_the_loop_runs_on_two_processes(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launch, str(SCRIPTS["accelerate_loop"]), "--max_steps", "10"]
    variables = {"ACCELERATE_USE_CPU": "true", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env={**environment(), **variables}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if not line.startswith("[")]
    assert [line.split(":")[0] for line in lines[:-1]] == ["step 5", "reordered", "step 10"]
    assert numbers(lines[2])[1] < numbers(lines[0])[1]
    assert_checkpoint(tmp_path / "accelerate-spp")
