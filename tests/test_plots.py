import io
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image

from hf_spp.cards.plots import method_bars, saliency_spectrum
from hf_spp.errors import CardError, NonFiniteWeightsError, SPPConfigError


@dataclass(frozen=True)
class Group:
    name: str
    axis: str
    layer: int | None
    blocks: int
    size: int


def row(dataset="fashion-mnist", method="spp", accuracy=0.775, **more):
    return {"dataset": dataset, "method": method, "accuracy": accuracy, "f1": accuracy, **more}


def spectrum(axes=("qk", "vo", "ffn"), layers=12, spread=0.5):
    generator = torch.Generator().manual_seed(0)
    groups = [
        Group(f"{axis}.{layer}", axis, layer, *((1, 1536) if axis == "ffn" else (6, 64)))
        for axis in axes
        for layer in range(layers)
    ]
    scores = {g.name: torch.exp(spread * torch.randn(g.blocks, g.size, generator=generator)) for g in groups}
    return scores, groups


def picture(data):
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(data) < 200_000
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def has_color(image, color):
    pixels = np.asarray(image.convert("RGB")).astype(int)
    return int((np.abs(pixels - np.array(color)).max(axis=-1) <= 4).sum())


ORIGINAL, PRUNING, SPP = (110, 110, 110), (213, 94, 0), (0, 114, 178)


def test_method_bars_is_a_small_png_with_one_color_per_method():
    image = picture(method_bars([row(method="original"), row(method="pruning-rank", accuracy=0.614), row()]))
    assert image.size == (1660, 720)
    areas = [has_color(image, color) for color in (ORIGINAL, PRUNING, SPP)]
    assert min(areas) > 10_000
    assert areas[1] / areas[2] == pytest.approx(0.614 / 0.775, abs=0.02)


def test_method_bars_is_deterministic_and_follows_the_data():
    rows = [row(method="original"), row()]
    assert method_bars(rows) == method_bars(rows)
    assert method_bars(rows) != method_bars([row(method="original"), row(accuracy=0.5)])


def test_method_bars_leaves_a_gap_where_a_method_was_not_run():
    both = picture(method_bars([row("a"), row("a", "original"), row("b"), row("b", "original")]))
    gap = picture(method_bars([row("a"), row("a", "original"), row("b")]))
    assert has_color(gap, ORIGINAL) < 0.6 * has_color(both, ORIGINAL)
    assert has_color(gap, SPP) == pytest.approx(has_color(both, SPP), rel=0.01)


def test_method_bars_draws_the_mean_of_several_seeds():
    several = picture(method_bars([row(accuracy=0.4, seed=0), row(accuracy=0.6, seed=1)]))
    single = picture(method_bars([row(accuracy=0.5)]))
    assert has_color(several, SPP) == pytest.approx(has_color(single, SPP), rel=0.02)


def test_method_bars_separates_models():
    together = method_bars([row(model="a/x", accuracy=0.4), row(model="b/y", accuracy=0.8)])
    assert has_color(picture(together), SPP) > 10_000
    assert together != method_bars([row(model="b/y", accuracy=0.4), row(model="a/x", accuracy=0.8)])


def test_method_bars_stays_small_when_full():
    methods = ("original", "pruning-rank", "random", "spp-raffm", "spp")
    picture(method_bars([row(f"set-{d}", m, 0.9 - d / 20) for d in range(6) for m in methods]))


def test_names_are_no_formulas():
    assert picture(method_bars([row("a $\\frac{$ b")]))


def test_method_bars_refuses_nothing_to_draw():
    with pytest.raises(CardError, match="hold no result"):
        method_bars([])


@pytest.mark.parametrize(
    ("axes", "size"),
    [(("ffn",), (1660, 640)), (("qk", "vo", "ffn"), (1660, 640)), (("qk", "vo", "heads", "ffn"), (1660, 1180))],
)
def test_saliency_spectrum_is_a_small_png(axes, size):
    assert picture(saliency_spectrum(*spectrum(axes))).size == size


def test_saliency_spectrum_of_a_deep_model_stays_small():
    picture(saliency_spectrum(*spectrum(layers=48)))


def test_saliency_spectrum_is_deterministic_and_follows_the_data():
    assert saliency_spectrum(*spectrum()) == saliency_spectrum(*spectrum())
    assert saliency_spectrum(*spectrum()) != saliency_spectrum(*spectrum(spread=0.1))


def test_saliency_spectrum_depends_neither_on_order_nor_on_scale():
    scores, groups = spectrum()
    moved = {name: 2 * values.flip(1) for name, values in scores.items()}
    assert saliency_spectrum(moved, groups) == saliency_spectrum(scores, groups)


def test_saliency_spectrum_draws_groups_without_layer_and_groups_of_one_channel():
    groups = [Group("hidden", "hidden", None, 1, 8), Group("heads", "heads", 0, 1, 1)]
    scores = {"hidden": torch.arange(8.0)[None], "heads": torch.ones(1, 1)}
    assert picture(saliency_spectrum(scores, groups)).size == (1660, 640)


def test_saliency_spectrum_draws_scores_that_are_all_zero_as_zero():
    group = Group("ffn", "ffn", 0, 1, 8)
    zero = saliency_spectrum({"ffn": torch.zeros(1, 8)}, [group])
    assert zero != saliency_spectrum({"ffn": torch.ones(1, 8)}, [group])


def test_saliency_spectrum_averages_experts_of_a_layer():
    experts = [Group("e0", "ffn", 0, 1, 2), Group("e1", "ffn", 0, 1, 2)]
    averaged = saliency_spectrum({"e0": torch.tensor([[4.0, 0.0]]), "e1": torch.tensor([[4.0, 4.0]])}, experts)
    assert averaged == saliency_spectrum({"m": torch.tensor([[4.0, 2.0]])}, [Group("m", "ffn", 0, 1, 2)])


def test_saliency_spectrum_reads_half_precision():
    scores = {"ffn": torch.tensor([[4.0, 2.0]])}
    group = [Group("ffn", "ffn", 0, 1, 2)]
    assert saliency_spectrum({"ffn": scores["ffn"].bfloat16()}, group) == saliency_spectrum(scores, group)


@pytest.mark.parametrize(
    ("scores", "groups", "error", "message"),
    [
        ({}, [], SPPConfigError, "are empty"),
        ({}, [Group("a", "ffn", 0, 1, 2)], SPPConfigError, "'a' in saliency_spectrum has no scores"),
        ({"a": torch.ones(2)}, [Group("a", "ffn", 0, 1, 2)], SPPConfigError, r"shape \[2\].*\[1, 2\]"),
        ({"a": torch.tensor([[1.0, torch.nan]])}, [Group("a", "ffn", 0, 1, 2)], NonFiniteWeightsError, "NaN"),
    ],
)
def test_saliency_spectrum_refuses(scores, groups, error, message):
    with pytest.raises(error, match=message):
        saliency_spectrum(scores, groups)
