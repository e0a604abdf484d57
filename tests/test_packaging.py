"""The wheel and the sdist hold what they should, and nothing else."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A wheel and a sdist, built from a copy so that no build folder is left in the checkout."""
    copy, out = tmp_path_factory.mktemp("source") / "hf_spp", tmp_path_factory.mktemp("dist")
    ignored = shutil.ignore_patterns(".git", ".*_cache", "__pycache__", "*.egg-info", "build", "dist", ".venv", "spp-*")
    shutil.copytree(ROOT, copy, ignore=ignored)
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(copy)],
        check=True,
        capture_output=True,
    )
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as file, tarfile.open(sdist) as archive:
        entry_points = file.read(next(name for name in file.namelist() if name.endswith("entry_points.txt"))).decode()
        metadata = file.read(next(name for name in file.namelist() if name.endswith("METADATA"))).decode()
        inside = [name.partition("/")[2] for name in archive.getnames()]
        return file.namelist(), inside, entry_points, metadata


def test_wheel_holds_the_package_and_its_data(built):
    names, _, entry_points, _ = built
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "hf_spp").rglob("*.py")}
    assert sources <= set(names)
    data = {"hf_spp/py.typed", "hf_spp/cards/templates/model_card.md.j2", "hf_spp/support/families.json"}
    assert data <= set(names)
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"hf_spp"}
    assert "hf-spp = hf_spp.cli:main" in entry_points


def test_sdist_holds_what_builds_it(built):
    _, inside, _, _ = built
    assert {"setup.cfg", "pyproject.toml", "README.md", "LICENSE", "hf_spp/cards/templates/model_card.md.j2"} <= set(
        inside
    )


def test_metadata_states_extras_and_range(built):
    metadata = built[3]
    for line in (
        "Requires-Python: >=3.10",
        "Provides-Extra: app",
        "Provides-Extra: demo",
        "Provides-Extra: test",
        "Provides-Extra: dev",
    ):
        assert line in metadata
    assert "Requires-Dist: transformers>=5.20" in metadata
    assert 'Requires-Dist: onnx>=1.17; extra == "test"' in metadata


def test_version_is_stated_once():
    namespace = {}
    exec((ROOT / "hf_spp" / "version.py").read_text(), namespace)
    assert f"## {namespace['__version__']}" in (ROOT / "CHANGELOG.md").read_text()
    assert "version = attr: hf_spp.version.__version__" in (ROOT / "setup.cfg").read_text()
