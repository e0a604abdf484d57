"""The gallery: every figure in a card stands in the results beside it."""

import json
import re
from pathlib import Path

import pytest
from benchmarks.gallery import GALLERY, SUMMARY_NAME, index
from huggingface_hub import ModelCard

from hf_spp.cards.card_sections import find_section
from hf_spp.cards.width_results import WidthReport
from hf_spp.cards.width_section import WIDTHS_END, WIDTHS_START, width_section

CARDS = Path(__file__).parent.parent / "model_cards"
NAMES = sorted(path.parent.name for path in CARDS.glob("*/README.md"))
FIGURE = re.compile(r"(?<![\w.-])\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]\d+)?(?![\w-])")
FORMATS = ("{:,}", "{:.2f}", "{:.1f}", "{:.4f}", "{:.1e}", "{:.3g}", "{:.4g}", "{:,.0f}", "{}")


def numbers(value):
    """All numbers in what a JSON file holds, counts of lists' entries aside."""
    if isinstance(value, dict):
        return [found for one in value.values() for found in numbers(one)]
    if isinstance(value, list):
        return [found for one in value for found in numbers(one)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


def written(values):
    """The ways in which cards write numbers; accuracy and F1 in percent."""
    return {text.format(factor * value) for value in values for factor in (1, 100) for text in FORMATS}


def stored(folder):
    found = [json.loads(path.read_text()) for path in (folder / SUMMARY_NAME, folder / "results.json")]
    return [number for one in found for number in numbers(one)]


def prose(text):
    """A card's own text, without code, links, versions and the section of widths."""
    place = find_section(text, WIDTHS_START, WIDTHS_END)
    text = text[: place[0]] + text[place[1] :] if place else text
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    text = re.sub(r"\]\(.*?\)|`[^`]*`|^Measured with.*|hf_spp \d.*", "", text, flags=re.MULTILINE)
    return re.sub(r"^#.*", "", text, flags=re.MULTILINE)


def test_the_gallery_has_every_card_that_can_be_made():
    assert set(GALLERY) <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_figures_of_a_card_are_those_of_its_results(name):
    card = ModelCard.load(CARDS / name / "README.md")
    values = stored(CARDS / name)
    found = FIGURE.findall(prose(card.text))
    assert len(found) > 10
    assert set(found) <= written(values) | {"0"}
    assert {one.metric_value for one in card.data.eval_results} <= set(values)


@pytest.mark.parametrize("name", sorted(GALLERY))
def test_widths_of_a_card_are_those_of_its_report(name):
    text = (CARDS / name / "README.md").read_text()
    report = WidthReport.load(CARDS / name / "widths")
    start, stop = find_section(text, WIDTHS_START, WIDTHS_END)
    plots = dict(re.findall(r"!\[(.*?)\]\((.*?)\)", text[start:stop]))
    assert len(plots) == 2
    assert text[start:stop] == width_section(report.rows, report.settings, plots)
    assert {row["kind"] for row in report.rows} >= {"full", "plain", "compensated", "random"}


def test_the_index_is_made_of_the_results():
    text = (CARDS / "README.md").read_text()
    assert text == index()
    assert all(f"]({name}/README.md)" in text for name in NAMES)
