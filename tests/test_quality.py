import math

import datasets
import pytest
import torch
from conftest import build_inputs, build_model, same_bits, weights_of
from sklearn.metrics import accuracy_score, f1_score
from torch.utils.data import DataLoader, TensorDataset
from transformers import default_data_collator

from hf_spp.curves.quality import (
    accuracy_and_f1,
    batch_length,
    cosine_to,
    default_metric,
    measured,
    perplexity,
    read_batches,
)
from hf_spp.errors import DatasetError, NonFiniteWeightsError, SPPConfigError


def batches_of(model, count=3, batch=4, **options):
    return [build_inputs(model, batch, seed=seed, **options) for seed in range(count)]


def examples(count=10):
    rows = {"pixel_values": torch.randn(count, 3, 12, 12).tolist(), "label": [index % 5 for index in range(count)]}
    return datasets.Dataset.from_dict({**rows, "name": ["x"] * count}).with_format("torch")


# Reading


def test_batches_are_read_once_and_kept():
    data = [{"a": torch.ones(2)}, {"a": torch.ones(1)}]
    assert read_batches(iter(data), None, 16) == data
    assert read_batches(DataLoader(data, batch_size=None), None, 16) == data


def test_a_dataset_is_collated():
    found = read_batches(examples(), None, 4)
    assert [batch_length(batch) for batch in found] == [4, 4, 2]
    assert found[0].keys() == {"pixel_values", "labels"}
    assert found[2]["labels"].tolist() == [3, 4]
    listed = [examples()[index] for index in range(10)]
    assert read_batches(listed, default_data_collator, 4)[1]["labels"].tolist() == found[1]["labels"].tolist()
    pairs = TensorDataset(torch.arange(3))
    assert read_batches(pairs, lambda rows: {"a": torch.stack([row[0] for row in rows])}, 2)[1]["a"].tolist() == [2]


@pytest.mark.parametrize(
    ("dataset", "collator", "message"),
    [
        (7, None, "The data set is a int"),
        ({"input_ids": torch.ones(1, 2)}, None, "Put a single batch into a list"),
        ("sst2", None, "The data set is a str"),
        ([], None, "holds no batch"),
        ([torch.ones(2)], None, "A batch of the data set is a Tensor"),
        (iter([{}]), default_data_collator, "whose items are read as whole batches"),
        (examples(), lambda rows: torch.ones(2), "A batch of the data set is a Tensor"),
        (datasets.Dataset.from_dict({"input_ids": [[1], [1, 2]]}), None, "made into a batch by default_data_collator"),
    ],
)
def test_what_is_no_data_set_is_refused(dataset, collator, message):
    with pytest.raises(DatasetError, match=message):
        read_batches(dataset, collator, 2)


# Metrics


@pytest.mark.parametrize(("name", "head"), [("vit", None), ("bert", "sequence-classification")])
def test_classifiers_get_accuracy_and_f1(name, head):
    model = build_model(name, head)
    batches = batches_of(model)
    metric = default_metric(model, batches)
    with torch.no_grad():
        classes = torch.cat([model(**batch).logits.argmax(-1) for batch in batches])
    labels = torch.cat([batch["labels"] for batch in batches])
    assert metric is accuracy_and_f1
    assert measured(metric, model, batches) == {
        "accuracy": accuracy_score(labels, classes),
        "f1": pytest.approx(f1_score(labels, classes, average="macro")),
    }


def test_token_classifiers_leave_out_what_is_not_labelled():
    model = build_model("bert", "token-classification")
    batches = batches_of(model)
    for batch in batches:
        batch["labels"][:, 3:] = -100
    with torch.no_grad():
        right = [(model(**b).logits.argmax(-1) == b["labels"])[:, :3].float().mean() for b in batches]
    assert measured(default_metric(model, batches), model, batches)["accuracy"] == pytest.approx(float(sum(right)) / 3)


def test_causal_language_models_get_perplexity_over_all_tokens():
    model = build_model("llama")
    batches = [build_inputs(model, 2), build_inputs(model, 5)]
    batches[0]["labels"][:, 2:] = -100
    with torch.no_grad():
        losses = [float(model(**batch).loss) for batch in batches]
    counts = [2 * 1, 5 * 6]
    mean = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    assert default_metric(model, batches) is perplexity
    assert measured(perplexity, model, batches)["perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)


@pytest.mark.parametrize("name", ["bert", "dinov2"])
def test_models_without_a_head_get_the_cosine_to_the_full_one(name):
    model, other = build_model(name, "base"), build_model(name, "base", seed=1)
    batches = batches_of(model)
    metric = default_metric(model, batches)
    assert measured(metric, model, batches)["cosine"] == pytest.approx(1)
    assert abs(measured(metric, other, batches)["cosine"]) < 0.9
    assert measured(cosine_to(other, batches), other, batches)["cosine"] == pytest.approx(1)


def test_padding_does_not_count_in_the_cosine():
    model = build_model("bert", "base")
    batches = batches_of(model)
    wanted = measured(default_metric(model, batches), model, batches)
    metric = cosine_to(model, batches)
    shorter = [{name: value[-1:, :5] for name, value in batch.items()} for batch in batches]
    longer = [{name: value[-1:] for name, value in batch.items()} for batch in batches]
    assert measured(cosine_to(model, shorter), model, longer)["cosine"] == pytest.approx(1, abs=1e-5)
    assert measured(metric, model, batches) == wanted


@pytest.mark.parametrize(
    ("name", "head", "change", "error", "message"),
    [
        ("vit", None, lambda b: b.pop("labels"), DatasetError, "and no labels, which accuracy needs"),
        ("vit", None, lambda b: b.update(labels=b["labels"].float()), SPPConfigError, "No quality is known"),
        ("vit", None, lambda b: b.update(labels=b["labels"] + 9), DatasetError, "Accepted: from 0 to 4, and -100"),
        (
            "vit",
            None,
            lambda b: b.update(pixel_values=b["pixel_values"][:, :2]),
            DatasetError,
            "does not run on a batch",
        ),
        ("bert", None, lambda b: None, SPPConfigError, "No quality is known for BertForMaskedLM.*Give metric="),
        ("llama", None, lambda b: b.pop("labels"), DatasetError, "needs a label for each token, and a batch has none"),
        ("llama", None, lambda b: b["labels"].fill_(-100), DatasetError, "All labels are -100"),
        ("dinov2", "backbone", lambda b: None, SPPConfigError, "No quality is known for Dinov2Backbone"),
    ],
)
def test_what_cannot_be_measured_is_refused(name, head, change, error, message):
    model = build_model(name, head)
    batches = batches_of(model, 2)
    for batch in batches:
        change(batch)
    with pytest.raises(error, match=message):
        measured(default_metric(model, batches), model, batches)


# Measuring


def test_metrics_run_in_evaluation_mode_on_the_same_random_numbers():
    model = build_model("bert", "sequence-classification").train()
    weights, state = weights_of(model), torch.get_rng_state()
    seen = []

    def metric(given, batches):
        seen.append((given.training, torch.is_grad_enabled(), float(torch.rand(1))))
        return {"x": torch.tensor(0.5), "y": 2}

    assert measured(metric, model, []) == {"x": 0.5, "y": 2.0}
    measured(metric, model, [])
    assert seen == [(False, False, seen[0][2])] * 2
    assert model.training
    assert same_bits(model, weights)
    assert torch.equal(torch.get_rng_state(), state)


def test_values_that_are_not_finite_become_none():
    model = build_model("vit")
    batches = batches_of(model, 1)
    assert measured(lambda *_: {"a": math.inf, "b": 1.0}, model, batches) == {"a": None, "b": 1.0}
    with pytest.raises(NonFiniteWeightsError, match=r"full ViTForImageClassification is \{'a': nan\}"):
        measured(lambda *_: {"a": math.nan}, model, batches, full=True)
    with torch.no_grad():
        model.classifier.weight.fill_(math.nan)
    assert measured(accuracy_and_f1, model, batches) == {"accuracy": None, "f1": None}


@pytest.mark.parametrize("value", [0.5, {"a": "b"}, None, {"a": torch.ones(2)}])
def test_a_metric_gives_numbers_by_name(value):
    with pytest.raises(SPPConfigError, match="Accepted: a dict of numbers by name"):
        measured(lambda *_: value, build_model("vit"), [])
