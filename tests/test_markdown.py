"""Strings from outside in a card: plain text for a Markdown parser, the same string for a YAML parser."""

import re
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from test_model_card import SUMMARY, row
from test_width_plots import row as width_row

from hf_spp.cards.markdown import Markdown, code, plain, unescaped
from hf_spp.cards.model_card import CardContent, CardLicense, render_card, update_card_with_evaluation
from hf_spp.cards.result_rows import markdown_table
from hf_spp.cards.results import ComparisonResults
from hf_spp.cards.width_section import update_card_with_widths, width_section
from hf_spp.errors import CardError

PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])
# As GitHub's Markdown finds addresses in plain text.
ADDRESS = re.compile(r"(?i)\b(?:https?|ftp)://\S|\bwww\.\S|[\w.+-]+@[\w-]+\.\w|mailto:\S|xmpp:\S")

# fmt: off
FRAGMENTS = [
    "<b>", "<script>", "</details>", "<!--hf_spp:end-->", "-->", "<http://e.vil>", "[x](http://e.vil)",
    "![i](e.png)", "[x]", "[^1]", "[a]:", "|", "\\|", "\\", "\\\\", "`", "``", "```", "~~~", "~~", "~", "**", "*",
    "__", "_", "#", "##", "###", "---", "--", "-", "+", "=", "===", ">", "1.", "2)", "$", "$$", "\\(", "&", "&lt;",
    "&#91;", "&amp;", "https://e.vil", "www.e.vil", "a@b.cd", "acc@5", "mailto:a", "javascript:x", "{{7*7}}",
    "{%raw%}", "{#x#}", "'", '"', ":", ";", ",", ".", "/", "é", "模", "x", "y1", "a_b", "(", ")", "!", "%2e",
]
# fmt: on
fragments = st.sampled_from(FRAGMENTS)
printable = st.lists(fragments | st.just(" "), min_size=1, max_size=7).map("".join).filter(str.strip)
raw = st.lists(
    fragments | st.sampled_from([" ", "\n", "\n\n", "\t", "\x00", "\x1b", "\u202e", "\u2028", "\ud800", "\r"])
)
hostile = raw.map("".join)
words = printable.map(lambda text: f"d{text}")


def shape(markdown):
    """Every block and mark that a parser finds, in order; text and code, which hold words, count as one."""
    found = []
    for block in PARSER.parse(markdown):
        if block.type != "inline":
            found.append(block.type if block.type not in ("html_block", "fence") else f"{block.type} {block.content}")
            continue
        for token in block.children:
            if token.type == "text":
                assert not ADDRESS.search(token.content), f"{token.content!r} becomes a link"
            if token.type in ("text", "code_inline"):
                found.extend(["words"] if found[-1:] != ["words"] else [])
            else:
                kept = {name: value for name, value in token.attrs.items() if name in ("href", "src")}
                found.append(f"{token.type} {kept}")
    return found


def words_of(markdown):
    inline = [token for block in PARSER.parse(markdown) for token in block.children or ()]
    return "".join(token.content for token in inline)


def as_shown(value):
    return "".join(one if one.isprintable() else "�" for one in " ".join(str(value).split()))


@given(hostile)
@example("a\\|b https://e.vil|x\\|y `")
@example("# # #")
@example("#https://e.vil")
@example("1.www.e.vil")
@example("10. x")
def test_any_string_is_one_line_of_text(value):
    written = plain(value)
    assert "\n" not in written
    for before, after in (("", ""), ("# ", ""), ("- ", ""), ("*", "*"), ("text ", " text"), ("> ", "")):
        if as_shown(value):
            assert shape(f"{before}{written}{after}\n") == shape(f"{before}x{after}\n")
    assert words_of(f"- {written}").replace("\\|", "|") == as_shown(value).replace("\\|", "|")
    assert unescaped(written) == as_shown(value)


@given(hostile, hostile)
def test_any_string_is_one_cell_of_a_table(one, two):
    table = markdown_table([one, "B"], [[two, "1"], ["2", code(one)]], left=1)
    assert shape(table) == shape(
        markdown_table(["x" * bool(as_shown(one)), "B"], [["y" * bool(as_shown(two)), "1"], ["2", "x"]], left=1)
    )
    assert words_of(table) == as_shown(one) + "B" + as_shown(two) + "12" + (as_shown(one) or '""')


@pytest.mark.parametrize(
    "name",
    [
        "facebook/dinov2-small-spp",
        "my_model_v1.5",
        "a__b",
        "50 %",
        "ndcg@10",
        "R&D",
        "1e-05",
        "-0.5",
        "C++",
        "x > y",
        "v2.",
    ],
)
def test_usual_names_stay_as_they_are(name):
    assert plain(name) == name


def test_markdown_stays_as_it_is():
    assert plain(Markdown("*x*")) == "*x*"
    assert plain("*x*") == "\\*x\\*"


def card_of(one, raw, *, path="plot.png"):
    """A card with a string at every place that takes one, printable or not."""
    count = SUMMARY["axes"]["qk"]
    summary = {
        **SUMMARY,
        "metric": raw,
        "dtype": raw,
        "axes": {raw: count, "qk": count},
        "refused": [{"axis": raw, "where": raw, "reason": raw}],
        "versions": {raw: raw, "torch": "1"},
    }
    shown = {"versions": {raw: raw}, "seed": 1, "model": one}
    rows = [row(f"d{one}", **shown), {"dataset": "b", "method": "spp", "metrics": {one: 1.0, "loss": 2.0}, **shown}]
    return CardContent(
        model_name=one,
        summary=summary,
        license=CardLicense("other", name=one),
        language=(one,),
        tags=(one,),
        pipeline_tag=one,
        rows=rows,
        settings={raw: raw, "model": raw, "group": {raw: [raw], "x": raw}, raw + "g": {"x": 1}},
        plots={one: path},
    )


@settings(max_examples=150)
@given(printable, hostile.filter(as_shown))
def test_strings_break_no_card(one, raw):
    expected, found = (str(render_card(card_of(*values))) for values in (("x", "x"), (one, raw)))
    assert shape(found.split("\n---\n", 1)[1]) == shape(expected.split("\n---\n", 1)[1])
    text = words_of(found)
    for value in (one, f"d{one}", raw):
        assert as_shown(value) in text or "/" in value or "\\" in value
    card = ModelCard(found)
    data = card.data
    assert (data.license_name, data.language, data.pipeline_tag) == (one, one, one)
    assert (data.tags[-1], data.model_name, data.metrics) == (
        one,
        one,
        list(dict.fromkeys(["accuracy", "f1", one, "loss"])),
    )
    assert {result.dataset_name for result in data.eval_results} == {f"d{one}", "b"}
    assert {result.task_type for result in data.eval_results} == {one}


@settings(max_examples=50)
@given(printable, hostile.filter(as_shown))
def test_strings_break_no_section_of_a_strangers_card(one, raw):
    def written(one, raw):
        rows = [{"dataset": f"d{one}", "method": "spp", "metrics": {one: 1.0}, "versions": {raw: raw}}]
        text = update_card_with_evaluation(f"# {plain(one)}\n\nTheirs.\n", rows, task=one, settings={raw: raw})
        assert update_card_with_evaluation(text, rows, task=one, settings={raw: raw}) == text
        assert ModelCard(text).data.model_name == as_shown(one)
        wide = {**width_row(metrics={raw: 0.5}), "width": raw}
        wide["latency"] = [{**wide["latency"][0], "device": raw}]
        shared = {"dataset": raw, "samples": 1, "ordered": True, "dtype": raw, "versions": {raw: raw}}
        section = width_section([wide], shared, {raw: "a b.png"})
        text = update_card_with_widths(text, section)
        assert update_card_with_widths(text, section) == text
        return text.split("\n---\n", 1)[1]

    assert shape(written(one, raw)) == shape(written("x", "x"))


@given(printable, hostile.filter(as_shown))
def test_strings_break_no_table_of_a_comparison(one, raw):
    def written(one, raw):
        results = ComparisonResults([row(f"d{one}")], {"left_out": {raw: raw}}, None)
        return results.to_markdown()

    assert shape(written(one, raw)) == shape(written("x", "x"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"summary": {**SUMMARY, "model_class": "X\nimport os"}}, "no name of a class"),
        ({"summary": {**SUMMARY, "model_class": "X`"}}, "no name of a class"),
        ({"folder": "a\n```\n<b>"}, "no line of text"),
        ({"folder": "https://e.vil"}, "does not lie beside the card"),
        ({"folder": "http://["}, "does not lie beside the card"),
        ({"plots": {"a": "javascript:alert(1)"}}, "does not lie beside the card"),
        ({"plots": {"a": "//e.vil/x.png"}}, "does not lie beside the card"),
        ({"plots": {"a\nb": "x.png"}}, "no line of text"),
        ({"pipeline_tag": ["a"]}, "no line of text"),
        ({"license": CardLicense("a\nb")}, "no line of text"),
        ({"license": CardLicense("other", link="javascript:alert(1)")}, "is no link"),
        ({"license": CardLicense("other", link="//e.vil")}, "is no link"),
        ({"license": CardLicense("other", link="https://")}, "is no link"),
        ({"license": CardLicense("other", link="http://[ x")}, "is no link"),
    ],
)
def test_what_would_be_no_plain_text_is_refused(changes, said):
    with pytest.raises(CardError, match=said):
        replace(CardContent(model_name="x", summary=SUMMARY), **changes)


def test_paths_are_quoted():
    text = str(render_card(card_of("x", "x", path='a/b)](http://e.vil "<x> c.png')))
    assert "](a/b%29%5D%28http%3A//e.vil%20%22%3Cx%3E%20c.png)" in text
    folder = str(render_card(CardContent(model_name="x", summary=SUMMARY, folder='a"; import os; "')))
    for block in re.findall(r"```python\n(.*?)```", folder, flags=re.DOTALL):
        compile(block, "card", "exec")
    assert '.from_pretrained("a\\"; import os; \\"")' in folder
