"""The coverage table's own judgement on tiny cases, and, marked slow, the table over every model type."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import coverage_table
import judgement
import pytest
import torch
import zoo
from conftest import build_inputs, build_model, same_bits, weights_of
from coverage_table import combine, judge_types, summarize
from judgement import Finding, judge_model, random_orders
from torch import nn

from hf_spp import UnsupportedArchitectureError, channel_groups
from hf_spp.channels import ChannelGroup, ChannelMap, Member, Refusal
from hf_spp.config import AXES

LEAST_PERCENT = {"attention_or_ffn": 96, "attention_and_ffn": 88, "vo_and_heads_and_ffn": 80}
"""Least share of the model types with attention or feed-forward units for which these axes are equal."""
LEAST_HIDDEN = 150
"""Least number of model types for which the residual stream is equal."""


# Judging one model


def judge(model, groups):
    return judge_model(model, build_inputs(model, labels=False), lambda model: groups)


def without_last_member(groups, *names):
    """The map with groups that forget one tensor which must move with the others."""
    return ChannelMap(
        tuple(dataclasses.replace(g, members=g.members[:-1]) if g.name in names else g for g in groups), groups.refused
    )


def idle_group(model):
    """A group of two layers that are in the model but not in its forward."""
    model.idle = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 6))
    members = (Member("idle.0.weight", "c i"), Member("idle.0.bias", "c"), Member("idle.1.weight", "o c"))
    return ChannelGroup("idle.ffn", "ffn", None, 1, 5, members)


@pytest.mark.parametrize("name", ["bert", "dinov2", "qwen3", "t5"])
def test_a_right_map_is_equal(name):
    model = build_model(name)
    findings = judge_model(model, build_inputs(model, labels=False))
    assert tuple(findings) == AXES
    for axis, finding in findings.items():
        if axis in channel_groups(model).axes:
            assert finding.verdict == "equal", finding
            assert finding.difference <= judgement.TOLERANCE
            assert finding.control > judgement.SHOWN
        else:
            assert finding.verdict == "refused"
            assert finding.reason


def test_the_model_is_put_back():
    model = build_model("bert", dtype=torch.float64)
    weights = weights_of(model)
    judge(model, without_last_member(channel_groups(model), "encoder.layer.0.ffn"))
    assert same_bits(model, weights)


def test_a_group_that_forgets_a_tensor_is_wrong():
    model = build_model("bert")
    ffn = [group.name for group in channel_groups(model) if group.axis == "ffn"]
    findings = judge(model, without_last_member(channel_groups(model), ffn[1]))
    assert findings["ffn"].verdict == "wrong"
    assert findings["ffn"].difference > judgement.SHOWN
    assert findings["ffn"].wrong_groups == [ffn[1]]
    assert findings["vo"].verdict == "equal"


def test_wrong_groups_are_named_once_for_each_kind():
    model = build_model("bert")
    ffn = [group.name for group in channel_groups(model) if group.axis == "ffn"]
    findings = judge(model, without_last_member(channel_groups(model), *ffn))
    assert findings["ffn"].wrong_groups == ffn[:1]


def test_a_group_on_an_unused_module_is_not_shown():
    model = build_model("bert")
    finding = judge(model, ChannelMap((idle_group(model),)))["ffn"]
    assert (finding.verdict, finding.reason) == ("not shown", "its modules never run")
    assert finding.idle_groups == ["idle.ffn"]


def test_an_unused_module_beside_used_ones_is_listed():
    model = build_model("bert")
    used = channel_groups(model).select(["ffn"])
    finding = judge(model, ChannelMap((*used, idle_group(model))))["ffn"]
    assert finding.verdict == "equal"
    assert finding.idle_groups == ["idle.ffn"]


def test_a_group_that_the_outputs_ignore_is_not_shown():
    model = build_model("bert")
    groups = channel_groups(model).select(["ffn"])
    for group in groups:
        nn.init.zeros_(model.get_parameter(f"bert.{group.members[-1].tensor.removeprefix('bert.')}"))
    finding = judge(model, groups)["ffn"]
    assert (finding.verdict, finding.reason) == ("not shown", "the outputs ignore a wrong order")


def test_an_unsupported_architecture_is_refused():
    def refuse(model):
        raise UnsupportedArchitectureError("no channel\nmap")

    model = build_model("bert")
    findings = judge_model(model, build_inputs(model), refuse)
    assert {str(finding) for finding in findings.values()} == {"refused: no channel map"}


def test_any_other_exception_is_an_error():
    def fail(model):
        raise IndexError("tuple index out of range")

    model = build_model("bert")
    findings = judge_model(model, build_inputs(model), fail)
    assert {str(finding) for finding in findings.values()} == {"error: IndexError: tuple index out of range"}


def test_an_exception_on_one_axis_is_an_error_there_only():
    model = build_model("bert")
    missing = ChannelGroup("missing.qk", "qk", None, 1, 4, (Member("missing.weight", "c i"),))
    findings = judge(model, ChannelMap((missing, *channel_groups(model).select(["vo"]))))
    assert str(findings["qk"]) == "error: KeyError: 'missing.weight'"
    assert findings["vo"].verdict == "equal"


def test_an_axis_that_is_not_offered_is_refused_with_its_reason():
    model = build_model("bert")
    groups = channel_groups(model).select(["ffn"])
    findings = judge(model, ChannelMap(groups.groups, (Refusal("qk", "layer.0", "rotary"),)))
    assert str(findings["qk"]) == "refused: rotary"
    assert str(findings["vo"]) == "refused: the model has no such channels"


def test_nan_is_not_shown():
    model = build_model("bert")
    groups = channel_groups(model)
    nn.init.constant_(model.get_parameter(groups.groups[0].members[0].tensor), float("nan"))
    finding = judge(model, groups)["ffn"]
    assert str(finding) == "not shown: NaN comes out (logits)"


def test_a_model_that_differs_from_run_to_run_is_not_shown():
    model = build_model("bert")

    def drift(module, arguments):
        module.cls.predictions.bias.data.add_(1)

    model.register_forward_pre_hook(drift)
    finding = judge(model, channel_groups(model))["ffn"]
    assert finding.verdict == "not shown"
    assert "not deterministic" in finding.reason


def test_inputs_that_do_not_run_are_not_shown():
    model = build_model("bert")
    finding = judge_model(model, {"pixel_values": torch.ones(1, 3)})["ffn"]
    assert finding.verdict == "not shown"
    assert finding.reason.startswith("the model does not run in float64, ValueError")


def test_a_change_that_cannot_be_undone_is_wrong(monkeypatch):
    monkeypatch.setattr(judgement, "invert_indices", lambda indices: {})
    model = build_model("bert")
    finding = judge(model, channel_groups(model).select(["ffn"]))["ffn"]
    assert finding.verdict == "wrong"
    assert "undoing does not restore" in finding.reason


def test_hidden_states_beside_a_head_may_come_out_in_the_new_order():
    model = build_model("bert", output_hidden_states=True)
    finding = judge(model, channel_groups(model))["hidden"]
    assert finding.verdict == "equal"


def test_hidden_states_alone_may_not():
    model = build_model("bert", "base", output_hidden_states=True)
    model.pooler = None
    headed = channel_groups(build_model("bert")).select(["hidden"])
    members = tuple(
        dataclasses.replace(member, tensor=member.tensor.removeprefix("bert."))
        for member in headed.groups[0].members
        if member.tensor.startswith("bert.")
    )
    finding = judge(model, ChannelMap((dataclasses.replace(headed.groups[0], members=members),)))["hidden"]
    assert finding.verdict == "wrong"


def test_masks_in_an_output_do_not_hide_a_change():
    lowest = torch.finfo(torch.float64).min
    assert judgement._relative(torch.tensor([1.0, lowest]), torch.tensor([1.5, lowest])) == 0.5
    assert judgement._relative(torch.tensor([1.0, lowest]), torch.tensor([lowest, 1.0])) == float("inf")


def test_random_orders_are_permutations_and_never_the_identity():
    groups = [ChannelGroup("two", "ffn", None, 50, 2, ()), ChannelGroup("five", "ffn", None, 50, 5, ())]
    for name, order in random_orders(groups).items():
        assert order.sort(-1).values.equal(torch.arange(order.shape[1]).expand_as(order)), name
        assert all((block != torch.arange(len(block))).any() for block in order)


def test_units_are_known_by_the_names_of_their_modules():
    class GatedMLP(nn.Linear):
        pass

    assert judgement.holds_units(nn.Sequential(nn.Linear(2, 2))) == (False, False)
    assert judgement.holds_units(nn.Sequential(nn.MultiheadAttention(2, 1))) == (True, False)
    assert judgement.holds_units(nn.Sequential(GatedMLP(2, 2))) == (False, True)


# Types


def built(verdict="equal", reason="", **units):
    axes = {axis: dataclasses.asdict(Finding(verdict, reason)) for axis in AXES}
    return {"builds": True, "attention": True, "feed_forward": True, "axes": axes, **units}


@pytest.mark.parametrize(
    ("verdicts", "worst"),
    [
        (("equal", "wrong", "error"), "wrong"),
        (("equal", "error"), "error"),
        (("refused", "equal", "not shown"), "equal"),
        (("refused", "not shown"), "not shown"),
    ],
)
def test_the_worst_class_decides(verdicts, worst):
    record = combine({str(place): built(verdict, "why") for place, verdict in enumerate(verdicts)})
    assert record["axes"]["ffn"] == f"{worst}: why"


def test_a_class_that_does_not_build_is_left_out():
    record = combine({"Model": {"builds": False, "reason": "no inputs"}, "ForCTC": built()})
    assert record["builds"]
    assert record["axes"]["qk"] == "equal"
    assert "reason" not in record


def test_a_type_without_a_class_that_builds_says_why():
    record = combine({"Model": {"builds": False, "reason": "no inputs"}})
    assert not record["builds"]
    assert record["reason"] == "does not build: no inputs"


def test_percentages_are_over_types_that_build_and_hold_units():
    records = {
        "equal": combine({"Model": built()}),
        "refused": combine({"Model": built("refused")}),
        "plain": combine({"Model": built("refused", attention=False, feed_forward=False)}),
        "missing": combine({"Model": {"builds": False, "reason": "timm"}}),
        "wrong": combine({"Model": built("wrong", "why")}),
    }
    records["refused"]["axes"]["ffn"] = "equal"
    summary = summarize(records)
    assert (summary["types"], summary["types_that_build"], summary["types_with_units"]) == (5, 4, 3)
    assert summary["attention_or_ffn"] == {"count": 2, "percent": 66.7}
    assert summary["attention_and_ffn"] == {"count": 1, "percent": 33.3}
    assert summary["axes"]["ffn"]["equal"] == 2
    assert summary["wrong"] == [f"wrong {axis}: why" for axis in AXES]
    page = coverage_table.to_markdown({"summary": summary, "types": records})
    assert "| equal* | " + "equal | " * len(AXES) in page
    assert "- missing: does not build: timm" in page


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize(
    ("stage", "ending", "expected"),
    [
        ("building", time.sleep, "does not build: not done in 1 s"),
        ("judging", time.sleep, "not shown: not done in 1 s"),
        ("judging", os._exit, "error: the process ended with 30"),
    ],
)
def test_a_process_that_does_not_finish_is_reported(monkeypatch, stage, ending, expected):
    def judge_type(model_type, classes, report):
        units = {"attention": True, "feed_forward": True}
        report("Model", {"stage": stage, **({"builds": True, **units} if stage == "judging" else {})})
        ending(30)

    monkeypatch.setattr(coverage_table, "judge_type", judge_type)
    [(name, record)] = judge_types(["bert"], classes=1, jobs=1, limit_s=1.0)
    assert name == "bert"
    assert (record["axes"]["ffn"] if record["builds"] else record["reason"]) == expected


def test_names_without_indices():
    assert judgement.without_indices("h.0.mlp2.experts.13.ffn") == "h.*.mlp2.experts.*.ffn"


# The zoo


def test_the_zoo_knows_every_type():
    assert len(zoo.all_types()) > 700
    assert len(set(zoo.listed_types()) - set(zoo.all_types())) < 0.1 * len(zoo.listed_types())
    assert {"bert", "llama", "beit+relpos"} <= set(zoo.listed_types())


@pytest.mark.parametrize("model_type", ["bert", "t5+gated", "patchtst", "nemotron_h", "clip"])
def test_the_zoo_builds_the_same_tiny_model_every_time(model_type):
    before = torch.get_rng_state()
    models = [zoo.build(model_type, zoo.model_classes(model_type)[0]).model for _ in range(2)]
    assert torch.get_rng_state().equal(before)
    assert same_bits(models[0], weights_of(models[1]))
    assert sum(parameter.numel() for parameter in models[0].parameters()) < 2e6


def test_the_zoo_says_what_it_tried():
    with pytest.raises(zoo.ZooError, match="it builds but runs on no inputs"):
        zoo.build("bert", type("Deaf", (zoo.model_classes("bert")[0],), {"forward": lambda self: None}))


# Every model type


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    out = tmp_path_factory.mktemp("coverage")
    script = Path(coverage_table.__file__)
    subprocess.run([sys.executable, script, "--out", out], check=False, cwd=script.parent.parent)
    return json.loads((out / "coverage.json").read_text())


@pytest.mark.slow
def test_no_type_is_wrong_or_an_error(table):
    assert table["summary"]["wrong"] == []
    assert table["summary"]["error"] == []


@pytest.mark.slow
@pytest.mark.parametrize("share", LEAST_PERCENT)
def test_enough_types_are_equal(table, share):
    assert table["summary"][share]["percent"] >= LEAST_PERCENT[share]


@pytest.mark.slow
def test_enough_residual_streams_are_equal(table):
    assert table["summary"]["axes"]["hidden"]["equal"] >= LEAST_HIDDEN


@pytest.mark.slow
def test_nearly_every_listed_type_builds(table):
    listed = [record for record in table["types"].values() if record["listed"]]
    assert sum(record["builds"] for record in listed) >= 0.98 * len(listed)
