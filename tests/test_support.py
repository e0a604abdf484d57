"""The table of families: that it is what the map says, and that the README and the command line show it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from hf_spp import CheckpointError, UnsupportedArchitectureError
from hf_spp.channels import ChannelGroup, ChannelMap, Refusal
from hf_spp.config import AXES
from hf_spp.support import __main__ as command
from hf_spp.support import survey
from hf_spp.support.families import (
    FAMILIES_FILE,
    README_MARKS,
    Families,
    Family,
    general_reason,
    load_families,
    replace_section,
)
from hf_spp.support.survey import Finding, collect, default_model, find_verdicts, model_types, verdicts

README = Path(__file__).parent.parent / "README.md"
SAMPLE = [
    *("bert", "clip", "deepseek_v3", "dinov2", "falcon", "gpt2"),
    *("llama", "qwen2_vl", "qwen3_moe", "resnet", "t5", "wav2vec2"),
]
TABLE = load_families()
same_transformers = pytest.mark.skipif(
    transformers.__version__ != TABLE.transformers, reason="the table is of another version of transformers"
)

ROTARY = "rotary position embedding: each frequency belongs to a fixed row of q and k"


def in_words(table, name):
    """A type's verdicts with the reasons in words."""
    found = {}
    for axis, verdict in table.families[name].verdicts.items():
        word, *numbers = verdict.split()
        found[axis] = (word, {table.reasons[int(number) - 1] for number in numbers})
    return found


# The shipped table


def test_the_readme_shows_the_shipped_table():
    text = README.read_text()
    assert replace_section(text, TABLE.to_markdown()) == text


def test_the_shipped_table_is_written_as_it_would_be_again():
    assert TABLE.to_json() == FAMILIES_FILE.read_text()
    assert json.loads(TABLE.to_json())["format_version"] == 1


def test_verdicts_and_reasons_of_the_shipped_table_belong_together():
    assert TABLE.axes == AXES
    used = set()
    for name, family in TABLE.families.items():
        for axis, verdict in family.verdicts.items():
            word, *numbers = verdict.split()
            assert axis in AXES, name
            assert (word == "yes") == (not numbers), name
            assert word in ("yes", "part", "no"), name
            used |= set(map(int, numbers))
    assert used == set(range(1, len(TABLE.reasons) + 1))


@same_transformers
def test_every_model_type_is_in_the_table_or_left_out_with_a_reason():
    assert sorted([*TABLE.families, *TABLE.left_out]) == model_types()
    assert all(TABLE.left_out.values())
    assert not [name for name, reason in TABLE.left_out.items() if "hf_spp" in reason or "process" in reason]


@same_transformers
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", SAMPLE)
def test_a_family_resolves_to_what_the_table_says(name):
    found = find_verdicts(name)
    assert found.model_class == TABLE.families[name].model_class
    assert {axis: (word, set(reasons)) for axis, (word, reasons) in found.verdicts.items()} == in_words(TABLE, name)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit", {"qk": "yes", "vo": "yes", "heads": "yes", "ffn": "yes", "hidden": "yes"}),
        ("llama", {"qk": "no", "vo": "yes", "heads": "yes", "ffn": "yes", "hidden": "yes"}),
        ("mixtral", {"qk": "no", "vo": "yes", "heads": "yes", "ffn": "yes", "experts": "yes", "hidden": "yes"}),
        ("resnet", {}),
    ],
)
def test_the_table_says_what_is_known(name, expected):
    assert {axis: word for axis, (word, _) in in_words(TABLE, name).items()} == expected


@pytest.mark.slow
@same_transformers
def test_the_whole_table_is_what_the_map_says():
    run = subprocess.run([sys.executable, "-m", "hf_spp.support"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr


# Verdicts


def group(axis):
    return ChannelGroup(f"a.{axis}", axis, 0, 1, 2, ())


def test_an_axis_is_legal_in_all_in_part_nowhere_or_absent():
    refused = (
        Refusal("vo", "b", "parameter b.x.weight is not understood"),
        Refusal("vo", "c", "parameter c.x.weight is not understood"),
        Refusal("qk", "a", ROTARY),
    )
    assert verdicts(ChannelMap((group("ffn"), group("vo")), refused)) == {
        "qk": ("no", (ROTARY,)),
        "vo": ("part", ("parameter … is not understood",)),
        "ffn": ("yes", ()),
    }


@pytest.mark.parametrize(
    ("reason", "general"),
    [
        (ROTARY, ROTARY),
        ("parameter layers.*.mlp.gate.act is not understood", "parameter … is not understood"),
        ("parameter weight of shape [3, 4] is not understood", "parameter … of shape … is not understood"),
        ("the stream has several widths, [768, 1024]", "the stream has several widths, …"),
        ("its 2048 inputs are 1024 channels several times", "its … inputs are … channels several times"),
        ("fc1 is a Conv2d, no plain linear layer", "… is a …, no plain linear layer"),
        ("qkv does not stack q, k and v", "… does not stack q, k and v"),
        ("no pattern explains key, value, pos_proj", "no pattern explains …"),
        ("q, k and v have 32, 64, 64 rows", "q, k and v have … rows"),
        ("values that are no parameter and stay", "values that are no parameter and stay"),
        ("it is not saved with the model", "it is not saved with the model"),
    ],
)
def test_reasons_lose_names_and_sizes(reason, general):
    assert general_reason(reason) == general


def test_reasons_are_numbered_as_they_occur_and_parts_are_known():
    no, other = ("no", ("never",)), ("part", ("never", "seldom"))
    findings = {
        "zoo_vision": Finding("ZooVision", {"qk": other}),
        "zoo": Finding("Zoo", {"qk": no, "vo": ("yes", ())}, holds=frozenset({"zoo_vision", "bert"})),
        "bert": Finding("Bert", {"hidden": ("no", ("seldom",))}),
        "yak": Finding("Yak", {"qk": no, "vo": ("yes", ())}),
        "lost": Finding(left_out="it needs the library maps"),
    }
    table = collect(findings)
    assert table.reasons == ("never", "seldom")
    assert table.families["yak"] == Family("Yak", {"qk": "no 1", "vo": "yes"})
    assert table.families["zoo_vision"] == Family("ZooVision", {"qk": "part 1 2"}, ("zoo",))
    assert table.families["bert"] == Family("Bert", {"hidden": "no 2"})
    assert table.left_out == {"lost": "it needs the library maps"}
    assert table.whole() == ["bert", "yak", "zoo"]
    assert table.rows(table.whole())[0] == (("no [1]", "yes", "–", "–", "–", "–"), ["yak", "zoo"])
    assert "| yak, zoo | no [1] | yes | – | – | – | – |" in table.to_markdown()


def test_a_type_without_a_model_is_left_out_and_said():
    assert find_verdicts("sam_prompt_encoder").left_out == "it has no model of its own"
    with pytest.raises(UnsupportedArchitectureError, match="describes no model: it has no model of its own"):
        default_model("sam_prompt_encoder")
    with pytest.raises(UnsupportedArchitectureError, match="model_type 'no-such-type' is unknown"):
        default_model("no-such-type")


def test_default_models_have_a_head_and_no_weights():
    model = default_model("qwen3_moe")
    assert type(model).__name__ == "Qwen3MoeForCausalLM"
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_failure_of_the_package_is_no_verdict(monkeypatch):
    def fail(model):
        raise IndexError("list index out of range")

    monkeypatch.setattr(survey, "channel_groups", fail)
    found = find_verdicts("bert")
    assert found.left_out == "hf_spp failed with IndexError: list index out of range"
    assert found.failed


# The command that writes it


def test_types_are_resolved_in_processes_that_may_die_or_take_too_long():
    found = dict(survey.survey(["bert", "no-such-type"], jobs=2, limit_s=120))
    assert found["bert"] == find_verdicts("bert")
    assert found["no-such-type"].left_out == "its process ended with 1"
    ((_, late),) = survey.survey(["bert"], limit_s=0)
    assert late.left_out == "not resolved in 0 s"
    assert late.failed


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The command over two types, in files of its own."""
    findings = {"bert": Finding("Bert", {"qk": ("yes", ())}), "lost": Finding(left_out="why")}
    monkeypatch.setattr(command, "model_types", lambda: list(findings))
    monkeypatch.setattr(command, "survey", lambda *_: iter(findings.items()))
    monkeypatch.setattr(command, "FAMILIES_FILE", tmp_path / "families.json")
    monkeypatch.setattr(command, "README", tmp_path / "README.md")
    (tmp_path / "README.md").write_text(f"before\n{README_MARKS[0]}\nold\n{README_MARKS[1]}\nafter\n")
    return tmp_path, findings


def test_the_command_writes_table_and_readme_and_tells_what_changed(small, capsys):
    folder, findings = small
    assert command.main(["--write"]) == 0
    out = capsys.readouterr().out
    assert f"1 of 2 types of transformers {transformers.__version__} resolved, 1 left out, in 0 s" in out
    table = load_families(folder / "families.json")
    assert table == Families(
        transformers.__version__, AXES, (), {"bert": Family("Bert", {"qk": "yes"})}, {"lost": "why"}
    )
    readme = (folder / "README.md").read_text()
    assert readme == f"before\n{table.to_markdown()}\nafter\n"
    assert command.main([]) == 0
    assert "says the same" in capsys.readouterr().out
    findings["bert"] = Finding("Bert", {"qk": ("no", ("never",))})
    assert command.main([]) == 1
    assert "bert qk: yes  →  no | never" in capsys.readouterr().out
    assert load_families(folder / "families.json") == table


def test_the_command_fails_where_the_package_did(small):
    _, findings = small
    findings["bert"] = Finding(left_out="hf_spp failed with IndexError", failed=True)
    assert command.main(["--write"]) == 1


def test_a_readme_without_marks_is_not_touched():
    with pytest.raises(CheckpointError, match="holds no section between"):
        replace_section("text", "section")
