import json
import random

import pytest
import torch
from conftest import build_model
from safetensors.torch import load_file, save_file

from hf_spp.errors import CheckpointError, UnsupportedModelError
from hf_spp.tensor_bytes import copy_pieces, open_tensors, pieces_of, read_tensor, write_tensors
from hf_spp.tensor_files import (
    INDEX_NAME,
    StoredTensor,
    pack_header,
    parse_header,
    parse_index,
    read_header,
    read_weights,
)

TENSORS = {
    "one": torch.arange(12, dtype=torch.float32).view(3, 4),
    "two": torch.arange(6).to(torch.bfloat16).view(2, 3),
    "three": torch.tensor([True, False, True]),
    "number": torch.tensor(5),
    "nothing": torch.zeros(0, 4),
    "small": torch.arange(4, dtype=torch.float32).to(torch.float8_e4m3fn),
}


@pytest.fixture
def file(tmp_path):
    save_file(TENSORS, tmp_path / "file.safetensors", metadata={"format": "pt", "who": "”me“"})
    return tmp_path / "file.safetensors"


def packed(header):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text


def entry(dtype="F32", shape=(2, 3), offsets=(0, 24), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


def test_header(file):
    header = read_header(file)
    assert header.metadata == {"format": "pt", "who": "”me“"}
    assert set(header.tensors) == set(TENSORS)
    assert [one.start for one in header.tensors.values()] == sorted(one.start for one in header.tensors.values())
    for name, tensor in TENSORS.items():
        one = header.tensors[name]
        assert (one.name, one.shape, one.nbytes) == (name, tuple(tensor.shape), tensor.nbytes)
        assert (one.torch_dtype, one.itemsize) == (tensor.dtype, tensor.element_size())
    data = file.read_bytes()
    assert parse_header(data[: header.length], len(data), "it") == header


def test_values(file):
    header = read_header(file)
    with open_tensors(file) as opened:
        for name, tensor in TENSORS.items():
            one = header.tensors[name]
            assert torch.equal(read_tensor(opened, one).float(), tensor.float())
            assert b"".join(copy_pieces(opened, one)) == b"".join(pieces_of(read_tensor(opened, one, raw=True)))
        assert torch.equal(read_tensor(opened, header.tensors["one"], rows=range(1, 3)), TENSORS["one"][1:])


def test_written_file_is_the_same(file, tmp_path):
    header = read_header(file)
    with open_tensors(file) as opened:
        data = (piece for one in header.tensors.values() for piece in copy_pieces(opened, one))
        head = pack_header(list(header.tensors.values()), header.metadata)
        digest = write_tensors(tmp_path / "copy.safetensors", head, data)
    from hf_spp.checkpoint import sha256_of

    assert digest == sha256_of(tmp_path / "copy.safetensors")
    copy = read_header(tmp_path / "copy.safetensors")
    assert list(copy.tensors) == list(header.tensors)
    assert copy.metadata == header.metadata
    loaded = load_file(tmp_path / "copy.safetensors")
    assert all(torch.equal(loaded[name].float(), tensor.float()) for name, tensor in TENSORS.items())


def test_file_that_fails_while_it_is_written_is_not_there(tmp_path):
    def broken():
        yield memoryview(b"1234")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_tensors(tmp_path / "it.safetensors", pack_header([], {}), broken())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"", "no readable safetensors file"),
        (b"not json at all", "is no valid JSON"),
        (b'{"a":' * 50_000, "is no valid JSON"),
        (b'{"a": NaN}  ', "is no valid JSON"),
        (b"[1, 2, 3]", "no JSON object"),
        (b'{"__metadata__": {"a": "1", "a": "2"}}', "stands there twice"),
        ({"__metadata__": {"a": 1}}, "no texts by name"),
        ({"__metadata__": ["a"]}, "no texts by name"),
        ({"a": [0, 24]}, "describes tensor 'a'"),
        ({"a": entry("F31")}, "describes tensor 'a'"),
        ({"a": entry(["F32"])}, "describes tensor 'a'"),
        ({"a": entry(shape=(2, -3))}, "describes tensor 'a'"),
        ({"a": entry(shape=(2, True))}, "describes tensor 'a'"),
        ({"a": entry(shape=(2.0, 3))}, "describes tensor 'a'"),
        ({"a": entry(shape=(1,) * 99 + (6,))}, "describes tensor 'a'"),
        ({"a": entry(offsets=(0, 24, 48))}, "describes tensor 'a'"),
        ({"a": entry(offsets=(0, 1 << 80))}, "describes tensor 'a'"),
        ({"a": entry(more=1)}, "describes tensor 'a'"),
        ({"a": entry(offsets=(0, 23))}, "which is another size"),
        ({"a": entry(offsets=(24, 0))}, "which is another size"),
        ({"a": entry("F4", (3,), (0, 1))}, "which is another size"),
        ({"a": entry(), "b": entry()}, "one after another"),
        ({"a": entry(offsets=(0, 24)), "b": entry(offsets=(30, 54))}, "one after another"),
        ({"a": entry(shape=(1, 3), offsets=(0, 12))}, "end at byte"),
    ],
    ids=str,
)
def test_damaged_headers(header, message, tmp_path):
    data = packed(header) + bytes(24)
    (tmp_path / "it.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        read_header(tmp_path / "it.safetensors")
    with pytest.raises(CheckpointError, match=message):
        parse_header(data, len(data), "it")


@pytest.mark.parametrize("data", [b"", b"1234", b"\xff" * 20, (1 << 40).to_bytes(8, "little") + b"{}"], ids=str)
def test_files_that_are_too_short(data, tmp_path):
    (tmp_path / "it.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="no readable safetensors file"):
        read_header(tmp_path / "it.safetensors")


def test_flipped_bytes_are_refused_or_harmless(file):
    data, draw, refused = file.read_bytes(), random.Random(0), 0
    length = read_header(file).length
    for _ in range(1500):
        damaged = bytearray(data)
        for _ in range(draw.randint(1, 3)):
            damaged[draw.randrange(length)] = draw.randrange(256)
        try:
            header = parse_header(bytes(damaged), len(damaged), "it")
        except CheckpointError:
            refused += 1
        else:
            assert max(one.stop for one in header.tensors.values()) == len(data)
    assert refused > 1000


def test_types_that_torch_lacks():
    with pytest.raises(UnsupportedModelError, match="F4, 4 bits an element"):
        _ = StoredTensor("it", "F4", (4,), 0, 2).raw_dtype
    with pytest.raises(UnsupportedModelError, match="F8_E8M0, whose values torch cannot read"):
        _ = StoredTensor("it", "F8_E8M0", (4,), 0, 4).torch_dtype
    assert StoredTensor("it", "F8_E8M0", (4,), 0, 4).raw_dtype == torch.uint8


def test_file_that_ends_early(file):
    one = read_header(file).tensors["one"]
    file.write_bytes(file.read_bytes()[: one.start + 10])
    with open_tensors(file) as opened, pytest.raises(CheckpointError, match="ends within tensor one"):
        read_tensor(opened, one)


@pytest.fixture
def sharded(tmp_path):
    build_model("bert").save_pretrained(tmp_path / "bert", max_shard_size="8KB")
    return tmp_path / "bert"


def test_weights_of_a_folder(sharded, tmp_path):
    weights = read_weights(sharded)
    index = json.loads((sharded / INDEX_NAME).read_text())
    assert len(weights.headers) > 2
    assert weights.files == index["weight_map"]
    assert weights.metadata == index["metadata"]
    build_model("bert").save_pretrained(tmp_path / "one")
    one = read_weights(tmp_path / "one")
    assert one.metadata is None
    assert {name: tensor.shape for name, tensor in one.tensors.items()} == {
        name: tensor.shape for name, tensor in weights.tensors.items()
    }
    with pytest.raises(CheckpointError, match="has neither"):
        read_weights(tmp_path)


@pytest.mark.parametrize("name", ["../it.safetensors", "/it.safetensors", "a\\b.safetensors", "model.bin", 5, ""])
def test_index_that_leads_elsewhere(name, sharded):
    index = json.loads((sharded / INDEX_NAME).read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = name
    (sharded / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="inside of the folder"):
        read_weights(sharded)


def test_index_and_files_that_disagree(sharded):
    index = json.loads((sharded / INDEX_NAME).read_text())
    name, file = index["weight_map"].popitem()
    (sharded / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"disagree about 1 tensors, such as {name}"):
        read_weights(sharded)
    index["weight_map"].update({name: file, "other": file})
    (sharded / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="disagree about 1 tensors, such as other"):
        read_weights(sharded)
    with pytest.raises(CheckpointError, match="no weight_map"):
        parse_index({"weight_map": []}, "it")


def test_links(sharded, tmp_path):
    shard = next(sharded.glob("*.safetensors"))
    outside = shard.rename(tmp_path / "outside.safetensors")
    shard.symlink_to(outside)
    with pytest.raises(CheckpointError, match="outside of the folder"):
        read_weights(sharded)
    # The Hugging Face cache is made of links to the blobs beside its snapshots.
    (tmp_path / "repo" / "snapshots").mkdir(parents=True)
    (tmp_path / "repo" / "blobs").mkdir()
    shard.unlink()
    outside = outside.rename(tmp_path / "repo" / "blobs" / "0a")
    cached = sharded.rename(tmp_path / "repo" / "snapshots" / "1b")
    (cached / shard.name).symlink_to("../../blobs/0a")
    assert shard.name in read_weights(cached).headers
