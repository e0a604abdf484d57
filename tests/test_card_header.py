import pytest
from huggingface_hub import ModelCard

from hf_spp.cards.card_header import join_card, patch_header, read_header, split_card
from hf_spp.errors import CardError


@pytest.mark.parametrize(
    "text", ["---\na: 1\n---\n\n# Card\n", "---\na: 1\n---\n---\nnot yaml\n---\n", "---\na: 1\n---\n"]
)
def test_a_card_is_cut_and_joined(text):
    header, body = split_card(text)
    assert header == "a: 1"
    assert join_card(header, body) == text


def test_a_card_without_a_header_gets_an_empty_one():
    assert split_card("# Card\n") == ("", "\n# Card\n")
    assert ModelCard(join_card("tags: [a]", "\n# Card\n")).data.tags == ["a"]


def test_patching_changes_the_named_keys_only():
    header = "language: no\ntags:\n- a\n# about the license\nlicense: 'mit'  # as written\n\nother:\n  x: 1"
    assert patch_header(header, {"tags": ["b", "c"], "new": "yes"}) == (
        "language: no\ntags:\n- b\n- c\n# about the license\nlicense: 'mit'  # as written\n\nother:\n  x: 1\nnew: 'yes'"
    )
    assert patch_header(header, {"tags": ["a"]}) == header


@pytest.mark.parametrize("header", ["{tags: [a], language: en}", "tags: &t [a]\nother: *t"])
def test_a_header_without_lines_of_its_own_for_each_key_is_written_anew(header):
    assert read_header(patch_header(header, {"tags": ["b"]})) == {**read_header(header), "tags": ["b"]}


def test_a_header_that_is_no_mapping_is_refused():
    with pytest.raises(CardError, match="no YAML mapping"):
        read_header("- a\n- b")
