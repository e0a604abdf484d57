"""A reordering of files under way: what is finished lies beside the target, where another process can go on."""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from . import checkpoint, folders
from .config import SPPConfig
from .errors import CheckpointError, SPPError
from .orders_file import ORDERS_NAME
from .reordering import Reordering
from .stored_checkpoint import StoredCheckpoint
from .tensor_bytes import write_tensors
from .tensor_files import INDEX_NAME, pack_header
from .tensor_stream import TensorStream
from .version import __version__

_MANIFEST = "manifest.json"


def fingerprint_of(origin: StoredCheckpoint, config: SPPConfig, reordering: Reordering | None) -> str:
    """SHA-256 of all that the result depends on: files by size and time, settings, given orders, versions."""
    paths = [origin.folder / name for name in origin.weights.headers] + list(origin.beside.values())
    paths += [path for path in (origin.folder / INDEX_NAME, origin.folder / ORDERS_NAME) if path.is_file()]
    stamps = {str(path): [path.stat().st_size, path.stat().st_mtime_ns] for path in paths}
    known = {
        "files": stamps,
        "config": config.to_dict(),
        "orders": None if reordering is None else hashlib.sha256(reordering.to_bytes()).hexdigest(),
        "versions": [__version__, torch.__version__],
    }
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


class Job:
    """A reordering under way in a folder beside the target, which another process can go on with.

    Args:
        work: The folder.
        fingerprint: What the result depends on.
    """

    def __init__(self, work: Path, fingerprint: str) -> None:
        self.built, self._manifest, self._fingerprint = work / "checkpoint", work / _MANIFEST, fingerprint
        self._sums: dict[str, str] = {}

    def resume(self) -> Reordering | None:
        """What an earlier process had decided, None where there is nothing to go on with."""
        try:
            found = checkpoint.read_json(self._manifest)
            if found["fingerprint"] != self._fingerprint:
                return None
            decided = Reordering.from_pretrained(self.built)
            if found["orders"] != decided.digest:
                return None
            sums = {str(name): str(value) for name, value in found["sums"].items()}
        except (SPPError, KeyError, TypeError, AttributeError):
            return None
        self._sums = {
            name: value
            for name, value in sums.items()
            if (self.built / name).is_file() and checkpoint.sha256_of(self.built / name) == value
        }
        return self._start(decided)

    def begin(self, decided: Reordering) -> Reordering:
        """Note what was decided, in an empty folder."""
        self._sums = {}
        return self._start(decided)

    def _start(self, decided: Reordering) -> Reordering:
        """Leave what is known to be finished, and the orders, alone in the folder."""
        self.built.mkdir(exist_ok=True)
        for path in self.built.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in self._sums:
                path.unlink()
        decided.save_pretrained(self.built)
        self._note(decided)
        return decided

    def write(
        self, files: TensorStream, decided: Reordering, indices: Mapping[str, Mapping[int, Tensor]]
    ) -> dict[str, str]:
        """Write every file of weights that is not there, and the index; gives the sums of the files."""
        origin, stored = files.origin, files.origin.stored
        for file, header in origin.weights.headers.items():
            kept = [one for name, one in header.tensors.items() if name in stored]
            if file in self._sums:
                files.advance(sum(one.nbytes for one in kept))
            elif kept:
                data = files.new([one.name for one in kept], indices)
                self._sums[file] = write_tensors(self.built / file, pack_header(kept, header.metadata), data)
                self._note(decided)
        if origin.weights.metadata is not None:
            self._write_index(origin)
        return dict(self._sums)

    def _write_index(self, origin: StoredCheckpoint) -> None:
        metadata, stored = dict(origin.weights.metadata or {}), origin.stored
        if origin.names.unused:
            metadata["total_size"] = sum(one.nbytes for one in stored.values())
            metadata.pop("total_parameters", None)
        homes = {name: file for name, file in origin.weights.files.items() if name in stored}
        checkpoint.write_json(self.built / INDEX_NAME, {"metadata": metadata, "weight_map": homes})

    def _note(self, decided: Reordering) -> None:
        known = {"fingerprint": self._fingerprint, "orders": decided.digest, "sums": self._sums}
        checkpoint.write_json(self._manifest, known)


@contextmanager
def work_folder(target: Path) -> Iterator[Path]:
    """The folder of unfinished work for a target, held against other processes; removed when the block ends well."""
    work = target.parent / f".{target.name}.spp-stream"
    try:
        work.mkdir(parents=True, exist_ok=True)
        held = folders.lock(work)
    except OSError as error:
        raise CheckpointError(f"{work} cannot be written ({error}). Give a folder that is writable.") from error
    if held is None and sys.platform != "win32":
        raise CheckpointError(f"Another process is reordering a checkpoint into {target}. Wait for it, or stop it.")
    try:
        yield work
        shutil.rmtree(work, ignore_errors=True)
    except SPPError as error:
        # A full disk can be cleared, and the work goes on; what is refused stays refused.
        if not isinstance(error, CheckpointError):
            shutil.rmtree(work, ignore_errors=True)
        raise
    finally:
        if held is not None:
            os.close(held)
