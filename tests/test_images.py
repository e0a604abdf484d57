import pickle

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from transformers import BitImageProcessor, ViTImageProcessor

from hf_spp.comparison.images import _MODES, PixelStats, pixel_stats, pixel_transform
from hf_spp.errors import DatasetError, SPPConfigError

STEP = 1 / 255
PLAIN = PixelStats(mean=(0.0,), std=(1.0,))


def smooth_image(width, height, mode="RGB", seed=0):
    """An image with structure at several scales, as noise alone would hide a shift of half a pixel."""
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 5, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def processors():
    shared = {"do_center_crop": False}
    return [
        BitImageProcessor(resample=3, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225], **shared),
        ViTImageProcessor(resample=2, **shared),
        ViTImageProcessor(resample=2, do_normalize=False, **shared),
    ]


@pytest.mark.parametrize("processor", processors(), ids=["bicubic", "bilinear", "unnormalised"])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1"])
@pytest.mark.parametrize("size", [14, 56])
def test_values_are_those_of_the_image_processor(processor, mode, size):
    images = [smooth_image(28, 28, mode, 0), smooth_image(40, 31, mode, 1), smooth_image(size, size, mode, 2)]
    # The processor knows neither palettes nor masks without conversion; the transform must convert in the same way.
    plain = [image.convert("RGB") for image in images]
    expected = processor(images=plain, size={"height": size, "width": size}, do_center_crop=False, return_tensors="pt")
    computed = pixel_transform(processor, size)({"image": images})["pixel_values"]
    assert computed.shape == (3, 3, size, size)
    assert computed.dtype == torch.float32
    scale = torch.tensor(processor.image_std if processor.do_normalize else [1.0] * 3)[:, None, None]
    difference = (computed - expected["pixel_values"]).abs() * scale / STEP
    assert difference.max() < 2.01
    assert (difference > 0.01).float().mean() < 0.02


def test_pixels_of_the_right_size_are_only_normalised():
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8), np.uint8)
    computed = pixel_transform(PixelStats(mean=(0.5,), std=(0.25,)), 8, 1)({"image": images})["pixel_values"]
    expected = (torch.from_numpy(images).double() / 255 - 0.5) / 0.25
    assert torch.allclose(computed[:, 0].double(), expected, atol=1e-6)


def test_grey_is_repeated():
    values = pixel_transform(PLAIN, 14)({"image": [smooth_image(28, 28, "L")]})["pixel_values"]
    assert torch.equal(values[:, 0], values[:, 1])
    assert torch.equal(values[:, 0], values[:, 2])


def test_colour_becomes_grey_as_in_pillow():
    image = smooth_image(8, 8)
    grey = torch.from_numpy(np.asarray(image.convert("L")).copy()).float() / 255
    for given in (image, np.asarray(image), np.asarray(image).transpose(2, 0, 1)):
        computed = pixel_transform(PLAIN, 8, 1)({"image": [given]})["pixel_values"]
        assert torch.allclose(computed[0, 0], grey, atol=1e-6)


def test_array_layouts_agree():
    pixels = np.asarray(smooth_image(12, 9))
    opaque = np.concatenate([pixels, np.full((9, 12, 1), 255, np.uint8)], axis=2)
    batch = [Image.fromarray(pixels), pixels, pixels.transpose(2, 0, 1), torch.from_numpy(pixels.copy()), opaque]
    values = pixel_transform(PLAIN, 6)({"image": batch})["pixel_values"]
    for other in values[1:]:
        assert torch.equal(values[0], other)


def test_mixed_sizes_keep_their_places():
    greys = [0, 255, 100, 200]
    images = [Image.new("L", (8 + row % 2, 8), grey) for row, grey in enumerate(greys)]
    values = pixel_transform(PLAIN, 4)({"image": images})["pixel_values"]
    assert (values.mean((1, 2, 3)) * 255).round().tolist() == greys


def test_works_with_datasets():
    images = [smooth_image(10, 10, "L", seed) for seed in range(3)]
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["a", "b"])})
    data = Dataset.from_dict({"image": images, "label": [0, 1, 0]}, features=features)
    transform = pixel_transform(PLAIN, 4, 1)
    shown = data.with_transform(transform)
    assert shown[1]["pixel_values"].shape == (1, 4, 4)
    assert shown[1]["label"] == 1
    stored = data.map(transform, batched=True, remove_columns="image").with_format("torch")
    assert torch.equal(stored[:]["pixel_values"], shown[:]["pixel_values"])


def test_transform_can_be_pickled_for_worker_processes():
    transform = pixel_transform(PLAIN, 4)
    batch = {"image": [smooth_image(8, 8)]}
    again = pickle.loads(pickle.dumps(transform))
    assert torch.equal(again(batch)["pixel_values"], transform(batch)["pixel_values"])


def test_statistics_of_a_processor():
    bit, vit, unnormalised = (pixel_stats(processor) for processor in processors())
    assert (bit.resample, bit.mean) == ("bicubic", (0.485, 0.456, 0.406))
    assert (vit.resample, vit.scale) == ("bilinear", pytest.approx(STEP))
    assert (unnormalised.mean, unnormalised.std) == ((0.0,), (1.0,))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([np.zeros((8, 8), np.float32)], "dtype float32"),
        ([np.zeros((5, 8, 7), np.uint8)], r"array of shape \(5, 8, 7\)"),
        ([np.zeros((8,), np.uint8)], r"shape \(8,\)"),
        ([Image.new("I;16", (8, 8))], "mode 'I;16'"),
        ([Image.new("F", (8, 8))], "mode 'F'"),
        ([], "is empty"),
    ],
)
def test_other_images_are_refused(given, message):
    with pytest.raises(DatasetError, match=message) as caught:
        pixel_transform(PLAIN, 4)({"image": given})
    assert "Accepted:" in str(caught.value)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", _MODES)
def test_every_accepted_mode_can_be_read(mode, channels):
    values = pixel_transform(PLAIN, 4, channels)({"image": [Image.new(mode, (8, 8))]})["pixel_values"]
    assert values.shape == (1, channels, 4, 4)
    assert values.flatten(2).unique(dim=2).shape == (1, channels, 1)


def test_missing_column():
    with pytest.raises(DatasetError, match=r"columns \['img', 'label'\], none is 'image'"):
        pixel_transform(PLAIN, 4)({"img": [], "label": []})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pixel_transform(PLAIN, 0), "size=0"),
        (lambda: pixel_transform(PLAIN, 4, 2), "channels=2"),
        (lambda: pixel_transform(PixelStats((0.1, 0.2, 0.3), (1.0, 1.0, 1.0)), 4, 1), "have 3 channels"),
        (lambda: pixel_transform(ViTImageProcessor(resample=1), 4), "resample=1 is not supported"),
        (lambda: pixel_transform(object(), 4), "object with resample=None"),
        (lambda: PixelStats(resample="lanczos"), "resample='lanczos'"),
        (lambda: PixelStats(std=(0.0,)), "positive deviations"),
        (lambda: PixelStats(mean=(0.0, 0.0)), "as many"),
    ],
)
def test_wrong_settings(call, message):
    with pytest.raises(SPPConfigError, match=message):
        call()
