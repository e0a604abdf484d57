"""Copies of weights in which slices are contiguous, for readers of byte ranges on the Hub.

A slice keeps the first channels of every group. Where these are rows of a matrix they are one range of bytes; where
they are columns, as in the projections that read them, every row holds a piece. So those matrices are stored a second
time, beside the stock files, with the channels as rows: `spp_prefix/NAME.safetensors` has those of the weight file
NAME, and `spp_prefix/index.json` says which files they were made of.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import logging

from .. import checkpoint, hub
from ..architectures import channel_groups
from ..channels import ChannelMap
from ..config import check_format_version
from ..errors import CheckpointError, SubnetworkError
from ..loading import load_config, meta_model
from ..stored_names import StoredNames, stored_names
from ..sums import renew_sums
from ..tensor_bytes import open_tensors, pieces_of, read_tensor, write_tensors
from ..tensor_files import StoredTensor, pack_header, read_weights

logger = logging.get_logger(__name__)

PREFIX_FOLDER = "spp_prefix"
PREFIX_INDEX = f"{PREFIX_FOLDER}/index.json"
FORMAT_VERSION = 1
# The axes that slices are cut along. Rows inside heads and the residual stream would need copies of nearly all weights.
_AXES = ("ffn", "heads")


@dataclass(frozen=True)
class Copies:
    """The copies that were made of one weight file.

    Attributes:
        source: The weight file's name.
        sha256: Its SHA-256 when they were made.
        own: The SHA-256 of the file of copies.
        dims: Which dimension of each tensor lies first in its copy.
    """

    source: str
    sha256: str
    own: str
    dims: Mapping[str, int]

    def is_intact(self, file: Any, repo: str) -> bool:
        """Whether a file on the Hub is the one that the index names; says so where it is not."""
        if isinstance(file, hub.RemoteFile) and file.sha256 != self.own:
            _warn(f"{file.name} of {repo} is not the file that {PREFIX_INDEX} names")
            return False
        return True

    def check(self, name: str, copy: StoredTensor, tensor: StoredTensor | None) -> None:
        """Refuse a copy that cannot be one of a tensor.

        Raises:
            CheckpointError: It has another shape or type, or there is no such tensor.
        """
        dim = self.dims.get(name, 0)
        if tensor is None or not 0 < dim < len(tensor.shape):
            raise CheckpointError(f"{PREFIX_INDEX} has a copy of {name}, which the weights do not. {_AGAIN}")
        moved = (tensor.shape[dim], *tensor.shape[:dim], *tensor.shape[dim + 1 :])
        if (copy.shape, copy.dtype) != (moved, tensor.dtype):
            raise CheckpointError(
                f"The copy of {name} in {PREFIX_FOLDER} is {copy.dtype} {list(copy.shape)}, and {list(moved)} in "
                f"{tensor.dtype} is needed. {_AGAIN}"
            )


_AGAIN = "Write the prefix layout again, or remove its folder."


def write_prefix_layout(folder: str | os.PathLike[str]) -> Path:
    """Write copies of those weights of a checkpoint whose slices are not contiguous, beside its weight files.

    They take about a third of the space of the weights. Weights stay as they are; write the copies again when those
    change. Copies of other weights are found out by their SHA-256 sums and not used.

    Args:
        folder: A checkpoint's folder.

    Returns:
        The path of the index, written last.

    Raises:
        CheckpointError: The checkpoint is damaged, or the folder cannot be written.
        SubnetworkError: No tensor needs a copy.
        UnsupportedModelError: transformers converts the weights in an unknown way.
    """
    folder = Path(folder)
    stored, model = read_weights(folder), meta_model(load_config(folder))
    names = stored_names(model, {name: tensor.shape for name, tensor in stored.tensors.items()})
    dims = _strided(channel_groups(model), names)
    if not dims:
        raise SubnetworkError(
            f"{type(model).__name__} has no weights whose slices need a copy. Accepted: models with feed-forward "
            "layers or heads that can be cut. Leave the layout out."
        )
    checkpoint.remove_file(folder / PREFIX_INDEX)
    entries = {}
    for file, header in stored.headers.items():
        chosen = [tensor for name, tensor in header.tensors.items() if name in dims]
        if chosen:
            own = {tensor.name: dims[tensor.name] for tensor in chosen}
            entries[file] = {
                "sha256": checkpoint.sha256_of(folder / file),
                "copies": _write_copies(folder / file, folder / PREFIX_FOLDER / file, chosen, own),
                "dims": own,
            }
    path = checkpoint.write_json(folder / PREFIX_INDEX, {"format_version": FORMAT_VERSION, "files": entries})
    renew_sums(folder, [PREFIX_INDEX, *(f"{PREFIX_FOLDER}/{file}" for file in entries)])
    return path


def usable_copies(folder: Path, files: Mapping[str, hub.RemoteFile]) -> dict[str, Copies]:
    """The copies of a repository that belong to its weights, by the path of their file.

    Those of other weights are left out with a warning.

    Args:
        folder: Where the index lies, if there is one.
        files: The weight files that are read from the Hub, by name.

    Raises:
        CheckpointError: The index is damaged, or from a newer version.
    """
    if not files or not (folder / PREFIX_INDEX).is_file():
        return {}
    found = {}
    for copies in _read_index(checkpoint.read_json(folder / PREFIX_INDEX)):
        if copies.source in files and files[copies.source].sha256 == copies.sha256:
            found[f"{PREFIX_FOLDER}/{copies.source}"] = copies
        elif copies.source in files:
            _warn(f"The copies in {PREFIX_FOLDER} were made of another {copies.source}")
    return found


def _warn(what: str) -> None:
    logger.warning(f"{what}, so they are not used, and more bytes are read. Push the checkpoint with its layout again.")


def _strided(groups: ChannelMap, names: StoredNames) -> dict[str, int]:
    """Stored tensors whose channels do not lie in their first dimension, and in which they do."""
    found: dict[str, int] = {}
    for group in groups:
        for member in group.members if group.axis in _AXES else ():
            if names.shared.get(member.tensor, member.tensor) in names.missing:
                continue
            for piece in names.layout(member.tensor).pieces.values():
                dims = piece.axes[member.dim].dims
                if len(dims) == 1 and dims[0] > 0:
                    found.setdefault(piece.source, dims[0])
    return found


def _write_copies(source: Path, target: Path, tensors: Sequence[StoredTensor], dims: Mapping[str, int]) -> str:
    moved = []
    for one in tensors:
        dim = dims[one.name]
        shape = (one.shape[dim], *one.shape[:dim], *one.shape[dim + 1 :])
        moved.append(StoredTensor(one.name, one.dtype, shape, one.start, one.stop))

    def data() -> Iterator[memoryview]:
        with open_tensors(source) as file:
            for one in tensors:
                yield from pieces_of(read_tensor(file, one, raw=True).movedim(dims[one.name], 0).contiguous())

    target.parent.mkdir(parents=True, exist_ok=True)
    return write_tensors(target, pack_header(moved, {"format": "pt"}), data())


def _read_index(value: Any) -> list[Copies]:
    if not isinstance(value, dict):
        raise CheckpointError(f"{PREFIX_INDEX} holds no JSON object. {_AGAIN}")
    check_format_version(value.get("format_version"), PREFIX_INDEX)
    files = value.get("files")
    found = []
    for source, entry in files.items() if isinstance(files, dict) else ():
        entry = entry if isinstance(entry, dict) else {}
        sums, dims = (entry.get("sha256"), entry.get("copies")), entry.get("dims")
        if not isinstance(dims, dict) or not all(isinstance(one, str) for one in sums):
            raise CheckpointError(f"{PREFIX_INDEX} is damaged at {source!r}. {_AGAIN}")
        if not all(type(dim) is int for dim in dims.values()):
            raise CheckpointError(f"{PREFIX_INDEX} is damaged at the dimensions of {source!r}. {_AGAIN}")
        found.append(Copies(source, str(sums[0]), str(sums[1]), dims))
    if not found:
        raise CheckpointError(f"{PREFIX_INDEX} names no files. {_AGAIN}")
    return found
