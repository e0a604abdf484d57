import io

import numpy as np
import pytest
from PIL import Image

from hf_spp.cards.width_plots import quality_curve
from hf_spp.errors import CardError

SALIENT, RANDOM, FULL = (0, 114, 178), (230, 159, 0), (110, 110, 110)


def row(width="50 %", kind="plain", quality=0.7, share=0.5, seed=None, batches=(16,), metrics=None):
    count = int(20_000_000 * share)
    return {
        "width": width,
        "kind": kind,
        "seed": seed,
        "spec": None,
        "parameters": count,
        "bytes": 4 * count,
        "share": share,
        "metrics": metrics or {"accuracy": quality, "f1": quality - 0.01},
        "latency": [
            {
                "batch": batch,
                "milliseconds": 40 * share,
                "spread": [38 * share, 50 * share],
                "runs": 10,
                "threads": 2,
                "device": "cpu",
            }
            for batch in batches
        ],
        "stock": True,
    }


def rows(kinds=("plain", "random"), **options):
    found = [row("full", "full", 0.8, 1.0, **options)]
    for share in (0.75, 0.5, 0.25):
        for place, kind in enumerate(kinds):
            found.append(row(f"{100 * share:g} %", kind, 0.8 - (1 - share) * (0.2 + 0.15 * place), share, **options))
    return found


def picture(data):
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(data) < 200_000
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def area(image, color):
    pixels = np.asarray(image.convert("RGB")).astype(int)
    return int((np.abs(pixels - np.array(color)).max(axis=-1) <= 4).sum())


@pytest.mark.parametrize("against", ["parameters", "latency"])
def test_a_curve_is_a_small_png_with_a_line_for_each_order(against):
    image = picture(quality_curve(rows(), against))
    assert image.size == (1660, 780)
    assert min(area(image, color) for color in (SALIENT, RANDOM)) > 5000
    assert area(image, FULL) > 300


def test_a_curve_is_deterministic_and_follows_the_data():
    assert quality_curve(rows(), "parameters") == quality_curve(rows(), "parameters")
    moved = [{**one, "metrics": {"accuracy": 0.9 * one["metrics"]["accuracy"]}} for one in rows()]
    assert quality_curve(rows(), "parameters") != quality_curve(moved, "parameters")


def test_a_model_that_is_never_right_has_a_curve():
    assert quality_curve(rows(metrics={"accuracy": 0.0}), "parameters").startswith(b"\x89PNG")


def test_compensated_and_plain_lines_are_told_apart():
    both = picture(quality_curve(rows(("compensated", "plain")), "parameters"))
    one = picture(quality_curve(rows(("compensated",)), "parameters"))
    assert area(one, SALIENT) < area(both, SALIENT) < 2 * area(one, SALIENT)
    assert area(both, RANDOM) == 0


def test_seeds_become_their_mean():
    seeds = [row("full", "full", 0.8, 1.0), row(quality=0.6, kind="random", seed=0)]
    several = quality_curve([*seeds, row(quality=0.4, kind="random", seed=1)], "parameters")
    assert several != quality_curve([*seeds[:1], row(quality=0.5, kind="random")], "parameters")
    assert area(picture(several), RANDOM) > 2000


def test_batch_sizes_and_metrics_have_panels():
    several = picture(quality_curve(rows(batches=(1, 16)), "latency"))
    assert several.size == (1660, 780)
    metrics = {"cosine": 0.9, "recall": 0.5, "error": 3.0, "more": 1.0}
    assert picture(quality_curve(rows(metrics=metrics), "parameters")).size == (1660, 680)
    twice = [{**one, "metrics": {"accuracy": one["metrics"]["accuracy"]}} for one in rows()]
    assert quality_curve(twice, "parameters") == quality_curve(rows(), "parameters")


def test_names_are_no_formulas():
    named = [{**one, "width": "$\\frac{$"} for one in rows(metrics={"$\\frac{$": 0.5})]
    assert picture(quality_curve(named, "parameters"))


def test_wide_values_are_drawn_on_a_logarithmic_scale():
    def drawn(values):
        shares = (1.0, 0.5, 0.25)
        kinds = ("full", "plain", "plain")
        cuts = zip(shares, kinds, values, strict=True)
        return quality_curve([row(str(s), k, share=s, metrics={"perplexity": v}) for s, k, v in cuts], "parameters")

    assert picture(drawn((20.0, 60.0, 1e6))).size == (1660, 780)
    assert drawn((20.0, 60.0, 1e6)) != drawn((20.0, 60.0, 90.0))


def test_values_that_are_not_known_are_left_out():
    lost = [*rows(("plain",))[:-1], row("25 %", share=0.25, metrics={"accuracy": None, "f1": None})]
    assert quality_curve(lost, "parameters") == quality_curve(rows(("plain",))[:-1], "parameters")


@pytest.mark.parametrize(
    ("given", "against"), [([], "parameters"), (rows()[:1], "parameters"), (rows(batches=()), "latency")]
)
def test_nothing_to_draw_is_refused(given, against):
    with pytest.raises(CardError, match=f"nothing to draw against {against}"):
        quality_curve(given, against)
