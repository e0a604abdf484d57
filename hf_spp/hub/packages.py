"""Wheels and Debian packages, by the clients that this machine is set up with."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import unquote

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from transformers.utils import logging

from .. import checkpoint
from ..errors import AssetError

logger = logging.get_logger(__name__)

_POLL_SECONDS = 0.1
_NETWORK_FAILURE = re.compile(
    r"NewConnectionError|NameResolutionError|ConnectionError|ConnectTimeout|ReadTimeout|ProxyError|SSLError"
    r"|Failed to establish|Temporary failure|Could not (resolve|connect)|Network is unreachable|Connection (refused|"
    r"failed|reset)|timed out",
    re.IGNORECASE,
)


def download_wheel(
    name: str, version: str, sha256: str, folder: str | os.PathLike[str], *, size: int | None = None
) -> Path:
    """Download one wheel with this Python's pip, and verify it. Nothing is installed.

    The package index, proxies and certificates are those that pip is configured for.

    Args:
        name: Name of the package.
        version: Exact version.
        sha256: Expected SHA-256 of the wheel, hexadecimal.
        folder: Where the wheel goes; made if absent. It holds the whole file or none.
        size: Expected bytes, for the progress bar.

    Returns:
        Path of the wheel in `folder`.

    Raises:
        AssetError: pip is missing, the network or the package is not there, or the checksum is wrong.
    """
    wanted = f"wheel {name}=={version}"
    if importlib.util.find_spec("pip") is None:
        raise AssetError(
            f"The {wanted} cannot be downloaded: the Python at '{sys.executable}' has no pip module. {_by_hand(folder)}"
            "Run `python -m ensurepip` (or `uv pip install pip`) in this environment."
        )
    # Any of these wheels is only unpacked, so the Python version it asks for does not matter.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--ignore-requires-python"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--no-input", "--progress-bar=off", "--dest=."]
    return _download([*command, f"{name}=={version}"], "*.whl", wanted, sha256, Path(folder), size, _explain_pip)


def download_debian_package(
    name: str, version: str, sha256: str, folder: str | os.PathLike[str], *, size: int | None = None
) -> Path:
    """Download one Debian package with `apt-get download`, and verify it. Needs no root, installs nothing.

    Args:
        name: Name of the package.
        version: Exact version, as `apt-cache policy` prints it.
        sha256: Expected SHA-256 of the `.deb` file, hexadecimal.
        folder: Where the file goes; made if absent. It holds the whole file or none.
        size: Expected bytes, for the progress bar.

    Returns:
        Path of the file in `folder`, under the name without percent encoding.

    Raises:
        AssetError: apt-get is missing, has no package lists, cannot reach the network, or the checksum is wrong.
    """
    wanted = f"Debian package {name}={version}"
    if shutil.which("apt-get") is None:
        raise AssetError(
            f"The {wanted} cannot be downloaded: this machine has no apt-get. {_by_hand(folder)}"
            "Download it on a Debian or Ubuntu machine and copy it there."
        )
    return _download(
        ["apt-get", "download", f"{name}={version}"], "*.deb", wanted, sha256, Path(folder), size, _explain_apt
    )


def verify_checksum(path: Path, sha256: str) -> None:
    """Compare a file's SHA-256 with the pinned one; remove the file if they differ.

    Args:
        path: File to read.
        sha256: Expected digest, hexadecimal.

    Raises:
        AssetError: The digests differ. The file is gone.
    """
    found = checkpoint.sha256_of(path)
    if found == sha256:
        return
    path.unlink()
    raise AssetError(
        f"File '{path}' has the wrong checksum: SHA-256 {found}. Accepted: {sha256}. The file was "
        "removed; run the command again, and if this repeats, the package index serves another file under this name."
    )


def _by_hand(folder: str | os.PathLike[str]) -> str:
    return f"Accepted: that file in '{os.fspath(folder)}', downloaded or copied there by hand. "


def _download(
    command: Sequence[str],
    pattern: str,
    wanted: str,
    sha256: str,
    folder: Path,
    size: int | None,
    explain: Callable[[str], str],
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as scratch:
        status, output = _run(command, Path(scratch), wanted, size)
        found = sorted(Path(scratch).glob(pattern))
        if status or len(found) != 1:
            last = next((line for line in reversed(output.splitlines()) if line.strip()), "no output")
            raise AssetError(
                f"The {wanted} could not be downloaded: {explain(output)} {_by_hand(folder)}The last line of "
                f"`{' '.join(command)}` (status {status}) was: {last.strip()}"
            )
        verify_checksum(found[0], sha256)
        target = folder / unquote(found[0].name)
        os.replace(found[0], target)
    return target


def _explain_pip(output: str) -> str:
    if _NETWORK_FAILURE.search(output):
        return "pip cannot reach its package index. Connect this machine, or set pip's proxy or index."
    if "No matching distribution" in output:
        return "pip's package index does not offer this version. Point pip to an index that does."
    return "pip failed. Run its command by hand to see why."


def _explain_apt(output: str) -> str:
    if "Unable to locate package" in output or "No packages found" in output:
        return "apt-get has no package lists, or none that name it. Run `apt-get update` as root."
    if re.search(r"Version .* was not found|Can't find a source|404 +Not Found", output):
        return "apt-get's package lists offer another version. Run `apt-get update` as root."
    if _NETWORK_FAILURE.search(output) or "Failed to fetch" in output:
        return "apt-get cannot reach its mirror. Connect this machine, or set apt's proxy."
    return "apt-get failed. Run its command by hand to see why."


def _run(command: Sequence[str], scratch: Path, wanted: str, size: int | None) -> tuple[int, str]:
    # pip downloads into the temporary directory first: inside `scratch` its size can be watched, and nothing is left.
    # Messages are read above, so they must be English.
    environment = {**os.environ, "LC_ALL": "C", **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch.resolve()))}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            command, cwd=scratch, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            if sys.stderr.isatty():
                _watch(process, scratch, command[-1], size)
            else:
                logger.info("Downloading the %s", wanted)
            status = process.wait()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        log.seek(0)
        return status, log.read()


def _watch(process: subprocess.Popen[bytes], scratch: Path, title: str, size: int | None) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title.partition("=")[0], total=size)
        while process.poll() is None:
            progress.update(task, completed=min(_bytes_in(scratch), size or sys.maxsize))
            time.sleep(_POLL_SECONDS)
        if process.returncode == 0:
            progress.update(task, completed=size or _bytes_in(scratch))


def _bytes_in(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(root, name)).st_size
            except FileNotFoundError:  # the client moves its files while they are counted
                continue
    return total
