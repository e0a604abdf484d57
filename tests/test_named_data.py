import datasets
import pytest
import torch
from conftest import build_model
from transformers import BertTokenizerFast

from hf_spp.comparison import presets
from hf_spp.comparison.classification import Recipe
from hf_spp.comparison.presets import PRESETS
from hf_spp.curves.named_data import load_named_data
from hf_spp.errors import DatasetError

WORDS = ("good", "fine", "bad", "poor", "day", "film")
LABELS = ("negative", "positive")


def texts(count=40):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=list(LABELS))})
    columns = {"text": ["good " * (1 + i % 3) + "film" for i in range(count)], "label": [i % 2 for i in range(count)]}
    return datasets.Dataset.from_dict(columns, features=features)


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A function that loads the data set `films` of a preset for a tiny model with a tokenizer."""
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    recipe = Recipe(validation_fraction=0.25, train_fraction=1.0)
    preset = PRESETS["demo"].__class__("", "m", lambda: "m", {"films": texts}, recipe, 1e-3, ("spp",), {})
    monkeypatch.setattr(presets, "PRESETS", {"mine": preset})

    def load(model, **options):
        model.save_pretrained(tmp_path / "model")
        BertTokenizerFast(vocab=vocabulary).save_pretrained(tmp_path / "model")
        return load_named_data("films", tmp_path / "model", **options)

    return load


def classifier(labels=LABELS):
    id2label = dict(enumerate(labels))
    return build_model("bert", "sequence-classification", num_labels=len(labels), id2label=id2label)


def test_a_presets_data_set_comes_with_its_splits(data):
    model = classifier()
    found = data(model)
    batches = list(found.evaluation_batches(model, 4))
    assert [len(batch["labels"]) for batch in batches] == [4, 4, 2]
    assert model(**batches[0]).logits.shape == (4, 2)
    assert len(list(data(model, max_eval_samples=3).evaluation_batches(model, 4))) == 1
    assert {name: value.shape[0] for name, value in found.example_inputs().items()} == {
        "input_ids": 1,
        "token_type_ids": 1,
        "attention_mask": 1,
    }


def test_calibration_is_the_training_part_without_labels(data):
    found = data(classifier())
    batches = found.calibration_batches(10, 8)
    assert [len(batch["input_ids"]) for batch in batches] == [8, 2]
    assert all("labels" not in batch for batch in batches)
    assert sum(len(batch["input_ids"]) for batch in found.calibration_batches(99, 8)) == 30
    assert found.calibration_batches(0, 8) == []


def test_causal_language_models_predict_the_tokens(data):
    model = build_model("gpt2")
    for batch in data(model).evaluation_batches(model, 4):
        padding = batch["attention_mask"] == 0
        assert torch.equal(batch["labels"], batch["input_ids"].masked_fill(padding, -100))
        assert padding.any()


def test_models_without_a_head_take_any_classes(data):
    model = build_model("bert", "base")
    assert next(iter(data(model).evaluation_batches(model, 4)))["input_ids"].shape[0] == 4


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (("a", "b", "c", "d"), r"tells 4 classes \(a, b, c, …\), and data set 'films' has 2 \(negative, positive\)"),
        (LABELS[::-1], r"tells 2 classes \(positive, negative\), and data set 'films' has 2 \(negative, positive\)"),
    ],
)
def test_a_head_of_other_classes_is_refused(data, labels, message):
    model = classifier(labels)
    with pytest.raises(DatasetError, match=message):
        data(model).evaluation_batches(model, 4)


def test_names_of_classes_that_say_nothing_are_taken(data):
    model = classifier(("LABEL_0", "LABEL_1"))
    assert len(list(data(model).evaluation_batches(model, 5))) == 2
