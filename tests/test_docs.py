"""What the documentation shows is what happens: cards and tables; see `test_readme.py` and `test_examples.py`."""

import re
from pathlib import Path

import pytest
from benchmarks.tables import TABLES, markdown_tables, written
from huggingface_hub import ModelCard

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("card", sorted((ROOT / "model_cards").glob("*/README.md")), ids=lambda path: path.parent.name)
def test_cards_parse_and_their_plots_exist(card):
    parsed = ModelCard.load(card)
    assert parsed.data.library_name == "transformers"
    assert parsed.data.eval_results
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", parsed.text):
        assert (card.parent / picture).is_file()


@pytest.mark.parametrize("folder", markdown_tables())
def test_readme_shows_what_was_measured(folder):
    assert written(README, folder, markdown_tables()[folder]) == README


def test_results_of_benchmarks_are_drawn():
    assert all((ROOT / "model_cards" / table.folder / "widths.png").is_file() for table in TABLES)
