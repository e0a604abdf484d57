"""Batched preparation of images for classification: the values of the model's image processor, several times faster."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from ..errors import DatasetError, SPPConfigError

# Pillow's filter numbers, and the names that torch uses.
_RESAMPLE = {2: "bilinear", 3: "bicubic", "bilinear": "bilinear", "bicubic": "bicubic"}
_MODES = ("1", "CMYK", "HSV", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "YCbCr")


@dataclass(frozen=True)
class PixelStats:
    """How 8-bit pixels become a model's input: `(pixel * scale - mean) / std`, after resizing.

    Attributes:
        mean: Mean per channel, or one for all.
        std: Standard deviation per channel, or one for all.
        resample: `"bilinear"` or `"bicubic"`.
        scale: Factor of the 8-bit values.

    Raises:
        SPPConfigError: The filter is unknown, a deviation is not positive, or the lengths differ.
    """

    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    resample: str = "bilinear"
    scale: float = 1 / 255

    def __post_init__(self) -> None:
        if self.resample not in ("bilinear", "bicubic"):
            raise SPPConfigError(
                f"PixelStats got resample={self.resample!r}. Accepted: 'bilinear', 'bicubic'. Choose one of them."
            )
        if len(self.mean) != len(self.std) or not self.std or min(self.std) <= 0:
            raise SPPConfigError(
                f"PixelStats got mean={self.mean} and std={self.std}. Accepted: as many positive deviations as means. "
                "Take both from the model's preprocessor_config.json."
            )


def pixel_stats(processor: Any) -> PixelStats:
    """Read the pixel statistics of an image processor of transformers.

    Args:
        processor: An image processor, for example from `AutoImageProcessor.from_pretrained`.

    Returns:
        Its filter, scale, mean and standard deviation.

    Raises:
        SPPConfigError: It is no image processor, or its filter is neither bilinear nor bicubic.
    """
    resample = getattr(processor, "resample", None)
    # Pillow's enum counts as its number; torchvision's holds its name.
    number_or_name = getattr(resample, "value", resample)
    if not hasattr(processor, "do_normalize") or number_or_name not in _RESAMPLE:
        raise SPPConfigError(
            f"{type(processor).__name__} with resample={resample!r} is not supported. Accepted: an image processor "
            "of transformers that resizes bilinear (2) or bicubic (3). Pass PixelStats(…) in its place."
        )
    normalize = processor.do_normalize
    return PixelStats(
        mean=tuple(map(float, processor.image_mean)) if normalize else (0.0,),
        std=tuple(map(float, processor.image_std)) if normalize else (1.0,),
        resample=_RESAMPLE[number_or_name],
        scale=float(processor.rescale_factor) if processor.do_rescale else 1.0,
    )


def pixel_transform(
    processor_or_stats: Any, size: int, channels: int = 3, *, image_column: str = "image"
) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Make a batch function for `Dataset.with_transform` or `Dataset.map(batched=True)`.

    The function replaces the image column by `pixel_values`, float32 `[images, channels, size, size]` on the CPU, and
    passes the other columns through. It resizes to `size` × `size` without keeping the aspect ratio or cropping, which
    is what an image processor does with `do_center_crop=False` and a height and width of `size`; values agree with it
    to within two steps of the 8-bit scale. Images may be Pillow images of any 8-bit mode or uint8 arrays
    `[height, width]`, `[height, width, channels]` or `[channels, height, width]`, of any and of mixed sizes. Grey is
    repeated to three channels; transparency is dropped.

    Args:
        processor_or_stats: The model's image processor, or `PixelStats`.
        size: Height and width of the result, in pixels.
        channels: 3 for colour or 1 for grey.
        image_column: Column that holds the images.

    Returns:
        A function from a batch (column name to list) to a batch. It can be pickled.

    Raises:
        SPPConfigError: A size below 1, other channels, or statistics for another number of channels.
        DatasetError: From the function: no image column, an empty batch, or something in it that is no 8-bit image.
    """
    if size < 1 or channels not in (1, 3):
        raise SPPConfigError(
            f"pixel_transform got size={size} and channels={channels}. Accepted: a size of at least 1, and 1 or 3 "
            "channels. Take them from the model's config."
        )
    stats = processor_or_stats if isinstance(processor_or_stats, PixelStats) else pixel_stats(processor_or_stats)
    if len(stats.mean) not in (1, channels):
        raise SPPConfigError(
            f"The pixel statistics have {len(stats.mean)} channels, pixel_transform got channels={channels}. Accepted: "
            "as many, or one for all. Change channels=, or pass PixelStats(…)."
        )
    return _PixelTransform(stats, size, channels, image_column)


@dataclass(frozen=True)
class _PixelTransform:
    stats: PixelStats
    size: int
    channels: int
    image_column: str

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        images = batch.get(self.image_column)
        if images is None:
            raise DatasetError(
                f"The batch has the columns {sorted(batch)}, none is {self.image_column!r}. Accepted: a column of "
                "images. Pass image_column=, and remove_unused_columns=False to the Trainer."
            )
        if len(images) == 0:
            raise DatasetError(
                f"Column {self.image_column!r} of the batch is empty. Accepted: at least one image. "
                "Check the filter or the selection of rows before it."
            )
        rest = {name: values for name, values in batch.items() if name != self.image_column}
        return {"pixel_values": self._pixel_values(images), **rest}

    def _pixel_values(self, images: Sequence[Any]) -> Tensor:
        by_shape: dict[tuple[int, ...], list[int]] = defaultdict(list)
        arrays = [_pixels(image, self.channels) for image in images]
        for row, array in enumerate(arrays):
            by_shape[array.shape].append(row)
        resized = torch.empty(len(arrays), self.channels, self.size, self.size, dtype=torch.uint8)
        for rows in by_shape.values():
            stack = torch.from_numpy(np.stack([arrays[row] for row in rows]))
            resized[rows] = self._resize(rearrange(stack, "n h w c -> n c h w"))
        scale = self.stats.scale / torch.tensor(self.stats.std, dtype=torch.float64)
        shift = torch.tensor(self.stats.mean, dtype=torch.float64) / torch.tensor(self.stats.std, dtype=torch.float64)
        # One pass of multiply and add; the factors are joined in double precision, so nothing is lost by it.
        return resized.float().mul_(_per_channel(scale)).sub_(_per_channel(shift))

    def _resize(self, pixels: Tensor) -> Tensor:
        """Resize `[n, c, h, w]` in 8 bits, as Pillow does, with its rounding between rows and columns."""
        if pixels.shape[-2:] == (self.size, self.size):
            return pixels
        return functional.interpolate(
            pixels, size=(self.size, self.size), mode=self.stats.resample, antialias=True, align_corners=False
        )


def _per_channel(values: Tensor) -> Tensor:
    return rearrange(values.float(), "c -> 1 c 1 1")


def _pixels(image: Any, channels: int) -> NDArray[np.uint8]:
    """Give one image as `[height, width, 1 or channels]`."""
    if isinstance(image, Image.Image):
        if image.mode not in _MODES:
            raise _not_an_image(f"a Pillow image of mode {image.mode!r}")
        grey = channels == 1 or image.mode in ("1", "L")
        array = np.asarray(image.convert("L" if grey else "RGB"))
        return array[..., None] if grey else array
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or array.size == 0:
        raise _not_an_image(f"{type(image).__name__} with dtype {array.dtype} and shape {array.shape}")
    if array.ndim == 2:
        return array[..., None]
    if array.shape[-1] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = rearrange(array, "c h w -> h w c")
    if array.shape[-1] not in (1, 3, 4):
        raise _not_an_image(f"an array of shape {array.shape}")
    if channels == 1 and array.shape[-1] != 1:
        return np.asarray(Image.fromarray(array[..., :3]).convert("L"))[..., None]
    return array[..., : min(array.shape[-1], 3)]


def _not_an_image(given: str) -> DatasetError:
    return DatasetError(
        f"The image column holds {given}. Accepted: Pillow images of 8 bits per channel "
        f"({', '.join(sorted(_MODES))}), or uint8 arrays with 1, 3 or 4 channels. Convert the column first."
    )
