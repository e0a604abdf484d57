"""The weight files of a checkpoint, opened in a folder or on the Hub without reading their values."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from .. import checkpoint, hub
from ..byte_ranges import Range
from ..errors import CheckpointError
from ..sums import SUMS_NAME, read_sums
from ..tensor_files import (
    INDEX_NAME,
    WEIGHTS_NAME,
    Header,
    check_index,
    header_length,
    parse_header,
    parse_index,
    read_header,
    read_weights,
)
from .prefix_layout import Copies, usable_copies
from .reading import LocalFile, Place, WeightFile, Weights


def open_folder(folder: Path) -> Weights:
    """The weight files of a folder.

    Raises:
        CheckpointError: There are none, or they are damaged.
    """
    stored = read_weights(folder)
    places = {
        name: [Place(LocalFile(folder / file), tensor)]
        for file, header in stored.headers.items()
        for name, tensor in header.tensors.items()
    }
    return Weights(places, [(folder / file).stat().st_size for file in stored.headers])


def open_repository(
    repo: str, folder: Path, token: str | bool | None = None, *, request_bytes: int = hub.REQUEST_BYTES
) -> Weights:
    """The weight files of a Hub repository at one commit, with copies in which other slices are contiguous.

    Files that were downloaded whole before are read from the cache, and their copies are not needed.

    Args:
        repo: Its id.
        folder: The commit's snapshot in the cache, which holds the index of shards and that of copies.
        token: As for `hub.resolve_file`.
        request_bytes: What a request costs, in bytes.

    Raises:
        CheckpointError: The files are damaged, or disagree.
        HubError: They cannot be read.
    """
    commit = folder.name
    names, index = weight_names(repo, folder, token)
    files = dict(zip(names, map(_opened, hub.open_files(repo, names, commit, token)), strict=True))
    _check_identity(files, folder, repo)
    copies = usable_copies(folder, {name: file for name, file in files.items() if isinstance(file, hub.RemoteFile)})
    copied = dict(zip(copies, map(_opened, hub.open_files(repo, list(copies), commit, token)), strict=True))
    copied = {name: file for name, file in copied.items() if copies[name].is_intact(file, repo)}
    headers, opened = _read_headers({**files, **copied}, repo, request_bytes)
    if index is not None:
        check_index(index, {name: headers[name] for name in files}, INDEX_NAME)
    places = {
        tensor.name: [Place(file, tensor)] for name, file in files.items() for tensor in headers[name].tensors.values()
    }
    for name, file in copied.items():
        _add_copies(places, file, headers[name], copies[name])
    sizes = [file.size if isinstance(file, hub.RemoteFile) else file.path.stat().st_size for file in files.values()]
    return Weights(places, sizes, request_bytes, opened)


def weight_names(
    repo: str, folder: Path, token: str | bool | None = None
) -> tuple[list[str], Mapping[str, str] | None]:
    """Names of a repository's weight files, and where it is sharded which of them holds each tensor.

    One file wins over shards, as in transformers.

    Args:
        repo: Its id.
        folder: The commit's snapshot in the cache, which holds the index of shards.
        token: As for `hub.resolve_file`.

    Raises:
        CheckpointError: The index is damaged.
        HubError: The repository cannot be read.
    """
    if not (folder / INDEX_NAME).is_file() or hub.has_file(repo, WEIGHTS_NAME, folder.name, token):
        return [WEIGHTS_NAME], None
    index, _ = parse_index(checkpoint.read_json(folder / INDEX_NAME), INDEX_NAME)
    return list(dict.fromkeys(index.values())), index


def _check_identity(files: Mapping[str, WeightFile], folder: Path, repo: str) -> None:
    """Refuse weight files that the Hub knows by other sums than the checkpoint's own list."""
    sums = read_sums(folder / SUMS_NAME) if (folder / SUMS_NAME).is_file() else {}
    for name, file in files.items():
        if isinstance(file, hub.RemoteFile) and file.sha256 != sums.get(name, file.sha256) and file.sha256 is not None:
            raise CheckpointError(
                f"{name} of {repo!r} is not the file that its {SUMS_NAME} names, so the repository is mixed from two "
                "checkpoints. Accepted: files as they were pushed together. Tell the author, or give an older revision."
            )


def _opened(file: Path | hub.RemoteFile) -> WeightFile:
    return LocalFile(file) if isinstance(file, Path) else file


def _read_headers(
    files: Mapping[str, WeightFile], repo: str, request_bytes: int
) -> tuple[dict[str, Header], dict[hub.RemoteFile, Sequence[Range]]]:
    """The headers of files, and which ranges of which were read for that."""
    remote = {name: file for name, file in files.items() if isinstance(file, hub.RemoteFile)}
    # What follows a header is often needed as well.
    opened: dict[hub.RemoteFile, Sequence[Range]] = {
        file: [(0, min(file.size, request_bytes))] for file in remote.values()
    }
    hub.fetch_ranges(opened, request_bytes=request_bytes)
    lengths = {name: header_length(_bytes_of(file, 8), file.size, f"{name} of {repo}") for name, file in remote.items()}
    opened = {file: [(0, max(opened[file][0][1], lengths[name]))] for name, file in remote.items()}
    hub.fetch_ranges(opened, request_bytes=request_bytes)
    headers = {}
    for name, file in files.items():
        if isinstance(file, LocalFile):
            headers[name] = read_header(file.path)
        else:
            headers[name] = parse_header(_bytes_of(file, lengths[name]), file.size, f"{name} of {repo}")
    return headers, opened


def _bytes_of(file: hub.RemoteFile, length: int) -> bytes:
    data = bytearray(min(length, file.size))
    file.read_into(0, memoryview(data))
    return bytes(data)


def _add_copies(places: dict[str, list[Place]], file: WeightFile, header: Header, copies: Copies) -> None:
    for name, tensor in header.tensors.items():
        copies.check(name, tensor, places[name][0].tensor if name in places else None)
        places[name].append(Place(file, tensor, copies.dims[name]))
