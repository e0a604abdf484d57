"""Every code block and command of the README runs, offline; what it quotes is in the source; its links lead somewhere.

A block is known by its heading and language. One without a runner fails, and so does a runner without its block.
Blocks that need a Hub get the local one, with the user `tester` in place of `my-name`.
"""

import ast
import configparser
import functools
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import datasets
import pytest
import torch
from conftest import build_inputs, build_model
from hub_server import serving
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_hub_experiment import DATASETS, MODEL, add_dataset
from transformers import AutoModel, BertTokenizerFast, ViTImageProcessor
from typer.main import get_command

from hf_spp import Reordering, apply_spp, load_reordered
from hf_spp.cli import app
from hf_spp.support.families import load_families

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@dataclass(frozen=True)
class Block:
    """A fenced block; `line` is that of its fence."""

    language: str
    code: str
    line: int


def read_blocks() -> dict[str, Block]:
    """The fenced blocks by heading and language, a second one of a kind as `heading: language 2`."""
    blocks, heading, opened, counts = {}, "", None, Counter()
    for number, line in enumerate(README.splitlines(), 1):
        if opened is None and re.match(r"#+ ", line):
            heading = line.lstrip("# ")
        elif line.startswith("```") and opened is None:
            opened, lines = (line[3:], number), []
        elif line == "```":
            language, first = opened
            counts[kind] = counts[kind := f"{heading}: {language}"] + 1
            name = kind if counts[kind] == 1 else f"{kind} {counts[kind]}"
            blocks[name] = Block(language, "".join(f"{one}\n" for one in lines), first)
            opened = None
        elif opened is not None:
            lines.append(line)
    assert opened is None, f"the block in line {opened} is not closed"
    return blocks


BLOCKS = read_blocks()


# What blocks take for given


def tiny_vit(seed=0, num_labels=5):
    sizes = {"image_size": 16, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    return build_model("vit", seed=seed, num_labels=num_labels, **sizes)


def examples(count=16):
    batch = build_inputs(tiny_vit(), count)
    rows = [{"pixel_values": pixels, "labels": label} for pixels, label in zip(*batch.values(), strict=True)]
    return datasets.Dataset.from_list(rows).with_format("torch")


def with_model() -> dict[str, Any]:
    """`model`, `batches`, `inputs`, `train` and `test`, as the README says before the first of these blocks."""
    model = tiny_vit()
    batches = [build_inputs(model, 4, seed=seed) for seed in range(3)]
    return {"model": model, "batches": batches, "inputs": batches[0], "train": examples(), "test": examples(8)}


def with_folder() -> dict[str, Any]:
    tiny_vit().save_pretrained("path/to/fine-tuned-vit")
    return with_model()


def with_ordered_model() -> dict[str, Any]:
    names = with_model()
    apply_spp(names["model"])
    return names


def with_adapter() -> dict[str, Any]:
    model = build_model("llama")
    adapted = get_peft_model(build_model("llama"), LoraConfig(r=3, target_modules=["q_proj", "v_proj", "down_proj"]))
    adapted.save_pretrained("path/to/lora")
    reordering = apply_spp(model)
    model.save_pretrained("path/to/reordered-model")
    reordering.save_pretrained("path/to/reordered-model")
    return {}


def with_checkpoint() -> dict[str, Any]:
    build_model("llama").save_pretrained("path/to/llama")
    return {}


# What they leave


def chosen(names, printed):
    assert names["reordering"].axes == ("heads", "ffn")
    assert names["reordering"].config.metric == "taylor"


def halved(names, printed):
    whole, small = names["model"].num_parameters(), names["small"].num_parameters()
    assert 0.4 < small / whole < 0.6
    assert "% of the model's parameters" in printed
    assert Path("vit-half/model.safetensors").is_file()


def viewed(names, printed):
    assert names["outputs"].logits.shape == (4, 5)
    whole = names["model"](**names["inputs"]).logits
    assert not torch.allclose(whole, names["outputs"].logits)


def reported(names, printed):
    widths = [row.split(" | ")[0].strip("| ") for row in printed.splitlines() if row.startswith("|")]
    assert widths == ["Width", ":---", "full", "25 %", "50 %", "75 %"]
    assert Path("vit-widths/results.json").is_file()


def trained(names, printed):
    assert names["trainer"].state.global_step == 6
    assert names["callback"].reordering.changed


def scheduled(names, printed):
    schedule = names["callback"].schedule
    assert (schedule.strategy, schedule.every, schedule.min_change) == ("steps", 500, 0.01)


def trained_elastic(names, printed):
    assert list(names["trainer"].widths) == ["0.25", "0.5", "0.75"]
    assert names["small"].num_parameters() < names["model"].num_parameters() / 2


def carried(names, printed):
    before, after = (load_file(f"{folder}/adapter_model.safetensors") for folder in ("path/to/lora", "lora-reordered"))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def streamed(names, printed):
    original, copy = AutoModel.from_pretrained("path/to/llama"), AutoModel.from_pretrained("llama-spp")
    assert names["reordering"].changed
    Reordering.from_pretrained("llama-spp").undo(copy)
    assert all(torch.equal(copy.state_dict()[name], value) for name, value in original.state_dict().items())


def described(names, printed):
    assert all(axis in printed for axis in ("qk", "vo", "heads", "ffn"))
    assert "equal function: max|Δ| = " in printed


def shown(names, printed):
    assert printed == BLOCKS["How it works: text"].code


@dataclass(frozen=True)
class Python:
    """Runs a block in a folder of its own.

    Attributes:
        check: Takes the names that the block leaves and what it printed.
        setup: Gives the names that it takes for given.
    """

    check: Callable[[Mapping[str, Any], str], None]
    setup: Callable[[], dict[str, Any]] = dict


PYTHON = {
    "Choose what moves, and by which measure: python": Python(chosen, with_model),
    "Cut a smaller model: python": Python(halved, with_folder),
    "Run a model at a smaller width, on the memory of its own weights: python": Python(viewed, with_ordered_model),
    "Measure what each width is worth: python": Python(reported, with_ordered_model),
    "Reorder inside of a Trainer: python": Python(trained, with_model),
    "Reorder inside of a Trainer: python 2": Python(scheduled),
    "Train all widths in one run: python": Python(trained_elastic, with_ordered_model),
    "Carry LoRA adapters over: python": Python(carried, with_adapter),
    "Reorder a checkpoint larger than memory: python": Python(streamed, with_checkpoint),
    "Add an architecture in ten lines: python": Python(described),
    "How it works: python": Python(shown),
}
# Run below, each by a test of its own; the outputs with the code before them.
OWN_TESTS = {
    "hf-spp: console",
    "hf-spp: python",
    "hf-spp: text",
    "Quickstart on a fresh machine: bash",
    "Share on the Hub: python",
    "Download only what a slice needs: python",
    "Repeat the paper's comparison: bash",
    "Command line: bash",
    "How it works: text",
    "API reference: bash",
    "A page to play with: bash",  # test_app_page.py
    "Citation: bibtex",
}


def test_every_block_has_a_runner_and_every_runner_a_block():
    lines = {name: block.line for name, block in BLOCKS.items() if name not in PYTHON.keys() | OWN_TESTS}
    assert not lines, f"no test runs the blocks of README.md in these lines: {lines}"
    assert BLOCKS.keys() == PYTHON.keys() | OWN_TESTS


@pytest.mark.filterwarnings("default")  # As a user sees them: training on a CPU, saving an adapter.
@pytest.mark.parametrize("name", PYTHON)
def test_code_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {"__name__": "readme", **PYTHON[name].setup()}
    capsys.readouterr()
    exec(compile(BLOCKS[name].code, f"README.md, {name}", "exec"), names)
    PYTHON[name].check(names, capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_first_code_prints_the_output_below_it(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(BLOCKS["hf-spp: python"].code, {})
    expected = BLOCKS["hf-spp: text"].code.splitlines()
    # DeepSpeed, where it is installed, greets on the standard output.
    printed = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("[")]
    assert printed[:-1] == expected[:-1]
    # The figure depends on how the processor rounds.
    assert printed[-1].startswith("  equal function: max|Δ| = ")
    assert (tmp_path / "smollm2-spp" / "model.safetensors").is_file()


# What installs


def extras():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    return setup["metadata"]["name"], setup["options.extras_require"]


def test_quickstart_is_two_commands_and_ci_runs_the_second():
    install_and_run, install_and_test = BLOCKS["Quickstart on a fresh machine: bash"].code.splitlines()
    assert re.fullmatch(r"pip install .* && hf-spp demo", install_and_run)
    assert re.fullmatch(r"pip install .* && pytest.*", install_and_test)
    found = re.search(r"test_command=\$\(sed -n 's/(.*)/\\1/p' README.md\)", (ROOT / ".ci" / "run").read_text())
    assert found, ".ci/run does not take its test command from README.md"
    wanted = found[1].replace(r"\(", "(").replace(r"\)", ")")
    assert re.findall(wanted, README, flags=re.MULTILINE) == [install_and_test]
    # So what the first one installs is installed too.
    assert set(extras()[1]["demo"].split()) <= set(extras()[1]["test"].split())


def test_what_is_to_be_installed_exists():
    name, known = extras()
    assert re.fullmatch(r'\$ pip install "\.\[demo\]" +# .*\[demo\].*\n', BLOCKS["hf-spp: console"].code)
    named = re.findall(rf'"(?:{name}|\.)\[(\w+)\]"', README)
    assert set(named) <= set(known)
    assert {"demo", "test", "docs"} <= set(named)


def test_the_reference_is_made_by_the_command_that_is_tested():
    assert BLOCKS["API reference: bash"].code == "python .ci/reference.py reference\n"
    assert "def test_every_public_name_is_documented" in (ROOT / "tests" / "test_reference.py").read_text()


def test_the_paper_that_is_cited_is_the_one_that_is_named():
    citation = BLOCKS["Citation: bibtex"].code
    assert re.findall(r"arXiv:([\d.]+)\}", citation) == re.findall(r"arXiv:(2310\.\d+)", README)[:1]
    # The one of the cards.
    assert citation in (ROOT / "model_cards" / "dinov2-small-spp" / "README.md").read_text()


# On the Hub and on the command line


def run_commands(name, folder, environment):
    """Run the commands of a block; gives what each printed."""
    printed = {}
    for command in BLOCKS[name].code.splitlines():
        program, *words = shlex.split(command.replace("my-name", "tester"), comments=True)
        assert program == "hf-spp"
        run = subprocess.run(
            [Path(sys.executable).with_name("hf-spp"), *words],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, f"{command}\n{run.stdout}{run.stderr}"
        printed[words[0]] = run.stdout
    return printed


def save_classifier(folder, num_labels):
    tiny_vit(num_labels=num_labels).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)


@pytest.fixture
def hub(tmp_path):
    with serving(tmp_path / "hub", lfs_threshold=2000) as server:
        server.client = {**server.environment("write"), "HF_DATASETS_CACHE": str(tmp_path / "datasets")}
        yield server
        assert server.violations == []


@pytest.mark.slow
def test_code_that_needs_the_hub_runs(hub, tmp_path):
    save_classifier(tmp_path / "vit", 5)
    given = """
from transformers import AutoModelForImageClassification, ViTImageProcessor
from hf_spp import apply_spp
model = AutoModelForImageClassification.from_pretrained("vit")
processor, reordering = ViTImageProcessor.from_pretrained("vit"), apply_spp(model)
"""
    pushed, sliced = (
        BLOCKS[name].code for name in ("Share on the Hub: python", "Download only what a slice needs: python")
    )
    checked = "print(reordering.changed, small.config.intermediate_size)\n"
    script = (given + pushed + sliced + checked).replace("my-name", "tester")
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**hub.client, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "True 32"
    assert b"0.967" in hub.read("tester/vit-spp", "README.md")


@pytest.mark.slow
def test_commands_run_one_after_another(hub, tmp_path):
    save_classifier(tmp_path / "vit", 3)
    add_dataset(hub, "uoft-cs/cifar10", tmp_path / "cifar10", 3)
    printed = run_commands("Command line: bash", tmp_path, hub.client)
    assert "Reordering of ViTForImageClassification by taylor" in printed["reorder"]
    assert "spp_orders.safetensors" in hub.files("tester/vit-spp")
    _, reordering = load_reordered(tmp_path / "vit-pulled")
    assert reordering.changed
    assert (tmp_path / "vit-small" / "model.safetensors").stat().st_size < (
        0.8 * (tmp_path / "vit" / "model.safetensors").stat().st_size
    )


def add_bert_and_texts(hub, folder):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "good", "bad", "film"]
    (folder / "bert").mkdir()
    (folder / "bert" / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "bert" / "vocab.txt")).save_pretrained(folder / "bert")
    build_model("bert", "masked-lm").save_pretrained(folder / "bert")
    hub.add_repository("google-bert/bert-base-uncased", folder / "bert")
    rows = {"sentence": ["a good film", "a bad film"] * 30, "label": [1, 0] * 30}
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["negative", "positive"])}
    )
    (folder / "sst2" / "data").mkdir(parents=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(
        folder / "sst2" / "data" / "train-00000-of-00001.parquet"
    )
    hub.add_repository("stanfordnlp/sst2", folder / "sst2", kind="dataset")


@pytest.mark.slow
def test_comparisons_run(hub, tmp_path):
    save_classifier(tmp_path / "vit", 3)
    hub.add_repository(MODEL, tmp_path / "vit")
    for number, repo_id in enumerate(DATASETS.values()):
        add_dataset(hub, repo_id, tmp_path / f"data{number}", 3 + number)
    add_bert_and_texts(hub, tmp_path)
    printed = run_commands("Repeat the paper's comparison: bash", tmp_path, hub.client)
    assert "sst2" in printed["compare"]
    assert (tmp_path / "spp-comparison" / "results.json").is_file()
    assert (tmp_path / "sst2-comparison" / "results.json").is_file()


@pytest.mark.slow
def test_the_demo_runs(tmp_path):
    run = subprocess.run(
        [Path(sys.executable).with_name("hf-spp"), "demo", "--quick"], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "Pruning-Rank" in run.stdout
    assert {"results.json", "README.md", "accuracy.png", "checkpoint"} <= {path.name for path in tmp_path.glob("*/*")}


# By command that no block can run, as it does not end, the file of the test that runs it.
RUN_ELSEWHERE: dict[str, str] = {"app": "test_app_page.py"}


def test_the_table_of_commands_lists_those_there_are_and_each_is_run():
    rows = re.findall(r"^\| `hf-spp (\w+)", README, flags=re.MULTILINE)
    assert sorted(rows) == sorted(get_command(app).commands)
    code = "".join(block.code for block in BLOCKS.values() if block.language == "bash")
    run = re.findall(r"(?:^|&& )hf-spp (\w+)", code, flags=re.MULTILINE)
    assert {*run, *RUN_ELSEWHERE} == set(rows)
    assert all((ROOT / "tests" / name).is_file() for name in RUN_ELSEWHERE.values())


# What it says


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"(?:python|pytest[^`\n]*?) ((?:tests|examples)/[\w/]+\.py)", README)))
)
def test_commands_name_files_that_exist(path):
    assert (ROOT / path).is_file()


# The script of tables takes no arguments: it writes them.
@pytest.mark.slow
@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"python (tests/benchmarks/\w+\.py)", README)) - {"tests/benchmarks/tables.py"})
)
def test_benchmarks_start_as_printed(path):
    plain = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, path, "--help"], cwd=ROOT, env=plain, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "usage:" in run.stdout


def test_the_comparison_counts_the_types_that_can_be_reordered():
    table = load_families()
    moving = [
        one for one in table.families.values() if any(not word.startswith("no") for word in one.verdicts.values())
    ]
    assert f"[{len(moving)} of {len(table.families)} model types]" in README


def test_figures_in_the_text_stand_in_the_tables():
    """Beside those that benchmarks write, the text names figures, which must not grow old."""
    tables = "".join(re.findall(r"<!-- \S+/\S+ -->.*?<!-- end -->", README, flags=re.DOTALL))
    known = set(re.findall(r"\d+\.\d", tables))
    for start, end in (("In short, as means over three seeds:", "!["), ("Take another one if", "## ")):
        named = re.findall(r"\b\d+\.\d\b", README.partition(start)[2].partition(end)[0])
        assert named
        assert set(named) <= known


@functools.cache
def raised_messages():
    """By class of error, the texts that the package raises it with; each value in them is a `…`."""
    found = {}
    for path in (ROOT / "hf_spp").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args):
                continue
            text = node.args[0]
            parts = text.values if isinstance(text, ast.JoinedStr) else [text]
            words = [str(part.value) if isinstance(part, ast.Constant) else "…" for part in parts]
            found.setdefault(node.func.id, []).append("".join(words))
    return found


MESSAGES = re.findall(r"^\| `(\w+Error)`: `(.*?)` \|", README, flags=re.MULTILINE)


def test_troubleshooting_has_messages():
    assert len(MESSAGES) >= 12


@pytest.mark.parametrize(("error", "message"), MESSAGES, ids=lambda text: text[:40])
def test_quoted_messages_are_raised(error, message):
    pattern = ".*".join(re.escape(part) for part in message.split("…"))
    texts = raised_messages()[error]
    assert any(re.search(pattern, text) for text in texts), f"no {error} of the package says {message!r}"


# Links


def slug(heading):
    """The anchor that GitHub gives a heading."""
    text = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def anchors():
    text = re.sub(r"^```.*?^```$", "", README, flags=re.DOTALL | re.MULTILINE)
    counts, found = Counter(), set()
    for heading in re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE):
        name = slug(heading)
        found.add(name if not counts[name] else f"{name}-{counts[name]}")
        counts[name] += 1
    return found


def links():
    text = re.sub(r"^```.*?^```$", "", README, flags=re.DOTALL | re.MULTILINE)
    return sorted(
        {*re.findall(r"\]\(([^)\s]+)\)", text), *re.findall(r"^\[[^\]]+\]: (\S+)$", text, flags=re.MULTILINE)}
    )


@pytest.mark.parametrize("link", [link for link in links() if "://" not in link])
def test_links_lead_somewhere(link):
    path, _, anchor = unquote(link).partition("#")
    assert not path or (ROOT / path).exists(), f"{path} does not exist"
    assert not anchor or (not path and anchor in anchors()), f"no heading has the anchor {anchor}"


def test_marks_of_links_are_defined_and_used():
    defined = set(re.findall(r"^\[([^\]]+)\]: ", README, flags=re.MULTILINE))
    assert defined == set(re.findall(r"\]\[(\w+)\]", README))
