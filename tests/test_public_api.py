"""What `hf_spp` promises to export, it exports, and nothing else."""

import inspect
import re

import pytest

import hf_spp

PROMISED = {"SPPConfig", "apply_spp", "Reordering", "SPPCallback", "SPPError", "compare_methods", "channel_groups"}


def test_all_is_what_the_package_exports():
    exported = {name: getattr(hf_spp, name) for name in hf_spp.__all__}
    assert list(exported) == sorted(exported)
    assert PROMISED <= set(exported) <= set(dir(hf_spp))
    own = {name for name, value in vars(hf_spp).items() if getattr(value, "__module__", "").startswith("hf_spp.")}
    assert own == set(exported) - {"__version__"}
    assert all(inspect.getdoc(exported[name]) for name in own)
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", hf_spp.__version__)
    assert list(inspect.signature(hf_spp.apply_spp).parameters) == ["model", "config", "calibration", "example_inputs"]
    with pytest.raises(AttributeError, match="no attribute 'apply_ssp'"):
        _ = hf_spp.apply_ssp
