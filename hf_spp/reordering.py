"""`Reordering`: what was done to a model, and the means to undo, repeat, save and load it."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from . import checkpoint, hub
from .apply import gather_model, invert_indices, named_tensors
from .architectures import channel_groups, model_type_of
from .channels import Refusal
from .config import AXES, CONFIG_NAME, FORMAT_VERSION, SPPConfig, check_format_version
from .errors import (
    CheckpointError,
    OrdersError,
    UnsupportedModelError,
)
from .permutation import check_orders, gather_indices, moved_channels
from .proof import Proof, places_of

ORDERS_NAME = "spp_orders.safetensors"
# The reorderings a live model went through, as far as this process did them; absent means unknown.
_HISTORY = "_spp_history"


@dataclass(frozen=True, eq=False)
class Reordering:
    """What one reordering did to a model, and the means to undo or repeat it.

    Attributes:
        config: The settings; `metric` and `axes` state what was really used.
        orders: Per group `[blocks, size]`, int64: entry `[b, i]` is the channel of original block `b` at rank `i`.
        scores: Per group `[blocks, size]`, float32, in the original order.
        axis_of: The axis of each group.
        layer_of: The layer of each group, None for a group that spans layers.
        refused: Axes that may not move, where and why.
        proof: How far the outputs moved, None if the proof was switched off.
        tolerance: Largest relative difference that was accepted, None if the proof was switched off.
        model_type: The config's `model_type`.
        model_class: Class name of the model that was reordered.
        dtype: Dtype of its weights.
        versions: Versions of the packages that took part.
    """

    config: SPPConfig
    orders: Mapping[str, Tensor]
    scores: Mapping[str, Tensor]
    axis_of: Mapping[str, str]
    layer_of: Mapping[str, int | None]
    refused: tuple[Refusal, ...]
    proof: Proof | None
    tolerance: float | None
    model_type: str
    model_class: str
    dtype: str
    versions: Mapping[str, str]

    @property
    def max_abs_diff(self) -> float | None:
        """Largest absolute difference of the model's outputs, None if the proof was switched off."""
        return None if self.proof is None else self.proof.max_abs_diff

    @property
    def relative_diff(self) -> float | None:
        """Largest difference relative to the scale of its output, None if the proof was switched off."""
        return None if self.proof is None else self.proof.relative_diff

    @property
    def changed(self) -> bool:
        """Whether any channel moved; false for a model that was already in order."""
        return any(moved_channels(order) for order in self.orders.values())

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes that were put in order."""
        return tuple(axis for axis in AXES if axis in self.axis_of.values())

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the orders."""
        total = hashlib.sha256()
        for name in sorted(self.orders):
            total.update(name.encode())
            total.update(self.orders[name].contiguous().numpy().tobytes())
        return total.hexdigest()

    def undo(self, model: PreTrainedModel) -> None:
        """Bring every channel back to its original place, in place and bit for bit.

        Args:
            model: The reordered model, or one loaded from its checkpoint; training in between is kept.

        Raises:
            OrdersError: The orders do not fit this model, or it is not in the order that this reordering made.
        """
        history = history_of(model)
        if history is not None and history[-1:] != (self.digest,):
            state = "in its original order" if not history else "in the order of another reordering"
            raise OrdersError(
                f"This {type(model).__name__} is {state}, so this reordering cannot be undone on it. "
                "Undo the last reordering first, or load the reordered checkpoint again."
            )
        gather_model(model, invert_indices(self.indices(model)))
        remember(model, () if history is None else history[:-1])

    def apply(self, model: PreTrainedModel) -> None:
        """Reorder another copy of the model that this reordering started from, in place.

        Args:
            model: A model in its original order, for example a fresh download, with or without another head.

        Raises:
            OrdersError: The orders do not fit this model, or it is already in this order.
        """
        history = history_of(model) or ()
        if history[-1:] == (self.digest,):
            raise OrdersError(
                f"This {type(model).__name__} is already in the order of this reordering. Apply it to the original."
            )
        gather_model(model, self.indices(model))
        remember(model, (*history, self.digest))

    def indices(self, model: PreTrainedModel) -> dict[str, dict[int, Tensor]]:
        """The gather index of each dimension that this reordering moves in a model, by tensor name and dimension.

        Args:
            model: A model of the kind that this reordering was made for.

        Raises:
            OrdersError: The orders do not fit this model.
        """
        groups = channel_groups(model)
        check_writable(model)
        if model_type_of(model) != self.model_type:
            raise OrdersError(
                f"These orders belong to a {self.model_type} model; a {model_type_of(model)} model "
                f"({type(model).__name__}) was given. Use the orders that were saved with this checkpoint."
            )
        check_orders(groups, self.orders)
        return gather_indices(groups, self.orders, {name: t.shape for name, t in named_tensors(model).items()})

    def summary(self) -> dict[str, Any]:
        """What was done, as plain JSON types: axes, channels moved, what was refused, the proof."""
        axes: dict[str, dict[str, int]] = {}
        for axis in self.axes:
            orders = [order for name, order in self.orders.items() if self.axis_of[name] == axis]
            axes[axis] = {
                "groups": len(orders),
                "channels": sum(order.numel() for order in orders),
                "moved": sum(map(moved_channels, orders)),
            }
        return {
            "format_version": FORMAT_VERSION,
            "model_type": self.model_type,
            "model_class": self.model_class,
            "dtype": self.dtype,
            "metric": self.config.metric_name,
            "seed": self.config.seed,
            "axes": axes,
            "changed": self.changed,
            "refused": [dataclasses.asdict(refusal) for refusal in self.refused],
            "verified": self.proof is not None,
            "max_abs_diff": self.max_abs_diff,
            "relative_diff": self.relative_diff,
            "output_scale": None if self.proof is None else self.proof.output_scale,
            "unproved": [] if self.proof is None else list(self.proof.unproved),
            "tolerance": self.tolerance,
            "versions": dict(self.versions),
        }

    def __str__(self) -> str:
        summary = self.summary()
        lines = [f"Reordering of {self.model_class} by {summary['metric']} ({self.dtype})"]
        for axis, count in summary["axes"].items():
            lines.append(
                f"  {axis:<7}{count['groups']:>5} groups {count['moved']:>8} of {count['channels']} channels moved"
            )
        for refusal in self.refused:
            lines.append(f"  {refusal.axis:<7}stays in place at {refusal.where}: {refusal.reason}")
        if not self.changed:
            lines.append("  nothing moved: the model was already in this order")
        if self.proof is None:
            lines.append("  equal function was NOT checked: the proof was switched off")
        else:
            lines.append(
                f"  equal function: max|Δ| = {self.proof.max_abs_diff:.2e}, {self.proof.relative_diff:.1e} of the "
                f"output's scale (accepted up to {self.tolerance:.0e})"
            )
            if self.proof.unproved:
                places = ", ".join(places_of(self.proof.unproved, self.orders))
                lines.append(f"  equal function was NOT checked of {len(self.proof.unproved)} groups: {places}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return (
            f"Reordering({self.model_class}, axes={self.axes}, metric={self.config.metric_name!r}, "
            f"changed={self.changed}, max_abs_diff={self.max_abs_diff})"
        )

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> tuple[Path, Path]:
        """Write `spp_config.json` and `spp_orders.safetensors` (orders and scores) into a folder.

        Returns:
            Both paths.
        """
        folder = Path(save_directory)
        orders = checkpoint.write_bytes(folder / ORDERS_NAME, self.to_bytes())
        return self.config.save_pretrained(folder), orders

    def to_bytes(self) -> bytes:
        """The whole reordering as one safetensors file: orders and scores, the rest as JSON in its metadata."""
        tensors = {f"orders.{name}": order.to(torch.int32) for name, order in self.orders.items()}
        tensors |= {f"scores.{name}": score.to(torch.float32) for name, score in self.scores.items()}
        metadata = {
            "format": "pt",
            "format_version": str(FORMAT_VERSION),
            "config": json.dumps(self.config.to_dict(), sort_keys=True),
            "summary": json.dumps(self.summary(), sort_keys=True),
            "groups": json.dumps({n: [self.axis_of[n], self.layer_of[n]] for n in sorted(self.orders)}),
        }
        return checkpoint.pack_tensors(tensors, {**metadata, "sha256": _seal(tensors, metadata)})

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> "Reordering":
        """Read a reordering from a folder or a Hub repo; every order is checked to be a permutation.

        Raises:
            CheckpointError: A file is missing, damaged, from a newer version, or the two do not belong together.
            OrdersError: An order is no permutation.
            HubError: The repo cannot be reached.
        """
        source = pretrained_model_name_or_path
        config = SPPConfig.from_pretrained(source, revision=revision, token=token)
        path = hub.resolve_file(source, ORDERS_NAME, revision=revision, token=token)
        reordering = cls.from_bytes(checkpoint.read_bytes(path))
        if reordering.config.to_dict() != config.to_dict():
            raise CheckpointError(
                f"{CONFIG_NAME} and {ORDERS_NAME} of {source} come from different reorderings. "
                "Save both again with Reordering.save_pretrained."
            )
        return reordering

    @classmethod
    def from_bytes(cls, data: bytes) -> "Reordering":
        """A reordering from what `to_bytes` gave; every byte is validated.

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
        return cls._from_parts({name: order.long() for name, order in orders.items()}, scores, stored)

    @classmethod
    def _from_parts(
        cls, orders: Mapping[str, Tensor], scores: Mapping[str, Tensor], stored: Mapping[str, Any]
    ) -> "Reordering":
        summary, groups, proof = stored["summary"], stored["groups"], None
        _check_summary(summary, groups, scores)
        try:
            if summary["verified"]:
                # What was written before groups were told apart does not say which were left out.
                unproved = tuple(summary.get("unproved", ()))
                proof = Proof(summary["max_abs_diff"], summary["relative_diff"], summary["output_scale"], unproved)
            return cls(
                SPPConfig.from_dict(stored["config"]),
                orders,
                scores,
                {name: axis for name, (axis, _) in groups.items()},
                {name: layer for name, (_, layer) in groups.items()},
                tuple(Refusal(**refusal) for refusal in summary["refused"]),
                proof,
                summary["tolerance"],
                summary["model_type"],
                summary["model_class"],
                summary["dtype"],
                summary["versions"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"The summary in {ORDERS_NAME} is damaged ({error!r}). Save it again.") from error


def check_writable(model: PreTrainedModel) -> None:
    """Refuse a model whose weights hold no values.

    Raises:
        UnsupportedModelError: A parameter is on the meta device.
    """
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta":
            raise UnsupportedModelError(
                f"Parameter {name} of {type(model).__name__} is on the meta device and holds no values. "
                "Load the weights first (from_pretrained without device_map='meta' or disk offload)."
            )


def history_of(model: PreTrainedModel) -> tuple[str, ...] | None:
    """Digests of the reorderings a live model went through in this process, None where nothing is known."""
    history: tuple[str, ...] | None = getattr(model, _HISTORY, None)
    return history


def remember(model: PreTrainedModel, history: tuple[str, ...]) -> None:
    """Note on a live model which reorderings it went through."""
    setattr(model, _HISTORY, history)


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
    try:
        stored = {key: json.loads(metadata[key]) for key in ("config", "summary", "groups")}
    except (KeyError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"The metadata of {ORDERS_NAME} is damaged ({error}). Save it again.") from error
    for key, value in stored.items():
        if not isinstance(value, dict):
            raise CheckpointError(f"The metadata {key!r} of {ORDERS_NAME} is no JSON object. Save it again.")
    return stored


def _check_summary(summary: Mapping[str, Any], groups: Mapping[str, Any], scores: Mapping[str, Tensor]) -> None:
    """Check the types of what an orders file says besides its orders."""
    figures = ("max_abs_diff", "relative_diff", "output_scale", "tolerance")
    numbers = [summary.get(name) for name in figures] if summary.get("verified") else []
    texts = [summary.get(name) for name in ("model_type", "model_class", "dtype")]
    refused, versions, unproved = summary.get("refused"), summary.get("versions"), summary.get("unproved", [])
    sound = (
        all(isinstance(value, (int, float)) for value in numbers)
        and isinstance(versions, dict)
        and isinstance(unproved, list)
        and all(isinstance(name, str) and name in groups for name in unproved)
        and isinstance(refused, list)
        and all(isinstance(one, dict) for one in refused)
        and all(isinstance(t, str) for t in (*texts, *versions.values(), *(v for one in refused for v in one.values())))
        and all(isinstance(value, list) and len(value) == 2 for value in groups.values())
        and all(axis in AXES and (layer is None or isinstance(layer, int)) for axis, layer in groups.values())
        and all(one.dtype == torch.float32 and bool(one.isfinite().all()) for one in scores.values())
    )
    if not sound:
        raise CheckpointError(
            f"Scores or metadata of {ORDERS_NAME} are of another type than hf_spp writes. Save it again."
        )


def _check_permutation(name: str, order: Tensor) -> None:
    size = order.shape[-1] if order.dim() == 2 else 0
    places = torch.arange(size, dtype=torch.int32).expand(order.shape[0] if order.dim() == 2 else 0, -1)
    if order.dim() != 2 or order.dtype != torch.int32 or not torch.equal(order.sort(-1).values, places):
        raise OrdersError(
            f"The order of {name!r} in {ORDERS_NAME} is no permutation in every block. "
            "The file is damaged; download or save it again."
        )
