"""The orders file: orders, scores and groups of a reordering in one safetensors file, validated on reading."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from . import checkpoint
from .channels import ChannelGroup, ChannelMap, Member, Role
from .config import AXES, FORMAT_VERSION, SPPConfig, check_format_version
from .errors import CheckpointError, OrdersError, SPPConfigError

ORDERS_NAME = "spp_orders.safetensors"
# A layout in einops notation: names, and parentheses around those that share a dimension.
_DIMENSION = r"(?:\w+|\(\w+(?: \w+)*\))"
_LAYOUT = rf"{_DIMENSION}(?: {_DIMENSION})*"


@dataclass(frozen=True)
class StoredOrders:
    """What an orders file holds.

    Attributes:
        orders: Per group `[blocks, size]`, int64.
        scores: Per group `[blocks, size]`, float32.
        groups: The groups, with every tensor dimension that moved.
        config: The settings.
        summary: What was done, as plain JSON types.
    """

    orders: Mapping[str, Tensor]
    scores: Mapping[str, Tensor]
    groups: ChannelMap
    config: SPPConfig
    summary: Mapping[str, Any]


def pack_orders(stored: StoredOrders) -> bytes:
    """The bytes of an orders file; an order takes two bytes per channel where its numbers fit."""
    tensors = {
        f"orders.{name}": order.to(torch.int16 if order.shape[-1] < 2**15 else torch.int32)
        for name, order in stored.orders.items()
    }
    tensors |= {f"scores.{name}": score.to(torch.float32) for name, score in stored.scores.items()}
    metadata = {
        "format": "pt",
        "format_version": str(FORMAT_VERSION),
        "config": json.dumps(stored.config.to_dict(), sort_keys=True),
        "summary": json.dumps(stored.summary, sort_keys=True),
        "groups": json.dumps({group.name: _packed_group(group) for group in stored.groups}, sort_keys=True),
    }
    return checkpoint.pack_tensors(tensors, {**metadata, "sha256": _seal(tensors, metadata)})


def unpack_orders(data: bytes) -> StoredOrders:
    """What the bytes of an orders file hold.

    Raises:
        CheckpointError: The data is damaged or from a newer version.
        OrdersError: An order is no permutation.
    """
    tensors, metadata = checkpoint.unpack_tensors(data, ORDERS_NAME)
    stored = _parse_metadata(metadata)
    orders = {n.removeprefix("orders."): t for n, t in tensors.items() if n.startswith("orders.")}
    scores = {n.removeprefix("scores."): t for n, t in tensors.items() if n.startswith("scores.")}
    if not (set(orders) == set(scores) == set(stored["groups"])):
        raise CheckpointError(f"Orders, scores and groups in {ORDERS_NAME} do not match. Save it again.")
    for name, order in orders.items():
        if order.shape != scores[name].shape:
            raise CheckpointError(f"Orders and scores of {name!r} in {ORDERS_NAME} do not match. Save it again.")
        _check_permutation(name, order)
    if metadata.get("sha256") != _seal(tensors, metadata):
        raise CheckpointError(f"The checksum of {ORDERS_NAME} is wrong. The file is damaged; download it again.")
    if not all(_is_packed_group(packed) for packed in stored["groups"].values()):
        raise CheckpointError(f"A group of {ORDERS_NAME} is of another form than hf_spp writes. Save it again.")
    _check_summary(stored["summary"], stored["groups"], scores)
    groups = ChannelMap(tuple(_group_of(name, packed, orders[name]) for name, packed in stored["groups"].items()))
    for group in groups:
        parent = groups.by_name.get(group.parent or "")
        if parent is not None and parent.channels != group.blocks:
            raise CheckpointError(f"Groups {group.name!r} and {group.parent!r} in {ORDERS_NAME} do not fit each other.")
    orders = {name: order.long() for name, order in orders.items()}
    try:
        config = SPPConfig.from_dict(stored["config"])
    except SPPConfigError as error:
        raise CheckpointError(f"The config in {ORDERS_NAME} is not accepted: {error}") from error
    return StoredOrders(orders, scores, groups, config, stored["summary"])


def _seal(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 over every tensor and all other metadata of an orders file."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].reshape(-1)
        total.update(f"{name} {tensor.dtype} {list(tensors[name].shape)}\n".encode())
        total.update(tensor.view(torch.uint8).numpy().tobytes())
    for key in sorted(metadata):
        if key != "sha256":
            total.update(f"{key}={metadata[key]}\n".encode())
    return total.hexdigest()


def _parse_metadata(metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        version = int(metadata["format_version"])
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{ORDERS_NAME} states no format_version. It was not written by hf_spp.") from error
    check_format_version(version, ORDERS_NAME)
    parts = ("config", "summary", "groups")
    stored = {key: checkpoint.parse_json(metadata.get(key, ""), f"The {key} of {ORDERS_NAME}") for key in parts}
    for key, value in stored.items():
        if not isinstance(value, dict):
            raise CheckpointError(f"The metadata {key!r} of {ORDERS_NAME} is no JSON object. Save it again.")
    return stored


def _check_summary(summary: Mapping[str, Any], groups: Mapping[str, Any], scores: Mapping[str, Tensor]) -> None:
    """Check the types of what an orders file says besides its orders."""
    figures = ("max_abs_diff", "relative_diff", "output_scale", "tolerance")
    proved = summary.get("verified")
    numbers = [summary.get(name) for name in figures]
    texts = [summary.get(name) for name in ("model_type", "model_class", "dtype")]
    refused, versions, unproved = summary.get("refused"), summary.get("versions"), summary.get("unproved")
    sound = (
        isinstance(proved, bool)
        and str(texts[1]).isidentifier()
        and all(_is_figure(value) if proved else value is None for value in numbers)
        and isinstance(versions, dict)
        and isinstance(unproved, list)
        and all(isinstance(name, str) and name in groups for name in unproved)
        and isinstance(refused, list)
        and all(isinstance(one, dict) for one in refused)
        and all(isinstance(t, str) for t in (*texts, *versions.values(), *(v for one in refused for v in one.values())))
        and all(one.dtype == torch.float32 and bool(one.isfinite().all()) for one in scores.values())
    )
    if not sound:
        raise CheckpointError(
            f"Scores or metadata of {ORDERS_NAME} are of another type than hf_spp writes. Save it again."
        )


def _is_figure(value: Any) -> bool:
    # A whole number may be too large for the computer's floating-point numbers.
    return type(value) in (int, float) and 0 <= value < 1e300


def _packed_group(group: ChannelGroup) -> list[Any]:
    members = [[one.tensor, one.pattern, one.role, one.span] for one in group.members]
    return [group.axis, group.layer, group.parent, members]


def _group_of(name: str, packed: list[Any], order: Tensor) -> ChannelGroup:
    axis, layer, parent, members = packed
    found = (Member(tensor, pattern, role, span and tuple(span)) for tensor, pattern, role, span in members)
    return ChannelGroup(name, axis, layer, order.shape[0], order.shape[1], tuple(found), parent)


def _is_packed_group(packed: Any) -> bool:
    if not (isinstance(packed, list) and len(packed) == 4 and isinstance(packed[3], list)):
        return False
    axis, layer, parent, members = packed
    return (
        axis in AXES
        and (layer is None or type(layer) is int)
        and (parent is None or isinstance(parent, str))
        and all(isinstance(member, list) and len(member) == 4 and _is_packed_member(*member) for member in members)
    )


def _is_packed_member(tensor: Any, pattern: Any, role: Any, span: Any) -> bool:
    whole_span = isinstance(span, list) and len(span) == 3 and all(type(number) is int for number in span)
    return (
        isinstance(tensor, str)
        and isinstance(pattern, str)
        and re.fullmatch(_LAYOUT, pattern) is not None
        and re.findall(r"\w+", pattern).count("c") == 1
        and re.findall(r"\w+", pattern).count("b") <= 1
        and role in get_args(Role)
        and (span is None or (whole_span and 0 <= span[0] < span[1] <= span[2] < 2**31))
    )


def _check_permutation(name: str, order: Tensor) -> None:
    size = order.shape[-1] if order.dim() == 2 else 0
    places = torch.arange(size, dtype=torch.int32).expand(order.shape[0] if order.dim() == 2 else 0, -1)
    known = order.dim() == 2 and order.numel() > 0 and order.dtype in (torch.int16, torch.int32)
    if not known or not torch.equal(order.sort(-1).values.int(), places):
        raise OrdersError(
            f"The order of {name!r} in {ORDERS_NAME} is no permutation in every block. "
            "The file is damaged; download or save it again."
        )
