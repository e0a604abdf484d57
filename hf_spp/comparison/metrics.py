"""Accuracy and macro F1 through `evaluate`, without the network: `evaluate.load` would fetch both from the Hub."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import datasets
import evaluate
import numpy as np
from sklearn.metrics import accuracy_score, f1_score
from transformers import EvalPrediction

_USAGE = "Class indices: `predictions` and `references`, one of each per example."
_FEATURES = {"predictions": "int64", "references": "int64"}


def _info(description: str) -> Any:
    features = datasets.Features({name: datasets.Value(dtype) for name, dtype in _FEATURES.items()})
    return evaluate.MetricInfo(description=description, citation="", inputs_description=_USAGE, features=features)


class Accuracy(evaluate.Metric):  # type: ignore[misc]
    """Share of examples whose predicted class is the reference."""

    def _info(self) -> Any:
        return _info("Share of examples whose predicted class is the reference.")

    def _compute(self, *, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(references, predictions))}


class MacroF1(evaluate.Metric):  # type: ignore[misc]
    """Unweighted mean of the F1 of every class that is predicted or referenced."""

    def _info(self) -> Any:
        return _info("Unweighted mean of the F1 of every class that is predicted or referenced.")

    def _compute(self, *, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        return {"f1": float(f1_score(references, predictions, average="macro", zero_division=0))}


@cache
def classification_evaluations() -> Any:
    """Accuracy and macro F1 as one `evaluate` evaluation, kept in memory."""
    return evaluate.combine([Accuracy(keep_in_memory=True, seed=0), MacroF1(keep_in_memory=True, seed=0)])


def classification_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy and macro F1 of a classifier's logits, for the Trainer's `compute_metrics`.

    Args:
        prediction: Logits `[examples, classes]` and class indices `[examples]`. Where the model returns more than
            logits, the Trainer hands over a tuple; its first entry is taken.

    Returns:
        `accuracy` and `f1`, fractions of 1.
    """
    logits = prediction.predictions
    if isinstance(logits, (tuple, list)):
        logits = logits[0]
    classes = np.asarray(logits).argmax(axis=-1)
    scores: dict[str, float] = classification_evaluations().compute(
        predictions=classes, references=np.asarray(prediction.label_ids)
    )
    return scores
