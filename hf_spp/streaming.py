"""Reorder a checkpoint that is larger than memory: its files are read and written tensor by tensor, never loaded."""

import dataclasses
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import FileIO
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from . import checkpoint, folders
from .apply import gather_tensors, named_tensors
from .architectures import channel_groups
from .channels import ChannelMap
from .config import WEIGHT_METRICS, SPPConfig
from .conversion import complete_checkpoint
from .errors import CalibrationError, CheckpointError, SPPConfigError, SPPError
from .hub import find_files, resolve_file
from .layouts import Layout, Positions, Read
from .loading import COMPANIONS, load_config, meta_model, refuse_quantized, warn_names
from .orders_file import ORDERS_NAME
from .permutation import compose_orders, gather_indices, invert_orders, salient_order, scores_before
from .reordering import Reordering
from .saliency import check_finite, has_large_entries, weight_scores
from .stored_names import Gather, StoredNames, stored_names
from .sums import SUMS_NAME
from .tensor_files import (
    INDEX_NAME,
    WEIGHTS_NAME,
    StoredTensor,
    StoredWeights,
    advise,
    copy_pieces,
    open_tensors,
    pack_header,
    parse_index,
    pieces_of,
    read_tensor,
    read_weights,
    return_large_memory,
    write_tensors,
)
from .transform import Plan, describe, select
from .version import __version__

Progress = Callable[[int, int], None]

# Weights in other forms, which would stay in the old order, what belongs to a training run, and what is written anew.
_LEFT_OUT = (
    *("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.h5"),
    *("*.msgpack", "*.onnx", "*.onnx_data", "*.gguf", "*.ot", "*.pkl", "*.npz", "*.tflite"),
    *("trainer_state.json", "adapter_config.json", "spp_config.json", "README.md", SUMS_NAME, "saliency.png"),
)
# What is fetched from the Hub besides weights.
_FETCHED = (*COMPANIONS, "*.json", "*.txt", "*.jinja")
_MANIFEST = "manifest.json"


def reorder_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    config: SPPConfig | None = None,
    *,
    reordering: Reordering | str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Reordering:
    """Write a reordered copy of a checkpoint of any size, which is never loaded.

    Every tensor of the result is, bit for bit, what `apply_spp` and saving would have made of it. Shards, names, dtypes
    and metadata stay as they are, and other files are copied; weights that the model's class does not use are left out,
    as are weights in other formats. Of the weights one tensor is in memory at a time. An earlier reordering of the
    source is undone.

    The model is not run, so the equal function is not proved: the result's `proof` is None, and the card says so.

    The work lies beside the target, in a hidden folder, until it is whole. If the process was killed, the same call
    goes on: shards that are finished are compared with their sums and kept. If source or settings have changed
    meanwhile, it begins anew.

    Args:
        source: A folder or a Hub id.
        target: Folder to make.
        config: What to reorder and how; None means `SPPConfig()`, by `l1`. Metrics that need calibration data are not
            possible here.
        reordering: Orders to apply instead, of any metric, for the source in its original order: a reordering or a
            folder or Hub id that holds one.
        overwrite: Whether a folder with content may be replaced.
        progress: Called now and then with the bytes that were read or written, and with those there will be.

    Returns:
        The reordering, without a proof.

    Raises:
        CheckpointError: Source files are damaged, or the target may not be replaced or cannot be written.
        UnsupportedModelError: The checkpoint is quantized, or is converted while loading in a way that is not known.
        CalibrationError: The metric needs more than weights.
        IllegalAxisError: A configured axis may not move in this model.
        NonFiniteWeightsError: A weight is NaN or infinite.
        OrdersError: The given orders do not fit the model.
    """
    config = _checked_settings(config, reordering)
    place = Path(os.path.realpath(target))
    folders.check_replaceable(place, overwrite=overwrite)
    return_large_memory()
    if reordering is not None and not isinstance(reordering, Reordering):
        reordering = Reordering.from_pretrained(reordering)
    origin = _open(source)
    with _work_folder(place) as work, ExitStack() as stack:
        files = _Files(origin, stack, progress)
        job = _Job(work, _fingerprint(origin, config, reordering))
        done = job.resume()
        if done is None:
            done = job.begin(_decide(files, config) if reordering is None else _given(origin, reordering))
        indices = _moves(origin, done)
        files.scored = _scored(origin, done, given=reordering is not None)
        for name in origin.stored:
            origin.names.gather(name, indices)  # refuses now what cannot be carried over
        sums = job.write(files, done, indices)
        complete_checkpoint(job.built, done, beside=origin.beside, source=source, sums=sums)
        folders.place_folder(job.built, place)
    return done


@dataclass(frozen=True)
class _Origin:
    """A checkpoint on this machine that is to be reordered.

    Attributes:
        folder: Its folder.
        weights: What its files of weights hold.
        model: Its model, without values.
        names: How stored tensors and the model's relate.
        beside: Other files to copy, by path inside the folder.
        earlier: The reordering that it has gone through, None if it is in its original order.
    """

    folder: Path
    weights: StoredWeights
    model: PreTrainedModel
    names: StoredNames
    beside: Mapping[str, Path]
    earlier: Reordering | None

    @property
    def stored(self) -> dict[str, StoredTensor]:
        """The tensors that the result has."""
        unused = set(self.names.unused)
        return {name: one for name, one in self.weights.tensors.items() if name not in unused}

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Shapes of the model's tensors."""
        return {name: tensor.shape for name, tensor in named_tensors(self.model).items()}


def _checked_settings(config: SPPConfig | None, reordering: Any) -> SPPConfig:
    if config is not None and reordering is not None:
        raise SPPConfigError(
            "reorder_checkpoint got a config and a reordering, which has orders already. Accepted: one of them. Leave "
            "one out."
        )
    config = SPPConfig() if config is None else config
    if not isinstance(config, SPPConfig):
        raise SPPConfigError(f"config is {config!r}; an SPPConfig is needed. Give SPPConfig(metric='l1', …).")
    if config.needs_calibration or callable(config.metric):
        raise CalibrationError(
            f"Metric {config.metric_name!r} needs the model in memory, and this checkpoint is not loaded. Accepted: "
            f"{', '.join(WEIGHT_METRICS)}, or orders that were made elsewhere, with reordering=…."
        )
    return config


def _open(source: str | os.PathLike[str]) -> _Origin:
    """Find a checkpoint's files and what they hold; of a Hub id they are downloaded."""
    config = load_config(source)
    refuse_quantized(config, source)
    folder = Path(source).expanduser()
    if not folder.is_dir():
        found = find_files(source, (*_FETCHED, WEIGHTS_NAME, INDEX_NAME))
        if WEIGHTS_NAME not in found and INDEX_NAME in found:
            shards, _ = parse_index(checkpoint.read_json(found[INDEX_NAME]), f"{INDEX_NAME} of {source}")
            find_files(source, tuple(dict.fromkeys(shards.values())))
        folder = resolve_file(source, "config.json").parent
    weights = read_weights(folder)
    model = meta_model(config)
    names = stored_names(model, {name: one.shape for name, one in weights.tensors.items()})
    kept, left_out = _other_files(folder, weights)
    cls = type(model).__name__
    warn_names(names.unused, f"weights of {os.fspath(source)} are not used by {cls} and left out")
    warn_names(names.missing, f"weights of {cls} are not in {os.fspath(source)}, nor in what is made of it")
    warn_names(
        left_out, f"files of {os.fspath(source)} hold weights in another form or a training run, and stay behind"
    )
    earlier = Reordering.from_pretrained(folder) if (folder / ORDERS_NAME).is_file() else None
    return _Origin(folder, weights, model, names, kept, earlier)


def _other_files(folder: Path, weights: StoredWeights) -> tuple[dict[str, Path], list[str]]:
    """Files beside the weights that are copied, and those that are not, by path inside the folder."""
    kept: dict[str, Path] = {}
    left_out = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if not path.is_file() or any(part.startswith(".") for part in name.parts):
            continue
        if name.parts[0].startswith("checkpoint-") or any(path.match(pattern) for pattern in _LEFT_OUT):
            if name.as_posix() not in (*weights.headers, INDEX_NAME, ORDERS_NAME) and path.suffix not in (
                ".md",
                ".png",
            ):
                left_out.append(name.as_posix())
        else:
            kept[name.as_posix()] = path
    return kept, [name for name in left_out if name not in ("spp_config.json", SUMS_NAME)]


class _Files:
    """The stored tensors of a checkpoint, read one at a time, and account of how far that has come.

    Args:
        origin: The checkpoint.
        stack: Closes the files.
        progress: Called with bytes done and bytes in all.
    """

    def __init__(self, origin: _Origin, stack: ExitStack, progress: Progress | None) -> None:
        self.origin, self.tensors, self.homes = origin, origin.weights.tensors, origin.weights.files
        self.scored: Collection[str] = ()
        self._stack, self._progress = stack, progress
        self._open: dict[str, FileIO] = {}
        # Memory that is used again and again spares the system the making of new pages, which costs as much as reading.
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._done, self._total = 0, sum(one.nbytes for one in origin.stored.values())

    def expect(self, more: int) -> None:
        """Note that more bytes than those of the result will be gone through."""
        self._total += more
        self.advance(0)

    def advance(self, count: int) -> None:
        """Note that bytes are done."""
        self._done += count
        if self._progress is not None:
            self._progress(self._done, self._total)

    def file(self, tensor: str) -> FileIO:
        """The open file that holds a tensor."""
        name = self.homes[tensor]
        if name not in self._open:
            self._open[name] = self._stack.enter_context(open_tensors(self.origin.folder / name))
        return self._open[name]

    def announce(self, tensor: str) -> None:
        """Let the system fetch a tensor's bytes while something else is computed."""
        one = self.tensors[tensor]
        advise(self.file(tensor).fileno(), one.start, one.nbytes, "WILLNEED")

    def read(self, name: str, *, rows: range | None = None, raw: bool = False) -> Tensor:
        """A stored tensor, or some rows of it; valid until the next is read."""
        tensor = self.tensors[name]
        if self._memory.numel() < tensor.nbytes:
            self._memory = torch.empty(0, dtype=torch.uint8)
            self._memory = torch.empty(tensor.nbytes, dtype=torch.uint8)
        return read_tensor(self.file(name), tensor, rows=rows, raw=raw, memory=self._memory)

    def live(self, layout: Layout, dims: Mapping[int, Positions]) -> Tensor:
        """A tensor of the model, or a block of it, put together from stored ones; valid until the next is read."""
        reads = layout.reads(dims)
        if len(reads) == 1:
            return self._block(reads[0])
        whole: Tensor | None = None
        for read in reads:
            values = self._block(read)
            if whole is None:
                shape = [len(dims.get(dim, range(size))) for dim, size in enumerate(layout.shape)]
                whole = torch.empty(shape, dtype=values.dtype)
            target = whole
            for dim, places in enumerate(read.places):
                target = target.narrow(dim, int(places[0]), len(places))
            target.copy_(values)
        return cast(Tensor, whole)

    def _block(self, read: Read) -> Tensor:
        index = dict(read.index)
        rows = index.pop(0, None)
        contiguous = isinstance(rows, range) and rows.step == 1
        values = self.read(read.source, rows=cast(range, rows) if contiguous else None)
        self.advance(values.numel() * values.element_size())
        if rows is not None and not contiguous:
            index[0] = rows
        for dim, positions in index.items():
            values = values.index_select(dim, torch.as_tensor(positions))
        order = [dim for dims in read.dims for dim in dims]
        return values.permute(order).reshape([len(places) for places in read.places]).contiguous()

    def new(self, names: Sequence[str], indices: Mapping[str, Mapping[int, Tensor]]) -> Iterator[memoryview]:
        """The bytes of stored tensors in the new order, one after another.

        Raises:
            NonFiniteWeightsError: One holds NaN or infinity, and was not found to be finite before.
        """
        for name, after in zip_longest(names, names[1:]):
            yield from self._gathered(name, self.origin.names.gather(name, indices), after)

    def _gathered(self, name: str, gather: Gather, after: str | None) -> Iterator[memoryview]:
        source = self.tensors[gather.source]
        unchecked = name not in self.scored and source.dtype in ("F64", "F32", "F16", "BF16")
        if gather.dims or unchecked:
            values = self.read(gather.source, raw=True)
            if unchecked:
                check_finite({name: values.view(source.torch_dtype)})
            gather_tensors({name: values}, {name: gather.dims})
            pieces = pieces_of(values)
        else:
            pieces = copy_pieces(self.file(gather.source), source)
        if after is not None:
            self.announce(after)
        for piece in pieces:
            yield piece
            self.advance(len(piece))


class _LiveTensors(Mapping[str, Any]):
    """The model's tensors by name, read from files when they are asked for; large stacks entry by entry.

    Args:
        files: The files.
        order: The names in the order in which they will be asked for.
    """

    def __init__(self, files: _Files, order: Sequence[str]) -> None:
        self._files, self._names = files, files.origin.names
        self._next = dict(pairwise(order))

    def __getitem__(self, name: str) -> Any:
        layout = self._names.layout(name)
        size = self._files.tensors[layout.sources[0]].itemsize
        stack = _Stack(self._files, layout, size)
        if has_large_entries(stack):
            return stack
        values = self._files.live(layout, {})
        if name in self._next:
            self._files.announce(self._names.layout(self._next[name]).sources[0])
        return values

    def __iter__(self) -> Iterator[str]:
        return iter(self._names.layouts)

    def __len__(self) -> int:
        return len(self._names.layouts)


@dataclass(frozen=True)
class _Stack:
    """A tensor of the model of which one entry of the first dimension is read at a time."""

    files: _Files
    layout: Layout
    itemsize: int

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.layout.shape)

    def element_size(self) -> int:
        return self.itemsize

    def __iter__(self) -> Iterator[Tensor]:
        return (self.files.live(self.layout, {0: range(at, at + 1)})[0] for at in range(self.layout.shape[0]))


def _decide(files: _Files, config: SPPConfig) -> Reordering:
    """Score the channels of a checkpoint and order them."""
    origin = files.origin
    groups, config = select(origin.model, config)
    metric = cast(str, config.metric)
    read = list(dict.fromkeys(member.tensor for group in groups for member in group.scored_members))
    if metric != "random":
        files.expect(sum(origin.stored[one].nbytes for name in read for one in origin.names.layout(name).sources))
    scores = weight_scores(groups, _LiveTensors(files, read), metric, config.seed)
    if origin.earlier is not None and metric != "random":
        scores = scores_before(groups, origin.earlier.orders, scores)
    orders = {name: salient_order(values) for name, values in scores.items()}
    planned = Plan(groups, dataclasses.replace(config, verify=False), scores, orders)
    return describe(origin.model, planned, _dtype(origin))


def _given(origin: _Origin, reordering: Reordering) -> Reordering:
    """Given orders, for the record of this checkpoint."""
    reordering.indices(origin.model)  # refuses orders that do not fit
    groups = [group for group in channel_groups(origin.model) if group.name in reordering.orders]
    config = dataclasses.replace(reordering.config, verify=False)
    planned = Plan(ChannelMap(tuple(groups), reordering.refused), config, reordering.scores, reordering.orders)
    return describe(origin.model, planned, _dtype(origin))


def _moves(origin: _Origin, reordering: Reordering) -> dict[str, dict[int, Tensor]]:
    """The gather of the model's tensors that brings the source, as it lies in its files, into the new order."""
    groups, orders = channel_groups(origin.model), reordering.orders
    if origin.earlier is not None:
        origin.earlier.indices(origin.model)  # refuses orders that do not fit
        orders = compose_orders(groups, invert_orders(groups, origin.earlier.orders), orders)
    return gather_indices(groups, orders, origin.shapes)


def _scored(origin: _Origin, reordering: Reordering, *, given: bool) -> Collection[str]:
    """The stored tensors whose values need no check: those that a norm has read, or all where orders were given."""
    if given:
        return set(origin.stored)
    if reordering.config.metric == "random":
        return ()
    read = {member.tensor for group in reordering.groups for member in group.scored_members}
    return {source for name in read for source in origin.names.layout(name).sources}


def _dtype(origin: _Origin) -> torch.dtype:
    """The dtype of the weights: of the first parameter that files hold."""
    held = next(name for name, _ in origin.model.named_parameters() if name not in origin.names.missing)
    return origin.weights.tensors[origin.names.layout(held).sources[0]].torch_dtype


def _fingerprint(origin: _Origin, config: SPPConfig, reordering: Reordering | None) -> str:
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


class _Job:
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

    def write(self, files: _Files, decided: Reordering, indices: Mapping[str, Mapping[int, Tensor]]) -> dict[str, str]:
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

    def _write_index(self, origin: _Origin) -> None:
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
def _work_folder(target: Path) -> Iterator[Path]:
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
