"""Resolves every model type anew, and compares with the shipped table or writes it: `python -m hf_spp.support --write`.

Writes `families.json` beside this file and the section of the README in the folder above the package.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

# Default configs may name backbones on the Hub, of which the shapes alone are wanted.
os.environ["HF_HUB_OFFLINE"] = "1"

from .. import checkpoint
from .families import FAMILIES_FILE, Families, load_families, replace_section
from .survey import collect, model_types, survey

README = Path(__file__).parents[2] / "README.md"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; gives its exit code, 1 where the table is stale or the package failed on a type."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the table; without it, only compare")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--limit-s", type=float, default=60.0, help="seconds for each type")
    options = parser.parse_args(arguments)
    started, types, findings = time.monotonic(), model_types(), {}
    for name, finding in survey(types, options.jobs, options.limit_s):
        findings[name] = finding
        if len(findings) % 100 == 0 or finding.failed:
            print(f"[{len(findings)}/{len(types)}] {name} {finding.left_out}", flush=True)
    families, failed = collect(findings), [name for name, one in findings.items() if one.failed]
    print(
        f"{len(families.families)} of {len(types)} types of transformers {families.transformers} resolved, "
        f"{len(families.left_out)} left out, in {time.monotonic() - started:.0f} s"
    )
    stale = _changes(families)
    print("\n".join(stale) or "The shipped table says the same.")
    if options.write:
        checkpoint.write_text(FAMILIES_FILE, families.to_json())
        checkpoint.write_text(README, replace_section(checkpoint.read_text(README), families.to_markdown()))
        print(f"Written: {FAMILIES_FILE} and {README}")
    return 1 if failed or (stale and not options.write) else 0


def _changes(families: Families) -> list[str]:
    """What differs from the shipped table, by type."""
    if not FAMILIES_FILE.is_file():
        return ["There was no table."]
    before, after = _readable(load_families(FAMILIES_FILE)), _readable(families)
    return [
        f"{name} {what}: {before.get((name, what), 'not there')}  →  {after.get((name, what), 'not there')}"
        for name, what in sorted({*before, *after})
        if before.get((name, what)) != after.get((name, what))
    ]


def _readable(table: Families) -> dict[tuple[str, str], str]:
    """Verdicts with their reasons in words, by type and axis; the numbers of reasons may change."""
    found = {(name, "left out"): reason for name, reason in table.left_out.items()}
    for name, family in table.families.items():
        found[name, "class"] = " in ".join([family.model_class, *family.part_of])
        for axis, verdict in family.verdicts.items():
            word, *numbers = verdict.split()
            found[name, axis] = " | ".join([word, *sorted(table.reasons[int(number) - 1] for number in numbers)])
    return found


if __name__ == "__main__":
    sys.exit(main())
