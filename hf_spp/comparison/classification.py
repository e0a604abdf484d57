"""Classification data and the model that fits it: columns, splits, transforms, heads."""

import dataclasses
import hashlib
import inspect
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    default_data_collator,
)

from ..errors import CheckpointError, DatasetError, HubError, SPPConfigError, UnsupportedArchitectureError
from .images import pixel_transform

DatasetSource: TypeAlias = Any
Collator: TypeAlias = Callable[[list[dict[str, Any]]], dict[str, Any]]

_LABEL_NAMES = ("label", "labels", "fine_label")
_IMAGE_NAMES = ("image", "img")
_TEXT_NAMES = ("text", "sentence", "content")
_TEXT_PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
)
_MODEL_CLASSES: Mapping[str, Any] = {
    "image": AutoModelForImageClassification,
    "text": AutoModelForSequenceClassification,
}
_EXAMPLES = 8


@dataclass(frozen=True)
class Recipe:
    """How a data set becomes a training and a validation set; the defaults are the paper's.

    Attributes:
        validation_fraction: Share of the train split that is held out for evaluation.
        train_fraction: Share of the rest that is trained on.
        split_seed: Seed of both splits.
        max_train_samples: Most examples trained on; None takes all.
        max_eval_samples: Most examples evaluated on; None takes all.
        image_size: Side in pixels that images are scaled to; None takes the model's own. ViT and its kin then need
            `interpolate_pos_encoding=True` wherever the fine-tuned model is used.
        max_length: Most tokens of a text; None takes the model's own.
        input_column: Column of the images or texts; None finds it.
        label_column: Column of the classes; None finds it.
    """

    validation_fraction: float = 0.1
    train_fraction: float = 0.2
    split_seed: int = 123
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    image_size: int | None = None
    max_length: int | None = None
    input_column: str | None = None
    label_column: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.validation_fraction < 1:
            raise SPPConfigError(
                f"Recipe(validation_fraction={self.validation_fraction!r}) leaves nothing to train or evaluate on. "
                "Accepted: more than 0 and less than 1. The paper holds out 0.1."
            )
        if not 0 < self.train_fraction <= 1:
            raise SPPConfigError(
                f"Recipe(train_fraction={self.train_fraction!r}) is no share. "
                "Accepted: more than 0, at most 1. The paper trains on 0.2; 1.0 takes all that is not held out."
            )
        for name in ("max_train_samples", "max_eval_samples", "image_size", "max_length"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise SPPConfigError(
                    f"Recipe({name}={value!r}) is no count. Accepted: a whole number from 1 up, or None for no limit "
                    f"of yours. Give Recipe({name}=None) to leave it out."
                )

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON types."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class ClassificationData:
    """One data set, split, with the columns that matter.

    Attributes:
        name: What the comparison calls it.
        kind: `image` or `text`.
        input_columns: One column, or two for pairs of texts.
        label_column: Column of class indices.
        labels: Class names, by index.
        train: Examples to train on.
        validation: Examples to evaluate on.
    """

    name: str
    kind: str
    input_columns: tuple[str, ...]
    label_column: str
    labels: tuple[str, ...]
    train: Any
    validation: Any

    def describe(self) -> dict[str, Any]:
        """What tells this data from other data of the same name, as plain JSON types."""
        classes = [split.select_columns([self.label_column])[:][self.label_column] for split in self._splits]
        digest = hashlib.sha256(json.dumps([self.labels, *classes]).encode()).hexdigest()
        return {
            "kind": self.kind,
            "input_columns": list(self.input_columns),
            "label_column": self.label_column,
            "classes": len(self.labels),
            "train_samples": len(self.train),
            "eval_samples": len(self.validation),
            "labels_sha256": digest,
        }

    @property
    def _splits(self) -> tuple[Any, Any]:
        return self.train, self.validation


def load_classification_data(name: str, source: DatasetSource, recipe: Recipe) -> ClassificationData:
    """Load one data set and split its train split as the recipe says.

    Args:
        name: What the comparison calls it.
        source: A Hub id (`repo` or `repo:configuration`), a `Dataset`, a `DatasetDict`, or a callable giving either.
        recipe: Columns, splits and sizes.

    Raises:
        DatasetError: The data cannot be loaded, has no train split, no class labels, no images or texts, or too few
            examples to split.
    """
    train = _train_split(name, source() if callable(source) else source)
    label_column = _label_column(name, train, recipe)
    kind, input_columns = _input_columns(name, train, recipe, label_column)
    labels = tuple(train.features[label_column].names)
    if len(labels) < 2:
        raise DatasetError(
            f"Data set {name!r}: label column {label_column!r} has {len(labels)} class. Accepted: two or more. "
            "Name another with Recipe(label_column=...)."
        )
    try:
        training, validation = _split(train, recipe)
    except ValueError as error:
        raise DatasetError(
            f"Data set {name!r}: {len(train)} examples cannot be split: {_line(error)} Accepted: at least one to "
            "train and one to evaluate on. Give larger fractions in Recipe, or a larger data set."
        ) from error
    return ClassificationData(
        name=name,
        kind=kind,
        input_columns=input_columns,
        label_column=label_column,
        labels=labels,
        train=_first(training, recipe.max_train_samples),
        validation=_first(validation, recipe.max_eval_samples),
    )


def _split(train: Any, recipe: Recipe) -> tuple[Any, Any]:
    split = train.train_test_split(test_size=recipe.validation_fraction, seed=recipe.split_seed)
    if recipe.train_fraction == 1:
        return split["train"], split["test"]
    # The source takes the "test" part of a second split as its small training set.
    reduced = split["train"].train_test_split(test_size=recipe.train_fraction, seed=recipe.split_seed)
    return reduced["test"], split["test"]


def _first(split: Any, count: int | None) -> Any:
    return split if count is None else split.select(range(min(count, len(split))))


def _train_split(name: str, source: Any) -> Any:
    if isinstance(source, str):
        source = _load_hub_dataset(name, source)
    if isinstance(source, datasets.DatasetDict):
        if "train" not in source:
            raise DatasetError(
                f"Data set {name!r} has the splits {sorted(source)}. Accepted: one named 'train', of which a part is "
                "held out for evaluation. Pass the split itself: {'" + name + "': data['" + next(iter(source)) + "']}."
            )
        source = source["train"]
    if not isinstance(source, datasets.Dataset):
        raise DatasetError(
            f"Data set {name!r} is a {type(source).__name__}. Accepted: a datasets.Dataset or DatasetDict, a Hub id, "
            "or a callable that gives one. A streamed set becomes one by loading it without streaming=True."
        )
    return source


def _load_hub_dataset(name: str, source: str) -> Any:
    repo, _, configuration = (source, "", "") if Path(source).exists() else source.partition(":")
    try:
        return datasets.load_dataset(repo, configuration or None)
    except (OSError, ValueError) as error:
        raise DatasetError(
            f"Data set {name!r}: datasets.load_dataset({repo!r}, {configuration or None!r}) failed: {_line(error)} "
            "Accepted: the id of a data set on the Hugging Face Hub, 'repo' or 'repo:configuration', or a local "
            "folder. Check the name and the network, and run `hf auth login` for a private set."
        ) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") + "."


def _label_column(name: str, train: Any, recipe: Recipe) -> str:
    classes: list[str] = [c for c, feature in train.features.items() if isinstance(feature, datasets.ClassLabel)]
    if recipe.label_column is not None:
        candidates = [column for column in classes if column == recipe.label_column]
    else:
        candidates = [column for column in _LABEL_NAMES if column in classes] or classes
    if not candidates or (len(candidates) > 1 and candidates[0] not in _LABEL_NAMES):
        wanted = "the label column" if recipe.label_column is None else f"label column {recipe.label_column!r}"
        raise DatasetError(
            f"Data set {name!r}: {wanted} cannot be told. Columns: {_columns(train)}. Accepted: a ClassLabel column, "
            f"named {', '.join(_LABEL_NAMES)} or the only one. Name it with Recipe(label_column=...), or make one "
            "with dataset.class_encode_column('<column>')."
        )
    return candidates[0]


def _input_columns(name: str, train: Any, recipe: Recipe, label_column: str) -> tuple[str, tuple[str, ...]]:
    images = [column for column, feature in train.features.items() if isinstance(feature, datasets.Image)]
    texts = [
        column
        for column, feature in train.features.items()
        if isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")
    ]
    if recipe.input_column is not None:
        images = [column for column in images if column == recipe.input_column]
        texts = [column for column in texts if column == recipe.input_column]
    for columns, names in ((images, _IMAGE_NAMES), (texts, _TEXT_NAMES)):
        kind = "image" if columns is images else "text"
        pairs = [pair for pair in _TEXT_PAIRS if kind == "text" and set(pair) <= set(columns)]
        if pairs:
            return kind, pairs[0]
        chosen = [column for column in names if column in columns] or columns
        if len(chosen) == 1 or (chosen and chosen[0] in names):
            return kind, (chosen[0],)
    raise DatasetError(
        f"Data set {name!r}: the column of images or texts cannot be told. Columns: {_columns(train)}. Accepted: an "
        f"Image column, or a string column named {', '.join(_TEXT_NAMES)} or the only one beside {label_column!r}. "
        "Name it with Recipe(input_column=...)."
    )


def _columns(train: Any) -> str:
    return ", ".join(f"{column} ({type(feature).__name__})" for column, feature in train.features.items())


@dataclass(frozen=True)
class ClassificationTask:
    """One data set prepared for one pretrained model.

    Attributes:
        data: The split data.
        model: Hub id or folder of the pretrained model.
        processor: Its tokenizer, or an image processor that prepares images as the task does.
        train: Examples to train on, as forward arguments.
        validation: Examples to evaluate on, as forward arguments.
        collate: Makes a batch of forward arguments from examples.
    """

    data: ClassificationData
    model: str
    processor: Any
    train: Any
    validation: Any
    collate: Collator

    def load_model(self) -> PreTrainedModel:
        """The pretrained model in float32 with a head for this data's classes, on the CPU.

        The head is drawn from torch's global generator: seed it first for the same head.
        """
        labels = self.data.labels
        model: PreTrainedModel = _MODEL_CLASSES[self.data.kind].from_pretrained(
            self.model,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            num_labels=len(labels),
            id2label=dict(enumerate(labels)),
            label2id={label: index for index, label in enumerate(labels)},
            problem_type="single_label_classification",
        )
        if self.data.kind == "text" and getattr(model.config, "pad_token_id", None) is None:
            model.config.pad_token_id = self.processor.pad_token_id
        return model

    def example_inputs(self) -> dict[str, Any]:
        """Forward arguments of the first validation examples, without labels."""
        count = min(_EXAMPLES, len(self.validation))
        batch = dict(self.collate([self.validation[index] for index in range(count)]))
        batch.pop("labels")
        return batch

    def calibration_batches(self, batch_size: int = 16) -> "torch.utils.data.DataLoader[dict[str, Tensor]]":
        """Training batches in their stored order, with labels."""
        return torch.utils.data.DataLoader(self.train, batch_size=batch_size, collate_fn=self.collate)


def prepare_task(data: ClassificationData, model: str | os.PathLike[str], recipe: Recipe) -> ClassificationTask:
    """Attach a model's preprocessing to split data.

    Raises:
        HubError: The model's config cannot be loaded.
        UnsupportedArchitectureError: transformers has no classification head for the model and this kind of data.
        CheckpointError: The model has no image processor or tokenizer.
    """
    model = os.fspath(model)
    config = _load_config(model)
    head = _MODEL_CLASSES[data.kind]
    if type(config) not in head._model_mapping:
        raise UnsupportedArchitectureError(
            f"Model {model!r} has model_type {config.model_type!r}, for which transformers has no {data.kind} "
            f"classification head, which data set {data.name!r} needs. Accepted: every type of {head.__name__}. "
            f"Give a model for {data.kind}s, or other data."
        )
    processor = _load_processor(model, data.kind)
    if data.kind == "image":
        model_class = head._model_mapping[type(config)]
        transform, collate, processor = _image_preparation(data, config, processor, recipe, model_class)
    else:
        transform, collate = _text_preparation(data, config, processor, recipe)
    train, validation = data.train.with_transform(transform), data.validation.with_transform(transform)
    return ClassificationTask(data, model, processor, train, validation, collate)


def _load_config(model: str) -> Any:
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise HubError(
            f"Model {model!r} cannot be loaded: {_line(error)} Accepted: the id of a model on the Hugging Face Hub, "
            "or a folder written by save_pretrained. Check the name and the network."
        ) from error


def _load_processor(model: str, kind: str) -> Any:
    loader = AutoImageProcessor if kind == "image" else AutoTokenizer
    try:
        processor: Any = loader.from_pretrained(model)
    except (OSError, ValueError) as error:
        needed = "preprocessor_config.json" if kind == "image" else "a tokenizer"
        raise CheckpointError(
            f"Model {model!r} has no {needed}, which preparing {kind}s for it needs: {_line(error)} "
            f"Accepted: a folder or Hub repo that holds it. Save the {kind} processor into the same folder."
        ) from error
    if kind == "text" and processor.pad_token_id is None:
        processor.pad_token = processor.eos_token
    return processor


def _image_preparation(
    data: ClassificationData, config: Any, processor: Any, recipe: Recipe, model_class: Any
) -> tuple[Callable[[dict[str, Any]], dict[str, Any]], Collator, Any]:
    own_size = _own_image_size(config, processor)
    size = recipe.image_size or own_size
    if size is None:
        raise SPPConfigError(
            f"The image size of model_type {config.model_type!r} cannot be told from its config or processor. "
            "Accepted: a side in pixels. Give Recipe(image_size=...)."
        )
    column, label_column = data.input_columns[0], data.label_column
    pixels = pixel_transform(processor, size, getattr(config, "num_channels", 3), image_column=column)
    # ViT and its kin refuse another size unless told to interpolate; others interpolate unasked.
    interpolate = size != own_size and "interpolate_pos_encoding" in inspect.signature(model_class.forward).parameters

    def transform(batch: dict[str, Any]) -> dict[str, Any]:
        return {"pixel_values": pixels({column: batch[column]})["pixel_values"], "labels": batch[label_column]}

    def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = dict(default_data_collator(examples))
        return {**batch, "interpolate_pos_encoding": True} if interpolate else batch

    # The processor of a kept checkpoint prepares images as they were trained on.
    as_trained = {**processor.to_dict(), "size": {"height": size, "width": size}, "do_center_crop": False}
    return transform, collate, type(processor).from_dict(as_trained)


def _own_image_size(config: Any, processor: Any) -> int | None:
    size = getattr(config, "image_size", None)
    if isinstance(size, (list, tuple)):
        size = size[0] if len(set(size)) == 1 else None
    if size is None:
        sides = dict(getattr(processor, "size", None) or {})
        size = sides.get("height", sides.get("shortest_edge"))
    return size


def _text_preparation(
    data: ClassificationData, config: Any, tokenizer: Any, recipe: Recipe
) -> tuple[Callable[[dict[str, Any]], dict[str, Any]], Collator]:
    length = recipe.max_length or min(
        tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
    )
    # A tokenizer without a stored length reports an astronomical one, which its own truncation refuses.
    truncation = {"truncation": True, "max_length": length} if length < 1_000_000 else {}

    def transform(batch: dict[str, Any]) -> dict[str, Any]:
        encoded = tokenizer(*(list(batch[column]) for column in data.input_columns), **truncation)
        return {**encoded, "labels": batch[data.label_column]}

    pad = DataCollatorWithPadding(tokenizer)

    def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
        return dict(pad(examples))

    return transform, collate
