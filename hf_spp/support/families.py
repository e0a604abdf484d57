"""The table of families by axes that ships with the package, as data and as the README shows it.

Reading it needs neither torch nor transformers, so the command line answers at once.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError

FAMILIES_FILE = Path(__file__).with_name("families.json")
FORMAT_VERSION = 1
README_MARKS = ("<!-- families: written by `python -m hf_spp.support --write` -->", "<!-- end of families -->")
ABSENT = "–"
# What the README shows of the table before all of it.
WELL_KNOWN = (
    "albert", "bart", "beit", "bert", "bloom", "clip", "convnext", "deberta-v2", "deepseek_v3", "deit", "dinov2",
    "dinov3_vit", "distilbert", "electra", "falcon", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "gpt_oss", "hubert",
    "llama", "llava", "mamba", "mistral", "mixtral", "modernbert", "opt", "phi3", "qwen2", "qwen2_5_vl", "qwen3",
    "qwen3_moe", "qwen3_next", "roberta", "siglip", "swin", "t5", "vit", "wav2vec2", "whisper",
)  # fmt: skip
# In a reason, what differs between models and not the reason itself: sizes, and names of parameters and modules.
_SPECIFIC = re.compile(
    r"\[[^\]]*\]|(?<=explains )[^;]+|(?<=parameter )(?!and |of |is )\S+|(?<=argument )\S+|^\w+(?= (?:does not|is a) )|"
    r"\b[\w*]*[\d_*][\w*]*(?:\.[\w*]+)*|\b\w+\.[\w.*]+\w|\b[A-Z]\w*[A-Z]\w*"
)

Row = tuple[tuple[str, ...], list[str]]
"""Cells by axis, and the model types that have them."""


@dataclass(frozen=True)
class Family:
    """What may move in one model type.

    Attributes:
        model_class: The class that was resolved, with a task head where transformers has one.
        verdicts: By axis `yes`, or `part` (in some units) or `no` with the numbers of the reasons, as in `no 2`; an
            axis without channels in the model is absent.
        part_of: Types that hold this one, a tower or decoder without a task head of its own.
    """

    model_class: str
    verdicts: Mapping[str, str]
    part_of: tuple[str, ...] = ()

    def cells(self, axes: Iterable[str]) -> tuple[str, ...]:
        """The verdicts in the order of the axes, as a table shows them."""
        return tuple(_cell(self.verdicts.get(axis, ABSENT)) for axis in axes)


@dataclass(frozen=True)
class Families:
    """Every model type of one version of transformers.

    Attributes:
        transformers: The version.
        axes: Names of the axes, in their order.
        reasons: Why an axis may not move; number 1 is the first.
        families: What may move, by model type.
        left_out: Why a model type was not resolved.
    """

    transformers: str
    axes: tuple[str, ...]
    reasons: tuple[str, ...]
    families: Mapping[str, Family]
    left_out: Mapping[str, str]

    def rows(self, names: Iterable[str]) -> list[Row]:
        """The given types by equal cells, the most common first; those in which nothing may move last."""
        rows = defaultdict(list)
        for name in sorted(names):
            rows[self.families[name].cells(self.axes)].append(name)
        nothing = (ABSENT,) * len(self.axes)
        return sorted(rows.items(), key=lambda row: (row[0] == nothing, -len(row[1]), row[1]))

    def whole(self) -> list[str]:
        """The types that are no part of another one."""
        return [name for name, family in self.families.items() if not family.part_of]

    def to_json(self) -> str:
        """The table as JSON with sorted keys, one line a model type."""
        types = {
            name: {
                "class": family.model_class,
                **family.verdicts,
                **({"part_of": family.part_of} if family.part_of else {}),
            }
            for name, family in self.families.items()
        }
        values = {
            "axes": json.dumps(self.axes),
            "families": _lines(types),
            "format_version": json.dumps(FORMAT_VERSION),
            "left_out": _lines(self.left_out),
            "reasons": "[\n" + ",\n".join(f"  {json.dumps(one)}" for one in self.reasons) + "\n ]",
            "transformers": json.dumps(self.transformers),
        }
        return "{\n" + ",\n".join(f' "{name}": {value}' for name, value in values.items()) + "\n}\n"

    def to_markdown(self) -> str:
        """The README's section, with its marks."""
        whole = self.whole()
        rows = self.rows(whole)
        known = self.rows(name for name in WELL_KNOWN if name in self.families)
        nothing = [name for name in whole if not self.families[name].verdicts]
        shared = [row for row in rows if len(row[1]) > 1 and row[1] != nothing]
        alone = [row for row in rows if len(row[1]) == 1 and row[1] != nothing]
        first = max(_reason_numbers(cells for cells, _ in shared), default=0)
        lines = [
            README_MARKS[0],
            "",
            f"Some of the {len(self.families)} model types of transformers {self.transformers} that can be built. "
            f"`part` is in some layers or towers and not in others, `{ABSENT}` no such channels.",
            "",
            *self._table(known),
            "",
            *(
                f"- [{number}] {self.reasons[number - 1]}"
                for number in sorted(_reason_numbers(row for row, _ in known))
            ),
            "",
            "All types, resolved on the meta device from their default configs, with a task head where there is one. "
            "Other settings may give other verdicts. "
            f"{len(self.families) - len(whole)} types exist only inside another one and are judged in it; "
            "`hf-spp architectures --filter` prints these too.",
            "",
            f"<details><summary>{sum(len(names) for _, names in shared)} families, by equal verdicts</summary>",
            "",
            *self._table(shared),
            "",
            *(f"{number}. {reason}" for number, reason in enumerate(self.reasons[:first], 1)),
            "",
            "</details>",
            "",
            f"<details><summary>{len(alone)} families with verdicts of their own</summary>",
            "",
            *self._table(alone),
            "",
            *(f"{number}. {reason}" for number, reason in enumerate(self.reasons[first:], first + 1)),
            "",
            "</details>",
            "",
            f"<details><summary>{len(nothing)} families in which nothing may move, {len(self.left_out)} types left "
            "out</summary>",
            "",
            f"No attention or feed-forward that the map knows, so they raise: {', '.join(nothing)}.",
            "",
            "Left out:",
            "",
            *(f"- {', '.join(names)}: {reason}" for reason, names in _by_value(self.left_out)),
            "",
            "</details>",
            "",
            README_MARKS[1],
        ]
        return "\n".join(lines)

    def _table(self, rows: Iterable[Row]) -> list[str]:
        lines = [
            f"| families | {' | '.join(f'`{axis}`' for axis in self.axes)} |",
            f"| --- |{' --- |' * len(self.axes)}",
        ]
        return lines + [f"| {', '.join(names)} | {' | '.join(cells)} |" for cells, names in rows]


def load_families(path: Path = FAMILIES_FILE) -> Families:
    """The table that ships with the package, or one written elsewhere."""
    stored = json.loads(path.read_text(encoding="utf-8"))
    families = {
        name: Family(
            family.pop("class"),
            part_of=tuple(family.pop("part_of", ())),
            verdicts={axis: family[axis] for axis in family},
        )
        for name, family in stored["families"].items()
    }
    return Families(
        stored["transformers"], tuple(stored["axes"]), tuple(stored["reasons"]), families, stored["left_out"]
    )


def replace_section(text: str, section: str) -> str:
    """A README with the section between the marks replaced.

    Raises:
        CheckpointError: The marks are not there, once each.
    """
    start, end = README_MARKS
    if text.count(start) != 1 or text.count(end) != 1:
        raise CheckpointError(f"The README holds no section between {start} and {end}. Put both marks in, once each.")
    return text.partition(start)[0] + section + text.partition(end)[2]


def general_reason(reason: str) -> str:
    """A reason without names of parameters and modules and without sizes, which differ between models."""
    return re.sub(r"…(,? …)+", "…", _SPECIFIC.sub("…", reason))


def _cell(verdict: str) -> str:
    word, *numbers = verdict.split()
    return f"{word} [{','.join(numbers)}]" if numbers else word


def _reason_numbers(rows: Iterable[Iterable[str]]) -> set[int]:
    return {int(number) for cells in rows for cell in cells for number in re.findall(r"\d+", cell)}


def _by_value(names: Mapping[str, str]) -> list[tuple[str, list[str]]]:
    values = defaultdict(list)
    for name, value in sorted(names.items()):
        values[value].append(name)
    return sorted(values.items(), key=lambda item: (-len(item[1]), item[1]))


def _lines(values: Mapping[str, object]) -> str:
    lines = (f"  {json.dumps(name)}: {json.dumps(value, sort_keys=True)}" for name, value in sorted(values.items()))
    return "{\n" + ",\n".join(lines) + "\n }"
