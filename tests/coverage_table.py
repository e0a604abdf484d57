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
from judgement import VERDICTS, Finding, described, holds_units, judge_model, one_line

from hf_spp.config import AXES

ATTENTION_AXES = ("qk", "vo", "heads")
_MEMORY = 12 << 30


# Judging a model type, in a process of its own


def judge_type(model_type: str, classes: int, report: Callable[[str, dict[str, Any]], None]) -> None:
    """Build a type's classes, judge each, and report its record twice: what comes next, and what came out."""
    try:
        found = zoo.model_classes(model_type)[:classes]
    except Exception as error:  # an optional dependency of the type is missing
        report("", {"builds": False, "reason": described(error)})
        return
    if not found:
        report("", {"builds": False, "reason": "it has no model class"})
    for model_class in found:
        name = model_class.__name__
        report(name, {"stage": "building"})
        try:
            built = zoo.build(model_type, model_class)
        except Exception as error:  # whatever is raised, this class is left out
            report(name, {"builds": False, "reason": one_line(error)})
            continue
        attention, feed_forward = holds_units(built.model)
        record = {"builds": True, "attention": attention, "feed_forward": feed_forward}
        report(name, {**record, "stage": "judging"})
        findings = judge_model(built.model, built.inputs)
        report(name, {**record, "axes": {axis: dataclasses.asdict(finding) for axis, finding in findings.items()}})


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
        reasons = dict.fromkeys(one_line(record["reason"]) for record in classes.values())
        return {**record, "reason": f"does not build: {one_line('; '.join(reasons))}"}
    record["axes"] = {}
    for axis in AXES:
        found = [Finding(**one["axes"][axis]) for one in built.values()]
        record["axes"][axis] = str(min(found, key=lambda finding: VERDICTS.index(finding.verdict)))
    return record


def judge_types(
    types: Iterable[str], *, classes: int, jobs: int, limit_s: float
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Judge each type in a forked process with a limit on its time and memory; gives records as they come."""
    context = multiprocessing.get_context("fork")
    waiting, running = list(types)[::-1], []

    def start(model_type: str) -> _Job:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(model_type, classes, sender), daemon=True)
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


def _work(model_type: str, classes: int, pipe: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, sys.stdout.fileno())
    os.dup2(silence, sys.stderr.fileno())
    warnings.simplefilter("ignore")
    judge_type(model_type, classes, lambda name, record: pipe.send((name, record)))


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
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.types or ()) - set(zoo.all_types())):
        parser.error(f"unknown types {', '.join(unknown)}")
    return options


def main() -> int:
    options = parse_arguments()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    types = options.types or zoo.all_types()
    listed = set(zoo.listed_types())
    records: dict[str, Any] = {}
    judged = judge_types(types, classes=options.classes, jobs=options.jobs, limit_s=options.limit_s)
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
