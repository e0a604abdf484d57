import time

import pytest
from huggingface_hub import ModelCard

from hf_spp.cards.card_header import join_card, merge_index, model_index, patch_header, read_header, split_card
from hf_spp.cards.model_card import evaluation_results, update_card_with_evaluation
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


LAUGHS = "\n".join(["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60))])
MERGES = "\n".join(["a0: &a0 {x: 1}", *(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}" for i in range(1, 60))])


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (LAUGHS, "more than 131,072 values"),
        (MERGES, "more than 131,072 values"),
        ("a: &a [*a]", "inside of what it names"),
        ("a: " + "[" * 100_000, "nested more than 50 levels"),
        ("- " * 5000, "nested more than 50 levels"),
        ("a: " + "9" * 5000, "a number has 5,000 characters"),
        ("a: " + "1:1" * 100_000, "a number has 300,000 characters"),
        ("a: " + "x" * (1 << 20), "more than 1,048,576"),
        ("a: 1\nb: 2\na: 3", "the key 'a' stands there 2 times"),
        ("a: {b: 1, b: 2}", "the key 'b' stands there 2 times"),
        ("1: a", "no text"),
        ("a: !!int x", "no YAML mapping"),
        ("a: !!bool x", "no YAML mapping"),
        ("a: !!timestamp x", "no YAML mapping"),
        ("a: 2020-13-45", "no YAML mapping"),
        ("a: !!python/object/apply:os.getcwd []", "no YAML mapping"),
        ("a: \x00", "no YAML mapping"),
        ("? [a]\n: b", "no YAML mapping"),
    ],
)
def test_a_header_that_asks_for_too_much_is_refused(header, said):
    start = time.monotonic()
    with pytest.raises(CardError, match=said):
        read_header(header)
    assert time.monotonic() - start < 10


def entry(name, *results):
    return {"name": name, "results": list(results)}


def result(value, **more):
    metric = {"type": "accuracy", "name": "Accuracy", "value": value}
    theirs = {"task": {"type": "t", "name": "T"}, "dataset": {"type": "a", "name": "A"}, "metrics": [metric]}
    return {**theirs, **more}


OURS = [{"dataset": "A", "method": "spp", "accuracy": 0.5, "f1": 0.25}]


@pytest.mark.parametrize("name", ["mine", "theirs"])
def test_results_of_others_survive_a_merge(name):
    """Also under the same model, task, data set, metric and metric's name as ours."""
    source = {"source": {"url": "https://example.com", "name": "x"}}
    theirs = [
        entry(
            "theirs", result(0.9), result(0.8, **source), {**result(0.7), "more": [1]}, {**result(0.1), "metrics": []}
        ),
        entry("mine", result(0.6)),
    ]
    once = merge_index(theirs, name, evaluation_results(OURS, task="t"))
    twice = merge_index(once, name, evaluation_results([{**OURS[0], "accuracy": 0.75}], task="t"))
    for merged, ours in ((once, 0.5), (twice, 0.75)):
        values = [metric["value"] for one in merged for part in one["results"] for metric in part["metrics"]]
        assert sorted(values) == sorted([0.9, 0.8, 0.7, 0.6, ours, 0.25])
        [home] = [one for one in merged if ours in [m["value"] for part in one["results"] for m in part["metrics"]]]
        assert home["name"] == name
    assert merge_index(twice, name, []) == theirs


@pytest.mark.parametrize(
    "index",
    [
        "text",
        [5],
        [{"results": [{}]}],
        [entry("a", {**result(1), "task": {"type": ["t"]}})],
        [entry("a", {**result(1), "dataset": {"type": {"x": 1}}})],
        [entry("a", {**result(1), "metrics": [{"type": None}]})],
        [{"name": "a", "results": None}],
    ],
)
def test_a_damaged_index_is_refused(index):
    with pytest.raises(CardError, match="model-index in the card's header is damaged"):
        model_index({"model-index": index})


def test_values_that_have_no_hash_are_kept():
    card = "---\ntags: [{a: 1}, 1, true, '1']\nmetrics: {x: 1}\npipeline_tag: t\n---\n# Card\n"
    updated = update_card_with_evaluation(card, OURS)
    metadata = read_header(split_card(updated)[0])
    assert metadata["tags"][:4] == [{"a": 1}, 1, True, "1"]
    assert metadata["metrics"] == [{"x": 1}, "accuracy", "f1"]
    odd = {**result(1), "dataset": {"type": "a", "config": ["x"], "split": {"y": 1}}}
    assert merge_index([entry("a", odd)], "a", evaluation_results(OURS, task="t"))[0]["results"][0] == odd
