import numpy as np
import pytest
from transformers import EvalPrediction

from hf_spp.comparison.metrics import classification_metrics


def _logits(classes, count):
    return np.eye(count, dtype=np.float32)[classes]


def test_accuracy_and_macro_f1_by_hand():
    # class 0: precision 1/2, recall 1 -> 2/3; class 1: precision 1, recall 1/2 -> 2/3; class 2: all right -> 1
    prediction = EvalPrediction(predictions=_logits([0, 0, 1, 2], 3), label_ids=np.array([0, 1, 1, 2]))
    assert classification_metrics(prediction) == {
        "accuracy": 0.75,
        "f1": pytest.approx((2 / 3 + 2 / 3 + 1) / 3, abs=1e-12),
    }


def test_macro_f1_weighs_classes_alike():
    prediction = EvalPrediction(predictions=_logits([0] * 10, 2), label_ids=np.array([0] * 9 + [1]))
    scores = classification_metrics(prediction)
    assert scores["accuracy"] == 0.9
    assert scores["f1"] == pytest.approx(0.5 * 18 / 19)


def test_logits_may_come_in_a_tuple():
    logits = _logits([1, 0], 2)
    prediction = EvalPrediction(predictions=(logits, np.zeros((2, 7))), label_ids=np.array([1, 1]))
    assert classification_metrics(prediction)["accuracy"] == 0.5


def test_repeated_calls_are_independent():
    right = EvalPrediction(predictions=_logits([0, 1], 2), label_ids=np.array([0, 1]))
    wrong = EvalPrediction(predictions=_logits([1, 0], 2), label_ids=np.array([0, 1]))
    assert [classification_metrics(p)["accuracy"] for p in (right, wrong, right)] == [1.0, 0.0, 1.0]


def test_the_global_numpy_state_is_left_alone():
    np.random.seed(7)
    expected = np.random.rand()
    np.random.seed(7)
    classification_metrics(EvalPrediction(predictions=_logits([0], 2), label_ids=np.array([0])))
    assert np.random.rand() == expected
