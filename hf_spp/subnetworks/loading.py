"""Sub-networks from files: those that were saved alone, and published widths of a reordered checkpoint.

A published width is one small file beside the checkpoint, `spp_widths/NAME.safetensors`: how wide every group is, and
the projections that compensation refitted. All other weights are prefixes of the checkpoint's own.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import checkpoint, hub
from ..architectures import channel_groups
from ..errors import CheckpointError, SubnetworkError
from ..loading import load_config, load_model, model_class
from ..orders_file import ORDERS_NAME
from ..reordering import Reordering, remember
from ..sums import renew_sums
from .costs import tensors_of
from .edits import find_edits
from .extraction import cut_out, extract_subnetwork, piece_of
from .record import RECORD_NAME, SubnetworkRecord, note_record, record_of
from .spec import SubnetworkSpec

WIDTHS_FOLDER = "spp_widths"
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


def load_subnetwork(
    repo_or_dir: str | os.PathLike[str],
    width: str | float | SubnetworkSpec | None = None,
    *,
    dtype: str = "auto",
) -> Any:
    """Load a sub-network from a folder or a Hub repo.

    Args:
        repo_or_dir: What a sub-network's `save_pretrained` wrote, or a reordered checkpoint.
        width: What to cut out of a reordered checkpoint: the name of a published width, which comes with its
            compensation, a fraction of the neurons and heads of every layer, or a spec. None for a saved sub-network.
        dtype: `auto` keeps the checkpoint's; `float32`, `bfloat16`, `float16` or `float64`.

    Returns:
        The sub-network, in evaluation mode.

    Raises:
        CheckpointError: A file is missing or damaged, or does not fit the model.
        SubnetworkError: There is no such width, or the spec does not fit the model.
        HubError: The repo cannot be reached.
    """
    load_config(repo_or_dir)
    saved = hub.find_files(repo_or_dir, [RECORD_NAME, ORDERS_NAME, f"{WIDTHS_FOLDER}/*.safetensors"])
    if RECORD_NAME in saved:
        if width is not None:
            raise SubnetworkError(
                f"{os.fspath(repo_or_dir)!r} is a sub-network itself, and width={width!r} is asked for. Leave width "
                "out, or give the checkpoint that it was cut from."
            )
        return _load_saved(repo_or_dir, saved[RECORD_NAME], dtype)
    published = {
        Path(name).name.removesuffix(".safetensors"): path
        for name, path in saved.items()
        if name.startswith(f"{WIDTHS_FOLDER}/")
    }
    if width is None:
        raise SubnetworkError(
            f"{os.fspath(repo_or_dir)!r} is no sub-network: it holds no {RECORD_NAME}. Give a width: a fraction, a spec"
            f"{', or one of ' + ', '.join(sorted(published)) if published else ''}."
        )
    if isinstance(width, str):
        if width not in published:
            raise SubnetworkError(
                f"{os.fspath(repo_or_dir)!r} has no width {width!r}. Published: "
                f"{', '.join(sorted(published)) or 'none'}. Give a fraction such as 0.5, or a SubnetworkSpec."
            )
        return _load_published(repo_or_dir, published[width], dtype)
    model = load_model(repo_or_dir, dtype)
    if ORDERS_NAME in saved:
        remember(model, (Reordering.from_pretrained(repo_or_dir),))
    spec = width if isinstance(width, SubnetworkSpec) else SubnetworkSpec.uniform(model, width)
    return extract_subnetwork(model, spec)


def _path_of(folder: Path, name: str) -> Path:
    return folder / WIDTHS_FOLDER / f"{name}.safetensors"


def _load_saved(source: str | os.PathLike[str], path: Path, dtype: str) -> Any:
    record = SubnetworkRecord.from_dict(checkpoint.read_json(path), RECORD_NAME)
    if record.reason is None:
        model = load_model(source, dtype)
    else:
        cls = model_class(load_config(source))
        model = load_model(source, dtype, cls=_cut_class(cls, record))
        model.__class__ = cls
    note_record(model, record)
    return model


def _cut_class(cls: Any, record: SubnetworkRecord) -> Any:
    """A class of models that are cut as soon as they are built, before weights are loaded into them."""

    def build(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, config, *args, **kwargs)
        _cut_in_place(self, record)

    return type(cls.__name__, (cls,), {"__init__": build, "__module__": cls.__module__})


def _cut_in_place(model: nn.Module, record: SubnetworkRecord) -> None:
    # Models are built without values, and places need them.
    with torch.device("cpu"):
        groups = channel_groups(model)
        _check_widths(record, {group.name: group.size for group in groups}, RECORD_NAME)
        edits = find_edits(model, groups, record.widths)
    first = {id(tensor): name for name, tensor in tensors_of(model).items()}
    pieces: dict[int, Any] = {}
    for module in model.modules():
        holders: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for holder in holders:
            for name, tensor in holder.items():
                if tensor is not None and first[id(tensor)] in edits.kept:
                    holder[name] = piece_of(tensor, edits.kept[first[id(tensor)]], pieces)
    edits.write_attributes(model)


@torch.no_grad()
def _load_published(source: str | os.PathLike[str], path: Path, dtype: str) -> Any:
    name = f"{WIDTHS_FOLDER}/{path.name}"
    tensors, metadata = checkpoint.unpack_tensors(checkpoint.read_bytes(path), name)
    if "subnetwork" not in metadata:
        raise CheckpointError(f"{name} does not say how wide it is. Save it again.")
    record = SubnetworkRecord.from_dict(checkpoint.parse_json(metadata["subnetwork"], f"The record of {name}"), name)
    model = load_model(source, dtype)
    groups = channel_groups(model)
    _check_widths(record, {group.name: group.size for group in groups}, name)
    small, _, _ = cut_out(model, groups, record.widths)
    _fill_in(small, tensors, record, name)
    note_record(small, record)
    return small


def _fill_in(small: Any, tensors: Mapping[str, Tensor], record: SubnetworkRecord, name: str) -> None:
    own = tensors_of(small)
    for tensor in record.compensated:
        fits = tensor in tensors and tensor in own and tensors[tensor].shape == own[tensor].shape
        fits = fits and tensors[tensor].dtype in _DTYPES
        if not fits or not bool(tensors[tensor].isfinite().all()):
            raise CheckpointError(f"{name} does not fit this checkpoint at {tensor}. Save the width again.")
        own[tensor].copy_(tensors[tensor])


def _check_widths(record: SubnetworkRecord, sizes: Mapping[str, int], name: str) -> None:
    for group, width in record.widths.items():
        if width >= sizes.get(group, 0):
            raise CheckpointError(
                f"{name} belongs to another model: it keeps {width} channels of {group!r}, and this one has "
                f"{sizes.get(group, 'no such group')}. Use the file that was saved with this checkpoint."
            )
