"""What the documentation shows is what happens: README code, cards, examples."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.tables import TABLES, written
from huggingface_hub import ModelCard
from typer.main import get_command

from hf_spp.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


def test_quickstart_is_two_commands():
    install_and_run, install_and_test = blocks("bash")[0].splitlines()
    assert re.fullmatch(r"pip install .* && hf-spp demo", install_and_run)
    assert re.fullmatch(r"pip install .* && pytest.*", install_and_test)


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.strip().splitlines()[0][:40])
def test_readme_code_is_python(code):
    compile(code, "README.md", "exec")


def test_readme_shows_what_a_group_looks_like(capsys):
    code = next(block for block in blocks("python") if "channel_groups" in block)
    exec(code, {})
    assert capsys.readouterr().out == blocks("text")[1]


def test_readme_shows_a_model_of_ones_own(capsys):
    code = next(block for block in blocks("python") if "register_architecture" in block)
    exec(code, {"__name__": "readme"})
    report = capsys.readouterr().out
    assert all(axis in report for axis in ("qk", "vo", "heads", "ffn"))
    assert "equal function: max|Δ| = " in report


def test_readme_lists_the_commands_there_are():
    assert set(re.findall(r"^\| `hf-spp (\w+)", README, flags=re.MULTILINE)) == set(get_command(app).commands)


@pytest.mark.parametrize("card", sorted((ROOT / "model_cards").rglob("*.md")), ids=lambda path: path.parent.name)
def test_cards_parse_and_their_plots_exist(card):
    parsed = ModelCard.load(card)
    assert parsed.data.library_name == "transformers"
    assert parsed.data.eval_results
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", parsed.text):
        assert (card.parent / picture).is_file()


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.folder)
def test_readme_shows_what_benchmarks_found(table):
    assert written(README, table) == README
    assert (ROOT / "model_cards" / table.folder / "widths.png").is_file()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_readme_output_is_what_its_code_prints(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(blocks("python")[0], {})
    shown = blocks("text")[0].splitlines()
    # DeepSpeed, where it is installed, greets on the standard output.
    printed = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("[")]
    assert printed[:-1] == shown[:-1]
    # The figure depends on how the processor rounds.
    assert printed[-1].startswith("  equal function: max|Δ| = ")
    assert (tmp_path / "smollm2-spp" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples_run(example, tmp_path):
    run = subprocess.run([sys.executable, str(example), str(tmp_path / "out")], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "out" / "spp_orders.safetensors").is_file()
