"""Which axes hf_spp reorders with equal outputs, for every model type of transformers.

    python tests/coverage_table.py [--types bert,llama] [--jobs 2] [--limit-s 120] [--out DIR] [--classes 3]

Each type is built tiny with random weights (see the package `zoo` beside this file), in its base class and a few task
heads, and every axis that the channel map offers is reordered at random in float64. Verdicts on an axis:

- `equal`: all outputs are the same, undoing restores every bit, and a deliberately wrong order does change the outputs.
- `refused`: the package says that the axis may not move, or that it does not understand the model.
- `not shown`: the run proves nothing, because the unmoved model gives NaN, is not deterministic, takes too long or does
  not run in float64, or because it ignores the wrong order.
- `wrong`: the outputs changed, or undoing did not restore the model.
- `error`: the package or the reordered model raised something else.

A type's verdict is the worst over its classes. `coverage.json` holds everything, `coverage.md` the readable table.
Percentages are over the types that build and hold attention or feed-forward units, by the names of their modules.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import multiprocessing
import os
import re
import resource
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
import zoo
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_spp import channel_groups
from hf_spp.apply import Indices, gather_model, invert_indices, named_tensors
from hf_spp.channels import ChannelGroup, ChannelMap, Member
from hf_spp.config import AXES
from hf_spp.errors import SPPError
from hf_spp.forward import Float64Throughout, evaluation_mode, fixed_rng, output_tensors, run_model
from hf_spp.permutation import Orders, gather_indices

VERDICTS = ("wrong", "error", "equal", "not shown", "refused")
"""From the one that decides first, when classes of a type differ, to the one that decides last."""

ATTENTION_AXES = ("qk", "vo", "heads")
TOLERANCE = 1e-9
"""Largest max|Δ| of an output, relative to its largest magnitude, that counts as equal."""
SHOWN = 1e-6
"""A wrong order must change some output by more than this, relative to its largest magnitude."""

_MEMORY = 12 << 30
_TRIES = 24
# Masks are filled with infinity or the lowest number; beside these no difference would show.
_FILLED = 1e30
_ATTENTION = re.compile(r"Attention|Attn")
_FEED_FORWARD = re.compile(r"MLP|Mlp|FeedForward|FFN|Ffn|Experts|Intermediate|Dense(Gated)?Act|LayerFF")


# Judging one model


@dataclass
class Finding:
    """The verdict on one axis of one model, and what it rests on.

    Attributes:
        verdict: One of `VERDICTS`.
        reason: Why, except for `equal`.
        groups: How many groups of the axis moved.
        difference: By how much the outputs changed, relative to their largest magnitude.
        control: By how much a wrong order changed them: in each group only the first matrix moves, or only the last.
        wrong_groups: Groups that change the outputs on their own; one for each name without its indices.
        idle_groups: Groups whose modules the inputs never reach, names with `*` for indices.
    """

    verdict: str
    reason: str = ""
    groups: int = 0
    difference: float | None = None
    control: float | None = None
    wrong_groups: list[str] = field(default_factory=list)
    idle_groups: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.verdict}: {self.reason}" if self.reason else self.verdict


def judge_model(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    find_groups: Callable[[PreTrainedModel], ChannelMap] = channel_groups,
) -> dict[str, Finding]:
    """Reorder a model along every axis and compare its outputs on the inputs; the model becomes float64.

    Args:
        model: The model; its weights are afterwards what they were, in float64, unless the verdict is `wrong`.
        inputs: Arguments of its forward.
        find_groups: What gives the channel map.

    Returns:
        A finding for each of `AXES`.
    """
    _make_float64(model)
    try:
        groups = find_groups(model)
    except SPPError as error:
        return _everywhere("refused", _one_line(error))
    except Exception as error:  # the table reports whatever is raised
        return _everywhere("error", _described(error))
    if not groups.axes:
        return {axis: _refusal(groups, axis) for axis in AXES}
    try:
        subject = Subject(model, inputs)
        flaw = subject.flaw
    except Exception as error:
        flaw = f"the model does not run in float64, {_described(error)}"
    findings = {axis: _refusal(groups, axis) for axis in AXES}
    if flaw:
        return {**findings, **{axis: Finding("not shown", flaw) for axis in groups.axes}}
    findings.update({axis: _judge_axis(subject, groups.select([axis])) for axis in groups.axes})
    if not subject.has_its_outputs():
        for axis in groups.axes:
            findings[axis].verdict, findings[axis].reason = "wrong", "undoing does not restore the outputs bit for bit"
    return findings


class Subject:
    """A model with fixed inputs, its outputs on them, and its weights, to compare with after a change."""

    def __init__(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> None:
        self.model, self.inputs = model, _to_float64(inputs)
        self.shapes = {name: tensor.shape for name, tensor in named_tensors(model).items()}
        self.weights = {name: tensor.clone() for name, tensor in named_tensors(model).items()}
        with _modules_that_run(model) as self.ran:
            self.before = self.run()
        self.flaw = self._find_flaw()

    @torch.no_grad()
    def run(self, hidden_orders: Sequence[Tensor] = ()) -> dict[str, Tensor]:
        """The outputs of the model as it is now; embeddings that it is given come in the order of its stream."""
        inputs = dict(self.inputs)
        for order in hidden_orders:
            embeddings = inputs.get("inputs_embeds")
            if embeddings is not None and embeddings.shape[-1] == len(order):
                inputs["inputs_embeds"] = embeddings.index_select(-1, order)
        with evaluation_mode(self.model), fixed_rng(self.model, 0), Float64Throughout(), _float64_by_default():
            outputs = output_tensors(run_model(self.model, inputs))
        return {name: value.detach().clone() for name, value in outputs.items()}

    def difference(self, hidden_orders: Iterable[Tensor] = ()) -> float:
        """Run the model and measure how far its outputs are from those before, relative to their magnitude.

        Args:
            hidden_orders: Orders of residual streams, `[hidden]`. A hidden state that comes out beside other outputs
                may be in one of these.
        """
        hidden_orders = list(hidden_orders)
        after = self.run(hidden_orders)
        if after.keys() != self.before.keys():
            return float("inf")
        # Where hidden states are all that comes out, their order is part of the function.
        orders = [] if all("hidden_state" in name for name in self.before) else hidden_orders
        return max(
            min(_relative(version, after[name]) for version in _versions(name, expected, orders))
            for name, expected in self.before.items()
        )

    def difference_with(self, groups: Iterable[ChannelGroup], orders: Orders) -> float:
        """The difference that reordering makes; the model is put back afterwards."""
        groups = list(groups)
        hidden = [orders[group.name].flatten() for group in groups if group.axis == "hidden"]
        with gathered(self.model, gather_indices(groups, orders, self.shapes)):
            return self.difference(hidden)

    def has_its_weights(self) -> bool:
        """Whether the weights are, bit for bit, what they were."""
        return _same_bits(self.weights, named_tensors(self.model))

    def has_its_outputs(self) -> bool:
        """Run the model; whether the outputs are, bit for bit, what they were."""
        return _same_bits(self.before, self.run())

    def is_reached(self, group: ChannelGroup) -> bool:
        """Whether the inputs reach a module that holds a member of the group."""
        return any(map(self._is_read, group.members))

    def one_sided(self, group: ChannelGroup, place: int) -> ChannelGroup:
        """The group with only one of the matrices that the inputs reach, so that moving its channels is wrong."""
        matrices = group.scored_members or group.members
        reached = list(filter(self._is_read, matrices)) or matrices
        return dataclasses.replace(group, members=(reached[place],))

    def _is_read(self, member: Member) -> bool:
        path = member.tensor.rpartition(".")[0]
        # Some modules are only read by the one around them, as in torch's own attention.
        return path in self.ran or path.rpartition(".")[0] in self.ran

    def _find_flaw(self) -> str:
        if not self.before:
            return "no floating-point tensor comes out"
        if broken := [name for name, value in self.before.items() if value.isnan().any()]:
            return f"NaN comes out ({', '.join(broken[:3])})"
        if not self.has_its_outputs():
            return f"the model is not deterministic, two runs differ by {self.difference():.1e}"
        return ""


@contextlib.contextmanager
def gathered(model: nn.Module, indices: Indices) -> Iterator[None]:
    """Run the block on a reordered model, and undo the reordering afterwards."""
    gather_model(model, indices)
    try:
        yield
    finally:
        gather_model(model, invert_indices(indices))


def random_orders(groups: Iterable[ChannelGroup], seed: int = 0) -> dict[str, Tensor]:
    """An order for each group that is random in each block, and the identity in none with more than one channel."""
    generator = torch.Generator().manual_seed(seed)

    def draw(size: int) -> Tensor:
        order = torch.randperm(size, generator=generator)
        return order.roll(1) if torch.equal(order, torch.arange(size)) else order

    return {group.name: torch.stack([draw(group.size) for _ in range(group.blocks)]) for group in groups}


def without_indices(name: str) -> str:
    """A name with `*` in place of every number that stands alone in it."""
    return re.sub(r"(?<![^.\s])\d+(?![^.\s])", "*", name)


def holds_units(model: nn.Module) -> tuple[bool, bool]:
    """Whether a model holds attention and feed-forward units, judged by the class names of modules with parameters."""
    modules = [module for module in model.modules() if next(module.parameters(), None) is not None]
    attention = any(_ATTENTION.search(type(m).__name__) or isinstance(m, nn.MultiheadAttention) for m in modules)
    return attention, any(_FEED_FORWARD.search(type(m).__name__) for m in modules)


def _judge_axis(subject: Subject, groups: ChannelMap) -> Finding:
    finding = Finding("equal", groups=len(groups))
    try:
        _compare(subject, groups, finding)
    except Exception as error:
        finding.verdict, finding.reason = "error", _described(error)
    return finding


def _compare(subject: Subject, groups: ChannelMap, finding: Finding) -> None:
    orders = random_orders(groups)
    idle = [group for group in groups if not subject.is_reached(group)]
    finding.idle_groups = sorted({without_indices(group.name) for group in idle})
    finding.difference = subject.difference_with(groups, orders)
    if not subject.has_its_weights():
        finding.verdict, finding.reason = "wrong", "undoing does not restore the weights bit for bit"
    elif not finding.difference <= TOLERANCE:
        finding.verdict, finding.reason = "wrong", f"the outputs change by {finding.difference:.1e}"
        finding.wrong_groups = _wrong_groups(subject, groups, orders)
    else:
        finding.control = subject.difference_with([subject.one_sided(group, 0) for group in groups], orders)
        if not finding.control > SHOWN:
            finding.control = subject.difference_with([subject.one_sided(group, -1) for group in groups], orders)
        if not finding.control > SHOWN:
            why = "its modules never run" if len(idle) == len(groups) else "the outputs ignore a wrong order"
            finding.verdict, finding.reason = "not shown", why


def _wrong_groups(subject: Subject, groups: Iterable[ChannelGroup], orders: Orders) -> list[str]:
    alike: dict[str, list[ChannelGroup]] = {}
    for group in groups:
        alike.setdefault(without_indices(group.name), []).append(group)
    # The first of each kind, then the others.
    ranked = sorted((place, kind) for kind, members in alike.items() for place in range(len(members)))
    wrong: dict[str, str] = {}
    for place, kind in ranked[:_TRIES]:
        group = alike[kind][place]
        if kind not in wrong and not subject.difference_with([group], orders) <= TOLERANCE:
            wrong[kind] = group.name
    return list(wrong.values()) or ["none on its own"]


def _refusal(groups: ChannelMap, axis: str) -> Finding:
    reasons = dict.fromkeys(refusal.reason for refusal in groups.refused if refusal.axis == axis)
    return Finding("refused", _one_line("; ".join(reasons)) or "the model has no such channels")


def _everywhere(verdict: str, reason: str) -> dict[str, Finding]:
    return {axis: Finding(verdict, reason) for axis in AXES}


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {_one_line(error)}"


def _one_line(text: object) -> str:
    return " ".join(str(text).split())[:400]


def _make_float64(model: nn.Module) -> None:
    """Make the model run in float64 where its author did not think of it."""
    model.double()
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, Tensor):  # remembered from an earlier run
                vars(module)[name] = _to_float64(value)
            elif isinstance(value, list):  # modules that were not registered
                for unregistered in (item for item in value if isinstance(item, nn.Module)):
                    unregistered.double()
            elif isinstance(value, PreTrainedConfig):
                value._experts_implementation = "eager"


def _to_float64(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: _to_float64(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_to_float64(item) for item in value)
    return value


@contextlib.contextmanager
def _float64_by_default() -> Iterator[None]:
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(usual)


@contextlib.contextmanager
def _modules_that_run(model: nn.Module) -> Iterator[set[str]]:
    ran: set[str] = set()
    hooks = [
        module.register_forward_hook(lambda *_, path=path: ran.add(path), always_call=True)
        for path, module in model.named_modules()
    ]
    try:
        yield ran
    finally:
        for hook in hooks:
            hook.remove()


def _versions(name: str, expected: Tensor, hidden_orders: Sequence[Tensor]) -> Iterator[Tensor]:
    """What an output may be after the residual stream moved; images have their channels in dimension 1."""
    yield expected
    if "hidden_state" in name:
        for order in hidden_orders:
            for dim in {expected.dim() - 1, 1}:
                if dim < expected.dim() and expected.shape[dim] == len(order):
                    yield expected.index_select(dim, order)


def _relative(expected: Tensor, found: Tensor) -> float:
    """Largest difference relative to the largest magnitude; infinity where shapes or NaN differ."""
    if expected.shape != found.shape or not torch.equal(_fillings(expected), _fillings(found)):
        return float("inf")
    plain = _fillings(expected) == 0
    if not plain.any():
        return 0.0
    expected, found = expected[plain], found[plain]
    scale, difference = float(expected.abs().max()), float((found - expected).abs().max())
    return difference / scale if scale else difference


def _fillings(tensor: Tensor) -> Tensor:
    """What each number is filled with: 0 for an ordinary one, else its sign; NaN gives 2."""
    signs = torch.where(tensor.abs() > _FILLED, tensor.sign(), torch.zeros_like(tensor))
    return torch.where(tensor.isnan(), torch.full_like(tensor, 2), signs)


def _same_bits(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        value.numpy().tobytes() == right[name].numpy().tobytes() for name, value in left.items()
    )


# Judging a model type, in a process of its own


def judge_type(
    model_type: str, classes: int, cache: Path | None, report: Callable[[str, dict[str, Any]], None]
) -> None:
    """Build a type's classes, judge each, and report its record twice: what comes next, and what came out."""
    try:
        found = zoo.model_classes(model_type)[:classes]
    except Exception as error:  # an optional dependency of the type is missing
        report("", {"builds": False, "reason": _described(error)})
        return
    if not found:
        report("", {"builds": False, "reason": "it has no model class"})
    for model_class in found:
        name = model_class.__name__
        report(name, {"stage": "building"})
        try:
            model, inputs = _cached(cache, model_type, model_class) if cache else _build(model_type, model_class)
        except Exception as error:  # whatever is raised, this class is left out
            report(name, {"builds": False, "reason": _one_line(error)})
            continue
        attention, feed_forward = holds_units(model)
        record = {"builds": True, "attention": attention, "feed_forward": feed_forward}
        report(name, {**record, "stage": "judging"})
        findings = judge_model(model, inputs)
        report(name, {**record, "axes": {axis: dataclasses.asdict(finding) for axis, finding in findings.items()}})


def _build(model_type: str, model_class: type[PreTrainedModel]) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    built = zoo.build(model_type, model_class)
    return built.model, built.inputs


def _cached(
    cache: Path, model_type: str, model_class: type[PreTrainedModel]
) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    path = cache / f"{model_type}__{model_class.__name__}.pt"
    failure = path.with_suffix(".fail")
    if failure.exists():
        raise RuntimeError(failure.read_text())
    if path.exists():
        stored = torch.load(path, weights_only=False)
        # Building a model is what makes transformers know which outputs its class can collect.
        with torch.device("meta"):
            model_class(stored["model"].config)
        return _without_hooks(stored["model"]), stored["inputs"]
    try:
        model, inputs = _build(model_type, model_class)
    except Exception as error:
        failure.write_text(str(error))
        raise
    # Models with parametrizations do not pickle; they are built each time.
    with contextlib.suppress(Exception):
        unfinished = path.with_suffix(".part")
        torch.save({"model": _without_hooks(model), "inputs": inputs}, unfinished)
        unfinished.replace(path)
    return model, inputs


def _without_hooks(model: PreTrainedModel) -> PreTrainedModel:
    """The model as before its first run, when transformers hooks its modules to collect their outputs."""
    for module in model.modules():
        module._forward_hooks.clear()
        module.__dict__.pop("_output_capturing_hooks_installed", None)
    return model


@dataclass
class _Job:
    model_type: str
    process: multiprocessing.process.BaseProcess
    pipe: Connection
    started: float = field(default_factory=time.monotonic)
    classes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def receive(self) -> bool:
        """Take what has been reported; whether the process has closed its side."""
        try:
            while self.pipe.poll():
                name, record = self.pipe.recv()
                self.classes[name] = record
        except EOFError:
            return True
        return False

    def finish(self, limit_s: float) -> dict[str, Any]:
        """End the process and give the type's record."""
        overdue = time.monotonic() - self.started > limit_s
        if overdue:
            self.process.kill()
        self.process.join()
        reason = f"not done in {limit_s:.0f} s" if overdue else f"the process ended with {self.process.exitcode}"
        self.pipe.close()
        for record in self.classes.values():
            if record.pop("stage", None) == "building":
                record.update(builds=False, reason=reason)
            elif record["builds"] and "axes" not in record:
                verdict = "not shown" if overdue else "error"
                record["axes"] = {axis: dataclasses.asdict(Finding(verdict, reason)) for axis in AXES}
        return combine(self.classes or {"": {"builds": False, "reason": reason}}, time.monotonic() - self.started)


def combine(classes: Mapping[str, Mapping[str, Any]], seconds: float = 0.0) -> dict[str, Any]:
    """A type's record from those of its classes: the worst verdict on each axis, with its reason."""
    built = {name: record for name, record in classes.items() if record["builds"]}
    record: dict[str, Any] = {
        "builds": bool(built),
        "attention": any(record["attention"] for record in built.values()),
        "feed_forward": any(record["feed_forward"] for record in built.values()),
        "seconds": round(seconds, 1),
        "classes": dict(classes),
    }
    if not built:
        reasons = dict.fromkeys(_one_line(record["reason"]) for record in classes.values())
        return {**record, "reason": f"does not build: {_one_line('; '.join(reasons))}"}
    record["axes"] = {}
    for axis in AXES:
        found = [Finding(**one["axes"][axis]) for one in built.values()]
        record["axes"][axis] = str(min(found, key=lambda finding: VERDICTS.index(finding.verdict)))
    return record


def judge_types(
    types: Iterable[str], *, classes: int, jobs: int, limit_s: float, cache: Path | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Judge each type in a forked process with a limit on its time and memory; gives records as they come."""
    context = multiprocessing.get_context("fork")
    waiting, running = list(types)[::-1], []

    def start(model_type: str) -> _Job:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(model_type, classes, cache, sender), daemon=True)
        process.start()
        sender.close()
        return _Job(model_type, process, receiver)

    while waiting or running:
        while waiting and len(running) < jobs:
            running.append(start(waiting.pop()))
        wait([job.pipe for job in running], timeout=1.0)
        for job in list(running):
            if job.receive() or time.monotonic() - job.started > limit_s:
                running.remove(job)
                yield job.model_type, job.finish(limit_s)


def _work(model_type: str, classes: int, cache: Path | None, pipe: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, sys.stdout.fileno())
    os.dup2(silence, sys.stderr.fileno())
    warnings.simplefilter("ignore")
    judge_type(model_type, classes, cache, lambda name, record: pipe.send((name, record)))


# The report


def summarize(records: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Counts and percentages over types; percentages are of the types that build and hold units."""
    built = {name: record for name, record in records.items() if record["builds"]}
    units = {name: record for name, record in built.items() if record["attention"] or record["feed_forward"]}

    def equal(record: Mapping[str, Any], axes: Iterable[str]) -> list[bool]:
        return [record["axes"].get(axis) == "equal" for axis in axes]

    def share(holds: Callable[[Mapping[str, Any]], bool]) -> dict[str, Any]:
        count = sum(map(holds, units.values()))
        return {"count": count, "percent": round(100 * count / max(1, len(units)), 1)}

    def having(verdict: str) -> list[str]:
        return [
            f"{name} {axis}{text.removeprefix(verdict)}"
            for name, record in built.items()
            for axis, text in record["axes"].items()
            if verdict_of(text) == verdict
        ]

    return {
        "types": len(records),
        "types_that_build": len(built),
        "types_with_units": len(units),
        "axes": {
            axis: {
                **{v: sum(verdict_of(r["axes"][axis]) == v for r in units.values()) for v in VERDICTS},
                "equal_percent": share(lambda record, axis=axis: all(equal(record, [axis])))["percent"],
            }
            for axis in AXES
        },
        "attention_or_ffn": share(lambda record: any(equal(record, (*ATTENTION_AXES, "ffn")))),
        "attention_and_ffn": share(lambda record: any(equal(record, ATTENTION_AXES)) and all(equal(record, ["ffn"]))),
        "vo_and_heads_and_ffn": share(lambda record: all(equal(record, ("vo", "heads", "ffn")))),
        "wrong": having("wrong"),
        "error": having("error"),
    }


def verdict_of(text: str) -> str:
    """The verdict in a type's entry for an axis, without its reason."""
    return text.partition(":")[0]


def to_markdown(results: Mapping[str, Any]) -> str:
    """The results as a readable page: shares, the table, and the reasons."""
    summary, records = results["summary"], results["types"]
    lines = ["# Coverage of model types", "", *_overview(summary), ""]
    for verdict in ("wrong", "error"):
        if summary[verdict]:
            lines += [f"## {verdict.capitalize()}", "", *(f"- {entry}" for entry in summary[verdict]), ""]
    lines += ["## Types", "", "`—`: refused. `*`: not on the list of types that the zoo is known to build.", ""]
    lines += ["| type | " + " | ".join(AXES) + " | units | s |", "| --- |" + " --- |" * (len(AXES) + 2)]
    for name, record in sorted(records.items()):
        if record["builds"]:
            cells = [verdict_of(record["axes"][axis]).replace("refused", "—") for axis in AXES]
            units = [unit for unit, key in (("attention", "attention"), ("ffn", "feed_forward")) if record[key]]
            star = "" if record.get("listed") else "*"
            lines.append(f"| {name}{star} | {' | '.join(cells)} | {', '.join(units)} | {record['seconds']} |")
    for verdict in ("refused", "not shown"):
        lines += ["", f"## Why {verdict}", "", *_reasons(records, verdict)]
    lines += ["", "## Does not build", ""]
    lines += [f"- {name}: {r['reason']}" for name, r in sorted(records.items()) if not r["builds"]]
    return "\n".join(lines) + "\n"


def _overview(summary: Mapping[str, Any]) -> list[str]:
    lines = [
        f"{summary['types']} types, {summary['types_that_build']} build, {summary['types_with_units']} of these hold "
        "attention or feed-forward units. Of the last:",
        "",
        "| equal | types | percent |",
        "| --- | --- | --- |",
    ]
    for name in ("attention_or_ffn", "attention_and_ffn", "vo_and_heads_and_ffn"):
        lines.append(f"| {name.replace('_', ' ')} | {summary[name]['count']} | {summary[name]['percent']} |")
    lines += ["", "| axis | " + " | ".join(VERDICTS) + " | equal % |", "| --- |" + " --- |" * (len(VERDICTS) + 1)]
    for axis, counts in summary["axes"].items():
        numbers = " | ".join(str(counts[verdict]) for verdict in VERDICTS)
        lines.append(f"| {axis} | {numbers} | {counts['equal_percent']} |")
    return lines


def _reasons(records: Mapping[str, Mapping[str, Any]], verdict: str) -> list[str]:
    types: dict[str, list[str]] = {}
    for name, record in records.items():
        for axis, text in record.get("axes", {}).items():
            if verdict_of(text) == verdict:
                # Sizes and places differ, the reason does not.
                reason = re.sub(r"\d+", "N", text.partition(": ")[2].replace(name, "…"))[:160]
                types.setdefault(f"{axis}: {reason}", []).append(name)
    counts = Counter({reason: len(names) for reason, names in types.items()})
    return [
        f"- {count} × {reason} ({', '.join(types[reason][:4])}{', …' if count > 4 else ''})"
        for reason, count in counts.most_common()
    ]


def write(out: Path, results: Mapping[str, Any]) -> None:
    """Write `coverage.json` and `coverage.md` into a folder."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "coverage.json").write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    (out / "coverage.md").write_text(to_markdown(results))


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", type=lambda text: text.split(","), help="model types; all of them if left out")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time")
    parser.add_argument("--limit-s", type=float, default=120.0, help="seconds for each type")
    parser.add_argument("--classes", type=int, default=3, help="classes of each type, the base model first")
    parser.add_argument("--out", type=Path, default=Path("build/coverage"), help="folder for the results")
    parser.add_argument(
        "--cache",
        type=Path,
        help="folder that keeps built models as pickles for the next run; for development only, since a stale model "
        "is used without a word",
    )
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.types or ()) - set(zoo.all_types())):
        parser.error(f"unknown types {', '.join(unknown)}")
    return options


def main() -> int:
    options = parse_arguments()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    if options.cache:
        options.cache.mkdir(parents=True, exist_ok=True)
    types = options.types or zoo.all_types()
    listed = set(zoo.listed_types())
    records: dict[str, Any] = {}
    judged = judge_types(
        types, classes=options.classes, jobs=options.jobs, limit_s=options.limit_s, cache=options.cache
    )
    finish = functools.partial(_finish, options.out, records)
    try:
        for model_type, record in judged:
            records[model_type] = {**record, "listed": model_type in listed}
            brief = record.get("reason") or ", ".join(f"{a} {verdict_of(t)}" for a, t in record["axes"].items())
            print(f"[{len(records)}/{len(types)}] {model_type} {record['seconds']} s: {brief[:160]}", flush=True)
            if len(records) % 50 == 0:
                finish()
    finally:
        results = finish()
    print("\n" + "\n".join(_overview(results["summary"])))
    for verdict in ("wrong", "error"):
        print(f"{verdict}: {len(results['summary'][verdict])}", *results["summary"][verdict], sep="\n  ")
    return 1 if results["summary"]["wrong"] or results["summary"]["error"] else 0


def _finish(out: Path, records: Mapping[str, Any]) -> dict[str, Any]:
    results = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "summary": summarize(records),
        "types": dict(records),
    }
    write(out, results)
    return results


if __name__ == "__main__":
    sys.exit(main())
