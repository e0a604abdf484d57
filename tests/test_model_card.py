import itertools
import re
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import nodes

from hf_spp.cards import model_card
from hf_spp.cards.model_card import (
    SECTION_END,
    SECTION_START,
    CardContent,
    CardLicense,
    evaluation_results,
    license_of,
    render_card,
    update_card_with_evaluation,
)
from hf_spp.cards.result_rows import METHODS, results_table
from hf_spp.errors import CardError

VERSIONS = {"hf_spp": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"}
SUMMARY = {
    "format_version": 1,
    "model_type": "vit",
    "model_class": "ViTForImageClassification",
    "metric": "l1",
    "axes": {
        "qk": {"groups": 12, "channels": 9216, "moved": 9100},
        "ffn": {"groups": 12, "channels": 36864, "moved": 36800},
    },
    "refused": [],
    "verified": True,
    "max_abs_diff": 3e-6,
    "relative_diff": 4e-7,
    "output_scale": 7.1,
    "tolerance": 1e-4,
    "dtype": "float32",
    "changed": True,
    "seed": 0,
    "versions": VERSIONS,
}


def row(dataset="fashion-mnist", method="spp", accuracy=0.775, f1=0.777, **more):
    return {"dataset": dataset, "method": method, "accuracy": accuracy, "f1": f1, **more}


def full_row(dataset, method, accuracy, f1, seed=123):
    return row(
        dataset,
        method,
        accuracy,
        f1,
        seed=seed,
        max_abs_diff=None if method == "original" else 7e-6,
        relative_diff=None if method == "original" else 1e-6,
        seconds=21.04,
        versions=VERSIONS,
        parameters={"total": 22_000_000, "trainable": 3850},
        train_samples=1000,
        eval_samples=2000,
        model="facebook/dinov2-small",
    )


ROWS = [
    full_row("fashion-mnist", "original", 0.775, 0.777),
    full_row("fashion-mnist", "pruning-rank", 0.614, 0.613),
    full_row("fashion-mnist", "spp", 0.7751, 0.7769),
    full_row("cifar-10", "original", 0.967, 0.9626),
    full_row("cifar-10", "spp", 0.9678, 0.9653),
]

MEASURED = {"dataset": "wiki", "method": "spp", "metrics": {"loss": 2.5}}


def content(**changes):
    return replace(CardContent(model_name="dinov2-small-spp", summary=SUMMARY), **changes)


def evaluated(**changes):
    return content(rows=ROWS, pipeline_tag="image-classification", **changes)


def summary(**changes):
    return {**SUMMARY, **changes}


def rendered(card_content):
    text = str(render_card(card_content))
    assert "More Information Needed".lower() not in text.lower()
    assert "\n\n\n" not in text
    assert not re.search(r"[{}%]{2}|None|Undefined", text.partition("```bibtex")[0])
    return text


# The header


def test_header_without_evaluation():
    data = ModelCard(rendered(content())).data.to_dict()
    assert data == {"library_name": "transformers", "tags": ["hf_spp", "salient-parameter-prioritization"]}


def test_header_with_everything():
    card = content(
        base_model="facebook/dinov2-small",
        license=CardLicense("apache-2.0"),
        language=("no",),
        tags=("yes", "a: b", "hf_spp"),
        datasets=("zalando-datasets/fashion_mnist",),
        pipeline_tag="image-classification",
        rows=ROWS,
    )
    data = ModelCard(rendered(card)).data.to_dict()
    assert data.pop("model-index")[0]["name"] == "dinov2-small-spp"
    assert data == {
        "base_model": "facebook/dinov2-small",
        "license": "apache-2.0",
        "language": "no",
        "tags": ["hf_spp", "salient-parameter-prioritization", "yes", "a: b"],
        "datasets": ["zalando-datasets/fashion_mnist"],
        "pipeline_tag": "image-classification",
        "library_name": "transformers",
        "metrics": ["accuracy", "f1"],
    }


def test_several_languages_and_licenses_stay_lists():
    data = ModelCard(rendered(content(language=("en", "de"), license=CardLicense(("mit", "apache-2.0"))))).data
    assert data.language == ["en", "de"]
    assert data.license == ["mit", "apache-2.0"]


def test_evaluation_results_survive_the_round_trip():
    results = evaluation_results(ROWS, task="image-classification")
    card = ModelCard(rendered(evaluated()))
    assert card.data.eval_results == results
    assert ModelCard(str(card)).data.eval_results == results
    assert {(r.dataset_type, r.metric_name): r.metric_value for r in results} == {
        ("fashion-mnist", "Accuracy (original)"): 0.775,
        ("fashion-mnist", "F1 (original)"): 0.777,
        ("fashion-mnist", "Accuracy (pruning-rank)"): 0.614,
        ("fashion-mnist", "F1 (pruning-rank)"): 0.613,
        ("fashion-mnist", "Accuracy"): 0.7751,
        ("fashion-mnist", "F1"): 0.7769,
        ("cifar-10", "Accuracy (original)"): 0.967,
        ("cifar-10", "F1 (original)"): 0.9626,
        ("cifar-10", "Accuracy"): 0.9678,
        ("cifar-10", "F1"): 0.9653,
    }


def test_only_the_method_of_the_checkpoint_has_plain_names():
    results = evaluation_results([row(method="spp"), row(method="spp-raffm")], task="t", method="spp-raffm")
    assert [r.metric_name for r in results] == ["Accuracy (spp)", "F1 (spp)", "Accuracy", "F1"]


names = st.text("abcXYZ019 -_./|:#'\"é<>", min_size=1, max_size=12).filter(lambda s: re.search("[a-zA-Z0-9]", s))
many_rows = st.lists(
    st.builds(
        row,
        names,
        st.sampled_from(sorted(METHODS)),
        st.floats(0, 1),
        st.floats(0, 1),
        seed=st.integers(0, 3),
        model=st.sampled_from([None, "a/b", "c/d"]),
    ),
    min_size=1,
    max_size=12,
    unique_by=(lambda r: (r["dataset"], r["method"], r["seed"], r["model"])),
)


@settings(max_examples=60, deadline=None)
@given(rows=many_rows)
def test_every_evaluation_result_survives_whatever_its_name(rows):
    try:
        results = evaluation_results(rows, task="image-classification")
    except CardError as error:
        assert "share the identifier" in str(error)  # noqa: PT017
        return
    assert len({repr(replace(result, metric_value=0)) for result in results}) == 2 * len(rows)
    card = render_card(content(rows=rows, pipeline_tag="image-classification"))
    by_data_set = sorted(results, key=repr)
    assert sorted(ModelCard(str(card)).data.eval_results, key=repr) == by_data_set
    for result in results:
        assert re.fullmatch(r"[a-z0-9][a-z0-9._/-]*", result.dataset_type)
    written = update_card_with_evaluation("# Card\n", rows, task="image-classification")
    assert sorted(ModelCard(written).data.eval_results, key=repr) == by_data_set
    assert update_card_with_evaluation(written, rows) == written
    lines = results_table(rows).split("\n")
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1


# The body


def test_body_states_what_moved_and_the_proof():
    text = rendered(content(base_model="facebook/dinov2-small"))
    assert "| `qk` | rows of query and key inside a head, together | 12 | 9,216 | 9,100 |" in text
    assert "No axis was refused." in text
    assert "differ by at most **3.0e-06**, which is **4.0e-07** of their scale (7.1)" in text
    assert "The tolerance is 1.0e-04 of that scale, in `float32`." in text
    assert "arXiv:2310.00247" in text
    assert "`undo` gives back the original weights, bit for bit." in text


def test_body_names_refusals_and_keeps_their_text_in_the_cell():
    refused = [{"axis": "qk", "where": "model.layers|x", "reason": "rotary | position\nembedding <!-- x"}]
    text = rendered(content(summary=summary(refused=refused)))
    assert "| `qk` | `model.layers\\|x` | rotary \\| position embedding &lt;!-- x |" in text
    assert "No axis was refused." not in text


def test_body_of_an_unverified_model_says_so():
    unverified = summary(verified=False, max_abs_diff=None, relative_diff=None, output_scale=None)
    text = rendered(content(summary=unverified))
    assert "**This was not verified.**" in text
    assert "Yes, measured." not in text


def test_body_of_a_model_already_in_order_says_so():
    axes = {"ffn": {"groups": 12, "channels": 36864, "moved": 0}}
    text = rendered(content(summary=summary(changed=False, axes=axes, max_abs_diff=0.0, relative_diff=0.0)))
    assert "Nothing moved: every channel already stood in order of saliency." in text
    assert "whose channels were found in order" in text
    assert "at most **0**" in text


def test_body_of_a_fine_tuned_model_does_not_promise_the_old_weights():
    text = rendered(content(fine_tuned=True))
    assert "was then fine-tuned" in text
    assert "`undo` restores the order, not the weights from before" in text
    assert "bit for bit" not in text


def test_body_without_evaluation_keeps_an_empty_place_for_it():
    text = rendered(content())
    assert f"{SECTION_START}\n{SECTION_END}" in text
    assert "## Evaluation" not in text


def test_body_with_evaluation():
    text = rendered(evaluated(settings={"epochs": 1, "learning_rate": 5e-5, "optimizer": "adamw|x", "fp16": None}))
    assert "| Pruning-Rank | 61.40 / 61.30 | – |" in text
    assert "Settings: epochs `1`, learning_rate `5e-05`, optimizer `adamw\\|x`, fp16 `null`." in text
    assert "| fashion-mnist | SPP | 123 | 1,000 | 2,000 | 3,850 of 22,000,000 | 21.0 | 7.0e-06 | 1.0e-06 |" in text
    assert "| fashion-mnist | Original | 123 | 1,000 | 2,000 | 3,850 of 22,000,000 | 21.0 | – | – |" in text
    assert "Measured with hf_spp 0.1.0, torch 2.13.0, transformers 5.23.0." in text
    assert "in percent, after the same fine-tuning on each data set. **SPP** is this checkpoint" in text


def test_body_lists_groups_of_settings():
    nested = {"training_arguments": {"epochs": 1, "fp16": False}, "left_out": {}, "data": {"a": {"n": 3}}}
    text = rendered(evaluated(settings=nested))
    assert 'Settings:\n\n- training_arguments: epochs `1`, fp16 `false`\n- data: a `{"n": 3}`\n\nSingle' in text
    assert "Settings" not in rendered(evaluated(settings={"left_out": {}}))


def test_local_paths_do_not_reach_the_card():
    path = "/home/someone/secret/model-x/"
    rows = [row(model=path), row(model="b/y"), row(method="original", model="C:\\secret\\z")]
    text = rendered(content(rows=rows, pipeline_tag="image-classification", settings={"model": path, "seed": 1}))
    assert "secret" not in text
    assert "| model-x | SPP |" in text
    assert "| z | Original |" in text
    assert "Settings: model `model-x`, seed `1`." in text


def test_body_says_when_no_row_is_this_checkpoint():
    text = rendered(content(rows=[row(method="original")], pipeline_tag="image-classification"))
    assert "No row is this checkpoint; all are for comparison." in text


def test_body_leaves_out_what_the_rows_do_not_say():
    text = rendered(content(rows=[row()], pipeline_tag="image-classification"))
    assert "Single runs" not in text
    assert "Settings" not in text
    assert "Measured with" not in text


def test_body_shows_runs_without_differences():
    text = rendered(content(rows=[row(seed=1)], pipeline_tag="image-classification"))
    assert "Single runs:\n\n| Data set | Method | Seed |\n| :--- | :--- | ---: |\n| fashion-mnist | SPP | 1 |" in text


def test_body_shows_what_the_trainer_measured():
    card = render_card(content(rows=[MEASURED], pipeline_tag="text-generation", fine_tuned=True))
    assert "Measured in evaluation mode:\n\n| Data set | Method | loss |" in str(card)
    assert "| wiki | SPP | 2.5 |" in str(card)
    assert "Accuracy" not in str(card)
    assert [(r.metric_type, r.metric_value) for r in card.data.eval_results] == [("loss", 2.5)]


def test_body_shows_plots():
    text = rendered(content(plots={"Accuracy <b>": "plots/method bars.png", "Saliency": "s.png"}))
    assert "## Plots\n\n![Accuracy &lt;b>](plots/method%20bars.png)\n\n*Accuracy &lt;b>*" in text
    assert text.count("## Plots") == 1


def test_body_states_the_license():
    assert "License: apache-2.0." in rendered(content(license=CardLicense("apache-2.0")))
    assert "License: other (my-license)." in rendered(content(license=CardLicense("other", name="my-license")))
    assert "see the terms of the base model." in rendered(content(base_model="a/b"))
    assert "ask its author before using it." in rendered(content())


@pytest.mark.parametrize(
    ("model_type", "model_class", "loader"),
    [
        ("vit", "ViTForImageClassification", "AutoModelForImageClassification"),
        ("llama", "LlamaForCausalLM", "AutoModelForCausalLM"),
        ("bert", "BertForMaskedLM", "AutoModelForMaskedLM"),
        ("gpt2", "GPT2LMHeadModel", "GPT2LMHeadModel"),
        ("bert", "BertModel", "BertModel"),
        ("blip", "BlipForQuestionAnswering", "BlipForQuestionAnswering"),
        ("wav2vec2", "Wav2Vec2ForCTC", "AutoModelForCTC"),
    ],
)
def test_loading_code_gives_back_the_class(model_type, model_class, loader):
    text = rendered(content(summary=summary(model_type=model_type, model_class=model_class), repo_id="me/x"))
    assert f'from transformers import {loader}\n\nmodel = {loader}.from_pretrained("me/x")' in text
    assert 'Reordering.from_pretrained("me/x").undo(model)' in text


def test_loading_code_without_hub_id_loads_the_folder():
    text = rendered(content())
    assert '.from_pretrained(".")' in text
    assert 'The path `"."` starts at the folder of this card.' in text


def test_loading_code_may_name_a_folder_beside_the_card():
    text = rendered(content(folder="checkpoint"))
    assert text.count('.from_pretrained("checkpoint")') == 2
    assert 'The path `"checkpoint"` starts at the folder of this card.' in text


def test_code_blocks_are_python():
    blocks = re.findall(r"```python\n(.*?)```", rendered(content(repo_id="me/x")), flags=re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        compile(block, "card", "exec")


def test_every_branch_of_the_template_is_run(monkeypatch):
    """Each `if` is taken both ways by the cards above, counted on an instrumented copy of the template."""
    environment = model_card._template().environment
    source, _, _ = environment.loader.get_source(environment, "model_card.md.j2")
    seen = set()
    cards = [
        content(),
        content(base_model="a/b"),
        evaluated(fine_tuned=True, settings={"epochs": 1, "x": "y"}, plots={"a": "a.png", "b": "b.png"}),
        content(rows=[row(method="original")], pipeline_tag="t", repo_id="a/b", license=CardLicense("mit")),
        content(rows=[row(seed=1)], pipeline_tag="t", license=CardLicense("other", name="x")),
        content(rows=[MEASURED], pipeline_tag="t"),
        content(summary=summary(changed=False, verified=False, axes={"new": SUMMARY["axes"]["qk"]})),
        content(summary=summary(refused=[{"axis": "qk", "where": "x", "reason": "y"}])),
    ]
    numbers = itertools.count()

    def instrument(node):
        for child in node.iter_child_nodes():
            instrument(child)
        if isinstance(node, nodes.If | nodes.CondExpr):
            number = nodes.Const(next(numbers))
            node.test = nodes.Filter(node.test, "seen", [number], [], None, None, lineno=node.lineno)

    def record(value, number):
        seen.add((number, bool(value)))
        return value

    copy = environment.overlay()
    copy.filters = {**environment.filters, "seen": record}
    tree = copy.parse(source)
    instrument(tree)
    tree.set_environment(copy)
    template = copy.from_string(tree)
    monkeypatch.setattr(model_card, "_template", lambda: template)
    for card in cards:
        rendered(card)
    assert seen == {(number, taken) for number in range(next(numbers)) for taken in (True, False)}


# The license


def test_license_of_a_card():
    text = "---\nlicense: apache-2.0\nmodel-index: broken\n---\n# Card\n"
    assert license_of(text) == CardLicense("apache-2.0")
    assert license_of("\ufeff" + text.replace("\n", "\r\n")) == CardLicense("apache-2.0")


def test_license_of_other_keeps_name_and_link():
    text = "---\nlicense: other\nlicense_name: my-license\nlicense_link: LICENSE\n---\n"
    terms = license_of(text)
    assert terms == CardLicense("other", name="my-license", link="LICENSE")
    data = ModelCard(rendered(content(license=terms, base_model="a/b"))).data
    assert (data.license, data.license_name) == ("other", "my-license")
    assert data.license_link == "https://huggingface.co/a/b/blob/main/LICENSE"


def test_license_link_that_is_a_url_stays():
    terms = CardLicense("other", link="https://example.com/license")
    assert ModelCard(rendered(content(license=terms, base_model="a/b"))).data.license_link == terms.link
    assert ModelCard(rendered(content(license=CardLicense("other", link="LICENSE")))).data.license_link == "LICENSE"


def test_license_of_known_license_drops_a_stray_name():
    assert license_of("---\nlicense: mit\nlicense_name: x\n---\n") == CardLicense("mit")


def test_license_of_several():
    assert license_of("---\nlicense: [mit, apache-2.0]\n---\n") == CardLicense(("mit", "apache-2.0"))


@pytest.mark.parametrize("text", ["", "# Card\n", "---\nlanguage: en\n---\n", "---\nlicense:\n---\n"])
def test_license_of_a_card_without_one(text):
    assert license_of(text) is None


def test_license_that_is_no_hub_identifier_is_kept_as_another():
    terms = license_of("---\nlicense: Apache License 2.0\n---\n")
    assert terms == CardLicense("other", name="Apache License 2.0")


def test_license_of_damaged_card():
    with pytest.raises(CardError, match="no YAML mapping"):
        license_of("---\nlicense: [a: b: c\n---\n")


# Checks


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_name": "two\nlines"}, "model_name"),
        ({"model_name": " "}, "model_name"),
        ({"base_model": "/local/path"}, "base_model '/local/path'"),
        ({"datasets": ("a b",)}, "datasets 'a b'"),
        ({"repo_id": "a/b/c"}, "repo_id"),
        ({"tags": "one"}, r"Write \('one',\)"),
        ({"tags": ("a\nb",)}, "tag or language"),
        ({"rows": [row()]}, "Set pipeline_tag"),
        ({"method": "magic"}, "method 'magic' in CardContent.method"),
        ({"plots": {"a": "/tmp/a.png"}}, "beside the card"),
        ({"plots": {"a": "../a.png"}}, "beside the card"),
        ({"folder": "/tmp/a"}, "CardContent.folder"),
        ({"plots": {"a": "https://example.com/a.png"}}, "beside the card"),
    ],
)
def test_card_content_refuses(changes, message):
    with pytest.raises(CardError, match=message):
        content(**changes)


# Updating an existing card

TRAINER_CARD = """---
library_name: transformers
language: no
license: 'apache-2.0'   # kept as written
base_model: facebook/dinov2-small
tags:
- generated_from_trainer
# a comment
- vision

metrics:
- accuracy
- wer
model-index:
- name: out
  results:
  - task:
      name: Image Classification
      type: image-classification
    dataset:
      name: Fashion MNIST
      type: fashion-mnist
    metrics:
    - name: Accuracy
      type: accuracy
      value: 0.5
---

<!-- This model card has been generated automatically. -->

# out

This model is a fine-tuned version  \n
## Training procedure
| a | b |
"""


def test_update_keeps_everything_else():
    updated = update_card_with_evaluation(TRAINER_CARD, ROWS)
    header, _, body = updated.partition("\n---\n")
    _, _, old_body = TRAINER_CARD.partition("\n---\n")
    assert body.startswith(old_body.rstrip())
    assert "language: no\nlicense: 'apache-2.0'   # kept as written\n" in header
    card = ModelCard(updated)
    assert card.data.tags == ["generated_from_trainer", "vision", "hf_spp", "salient-parameter-prioritization"]
    assert card.data.metrics == ["accuracy", "wer", "f1"]
    assert body.count(SECTION_START) == body.count(SECTION_END) == 1
    assert "| Pruning-Rank | 61.40 / 61.30 | – |" in body


def test_update_keeps_the_results_of_others_and_survives_rewriting():
    card = ModelCard(update_card_with_evaluation(TRAINER_CARD, ROWS))
    results = card.data.eval_results
    assert results[0].metric_value == 0.5
    assert results[0].metric_args is None
    assert len(results) == 1 + 2 * len(ROWS)
    assert ModelCard(str(card)).data.eval_results == results
    assert card.data.model_name == "out"


def test_update_twice_changes_nothing_and_new_rows_replace_old():
    once = update_card_with_evaluation(TRAINER_CARD, ROWS)
    assert update_card_with_evaluation(once, ROWS) == once
    fewer = update_card_with_evaluation(once, ROWS[:1])
    assert fewer == update_card_with_evaluation(TRAINER_CARD, ROWS[:1])
    assert len(ModelCard(fewer).data.eval_results) == 3


def test_update_of_our_own_card_replaces_its_section_in_place():
    text = rendered(evaluated(settings={"epochs": 1}, fine_tuned=True))
    assert update_card_with_evaluation(text, ROWS, settings={"epochs": 1}) == text
    changed = update_card_with_evaluation(text, ROWS[:1], settings={"epochs": 2})
    assert changed.index("## Evaluation") < changed.index("## Citation")
    assert "Settings: epochs `2`." in changed
    filled = update_card_with_evaluation(rendered(content()), ROWS, task="image-classification")
    assert filled.index("## Evaluation") < filled.index("## Citation")


def test_update_of_a_card_without_header():
    updated = update_card_with_evaluation("# My model\n\nText\n", ROWS, task="image-classification")
    card = ModelCard(updated)
    assert card.data.model_name == "My model"
    assert card.text.startswith("\n# My model\n\nText\n\n" + SECTION_START)


def test_update_reads_windows_line_ends_and_byte_order_mark():
    windows = "\ufeff" + TRAINER_CARD.replace("\n", "\r\n")
    assert update_card_with_evaluation(windows, ROWS) == update_card_with_evaluation(TRAINER_CARD, ROWS)


@pytest.mark.parametrize("header", ["{tags: [a], language: en}", "tags: &t [a]\nother: *t", "tags: a"])
def test_update_rewrites_a_header_it_cannot_patch(header):
    before = f"---\n{header}\n---\n# Card\n"
    updated = update_card_with_evaluation(before, ROWS, task="image-classification")
    data = ModelCard(updated).data.to_dict()
    assert data["tags"] == ["a", "hf_spp", "salient-parameter-prioritization"]
    assert {k: v for k, v in ModelCard(before).data.to_dict().items() if k != "tags"}.items() <= data.items()
    assert update_card_with_evaluation(updated, ROWS) == updated


def test_update_does_not_file_its_results_under_anothers_source():
    sourced = TRAINER_CARD.replace(
        "      value: 0.5\n", "      value: 0.5\n    source:\n      url: https://example.com\n"
    )
    results = ModelCard(update_card_with_evaluation(sourced, ROWS)).data.eval_results
    assert [r.metric_value for r in results if r.source_url] == [0.5]


def test_update_of_a_card_whose_index_has_no_results():
    card = "---\nmodel-index:\n- name: out\n  results: []\n---\n# Title\n"
    updated = update_card_with_evaluation(card, [row()], task="image-classification")
    assert ModelCard(updated).data.model_name == "out"
    assert len(ModelCard(updated).data.eval_results) == 2


def test_update_takes_task_and_name_given():
    updated = update_card_with_evaluation("text\n", [row()], task="text-classification", model_name="x")
    data = ModelCard(updated).data
    assert (data.model_name, data.eval_results[0].task_type) == ("x", "text-classification")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# Card\n", "Pass task="),
        ("---\npipeline_tag: image-classification\n---\ntext\n", "Pass model_name="),
        ("---\n- a\n- b\n---\n# Card\n", "no YAML mapping"),
        ("---\na: b: c\n---\n# Card\n", "no YAML mapping"),
        ("---\npipeline_tag: t\nmodel-index: text\n---\n# Card\n", "model-index in the card's header is damaged"),
        (f"---\npipeline_tag: t\n---\n# Card\n{SECTION_START}\n", "Remove the stray ones"),
        (f"---\npipeline_tag: t\n---\n# Card\n{SECTION_END}\n{SECTION_START}\n", "Remove the stray ones"),
    ],
)
def test_update_refuses(text, message):
    with pytest.raises(CardError, match=message):
        update_card_with_evaluation(text, [row()])
