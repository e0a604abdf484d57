import pytest
from test_width_plots import row, rows

from hf_spp.cards.card_sections import replace_section
from hf_spp.cards.model_card import update_card_with_evaluation
from hf_spp.cards.width_rows import metrics_caption, show_metric, width_table
from hf_spp.cards.width_section import (
    WIDTHS_END,
    WIDTHS_START,
    keep_widths,
    update_card_with_widths,
    width_section,
)
from hf_spp.errors import CardError

SETTINGS = {
    "dataset": "fashion-mnist",
    "samples": 1000,
    "ordered": True,
    "calibration_samples": 512,
    "random_seeds": [0],
    "dtype": "float32",
    "versions": {"hf_spp": "0.1.0", "torch": "2.13.0"},
}
CARD = "---\nlicense: mit # mine\n---\n# Title\n\n<!-- hf_spp:start -->\nold\n<!-- hf_spp:end -->\n\n## Citation\n"


def section(**changes):
    return width_section(rows(), {**SETTINGS, **changes}, {"Quality | size": "widths parameters.png"})


# Tables


def test_table_has_a_line_for_each_width_and_a_column_for_each_kind():
    given = [row("full", "full", 0.8, 1.0), row(quality=0.7), row(kind="compensated", quality=0.75)]
    given += [row(kind="random", quality=quality, seed=seed) for seed, quality in enumerate((0.4, 0.6))]
    assert width_table(given) == (
        "| Width | Parameters | MB | ms, batch 16 | Compensated | Plain slice | Random order |\n"
        "| :--- | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        "| full | 20.0 M (100 %) | 80.0 | 40 (38–50) | 80.00 / 79.00 | – | – |\n"
        "| 50 % | 10.0 M (50 %) | 40.0 | 20 (19–25) | 75.00 / 74.00 | 70.00 / 69.00 | "
        "50.00 ± 14.14 / 49.00 ± 14.14 |"
    )


def test_long_times_are_written_out():
    slow = row("full", "full", 0.8, 1.0, batches=(16,))
    slow["latency"][0].update(milliseconds=1542.7, spread=[1489.9, 12345.6])
    assert "| 1,540 (1,490–12,300) |" in width_table([slow, row()])


def test_table_without_times_and_with_lost_values():
    given = [row("full", "full", share=1.0, batches=(), metrics={"perplexity": 12.345})]
    given += [row(batches=(), metrics={"perplexity": 123456.7}), row("25 %", batches=(), metrics={"perplexity": None})]
    lines = width_table(given).split("\n")
    assert lines[0] == "| Width | Parameters | MB | Plain slice |"
    assert [line.rsplit("| ", 1)[1] for line in lines[2:]] == ["12.35 |", "123,457 |", "– |"]


@pytest.mark.parametrize(
    ("metric", "value", "shown"),
    [
        ("accuracy", 0.12345, "12.35"),
        ("cosine", 0.99951, "0.9995"),
        ("perplexity", 3.2e9, "3.2e+09"),
        ("perplexity", 7_183_495.0, "7.2e+06"),
        ("perplexity", 999.96, "1000"),
        ("mine", 0.000123456, "0.0001235"),
        ("mine", -2500.0, "-2,500"),
    ],
)
def test_metrics_are_shown_in_few_digits(metric, value, shown):
    assert show_metric(metric, value) == shown


def test_caption_names_the_metrics():
    assert metrics_caption(rows()) == "Accuracy / macro F1, in percent"
    assert metrics_caption([row(metrics={"cosine": 0.9, "accuracy": 0.5, "mine": 1.0})]) == (
        "Cosine to the full model / accuracy, % / mine"
    )


# The section


def test_section_says_what_was_measured_and_how():
    text = section()
    assert text.startswith(f"{WIDTHS_START}\n\n## Widths\n\n")
    assert text.endswith(f"\n\n{WIDTHS_END}")
    for part in (
        "on 1,000 examples of fashion-mnist. Accuracy / macro F1, in percent. Stock `transformers` loads each of them",
        "| 50 % | 10.0 M (50 %) |",
        "![Quality \\| size](widths%20parameters.png)",
        "least squares on 512 unlabelled examples, nothing is trained.",
        "Milliseconds: median (shortest–longest) of 10 forward passes on cpu, 2 threads, float32, in turns",
        "Measured with hf_spp 0.1.0, torch 2.13.0.",
    ):
        assert part in text
    assert "\n\n\n" not in text


def test_section_says_what_is_not_known():
    assert "are in no known order of saliency" in section(ordered=False)
    text = section(calibration_samples=0, random_seeds=[], dataset=None)
    assert "least squares" not in text
    assert "shuffled" not in text
    assert "on 1,000 examples. " in text
    cut = width_section([{**one, "stock": one["kind"] == "full"} for one in rows()], SETTINGS, {})
    assert "`hf_spp.load_subnetwork` loads them" in cut


# In a card


def test_section_stands_behind_the_evaluation_and_is_replaced():
    first = update_card_with_widths(CARD, "\n".join([WIDTHS_START, "one", WIDTHS_END]))
    assert first == CARD.replace("end -->\n\n## C", f"end -->\n\n{WIDTHS_START}\none\n{WIDTHS_END}\n\n## C")
    second = update_card_with_widths(first, section())
    assert second == CARD.replace("end -->\n\n## C", f"end -->\n\n{section()}\n\n## C")
    assert update_card_with_widths(second, section()) == second


def test_section_goes_to_the_end_of_somebody_elses_card():
    assert update_card_with_widths("# Mine\n\ntext\n\n", section()) == f"# Mine\n\ntext\n\n{section()}\n"
    windows = "# Mine\r\n\r\ntext\r\n"
    assert update_card_with_widths(windows, section()).startswith("# Mine\r\n\r\ntext\n")


def test_evaluation_results_and_widths_leave_each_other_alone():
    results = [{"dataset": "a", "method": "spp", "accuracy": 0.5, "f1": 0.5}]
    both = update_card_with_widths(CARD, section())
    updated = update_card_with_evaluation(both, results, task="image-classification", model_name="m")
    assert section() in updated
    assert "50.00 / 50.00" in updated
    again = update_card_with_widths(updated, section(samples=7))
    assert "on 7 examples" in again
    assert "50.00 / 50.00" in again


def test_widths_are_kept_when_a_card_is_written_anew():
    assert keep_widths(CARD, "# Another\n") == CARD
    assert keep_widths(CARD, f"# Another\n\n{section()}\n") == update_card_with_widths(CARD, section())


@pytest.mark.parametrize("lines", [["start"], ["end"], ["end", "start"], ["start", "start", "end"]])
def test_damaged_markers_are_refused(lines):
    text = "\n".join(f"<!-- {line} -->" for line in lines)
    with pytest.raises(CardError, match="Remove the stray ones"):
        replace_section(text, "new", "<!-- start -->", "<!-- end -->")
