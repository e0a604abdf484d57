"""Data sets by the names that `hf-spp compare` takes, as batches for a model that lies in a checkpoint."""

import os
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from ..cards.model_card import task_of_class
from ..comparison import presets
from ..comparison.classification import ClassificationTask, Recipe, load_classification_data, prepare_task
from ..errors import DatasetError
from .quality import Batch, forward_arguments

# What a user need not choose: only the memory depends on it.
CALIBRATION_BATCH = 32


@dataclass(frozen=True)
class NamedData:
    """A data set prepared for the model of a checkpoint.

    Attributes:
        name: What the user calls it.
        task: The split data with the checkpoint's own preprocessing.
    """

    name: str
    task: ClassificationTask

    def evaluation_batches(self, model: Any, batch_size: int) -> "DataLoader[Any]":
        """Batches of the held-out part, with the labels that the model's head predicts.

        A causal language model predicts the tokens themselves.

        Raises:
            DatasetError: The head tells other classes than the data set has.
        """
        task = task_of_class(type(model).__name__)
        if task.endswith("classification"):
            self._check_classes(model)
        collate = self._collate_tokens if task == "text-generation" else self.task.collate
        return DataLoader(self.task.validation, batch_size=batch_size, collate_fn=collate)

    def calibration_batches(self, samples: int, batch_size: int = CALIBRATION_BATCH) -> list[Batch]:
        """Batches of the first examples of the training part, without labels; together so many examples at most."""
        count = min(samples, len(self.task.train))
        rows = self.task.train.select(range(count))
        return [
            forward_arguments(batch) for batch in DataLoader(rows, batch_size=batch_size, collate_fn=self.task.collate)
        ]

    def example_inputs(self) -> dict[str, Any]:
        """Forward arguments of one example."""
        inputs = self.task.example_inputs()
        return {name: value[:1] if isinstance(value, Tensor) else value for name, value in inputs.items()}

    def _collate_tokens(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = forward_arguments(self.task.collate(examples))
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return batch

    def _check_classes(self, model: Any) -> None:
        labels, config = self.task.data.labels, model.config
        own = [str(config.id2label[index]) for index in sorted(config.id2label)]
        if len(own) != len(labels) or (set(own) == set(labels) and own != list(labels)):
            raise DatasetError(
                f"{type(model).__name__} tells {len(own)} classes ({_some(own)}), and data set {self.name!r} has "
                f"{len(labels)} ({_some(labels)}). Accepted: a model that was fine-tuned on this data set. Fine-tune "
                "one with `hf-spp compare --save-models`, or name other data."
            )


def load_named_data(
    name: str,
    model: str | os.PathLike[str],
    *,
    image_size: int | None = None,
    max_eval_samples: int | None = None,
) -> NamedData:
    """Load a data set by name and prepare it as the checkpoint says.

    Args:
        name: A name of a preset's data set, which comes with the preset's splits and image size, or a Hub id
            (`repo` or `repo:configuration`) or folder.
        model: Folder or Hub id of the checkpoint.
        image_size: Side in pixels; None takes the preset's, or the model's own.
        max_eval_samples: Most examples to evaluate on; None takes the preset's, or all.

    Raises:
        DatasetError: It cannot be loaded, or lacks what classification needs.
        SPPError: Whatever fetching the data and the model's preprocessing raise.
    """
    source, recipe = presets.find_source(name)
    changes = {"image_size": image_size, "max_eval_samples": max_eval_samples}
    settings = {**recipe.to_dict(), **{key: value for key, value in changes.items() if value is not None}}
    recipe = Recipe(**settings)
    return NamedData(name, prepare_task(load_classification_data(name, source, recipe), model, recipe))


def _some(names: Any) -> str:
    return ", ".join(list(names)[:3]) + (", …" if len(names) > 3 else "")
