import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    BertConfig,
    BertModel,
    BertTokenizerFast,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
    set_seed,
)

from hf_spp.comparison.classification import Recipe, load_classification_data, prepare_task
from hf_spp.errors import CheckpointError, DatasetError, HubError, SPPConfigError, UnsupportedArchitectureError

LABELS = datasets.ClassLabel(names=["no", "yes"])
TEXT = datasets.Value("string")


def table(count=40, **features):
    columns = {}
    for name, feature in features.items():
        if isinstance(feature, datasets.Image):
            columns[name] = [Image.fromarray(np.full((10, 12, 3), index, dtype=np.uint8)) for index in range(count)]
        elif isinstance(feature, datasets.ClassLabel):
            columns[name] = [index % feature.num_classes for index in range(count)]
        else:
            columns[name] = [f"word {index}" for index in range(count)]
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def images(count=40, image="image", label="label"):
    return table(count, **{image: datasets.Image(), label: LABELS})


def load(data, **recipe):
    return load_classification_data("data", data, Recipe(**recipe))


@pytest.fixture
def vit(tmp_path):
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
    )
    ViTModel(config).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def test_the_papers_split_of_cifar_has_9000_and_5000():
    data = load(table(50_000, text=TEXT, label=LABELS))
    assert (len(data.train), len(data.validation)) == (9000, 5000)


def test_splits_are_the_sources():
    whole = images(200)
    first = whole.train_test_split(test_size=0.1, seed=123)
    second = first["train"].train_test_split(test_size=0.2, seed=123)
    data = load(whole)
    assert data.train["label"][:] == second["test"]["label"][:]
    assert data.validation["label"][:] == first["test"]["label"][:]


def test_training_and_validation_share_nothing():
    data = load(table(100, text=TEXT, label=LABELS), train_fraction=1.0)
    train, validation = set(data.train["text"]), set(data.validation["text"])
    assert (len(train), len(validation), train & validation) == (90, 10, set())


def test_most_samples_are_counted_after_the_split():
    data = load(images(100), train_fraction=1.0, max_train_samples=7, max_eval_samples=500)
    assert (len(data.train), len(data.validation)) == (7, 10)


@pytest.mark.parametrize(
    ("features", "kind", "columns", "label"),
    [
        ({"image": datasets.Image(), "label": LABELS}, "image", ("image",), "label"),
        ({"img": datasets.Image(), "fine_label": LABELS, "coarse_label": LABELS}, "image", ("img",), "fine_label"),
        ({"photo": datasets.Image(), "kind": LABELS}, "image", ("photo",), "kind"),
        ({"image": datasets.Image(), "mask": datasets.Image(), "label": LABELS}, "image", ("image",), "label"),
        ({"image": datasets.Image(), "text": TEXT, "labels": LABELS}, "image", ("image",), "labels"),
        ({"review": TEXT, "label": LABELS}, "text", ("review",), "label"),
        ({"id": TEXT, "text": TEXT, "label": LABELS}, "text", ("text",), "label"),
        ({"premise": TEXT, "hypothesis": TEXT, "label": LABELS}, "text", ("premise", "hypothesis"), "label"),
    ],
)
def test_columns_are_told_by_type_and_name(features, kind, columns, label):
    data = load(table(**features))
    assert (data.kind, data.input_columns, data.label_column) == (kind, columns, label)
    assert data.labels == ("no", "yes")


def test_named_columns_win():
    data = load(
        table(a=TEXT, b=TEXT, first=LABELS, second=datasets.ClassLabel(names=["x", "y", "z"])),
        input_column="b",
        label_column="second",
    )
    assert (data.input_columns, data.label_column, data.labels) == (("b",), "second", ("x", "y", "z"))


@pytest.mark.parametrize(
    ("source", "recipe", "said"),
    [
        (table(image=datasets.Image(), label=datasets.Value("string")), {}, r"the label column cannot be told.*Value"),
        (table(image=datasets.Image(), a=LABELS, b=LABELS), {}, "the label column cannot be told"),
        (images(), {"label_column": "image"}, "label column 'image' cannot be told"),
        (table(label=LABELS), {}, "the column of images or texts cannot be told"),
        (table(a=TEXT, b=TEXT, label=LABELS), {}, "the column of images or texts cannot be told"),
        (images(), {"input_column": "missing"}, "the column of images or texts cannot be told"),
        (images(1), {}, "1 examples cannot be split"),
        (images(2), {}, "2 examples cannot be split"),
        (table(text=TEXT, label=datasets.ClassLabel(names=["one"])), {}, "has 1 class"),
        (datasets.DatasetDict(test=images()), {}, r"has the splits \['test'\]"),
        (images().to_iterable_dataset(), {}, "is a IterableDataset"),
        (lambda: 3, {}, "is a int"),
    ],
)
def test_unfit_data_is_refused_by_name(source, recipe, said):
    with pytest.raises(DatasetError, match=f"Data set 'data'.*{said}|Data set 'data':? {said}"):
        load(source, **recipe)


def test_a_hub_id_is_loaded_with_its_configuration(monkeypatch):
    calls = []

    def load_dataset(*given):
        calls.append(given)
        return datasets.DatasetDict(train=images())

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    load("user/set")
    load("user/set:small")
    assert calls == [("user/set", None), ("user/set", "small")]


def test_a_hub_id_that_cannot_be_had_says_so(monkeypatch):
    def load_dataset(*given):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DatasetError, match="Couldn't reach the Hub") as caught:
        load("user/set")
    assert isinstance(caught.value.__cause__, ConnectionError)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"validation_fraction": 0.0}, "validation_fraction=0.0"),
        ({"validation_fraction": 1.0}, "validation_fraction=1.0"),
        ({"train_fraction": 0}, "train_fraction=0"),
        ({"train_fraction": 1.1}, "train_fraction=1.1"),
        ({"max_train_samples": 0}, "max_train_samples=0"),
        ({"max_eval_samples": True}, "max_eval_samples=True"),
        ({"image_size": 2.5}, "image_size=2.5"),
        ({"max_length": -1}, "max_length=-1"),
    ],
)
def test_a_recipe_checks_its_values(values, said):
    with pytest.raises(SPPConfigError, match=said):
        Recipe(**values)


def test_a_description_tells_data_apart():
    description = load(images()).describe()
    assert description == load(images()).describe()
    assert description != load(images(), split_seed=1).describe()
    assert (description["train_samples"], description["eval_samples"], description["classes"]) == (8, 4, 2)


def test_batches_are_forward_arguments(vit):
    task = prepare_task(load(images(image="img")), vit, Recipe())
    batch = task.collate([task.train[index] for index in range(3)])
    assert batch["pixel_values"].shape == (3, 3, 8, 8)
    assert batch["labels"].tolist() == task.data.train["label"][:3]
    assert set(task.example_inputs()) == {"pixel_values"}
    assert len(task.example_inputs()["pixel_values"]) == 4


def test_the_head_fits_the_labels_and_comes_from_the_seed(vit):
    task = prepare_task(load(images()), vit, Recipe())
    heads = []
    for seed in (1, 1, 2):
        set_seed(seed)
        model = task.load_model()
        heads.append(model.classifier.weight.detach())
    assert model.config.label2id == {"no": 0, "yes": 1}
    assert model.dtype == torch.float32
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_a_head_for_other_labels_is_replaced(vit, tmp_path):
    ViTForImageClassification.from_pretrained(vit, num_labels=7).save_pretrained(tmp_path / "seven")
    AutoImageProcessor.from_pretrained(vit).save_pretrained(tmp_path / "seven")
    task = prepare_task(load(images()), tmp_path / "seven", Recipe())
    assert task.load_model().classifier.out_features == 2


def test_another_image_size_interpolates_where_the_model_must_be_told(vit, tmp_path):
    task = prepare_task(load(images()), vit, Recipe(image_size=16))
    inputs = task.example_inputs()
    assert inputs["interpolate_pos_encoding"] is True
    with torch.no_grad():
        assert task.load_model().eval()(**inputs).logits.shape == (4, 2)

    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4)
    Dinov2Model(config).save_pretrained(tmp_path / "dino")
    AutoImageProcessor.from_pretrained(vit).save_pretrained(tmp_path / "dino")
    task = prepare_task(load(images()), tmp_path / "dino", Recipe(image_size=16))
    assert set(task.example_inputs()) == {"pixel_values"}
    with torch.no_grad():
        assert task.load_model().eval()(**task.example_inputs()).logits.shape == (4, 2)


def test_the_processor_prepares_images_as_the_task_does(vit):
    task = prepare_task(load(images()), vit, Recipe(image_size=16))
    picture = task.data.validation[0]["image"]
    stock = task.processor(picture, return_tensors="pt")["pixel_values"]
    assert torch.allclose(stock[0], task.validation[0]["pixel_values"], atol=2.5 * 2 / 255)


def test_pairs_of_texts_are_cut_to_the_models_length(tmp_path):
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "word"])}
    BertTokenizerFast(vocab=vocabulary).save_pretrained(tmp_path)
    config = BertConfig(
        vocab_size=6,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=6,
    )
    BertModel(config).save_pretrained(tmp_path)
    data = load(table(question1=TEXT, question2=TEXT, label=LABELS))
    task = prepare_task(data, tmp_path, Recipe())
    assert task.train[0]["input_ids"] == [2, 5, 3, 5, 1, 3]
    inputs = prepare_task(data, tmp_path, Recipe(max_length=4)).example_inputs()
    assert inputs["input_ids"].shape == (4, 4)
    assert "token_type_ids" in inputs


def test_a_model_for_other_data_is_refused(vit, tmp_path):
    with pytest.raises(UnsupportedArchitectureError, match=r"model_type 'vit'.*no text classification head"):
        prepare_task(load(table(text=TEXT, label=LABELS)), vit, Recipe())


def test_a_model_without_processor_is_refused(vit):
    (vit / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no preprocessor_config\.json"):
        prepare_task(load(images()), vit, Recipe())


def test_a_missing_model_is_refused(tmp_path):
    with pytest.raises(HubError, match="cannot be loaded"):
        prepare_task(load(images()), tmp_path / "nothing", Recipe())
