"""Sub-networks from files: those that were saved alone, and published widths of a reordered checkpoint.

A published width is one small file beside the checkpoint, `spp_widths/NAME.safetensors`: how wide every group is, and
the projections that compensation refitted. All other weights are prefixes of the checkpoint's own.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import EntryNotFoundError
from torch import Tensor
from transformers.utils import logging

from .. import checkpoint, hub
from .._compat import keeps_own_names
from ..architectures import channel_groups
from ..byte_ranges import Range
from ..channels import ChannelMap
from ..config import CONFIG_NAME
from ..errors import CheckpointError, HubError, SubnetworkError, UnsupportedModelError
from ..loading import (
    check_dtype,
    check_folder,
    fill_model,
    load_config,
    load_model,
    meta_model,
    name_source,
    refuse_quantized,
)
from ..orders_file import ORDERS_NAME
from ..reordering import Reordering, remember
from ..stored_names import shared_names, stored_names
from ..sums import SUMS_NAME, check_sums, differing, renew_sums
from ..tensor_files import INDEX_NAME
from .costs import tensors_of
from .edits import Edits, find_edits
from .extraction import Cut, cut_out, piece_of, plan_cut, scale_queries, settle, warn_of_norms
from .prefix_layout import PREFIX_INDEX
from .reading import PartialTensor, ReadReport, WeightFile, Weights, fetch_parts, partial_tensors, plan_parts
from .record import RECORD_NAME, SubnetworkRecord, note_record, record_of
from .spec import SubnetworkSpec
from .weight_files import open_folder, open_repository, weight_names
from .widths import Kept, Widths

logger = logging.get_logger(__name__)

WIDTHS_FOLDER = "spp_widths"
_SMALL_FILES = (
    "config.json", "generation_config.json", INDEX_NAME, PREFIX_INDEX, ORDERS_NAME, CONFIG_NAME, RECORD_NAME,
    SUMS_NAME,
)  # fmt: skip
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def save_width(save_directory: str | os.PathLike[str], name: str, subnetwork: Any) -> Path:
    """Publish a width of a checkpoint: write what `load_subnetwork(save_directory, name)` needs beside it.

    Args:
        save_directory: The folder of the reordered checkpoint that the sub-network was cut from.
        name: What to call the width, such as `"0.5"`.
        subnetwork: What `extract_subnetwork` gave, not trained since.

    Returns:
        The path of the file: its size is that of the refitted projections, nothing without compensation.

    Raises:
        SubnetworkError: The name is no plain file name, or the model was not cut out of another.
    """
    record = record_of(subnetwork)
    if record is None:
        raise SubnetworkError(
            f"This {type(subnetwork).__name__} was not cut out of another model. Give what extract_subnetwork returned."
        )
    if not _NAME.fullmatch(name):
        raise SubnetworkError(f"{name!r} is no name for a width. Use letters, digits, dots and dashes, such as '0.5'.")
    tensors = {tensor: tensors_of(subnetwork)[tensor] for tensor in record.compensated}
    data = checkpoint.pack_tensors(tensors, {"subnetwork": json.dumps(record.to_dict(), sort_keys=True)})
    path = checkpoint.write_bytes(_path_of(Path(save_directory), name), data)
    renew_sums(save_directory, [path.relative_to(save_directory).as_posix()])
    return path


def published_widths(files: Iterable[str]) -> list[str]:
    """Names of the widths that are published among the files of a checkpoint."""
    return sorted(Path(name).stem for name in files if Path(name).match(f"{WIDTHS_FOLDER}/*.safetensors"))


def load_subnetwork(
    repo_or_dir: str | os.PathLike[str],
    width: str | float | SubnetworkSpec | None = None,
    *,
    dtype: str = "auto",
    revision: str | None = None,
    token: str | bool | None = None,
) -> Any:
    """Load a sub-network from a folder or a Hub repo, reading only the bytes that it needs.

    Of a reordered checkpoint only those parts of the weight files are read that the sub-network keeps: from a folder
    into memory for the sub-network, from the Hub by HTTP ranges at one commit, which are cached like downloads.
    `plan_read` says before what would be read.

    Parts cannot be compared with `SHA256SUMS`, whose sums are those of whole files: wrong bytes of the right length in
    a weight file are not noticed. What is checked: that the Hub names the weight files by the same sums, the length
    and place of every answer, headers, and whole small files (config, orders, widths).

    Args:
        repo_or_dir: What a sub-network's `save_pretrained` wrote, or a reordered checkpoint.
        width: What to cut out of a reordered checkpoint: the name of a published width, which comes with its
            compensation, a fraction of the neurons and heads of every layer, or a spec. None for a saved sub-network.
        dtype: `auto` keeps the checkpoint's; `float32`, `bfloat16`, `float16` or `float64`.
        revision: Branch, tag or commit of the repo. Not used for a folder.
        token: Hub token, `True` for the stored one, `False` for none.

    Returns:
        The sub-network, in evaluation mode.

    Raises:
        CheckpointError: A file is missing or damaged, or does not fit the model.
        SubnetworkError: There is no such width, or the spec does not fit the model.
        HubError: The repo cannot be reached.
    """
    check_dtype(dtype)
    source = _Source.of(repo_or_dir, revision, token)
    if (source.folder / RECORD_NAME).is_file():
        _refuse_width(repo_or_dir, width)
        return _load_saved(source, dtype)
    found = _Slice.of(source, width)
    try:
        planned = found.plan()
    except UnsupportedModelError as error:
        logger.warning(f"All weights of {source.name} are read, because parts of them cannot be: {error}")
        return found.cut_from_whole(dtype)
    logger.info(f"{source.name}: {planned.report}")
    return found.load(planned, dtype)


def plan_read(
    repo_or_dir: str | os.PathLike[str],
    width: str | float | SubnetworkSpec,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
) -> ReadReport:
    """What `load_subnetwork` would read of a reordered checkpoint now; only headers and small files are read for it.

    Args:
        repo_or_dir: A reordered checkpoint, a folder or a Hub repo.
        width: As for `load_subnetwork`.
        revision: As for `load_subnetwork`.
        token: As for `load_subnetwork`.

    Returns:
        Bytes of the slice, of what is read for it, and of all weight files.

    Raises:
        UnsupportedModelError: Parts of these weights cannot be read; `load_subnetwork` reads all of them.
        CheckpointError: A file is missing or damaged, or does not fit the model.
        SubnetworkError: There is no such width, or the spec does not fit the model.
        HubError: The repo cannot be reached.
    """
    source = _Source.of(repo_or_dir, revision, token)
    if (source.folder / RECORD_NAME).is_file():
        _refuse_width(repo_or_dir, width)
    return _Slice.of(source, width).plan().report


@dataclass(frozen=True)
class _Source:
    """A checkpoint: what a user calls it, and the folder that holds its small files.

    Of a Hub repository, that is the snapshot of one commit in the cache, without weights.
    """

    name: str
    folder: Path
    is_remote: bool
    token: str | bool | None

    @classmethod
    def of(cls, repo_or_dir: str | os.PathLike[str], revision: str | None, token: str | bool | None) -> "_Source":
        check_folder(repo_or_dir)
        name = os.fspath(repo_or_dir)
        if Path(name).is_dir():
            return cls(name, Path(name), False, token)
        commit = hub.resolve_commit(name, revision, token)
        found = hub.find_files(name, _SMALL_FILES, revision=commit, token=token)
        source = cls(name, found["config.json"].parent, True, token)
        source.check([file for file in found if file != SUMS_NAME])
        return source

    def check(self, names: Sequence[str]) -> None:
        """Compare files of a repository with its sums, if it has such; one that differs is downloaded once more."""
        if (self.folder / SUMS_NAME).is_file():
            for name in differing(self.folder, names):
                hub.download_again(self.name, self.folder.name, name, token=self.token)
            check_sums(self.folder, names)

    def weights(self) -> Weights:
        return open_repository(self.name, self.folder, self.token) if self.is_remote else open_folder(self.folder)

    def download_weights(self) -> None:
        """Bring the whole weights of a repository into the folder."""
        if self.is_remote:
            for name in weight_names(self.name, self.folder, self.token)[0]:
                hub.resolve_file(self.name, name, revision=self.folder.name, token=self.token)

    def published(self, width: str) -> Path:
        """The file of a published width."""
        name = f"{WIDTHS_FOLDER}/{width}.safetensors"
        if _NAME.fullmatch(width) and not self.is_remote and (self.folder / name).is_file():
            return self.folder / name
        if _NAME.fullmatch(width) and self.is_remote:
            try:
                path = hub.resolve_file(self.name, name, revision=self.folder.name, token=self.token)
                self.check([name])
                return path
            except HubError as error:
                if not isinstance(error.__cause__, EntryNotFoundError):
                    raise
        raise SubnetworkError(
            f"{self.name!r} has no width {width!r}. Published: {', '.join(self.widths()) or 'none'}. "
            "Give a fraction such as 0.5, or a SubnetworkSpec."
        )

    def widths(self) -> list[str]:
        """Names of the published widths."""
        names = hub.list_files(self.name if self.is_remote else self.folder, self.folder.name, self.token)
        return published_widths(names)


@dataclass(frozen=True)
class _Planned:
    """A slice whose parts are known, and nothing of it read."""

    cut: Cut
    weights: Weights
    parts: Mapping[str, PartialTensor]
    ranges: Mapping[WeightFile, Sequence[Range]]
    report: ReadReport
    unused: tuple[str, ...]


@dataclass(frozen=True)
class _Slice:
    """What is cut out of a checkpoint: the whole model without values, and what stays of it.

    `refitted` holds tensors of the slice that a published width brings along.
    """

    source: _Source
    model: Any
    groups: ChannelMap
    widths: Widths
    spec: SubnetworkSpec
    refitted: Mapping[str, Tensor]
    published: str | None

    @classmethod
    def of(cls, source: _Source, width: str | float | SubnetworkSpec | None) -> "_Slice":
        if width is None:
            names = source.widths()
            raise SubnetworkError(
                f"{source.name!r} is no sub-network: it holds no {RECORD_NAME}. Give a width: a fraction, a spec"
                f"{', or one of ' + ', '.join(names) if names else ''}."
            )
        config = load_config(source.folder)
        refuse_quantized(config, source.name)
        model = meta_model(config)
        if isinstance(width, str):
            return cls._published(source, model, source.published(width))
        if (source.folder / ORDERS_NAME).is_file():
            remember(model, (Reordering.from_pretrained(source.folder),))
        spec = width if isinstance(width, SubnetworkSpec) else SubnetworkSpec.uniform(model, width)
        groups, widths = settle(model, spec, False)
        return cls(source, model, groups, widths, spec, {}, None)

    @classmethod
    def _published(cls, source: _Source, model: Any, path: Path) -> "_Slice":
        name = f"{WIDTHS_FOLDER}/{path.name}"
        tensors, metadata = checkpoint.unpack_tensors(checkpoint.read_bytes(path), name)
        if "subnetwork" not in metadata:
            raise CheckpointError(f"{name} does not say how wide it is. Save it again.")
        stored = checkpoint.parse_json(metadata["subnetwork"], f"The record of {name}")
        record = SubnetworkRecord.from_dict(stored, name)
        groups = channel_groups(model)
        _check_widths(record, {group.name: group.size for group in groups}, name)
        for tensor in record.compensated:
            known = tensor in tensors and tensors[tensor].dtype in _DTYPES
            if not known or not bool(tensors[tensor].isfinite().all()):
                raise _does_not_fit(name, tensor)
        refitted = {tensor: tensors[tensor] for tensor in record.compensated}
        return cls(source, model, groups, record.widths, record.spec, refitted, name)

    def record(self, reason: str | None) -> SubnetworkRecord:
        names = tuple(self.refitted)
        return SubnetworkRecord(self.spec, self.widths, type(self.model).__name__, reason, names)

    def plan(self) -> _Planned:
        """Find out which parts of the weight files make the slice."""
        cut, weights = plan_cut(self.model, self.groups, self.widths), self.source.weights()
        self._check_refitted(cut.kept)
        names = stored_names(self.model, weights.shapes)
        parts = {
            name: part
            for name, part in partial_tensors(weights, names, cut.kept).items()
            if names.shared.get(name, name) not in self.refitted
        }
        if not keeps_own_names(self.model, parts):
            raise UnsupportedModelError(
                f"transformers takes names of {type(self.model).__name__} in memory for names of files. Load the model "
                "whole."
            )
        ranges, report = plan_parts(parts, weights)
        return _Planned(cut, weights, parts, ranges, report, names.unused)

    def load(self, planned: _Planned, dtype: str) -> Any:
        """Read the planned parts into the slice."""
        cut, cls = planned.cut, type(self.model)
        record = self.record(cut.reason)
        fetch_parts(planned.ranges, planned.weights)
        own: Any = cls if cut.edits is None else _cut_class(self.model, cut.edits)
        state = {**planned.parts, **self.refitted}
        small = fill_model(own, cut.config, state, self.source.name, self.source.folder, dtype, planned.unused)
        small.__class__ = cls
        scale_queries(small, {name: rows for name, rows in cut.scales.items() if name not in self.refitted})
        return self._noted(small, record)

    @torch.no_grad()
    def cut_from_whole(self, dtype: str) -> Any:
        """The slice, of weights that are all loaded."""
        self.source.download_weights()
        model = load_model(self.source.folder, dtype)
        small, kept, reason = cut_out(model, channel_groups(model), self.widths)
        self._check_refitted(kept)
        for name, tensor in self.refitted.items():
            tensors_of(small)[name].copy_(tensor)
        name_source(small, self.source.name)
        return self._noted(small, self.record(reason))

    def _noted(self, small: Any, record: SubnetworkRecord) -> Any:
        if self.published is None:
            warn_of_norms(self.model, self.groups, self.widths)
        note_record(small, record)
        return small

    def _check_refitted(self, kept: Kept) -> None:
        """Refuse a published width whose tensors have other shapes than the slice."""
        own = tensors_of(self.model)
        for name, tensor in self.refitted.items():
            dims = kept.get(name, {})
            shape = [
                len(dims[dim]) if dim in dims else one for dim, one in enumerate(own[name].shape if name in own else ())
            ]
            if name not in own or list(tensor.shape) != shape:
                raise _does_not_fit(str(self.published), name)


def _path_of(folder: Path, name: str) -> Path:
    return folder / WIDTHS_FOLDER / f"{name}.safetensors"


def _load_saved(source: _Source, dtype: str) -> Any:
    record = SubnetworkRecord.from_dict(checkpoint.read_json(source.folder / RECORD_NAME), RECORD_NAME)
    source.download_weights()
    whole = meta_model(load_config(source.folder))
    cls: Any = type(whole)
    if record.reason is not None:
        groups = channel_groups(whole)
        _check_widths(record, {group.name: group.size for group in groups}, RECORD_NAME)
        cls = _cut_class(whole, find_edits(whole, groups, record.widths))
    model: Any = load_model(source.folder, dtype, cls=cls)
    model.__class__ = type(whole)
    name_source(model, source.name)
    note_record(model, record)
    return model


def _cut_class(whole: Any, edits: Edits) -> Any:
    """A class of models that are cut as soon as they are built, before weights are loaded into them.

    Args:
        whole: The model without values, with its tied weights; they are not tied yet in one that is being loaded.
        edits: What changes in it.
    """
    cls, shared = type(whole), shared_names(whole)

    def build(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, config, *args, **kwargs)
        pieces: dict[int, Any] = {}
        for path, module in self.named_modules():
            holders: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for holder in holders:
                for name, tensor in holder.items():
                    full = f"{path}.{name}" if path else name
                    dims = edits.kept.get(shared.get(full, full))
                    if tensor is not None and dims is not None:
                        holder[name] = piece_of(tensor, dims, pieces)
        edits.write_attributes(self)

    return type(cls.__name__, (cls,), {"__init__": build, "__module__": cls.__module__})


def _does_not_fit(name: str, tensor: str) -> CheckpointError:
    return CheckpointError(f"{name} does not fit this checkpoint at {tensor}. Save the width again.")


def _refuse_width(repo_or_dir: str | os.PathLike[str], width: Any) -> None:
    if width is not None:
        raise SubnetworkError(
            f"{os.fspath(repo_or_dir)!r} is a sub-network itself, and width={width!r} is asked for. Leave width "
            "out, or give the checkpoint that it was cut from."
        )


def _check_widths(record: SubnetworkRecord, sizes: Mapping[str, int], name: str) -> None:
    for group, width in record.widths.items():
        if width >= sizes.get(group, 0):
            raise CheckpointError(
                f"{name} belongs to another model: it keeps {width} channels of {group!r}, and this one has "
                f"{sizes.get(group, 'no such group')}. Use the file that was saved with this checkpoint."
            )
