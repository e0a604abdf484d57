"""A small text data set that installs without the Hub, stored as Arrow tables."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .store import built_dataset, read_debian_package

if TYPE_CHECKING:
    from datasets import DatasetDict

_CATEGORIES = ("computers", "education", "food", "kids", "law", "science", "sports")
_SHORTEST, _LONGEST = 40, 300


def fortunes() -> DatasetDict:
    """Give 1,818 short quotations and jokes from Debian's package `fortunes`, to be told apart by their topic.

    The topics are seven of the package's files: computers, education, food, kids, law, science and sports. Texts of 40
    to 300 characters are kept, on one line each. The split is stratified and always the same: 1,454 texts for training
    and 364 for tests. The first call downloads a Debian package (1 MB), which is not installed; later calls map the
    stored tables into memory.

    Returns:
        Splits `train` and `test` with the columns `text` and `label` (`ClassLabel`).

    Raises:
        AssetError: The package cannot be fetched.

    Reference:
        fortune-mod 1.99.1, collected by Ken Arnold, Amy A. Lewis and others; BSD 3-Clause.
    """
    return built_dataset("fortunes", _build_fortunes)


def _build_fortunes(package: Path) -> DatasetDict:
    import datasets
    from sklearn.model_selection import train_test_split

    files = read_debian_package(package)
    # A dictionary, so that a text counts once; where two topics have it, the later one.
    label_of = {
        text: label
        for label, topic in enumerate(_CATEGORIES)
        for text in _texts(files[f"usr/share/games/fortunes/{topic}"].decode())
    }
    texts, labels = np.array(list(label_of), dtype=object), np.array(list(label_of.values()))
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=list(_CATEGORIES))}
    )
    info = datasets.DatasetInfo(dataset_name="fortunes", license="bsd-3-clause", features=features)
    rows = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels)
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_dict({"text": texts[keep], "label": labels[keep]}, info=info)
            for split, keep in zip(("train", "test"), rows, strict=True)
        }
    )


def _texts(file: str) -> list[str]:
    """The texts of a file of fortunes, between lines of `%`, without those that a terminal would overprint."""
    lines = [" ".join(text.split()) for text in file.split("\n%\n")]
    return [line for line in lines if _SHORTEST <= len(line) <= _LONGEST and "\b" not in line]
