import json
import math
import random
import shutil

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
    set_seed,
)

from hf_spp.cards.results import METHODS, ROW_KEYS, load_results
from hf_spp.comparison.classification import Recipe
from hf_spp.comparison.evaluation import compare_methods, precision_arguments, recipe_arguments
from hf_spp.config import SPPConfig
from hf_spp.errors import DatasetError, HubError, SPPConfigError
from hf_spp.orders_file import ORDERS_NAME
from hf_spp.reordering import Reordering

RECIPE = Recipe(validation_fraction=0.25, train_fraction=1.0)
WORDS = ("good", "fine", "bad", "poor", "day", "film")


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    set_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=8,
        patch_size=4,
        initializer_range=0.4,
    )
    ViTModel(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    BertTokenizerFast(vocab=vocabulary).save_pretrained(folder)
    set_seed(0)
    config = BertConfig(
        vocab_size=11,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        initializer_range=0.4,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


def image_data(count=48, seed=0):
    generator = np.random.default_rng(seed)
    classes = [index % 3 for index in range(count)]
    pixels = [(80 * label + generator.integers(0, 60, size=(8, 8, 3))).astype(np.uint8) for label in classes]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["dark", "grey", "light"])}
    )
    columns = {"image": [Image.fromarray(array) for array in pixels], "label": classes}
    return datasets.Dataset.from_dict(columns, features=features)


def text_data(count=32):
    texts = [("good fine film" if index % 2 else "bad poor day") for index in range(count)]
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["negative", "positive"])}
    )
    return datasets.Dataset.from_dict(
        {"text": texts, "label": [index % 2 for index in range(count)]}, features=features
    )


def arguments(**changes):
    values = {
        "output_dir": "unused",
        "num_train_epochs": 1,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "report_to": "none",
        "use_cpu": True,
    }
    return TrainingArguments(**{**values, **changes})


def compare(model, folder, methods=("original", "pruning-rank", "spp"), data=None, **options):
    options = {"args": arguments(), "recipe": RECIPE, "output_dir": folder, **options}
    return compare_methods(model, data or {"shades": image_data()}, methods, **options)


@pytest.fixture(scope="module")
def whole(vit, tmp_path_factory):
    """A finished comparison by every method."""
    return compare(vit, tmp_path_factory.mktemp("whole"), METHODS)


@pytest.fixture
def finished(whole, tmp_path):
    """A copy of it to continue."""
    return shutil.copytree(whole.output_dir, tmp_path / "finished")


def comparable(row):
    return {key: value for key, value in row.items() if key != "seconds"}


def test_rows_hold_what_the_contract_says(vit, whole):
    assert [row["method"] for row in whole.rows] == list(METHODS)
    head = 32 * 3 + 3
    parameters = ViTModel.from_pretrained(vit, add_pooling_layer=False).num_parameters() + head
    for row in whole.rows:
        assert set(row) == ROW_KEYS
        assert all(math.isfinite(row[key]) for key in ("max_abs_diff", "relative_diff", "seconds"))
        assert 0 <= row["accuracy"] <= 1
        assert 0 <= row["f1"] <= 1
        assert (row["dataset"], row["model"], row["seed"]) == ("shades", vit, 123)
        assert (row["train_samples"], row["eval_samples"]) == (36, 12)
        assert set(row["versions"]) == {"hf_spp", "torch", "transformers", "accelerate", "datasets", "python"}
        assert row["parameters"] == {"total": parameters, "trainable": parameters}
    change = {row["method"]: row["max_abs_diff"] for row in whole.rows}
    relative = {row["method"]: row["relative_diff"] for row in whole.rows}
    assert change["original"] == relative["original"] == 0.0
    assert max(relative[method] for method in ("random", "spp-raffm", "spp")) < 1e-4
    assert relative["pruning-rank"] > 0.01


def test_files_are_written(whole):
    folder = whole.output_dir
    stored = json.loads((folder / "results.json").read_text())
    assert stored["format_version"] == 1
    assert stored["rows"] == whole.rows
    assert stored["settings"]["datasets"]["shades"]["label_column"] == "label"
    assert stored["settings"]["training_arguments"]["learning_rate"] == 1e-3
    assert (folder / "results.md").read_text() == whole.to_markdown()
    assert "| SPP" in whole.to_markdown()
    for name in ("accuracy.png", "saliency.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in folder.iterdir()} == {"results.json", "results.md", "accuracy.png", "saliency.png"}
    assert load_results(folder) == whole


@pytest.mark.parametrize("method", ["original", "spp"])
def test_one_method_alone_gives_the_same_row_as_among_others(vit, whole, tmp_path, method):
    torch.manual_seed(99)
    alone = compare(vit, tmp_path, (method,))
    assert comparable(alone.rows[0]) == comparable(whole.rows[METHODS.index(method)])


def test_another_seed_gives_another_head(vit, whole, tmp_path):
    (row,) = compare(vit, tmp_path, ("pruning-rank",), seed=2).rows
    assert row["max_abs_diff"] != whole.rows[METHODS.index("pruning-rank")]["max_abs_diff"]
    assert row["seed"] == 2


def test_the_callers_generators_are_left_alone(vit, tmp_path):
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    set_seed(5)
    expected = draw()
    set_seed(5)
    compare(vit, tmp_path, ("original",))
    assert draw() == expected


def test_a_crash_keeps_finished_runs_and_a_second_call_continues(vit, whole, tmp_path, monkeypatch):
    train, calls = Trainer.train, []

    def crash_on_second(self, *args, **kwargs):
        calls.append(self)
        if len(calls) == 2:
            raise RuntimeError("power cut")
        return train(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "train", crash_on_second)
    with pytest.raises(RuntimeError, match="power cut"):
        compare(vit, tmp_path / "cut")
    assert [row["method"] for row in load_results(tmp_path / "cut").rows] == ["original"]
    continued = compare(vit, tmp_path / "cut")
    assert len(calls) == 4
    expected = [comparable(row) for row in whole.rows if row["method"] in ("original", "pruning-rank", "spp")]
    assert list(map(comparable, continued.rows)) == expected
    assert compare(vit, tmp_path / "cut").rows == continued.rows
    assert len(calls) == 4


def test_a_second_call_may_add_methods_and_data_sets(vit, tmp_path):
    (first,) = compare(vit, tmp_path, ("spp",)).rows
    more = compare(vit, tmp_path, ("original",), {"shades": image_data(), "more": image_data(seed=1)}).rows
    assert [(row["dataset"], row["method"]) for row in more] == [
        ("shades", "original"),
        ("shades", "spp"),
        ("more", "original"),
    ]
    assert more[1] == first


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 7}, r"seed is 123 there and 7 now"),
        ({"recipe": Recipe(0.25, 1.0, max_eval_samples=4)}, r"recipe\.max_eval_samples is None there and 4 now"),
        ({"args": arguments(learning_rate=5e-4)}, r"training_arguments\.learning_rate is 0\.001 there"),
        ({"args": arguments(warmup_steps=3)}, r"training_arguments\.warmup_steps is None there and 3 now"),
        ({"config": SPPConfig(axes=("ffn",))}, r"config\.axes is None there"),
        ({"data": {"shades": image_data(45)}}, r"shades\.train_samples is 36 there and"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(vit, finished, change, said):
    before = (finished / "results.json").read_bytes()
    with pytest.raises(SPPConfigError, match=said):
        compare(vit, finished, **change)
    assert (finished / "results.json").read_bytes() == before


def test_what_does_not_decide_a_result_may_change(vit, whole, finished):
    changed = arguments(logging_steps=1, output_dir="elsewhere", save_strategy="epoch", eval_strategy="epoch")
    assert compare(vit, finished, args=changed).rows == whole.rows


def test_the_callers_arguments_are_not_changed(vit, tmp_path):
    args = arguments(save_strategy="epoch", seed=1)
    before = args.to_dict()
    compare(vit, tmp_path, ("original",), args=args)
    assert args.to_dict() == before


def test_saved_models_load_in_stock_transformers_and_undo(vit, tmp_path):
    results = compare(vit, tmp_path, ("spp",), save_models=True)
    folder = tmp_path / "models" / "shades-spp"
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["shades-spp"]
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "spp_config.json", ORDERS_NAME} <= {
        path.name for path in folder.iterdir()
    }
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    assert model.config.id2label == {0: "dark", 1: "grey", 2: "light"}
    reordering = Reordering.from_pretrained(folder)
    assert reordering.changed
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(pixels).logits
        reordering.undo(model)
        assert torch.allclose(model(pixels).logits, before, atol=1e-5)
    assert results.rows[0]["accuracy"] >= 0


def test_a_row_without_its_saved_model_is_run_again(vit, whole, finished):
    again = compare(vit, finished, ("spp",), save_models=True)
    assert list(map(comparable, again.rows)) == list(map(comparable, whole.rows))
    assert (finished / "models" / "shades-spp" / "model.safetensors").is_file()


def test_a_missing_plot_of_a_finished_comparison_is_drawn_again(vit, whole, finished):
    (finished / "saliency.png").unlink()
    compare(vit, finished)
    assert (finished / "saliency.png").read_bytes() == (whole.output_dir / "saliency.png").read_bytes()


def test_texts_are_told_by_their_column(bert, tmp_path):
    results = compare(
        bert, tmp_path, data={"mood": text_data()}, args=arguments(num_train_epochs=8, learning_rate=1e-2)
    )
    assert results.settings["datasets"]["mood"]["kind"] == "text"
    assert results.rows[0]["accuracy"] == results.rows[2]["accuracy"] == 1.0
    assert results.rows[2]["relative_diff"] < 1e-4


def test_saved_text_models_hold_the_tokenizer(bert, tmp_path):
    compare(bert, tmp_path, ("original",), {"mood": text_data()}, save_models=("original",))
    folder = tmp_path / "models" / "mood-original"
    assert AutoTokenizer.from_pretrained(folder)("good film")["input_ids"] == [2, 5, 10, 3]
    assert not (folder / ORDERS_NAME).exists()


def test_calibrated_metrics_use_the_training_set(vit, tmp_path):
    results = compare(vit, tmp_path, ("spp",), config=SPPConfig(axes=("ffn",), metric="taylor"))
    assert results.rows[0]["relative_diff"] < 1e-4


def test_sources_may_be_callables_and_splits(vit, tmp_path):
    data = {"called": image_data, "split": datasets.DatasetDict(train=image_data(), test=image_data(3))}
    results = compare(vit, tmp_path, ("original",), data)
    assert [row["train_samples"] for row in results.rows] == [36, 36]


def test_left_out_data_sets_are_named(vit, tmp_path):
    results = compare(vit, tmp_path, ("original",), left_out={"clothes": "no network"})
    assert results.left_out == {"clothes": "no network"}
    assert "**clothes** (no network)" in results.to_markdown()
    assert json.loads((tmp_path / "results.json").read_text())["settings"]["left_out"] == {"clothes": "no network"}


def test_nothing_is_printed_without_a_terminal(vit, tmp_path, capfd):
    compare(vit, tmp_path, ("original",))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("methods", "data", "options", "said"),
    [
        ((), None, {}, "is no list of methods"),
        ("spp", None, {}, "is no list of methods"),
        (("spp", "magic"), None, {}, "unknown method 'magic'"),
        (("spp",), [image_data(6)], {}, "something else than Hub ids"),
        (("spp",), "uoft-cs/cifar10", {}, "something else than Hub ids"),
        (("spp",), {"a b": None, "a-b": None}, {}, "give one folder name"),
        (("original",), None, {"save_models": True}, "that methods=.* does not make"),
        (("spp",), None, {"save_models": "spp"}, "asks to keep"),
    ],
)
def test_bad_calls_are_refused_before_anything_is_written(vit, tmp_path, methods, data, options, said):
    with pytest.raises(SPPConfigError, match=said):
        compare(vit, tmp_path / "out", methods, data, **options)
    assert not (tmp_path / "out").exists()


def test_no_data_set_is_refused(vit, tmp_path):
    with pytest.raises(SPPConfigError, match="names no data set"):
        compare_methods(vit, {}, output_dir=tmp_path)


def test_an_unknown_model_is_named(tmp_path):
    with pytest.raises(HubError, match="no-such-model"):
        compare(str(tmp_path / "no-such-model"), tmp_path / "out", ("original",))


def test_data_errors_reach_the_caller(vit, tmp_path):
    with pytest.raises(DatasetError, match="'shades' is a list"):
        compare(vit, tmp_path, data={"shades": [1, 2]})


def test_default_arguments_are_the_papers(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    args = recipe_arguments()
    assert (args.num_train_epochs, args.per_device_train_batch_size, args.learning_rate) == (1, 16, 2e-4)
    assert not args.bf16
    assert not args.fp16
    assert recipe_arguments(learning_rate=5e-5).learning_rate == 5e-5


@pytest.mark.parametrize(
    ("cuda", "bf16", "expected"),
    [(False, False, {}), (True, True, {"bf16": True}), (True, False, {"fp16": True})],
)
def test_precision_follows_the_device(monkeypatch, cuda, bf16, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    assert precision_arguments() == expected
