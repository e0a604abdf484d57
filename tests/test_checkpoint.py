"""Files are written whole or not at all, and every byte read is validated."""

import json
import os
from functools import cache

import hypothesis.strategies as st
import pytest
import torch
from conftest import build_model, legal_axes, same_bits, weights_of
from hypothesis import example, given, settings

from hf_spp import CheckpointError, OrdersError, Reordering, SPPConfig, SPPError, apply_spp, checkpoint
from hf_spp.config import FORMAT_VERSION
from hf_spp.orders_file import ORDERS_NAME, _seal

ORDER, SCORE = "orders.layers.0.mlp.ffn", "scores.layers.0.mlp.ffn"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# --- writing ----------------------------------------------------------------------------------------------------------


def test_write_makes_folders_and_leaves_nothing_else(tmp_path):
    target = tmp_path / "a" / "b" / "file.bin"
    assert checkpoint.write_bytes(target, b"new") == target
    assert checkpoint.write_bytes(str(target), b"newer") == target
    assert target.read_bytes() == b"newer"
    assert names(target.parent) == ["file.bin"]


def test_text_is_utf8_and_json_is_sorted(tmp_path):
    checkpoint.write_text(tmp_path / "text", "Δ ≤ 1\n")
    assert (tmp_path / "text").read_bytes() == "Δ ≤ 1\n".encode()
    assert checkpoint.read_text(tmp_path / "text") == "Δ ≤ 1\n"
    checkpoint.write_json(tmp_path / "json", {"b": [1, None], "a": "Δ"})
    assert checkpoint.read_json(tmp_path / "json") == {"a": "Δ", "b": [1, None]}
    assert list(json.loads((tmp_path / "json").read_text())) == ["a", "b"]


@pytest.mark.parametrize("moment", ["fsync", "replace"])
@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "stopped"]
)
def test_crash_while_writing_keeps_the_old_file(moment, error, tmp_path, monkeypatch):
    target = tmp_path / "file.bin"
    checkpoint.write_bytes(target, b"old")

    def crash(*arguments):
        raise error

    monkeypatch.setattr(os, moment, crash)
    expected = CheckpointError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        checkpoint.write_bytes(target, b"new")
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["file.bin"]


def test_value_that_json_cannot_hold_writes_nothing(tmp_path):
    checkpoint.write_json(tmp_path / "file.json", {})
    with pytest.raises(ValueError, match="not JSON compliant"):
        checkpoint.write_json(tmp_path / "file.json", {"a": float("nan")})
    assert checkpoint.read_json(tmp_path / "file.json") == {}
    assert names(tmp_path) == ["file.json"]


def test_write_over_a_folder(tmp_path):
    (tmp_path / "target").mkdir()
    with pytest.raises(CheckpointError, match=r"target cannot be written \(.*\)\. Give a folder"):
        checkpoint.write_bytes(tmp_path / "target", b"")
    assert names(tmp_path) == ["target"]


def test_write_below_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot be written \(.*\)\. Give a folder"):
        SPPConfig().save_pretrained(tmp_path / "file")


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read", [checkpoint.read_text, checkpoint.read_json, checkpoint.read_bytes])
def test_missing_file_and_folder(read, tmp_path):
    for path in (tmp_path / "nothing.json", tmp_path):
        with pytest.raises(CheckpointError, match=r"cannot be read.*Check the path"):
            read(path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xef\xbb\xbf{}", b"{'a': 1}", b"[1,]", b"{} {}"])
def test_no_json(content, tmp_path):
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="is no valid JSON"):
        checkpoint.read_json(tmp_path / "file.json")


def test_json_nested_without_end(tmp_path):
    (tmp_path / "file.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="is no valid JSON"):
        checkpoint.read_json(tmp_path / "file.json")


@given(st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=4), st.lists(st.integers(0, 9), max_size=5))
def test_tensors_round_trip(metadata, shape_like):
    tensors = {
        "one": torch.tensor(shape_like, dtype=torch.int32),
        "two": torch.zeros(2, 0),
        "three": torch.ones(3, 2).t(),
    }
    found, stored = checkpoint.unpack_tensors(checkpoint.pack_tensors(tensors, metadata), "file")
    assert stored == metadata
    assert found.keys() == tensors.keys()
    assert all(found[name].equal(value) and found[name].dtype == value.dtype for name, value in tensors.items())


@given(st.binary(max_size=200))
@example(b"")
@example(b"\x02\0\0\0\0\0\0\0{}")
@example(b"\xff" * 16)
@example((2**40).to_bytes(8, "little") + b"{}")
def test_bytes_that_are_no_safetensors_file(data):
    try:
        tensors, _ = checkpoint.unpack_tensors(data, "orders")
    except CheckpointError as error:
        assert "orders is no readable safetensors file" in str(error)  # noqa: PT017
    else:
        assert tensors == {}


# --- damaged orders ---------------------------------------------------------------------------------------------------


@cache
def stored():
    model = build_model("llama", num_hidden_layers=1)
    reordering = apply_spp(model, SPPConfig(axes=legal_axes(model), metric="random"))
    return reordering, reordering.to_bytes()


def is_equal(one, other):
    return (
        one.digest == other.digest
        and one.config == other.config
        and one.summary() == other.summary()
        and (one.axis_of, one.layer_of) == (other.axis_of, other.layer_of)
        and all(one.scores[name].equal(scores) for name, scores in other.scores.items())
    )


def read(data):
    """What the bytes give: an error of the package, or a reordering."""
    try:
        return Reordering.from_bytes(data)
    except SPPError as error:
        return error


@settings(max_examples=300)
@given(st.data())
def test_damaged_file_gives_permutations_or_an_error(data):
    reordering, whole = stored()
    found = read(damage(data, whole))
    if isinstance(found, Reordering):
        assert found.orders.keys() == reordering.orders.keys()
        for name, order in reordering.orders.items():
            assert found.orders[name].sort(-1).values.equal(order.sort(-1).values)
    else:
        assert isinstance(found, (CheckpointError, OrdersError))


@settings(max_examples=300)
@given(st.data())
def test_damaged_file_is_refused_or_means_the_same(data):
    reordering, whole = stored()
    found = read(damage(data, whole))
    assert isinstance(found, (CheckpointError, OrdersError)) or is_equal(found, reordering)


def test_two_swapped_bytes_are_no_other_permutation():
    reordering, whole = stored()
    order = reordering.orders["layers.0.mlp.ffn"].short().numpy().tobytes()
    start = whole.index(order)
    content = bytearray(whole)
    content[start], content[start + 4] = content[start + 4], content[start]
    assert isinstance(read(bytes(content)), (CheckpointError, OrdersError))


def damage(data, whole):
    """The bytes with some of them flipped, cut off, doubled or left out."""
    content = bytearray(whole)
    start = 8 + int.from_bytes(whole[:8], "little")
    places = st.one_of(st.integers(0, start - 1), st.integers(0, len(whole) - 1))
    place = data.draw(places)
    kind = data.draw(st.sampled_from(["flip", "flips", "cut", "insert", "delete", "swap"]))
    if kind == "cut":
        del content[place:]
    elif kind == "insert":
        content[place:place] = data.draw(st.binary(min_size=1, max_size=4))
    elif kind == "delete":
        del content[place : place + data.draw(st.integers(1, 4))]
    elif kind == "swap":
        other = data.draw(places)
        content[place], content[other] = content[other], content[place]
    else:
        for _ in range(1 if kind == "flip" else 3):
            content[place] ^= data.draw(st.integers(1, 255))
            place = data.draw(places)
    return bytes(content)


def altered(change=lambda tensors: None, **metadata):
    """The stored file with other tensors or metadata, packed anew."""
    tensors, old = checkpoint.unpack_tensors(apply_spp(build_model("vit")).to_bytes(), ORDERS_NAME)
    change(tensors)
    return checkpoint.pack_tensors(tensors, {**old, **metadata})


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors[ORDER].zero_(),
        lambda tensors: tensors[ORDER].sub_(20),
        lambda tensors: tensors[ORDER].add_(1),
        lambda tensors: tensors.update({ORDER: tensors[ORDER][0], SCORE: tensors[SCORE][0]}),
        lambda tensors: tensors.update({ORDER: torch.tensor(0), SCORE: torch.tensor(0.0)}),
        lambda tensors: tensors.update({ORDER: tensors[ORDER].bool()}),
    ],
    ids=["repeated", "negative", "too-large", "flat", "scalar", "bool"],
)
def test_stored_order_that_is_no_permutation(change):
    with pytest.raises(OrdersError, match=rf"The order of 'layers\.0\.mlp\.ffn' in {ORDERS_NAME} is no permutation"):
        Reordering.from_bytes(altered(change))


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop(ORDER),
        lambda tensors: tensors.pop(SCORE),
        lambda tensors: tensors.clear(),
        lambda tensors: tensors.update({"orders.other": torch.zeros(1, 1).int(), "scores.other": torch.zeros(1, 1)}),
        lambda tensors: tensors.update({SCORE: tensors[SCORE][:, :-1]}),
    ],
    ids=["order-missing", "score-missing", "empty", "group-too-many", "other-shape"],
)
def test_stored_groups_that_do_not_match(change):
    with pytest.raises(CheckpointError, match="do not match"):
        Reordering.from_bytes(altered(change))


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.update({ORDER: tensors[ORDER].float() + 0.4}),
        lambda tensors: tensors[SCORE].fill_(float("nan")),
        lambda tensors: tensors.update({"extra": torch.zeros(2)}),
    ],
    ids=["fractions", "nan-scores", "unknown-tensor"],
)
def test_stored_tensors_of_another_kind(change):
    with pytest.raises((CheckpointError, OrdersError)):
        Reordering.from_bytes(altered(change))


def test_empty_order_of_another_model():
    """A file can be sound in itself and still not fit."""
    model = build_model("vit")
    empty = {ORDER: torch.zeros(1, 0, dtype=torch.int32), SCORE: torch.zeros(1, 0)}
    reordering = read(altered(lambda tensors: tensors.update(empty)))
    before = weights_of(model)
    if isinstance(reordering, Reordering):
        with pytest.raises(OrdersError):
            reordering.apply(model)
    assert same_bits(model, before)


@pytest.mark.parametrize("key", ["format_version", "config", "summary", "groups"])
@pytest.mark.parametrize("value", ["", "{", "[]", '"text"', "x", '{"a": 1}'])
def test_damaged_metadata(key, value):
    with pytest.raises(CheckpointError, match=r"spp_(orders|config)\."):
        Reordering.from_bytes(altered(**{key: value}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("config", "5"),
        ("config", "null"),
        ("summary", "5"),
        ("summary", "null"),
        ("groups", "5"),
        ("groups", "null"),
        ("groups", '[["a"]]'),
    ],
)
def test_metadata_of_another_type(key, value):
    with pytest.raises(CheckpointError, match=ORDERS_NAME):
        Reordering.from_bytes(altered(**{key: value}))


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("groups", lambda groups: dict.fromkeys(groups, "ab")),
        ("groups", lambda groups: {name: ["neck", 0] for name in groups}),
        ("groups", lambda groups: {name: ["ffn", "first"] for name in groups}),
        ("summary", lambda summary: {**summary, "model_type": 5}),
        ("summary", lambda summary: {**summary, "tolerance": "small"}),
        ("summary", lambda summary: {**summary, "max_abs_diff": "none"}),
        ("summary", lambda summary: {**summary, "refused": [{"axis": 1, "where": 2, "reason": 3}]}),
        ("summary", lambda summary: {**summary, "versions": 3}),
    ],
)
def test_metadata_with_values_of_another_type(key, change):
    _, metadata = checkpoint.unpack_tensors(apply_spp(build_model("vit")).to_bytes(), ORDERS_NAME)
    with pytest.raises(CheckpointError, match=ORDERS_NAME):
        Reordering.from_bytes(altered(**{key: json.dumps(change(json.loads(metadata[key])))}))


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("groups", lambda groups: dict.fromkeys(groups, "ab")),
        ("groups", lambda groups: {name: ["neck", 0] for name in groups}),
        ("groups", lambda groups: {name: ["ffn", "first"] for name in groups}),
        ("summary", lambda summary: {**summary, "model_type": 5}),
        ("summary", lambda summary: {**summary, "tolerance": "small"}),
        ("summary", lambda summary: {**summary, "max_abs_diff": "none"}),
        ("summary", lambda summary: {**summary, "versions": 3}),
    ],
)
def test_values_of_another_type_under_a_good_checksum(key, change):
    """Files come from the Hub, and whoever writes one can compute a checksum."""
    tensors, metadata = checkpoint.unpack_tensors(apply_spp(build_model("vit")).to_bytes(), ORDERS_NAME)
    metadata[key] = json.dumps(change(json.loads(metadata[key])))
    with pytest.raises(CheckpointError, match=ORDERS_NAME):
        Reordering.from_bytes(checkpoint.pack_tensors(tensors, {**metadata, "sha256": _seal(tensors, metadata)}))


def test_stored_scalar():
    with pytest.raises(CheckpointError):
        Reordering.from_bytes(altered(lambda tensors: tensors.update(extra=torch.tensor(1.0))))


def test_file_of_another_kind():
    with pytest.raises(CheckpointError, match="It was not written by hf_spp"):
        Reordering.from_bytes(checkpoint.pack_tensors({"weight": torch.ones(2)}, {"format": "pt"}))


def test_newer_format_is_refused_with_both_versions():
    newer = FORMAT_VERSION + 1
    with pytest.raises(CheckpointError, match=rf"format_version {newer}; this hf_spp reads up to {FORMAT_VERSION}"):
        Reordering.from_bytes(altered(format_version=str(newer)))
    with pytest.raises(CheckpointError, match=r"format_version -1; a number from 1 up is needed"):
        Reordering.from_bytes(altered(format_version="-1"))


# --- folders of a reordering ------------------------------------------------------------------------------------------


def test_saved_files(tmp_path):
    reordering = apply_spp(build_model("vit"))
    config, orders = reordering.save_pretrained(tmp_path)
    assert names(tmp_path) == sorted([config.name, orders.name]) == ["spp_config.json", "spp_orders.safetensors"]
    assert is_equal(Reordering.from_pretrained(tmp_path), reordering)


@pytest.mark.parametrize("missing", ["spp_config.json", "spp_orders.safetensors"])
def test_folder_that_lacks_a_file(missing, tmp_path):
    apply_spp(build_model("vit")).save_pretrained(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(CheckpointError, match=f"no file '{missing}'"):
        Reordering.from_pretrained(tmp_path)


def test_files_of_two_reorderings(tmp_path):
    apply_spp(build_model("vit")).save_pretrained(tmp_path)
    SPPConfig.raffm().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="come from different reorderings"):
        Reordering.from_pretrained(tmp_path)


@pytest.mark.parametrize("crash_at", [1, 2])
def test_crash_between_the_two_files(crash_at, tmp_path, monkeypatch):
    """The old reordering, the new one, or an error that says so; never a mixture."""
    old = apply_spp(build_model("vit"), SPPConfig(metric="l2"))
    new = apply_spp(build_model("vit"), SPPConfig(metric="random"))
    old.save_pretrained(tmp_path)
    replace, calls = os.replace, []

    def crash(source, destination):
        calls.append(source)
        if len(calls) == crash_at:
            raise KeyboardInterrupt
        replace(source, destination)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            new.save_pretrained(tmp_path)
    assert names(tmp_path) == ["spp_config.json", "spp_orders.safetensors"]
    if crash_at == 1:
        assert is_equal(Reordering.from_pretrained(tmp_path), old)
    else:
        with pytest.raises(CheckpointError, match="come from different reorderings"):
            Reordering.from_pretrained(tmp_path)


def resealed(**changes):
    """The bytes of an orders file with other metadata, sealed anew, as somebody with bad intent would."""
    tensors, metadata = checkpoint.unpack_tensors(stored()[1], ORDERS_NAME)
    metadata = {**metadata, **changes}
    return checkpoint.pack_tensors(tensors, {**metadata, "sha256": _seal(tensors, metadata)})


def with_summary(**changes):
    _tensors, metadata = checkpoint.unpack_tensors(stored()[1], ORDERS_NAME)
    return resealed(summary=json.dumps({**json.loads(metadata["summary"]), **changes}))


def with_member(*member):
    _tensors, metadata = checkpoint.unpack_tensors(stored()[1], ORDERS_NAME)
    groups = json.loads(metadata["groups"])
    next(iter(groups.values()))[3][0] = list(member)
    return resealed(groups=json.dumps(groups))


@pytest.mark.parametrize(
    "data",
    [
        lambda: resealed(config='{"format_version": 1, "seed": ' + "9" * 5000 + "}"),
        lambda: resealed(config='{"format_version": 1, "axes": ["nowhere"]}'),
        lambda: with_summary(tolerance=10**400),
        lambda: with_summary(max_abs_diff=float("nan")),
        lambda: with_summary(relative_diff=True),
        lambda: with_summary(verified="yes"),
        lambda: with_summary(verified=False),
        lambda: with_member("w", "c", "producer", [0, 1, 10**30]),
        lambda: with_member("w", "(c c) i", "producer", None),
        lambda: with_member("w", "((c) i", "producer", None),
        lambda: with_member("w", "c " * 4000 + "(", "producer", None),
        lambda: with_member("w", "c", "ruler", None),
        lambda: with_member(5, "c", "producer", None),
        lambda: with_member("w", "c"),
    ],
)
def test_crafted_orders_are_refused(data):
    assert isinstance(read(data()), (CheckpointError, OrdersError))


def test_reorderings_of_other_axes_compose():
    model = build_model("vit")
    before = {name: one.clone() for name, one in model.state_dict().items()}
    first = apply_spp(model, SPPConfig(axes=("ffn",), metric="random"))
    second = apply_spp(model, SPPConfig(axes=("vo",), metric="random"))
    both = first.then(second)
    assert set(both.axes) == {"ffn", "vo"}
    fresh = build_model("vit")
    both.apply(fresh)
    assert all(torch.equal(one, model.state_dict()[name]) for name, one in fresh.state_dict().items())
    both.undo(fresh)
    assert all(torch.equal(one, before[name]) for name, one in fresh.state_dict().items())
    with pytest.raises(OrdersError, match="Compose reorderings of one model"):
        first.then(apply_spp(build_model("bert")))
