"""`SPPConfig`: validation, round trip, versions."""

import dataclasses
import functools
import json

import numpy as np
import pytest
import torch
from conftest import build_model

from hf_spp import CheckpointError, SPPConfig, SPPConfigError, apply_spp
from hf_spp.config import AXES, FORMAT_VERSION, METRICS


def my_metric(group, weights):
    return weights[0].flatten(2).abs().sum(-1)


def test_defaults():
    config = SPPConfig()
    assert dataclasses.asdict(config) == {
        "axes": None,
        "towers": None,
        "metric": None,
        "calibration_batches": 32,
        "verify": True,
        "tolerance": None,
        "seed": 0,
    }
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1


def test_the_papers_setting():
    assert SPPConfig.raffm() == SPPConfig(axes=("qk",), metric="l1")
    assert SPPConfig.raffm(seed=3, verify=False) == SPPConfig(axes=("qk",), metric="l1", seed=3, verify=False)
    with pytest.raises(TypeError):
        SPPConfig.raffm(colour=1)


@pytest.mark.parametrize(
    "values",
    [
        {"axes": ("hidden", "qk")},
        {"axes": ["vo"]},
        {"metric": "taylor"},
        {"metric": my_metric},
        {"metric": lambda group, weights: weights[0]},
        {"metric": functools.partial(my_metric)},
        {"calibration_batches": None},
        {"calibration_batches": 1},
        {"verify": False},
        {"tolerance": 1e-12},
        {"tolerance": 1},
        {"seed": 2**63 - 1},
        *({"axes": (axis,)} for axis in AXES),
        *({"metric": metric} for metric in METRICS),
    ],
)
def test_round_trip(values, tmp_path):
    config = SPPConfig(**values)
    path = config.save_pretrained(tmp_path / "new" / "folder")
    assert path.name == "spp_config.json"
    loaded = SPPConfig.from_pretrained(tmp_path / "new" / "folder")
    assert loaded.to_dict() == config.to_dict() == json.loads(path.read_text())
    assert loaded.metric_name == config.metric_name
    if not callable(config.metric):
        assert loaded == config
        assert hash(loaded) == hash(config)
        assert SPPConfig.from_dict(config.to_dict()) == config


def test_file_is_plain_sorted_json(tmp_path):
    text = SPPConfig(axes=("ffn", "qk"), metric="l2").save_pretrained(tmp_path).read_text()
    assert json.loads(text) == {
        "axes": ["ffn", "qk"],
        "calibration_batches": 32,
        "format_version": FORMAT_VERSION,
        "metric": "l2",
        "seed": 0,
        "tolerance": None,
        "towers": None,
        "verify": True,
    }
    assert list(json.loads(text)) == sorted(json.loads(text))
    assert text.endswith("}\n")


def test_stored_callable_asks_for_the_function(tmp_path):
    SPPConfig(metric=my_metric).save_pretrained(tmp_path)
    loaded = SPPConfig.from_pretrained(tmp_path)
    assert loaded.metric_name == "my_metric"
    assert not loaded.needs_calibration
    model = build_model("vit")
    with pytest.raises(SPPConfigError, match=r"'my_metric' was a Python callable.*replace\(config, metric="):
        apply_spp(model, loaded)
    again = dataclasses.replace(loaded, metric=my_metric)
    assert apply_spp(model, again).digest == apply_spp(build_model("vit"), SPPConfig(metric=my_metric)).digest


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"axes": ()}, r"axes=\(\) names no axis"),
        ({"axes": []}, r"names no axis"),
        ({"axes": "qk"}, r"axes='qk' is no tuple of axis names. Give axes="),
        ({"axes": {"qk"}}, r"is no tuple of axis names"),
        ({"axes": 5}, r"axes=5 is no tuple"),
        ({"towers": "encoder"}, r"towers='encoder' is no tuple of module paths"),
        ({"towers": ()}, r"towers=\(\) is no tuple of module paths"),
        ({"towers": (1,)}, r"Give towers=\('encoder',\), or None for all"),
        ({"axes": ("qk", "neck")}, r"unknown axis 'neck'. Known axes: qk, vo, heads, ffn, experts, hidden"),
        ({"axes": ("QK",)}, r"unknown axis 'QK'"),
        ({"axes": (None,)}, r"unknown axis None"),
        ({"axes": (["qk"],)}, r"unknown axis \['qk'\]"),
        ({"axes": ("qk", "vo", "qk")}, r"names an axis twice"),
        ({"metric": "L1"}, r"metric='L1' is unknown. Known: l1, l2, random, activation, taylor, or a callable"),
        ({"metric": ""}, r"metric='' is unknown"),
        ({"metric": 1}, r"metric=1 is unknown"),
        ({"metric": ["l1"]}, r"metric=\['l1'\] is unknown"),
        ({"calibration_batches": 0}, r"calibration_batches=0 is no positive whole number"),
        ({"calibration_batches": -3}, r"calibration_batches=-3"),
        ({"calibration_batches": 1.5}, r"calibration_batches=1.5"),
        ({"calibration_batches": True}, r"calibration_batches=True"),
        ({"calibration_batches": "8"}, r"calibration_batches='8'"),
        ({"verify": 1}, r"verify=1 is neither True nor False"),
        ({"verify": None}, r"verify=None"),
        ({"verify": "no"}, r"verify='no'"),
        ({"tolerance": 0}, r"tolerance=0 is no positive number"),
        ({"tolerance": -1e-3}, r"tolerance=-0.001"),
        ({"tolerance": float("nan")}, r"tolerance=nan"),
        ({"tolerance": float("inf")}, r"tolerance=inf"),
        ({"tolerance": "1e-4"}, r"tolerance='1e-4'"),
        ({"tolerance": torch.tensor(1e-4)}, r"tolerance=tensor"),
        ({"seed": -1}, r"seed=-1 is no whole number from 0 up"),
        ({"seed": 1.0}, r"seed=1.0"),
        ({"seed": False}, r"seed=False"),
        ({"seed": None}, r"seed=None"),
        ({"seed": np.int64(3)}, r"seed=.*3"),
        ({"tolerance": True}, r"tolerance=True"),
        ({"seed": 2**64}, r"seed=18446744073709551616"),
    ],
    ids=str,
)
def test_values_that_are_not_accepted(values, message):
    with pytest.raises(SPPConfigError, match=message):
        SPPConfig(**values)
    if "seed" not in values or not isinstance(values["seed"], np.int64):
        try:
            stored = json.loads(json.dumps(values))
        except TypeError:
            return
        with pytest.raises(SPPConfigError):
            SPPConfig.from_dict({**SPPConfig().to_dict(), **stored})


def test_newer_format_is_refused_with_both_versions():
    values = {**SPPConfig().to_dict(), "format_version": FORMAT_VERSION + 1}
    with pytest.raises(
        CheckpointError, match=rf"format_version {FORMAT_VERSION + 1}; .* up to {FORMAT_VERSION}. Upgrade hf-spp"
    ):
        SPPConfig.from_dict(values)


@pytest.mark.parametrize("version", [None, 0, -1, "1", 1.0, True, [1]])
def test_no_format_version(version):
    with pytest.raises(CheckpointError, match="states format_version"):
        SPPConfig.from_dict({**SPPConfig().to_dict(), "format_version": version})
    with pytest.raises(CheckpointError, match="states format_version None"):
        SPPConfig.from_dict({})


def test_unknown_key_is_named():
    with pytest.raises(SPPConfigError, match=r"unknown keys \['axis', 'zeal'\]. Known: axes, calibration_batches"):
        SPPConfig.from_dict({**SPPConfig().to_dict(), "zeal": 1, "axis": "qk"})


@pytest.mark.parametrize("values", [[], 5, None, "text"], ids=str)
def test_no_object(values):
    with pytest.raises(SPPConfigError, match="a JSON object is needed"):
        SPPConfig.from_dict(values)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"nonsense", b'{"a": 1,}'])
def test_damaged_file(content, tmp_path):
    (tmp_path / "spp_config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"spp_config\.json"):
        SPPConfig.from_pretrained(tmp_path)


def test_folder_without_the_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"spp_config\.json"):
        SPPConfig.from_pretrained(tmp_path)


def test_axes_come_back_in_the_packages_order():
    reordering = apply_spp(build_model("vit"), SPPConfig(axes=("ffn", "qk")))
    assert reordering.config.axes == reordering.axes == ("qk", "ffn")
    assert apply_spp(build_model("vit")).config == SPPConfig(axes=("qk", "vo", "heads", "ffn"), metric="l1")
