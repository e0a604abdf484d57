"""`Reordering`: what was done to a model, and the means to undo, repeat, save and load it."""

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from . import checkpoint, hub
from .adapters import ADAPTER_CONFIG, Direction, read_adapter, remapped, write_adapter
from .apply import carry, gather_model, invert_indices, named_tensors
from .architectures import channel_groups, model_type_of
from .channels import ChannelMap, Refusal
from .config import AXES, CONFIG_NAME, FORMAT_VERSION, SPPConfig
from .errors import AdapterError, CheckpointError, OptimizerError, OrdersError, UnsupportedModelError
from .optimizers import inner_optimizer, optimizer_moves
from .orders_file import ORDERS_NAME, StoredOrders, pack_orders, unpack_orders
from .permutation import check_orders, compose_orders, gather_indices, moved_channels, scores_before
from .proof import Proof, places_of
from .structure import inner_model
from .sums import SUMS_NAME

# The reorderings a live model went through, as far as this process did them; absent means unknown.
_HISTORY = "_spp_history"


@dataclass(frozen=True, eq=False)
class Reordering:
    """What one reordering did to a model, and the means to undo or repeat it.

    Attributes:
        config: The settings; `metric` and `axes` state what was really used.
        orders: Per group `[blocks, size]`, int64: entry `[b, i]` is the channel of original block `b` at rank `i`.
        scores: Per group `[blocks, size]`, float32, in the original order.
        groups: The groups that were put in order, with every tensor dimension that moved.
        refused: Axes that may not move, where and why.
        proof: How far the outputs moved, None if the model was not run.
        tolerance: Largest relative difference that was accepted, None if the model was not run.
        model_type: The config's `model_type`.
        model_class: Class name of the model that was reordered.
        dtype: Dtype of its weights.
        versions: Versions of the packages that took part.
    """

    config: SPPConfig
    orders: Mapping[str, Tensor]
    scores: Mapping[str, Tensor]
    groups: ChannelMap
    refused: tuple[Refusal, ...]
    proof: Proof | None
    tolerance: float | None
    model_type: str
    model_class: str
    dtype: str
    versions: Mapping[str, str]

    # Live models and optimizers hold the reorderings that they went through, and are copied and pickled with them.
    def __deepcopy__(self, memo: dict[int, Any]) -> "Reordering":
        return self

    def __reduce__(self) -> Any:
        return Reordering.from_bytes, (self.to_bytes(),)

    @property
    def max_abs_diff(self) -> float | None:
        """Largest absolute difference of the model's outputs, None if the model was not run."""
        return None if self.proof is None else self.proof.max_abs_diff

    @property
    def relative_diff(self) -> float | None:
        """Largest difference relative to the scale of its output, None if the model was not run."""
        return None if self.proof is None else self.proof.relative_diff

    @property
    def changed(self) -> bool:
        """Whether any channel moved; false for a model that was already in order."""
        return any(moved_channels(order) for order in self.orders.values())

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes that were put in order."""
        return tuple(axis for axis in AXES if axis in self.groups.axes)

    @property
    def axis_of(self) -> dict[str, str]:
        """The axis of each group."""
        return {group.name: group.axis for group in self.groups}

    @property
    def layer_of(self) -> dict[str, int | None]:
        """The layer of each group, None for a group that spans layers."""
        return {group.name: group.layer for group in self.groups}

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the orders."""
        total = hashlib.sha256()
        for name in sorted(self.orders):
            total.update(name.encode())
            total.update(self.orders[name].contiguous().numpy().tobytes())
        return total.hexdigest()

    def undo(self, model: nn.Module, optimizer: Any = None) -> None:
        """Bring every channel back to its original place, in place and bit for bit.

        Args:
            model: The reordered model, or one loaded from its checkpoint; training in between is kept. Adapters move
                along.
            optimizer: The optimizer that trains it, whose state moves along.

        Raises:
            OrdersError: The orders do not fit this model, or it is not in the order that this reordering made.
            OptimizerError: The optimizer's state cannot be moved.
        """
        history, optimizer = history_of(model), inner_optimizer(optimizer)
        if history is not None and not is_in_order(model, self):
            state = "in its original order" if not history else "in the order of another reordering"
            raise OrdersError(
                f"This {type(model).__name__} is {state}, so this reordering cannot be undone on it. "
                "Undo the last reordering first, or load the reordered checkpoint again."
            )
        indices = invert_indices(self.indices(model))
        check_writable(inner_model(model))
        along = optimizer_moves(optimizer, model, indices)
        if along and not is_in_order(optimizer, self):
            raise OptimizerError(
                f"The state of this {type(optimizer).__name__} was not moved by this reordering, so it must not be "
                "moved back. Leave the optimizer out, or call apply_to_optimizer after the reordering."
            )
        gather_model(model, indices, others=along)
        remember(model, () if history is None else history[:-1])
        if optimizer is not None:
            remember(optimizer, (history_of(optimizer) or ())[:-1])

    def apply(self, model: nn.Module) -> None:
        """Reorder another copy of the model that this reordering started from, in place.

        Args:
            model: A model in its original order, for example a fresh download, with or without another head or
                adapters that were trained on it.

        Raises:
            OrdersError: The orders do not fit this model, or it is already in this order.
        """
        if is_in_order(model, self):
            raise OrdersError(
                f"This {type(model).__name__} is already in the order of this reordering. Apply it to the original."
            )
        indices = self.indices(model)
        check_writable(inner_model(model))
        gather_model(model, indices)
        remember(model, (*(history_of(model) or ()), self))

    def apply_to_optimizer(self, optimizer: Any, model: nn.Module) -> None:
        """Move the state of an optimizer in place, once its model has been reordered, so that training goes on.

        Call it between two steps, after `apply_spp(model)` and before the next backward pass.

        Args:
            optimizer: A torch optimizer, or accelerate's wrapper of one.
            model: The model that it trains, in the order of this reordering.

        Raises:
            OptimizerError: The state cannot be moved by index, or the optimizer has moved already. It is unchanged;
                `undo(model)` brings the model back to it.
            OrdersError: The orders do not fit this model, or it is not in the order that this reordering made.
        """
        optimizer = inner_optimizer(optimizer)
        if history_of(model) is not None and not is_in_order(model, self):
            raise OrdersError(
                f"This {type(model).__name__} is not in the order of this reordering, so its optimizer must not be "
                "either. Call apply_to_optimizer right after the reordering of the model."
            )
        moved, before = history_of(optimizer), (history_of(model) or ())[:-1]
        if is_in_order(optimizer, self):
            raise OptimizerError(
                f"This {type(optimizer).__name__} was moved by this reordering before; its state fits the model. "
                "Call apply_to_optimizer once for each reordering."
            )
        if moved is not None and [one.digest for one in moved] != [one.digest for one in before]:
            raise OptimizerError(
                f"This {type(optimizer).__name__} has moved with {len(moved)} reorderings, and the model with "
                f"{len(before)} others before this one. Call apply_to_optimizer after each reordering, in order."
            )
        carry(optimizer_moves(optimizer, model, self.indices(model)))
        remember(optimizer, (*before, self))

    def remap_adapter(
        self,
        adapter: str | os.PathLike[str] | Mapping[str, Tensor],
        direction: Direction = "to_reordered",
        *,
        save_directory: str | os.PathLike[str] | None = None,
    ) -> dict[str, Tensor]:
        """Carry a LoRA adapter from the original base model to the reordered one or back, exactly.

        Args:
            adapter: A folder that `PeftModel.save_pretrained` wrote, or a state dict with PEFT's names; it stays as
                it is.
            direction: `to_reordered` for an adapter of the original base model, `to_original` for one that was trained
                on the reordered model.
            save_directory: Where to write the adapter with its config; needs a folder to read from.

        Returns:
            The adapter's tensors for the base model in the other order.

        Raises:
            AdapterError: The adapter is of another model, of a kind that is not known, or the direction is unknown.
            CheckpointError: The folder holds no readable adapter.
        """
        if isinstance(adapter, Mapping):
            if save_directory is not None:
                raise AdapterError(
                    "A state dict has no adapter_config.json to save beside it. Give the adapter's folder, or save the "
                    "returned tensors yourself."
                )
            return remapped(adapter, self.groups, self.orders, direction)
        tensors, metadata = read_adapter(adapter)
        tensors = remapped(tensors, self.groups, self.orders, direction)
        if save_directory is not None:
            config = checkpoint.read_json(Path(adapter) / ADAPTER_CONFIG)
            write_adapter(save_directory, tensors, metadata, config)
        return tensors

    def indices(self, model: nn.Module) -> dict[str, dict[int, Tensor]]:
        """The gather index of each dimension that this reordering moves in a model, by tensor name and dimension.

        Args:
            model: A model of the kind that this reordering was made for; its weights need hold no values.

        Raises:
            OrdersError: The orders do not fit this model.
        """
        groups, model = channel_groups(model), inner_model(model)
        if model_type_of(model) != self.model_type:
            raise OrdersError(
                f"These orders belong to a {self.model_type} model; a {model_type_of(model)} model "
                f"({type(model).__name__}) was given. Use the orders that were saved with this checkpoint."
            )
        check_orders(groups, self.orders)
        return gather_indices(groups, self.orders, {name: t.shape for name, t in named_tensors(model).items()})

    def then(self, later: "Reordering") -> "Reordering":
        """The one reordering that equals this one followed by another of the same model.

        Its scores, settings and proof are those of the later one; scores are in the original order again.

        Args:
            later: What was done to the model that this reordering had made.

        Raises:
            OrdersError: The two are not of the same model.
        """
        if later.model_type != self.model_type or self.groups.shapes_differ(later.groups):
            raise OrdersError(
                f"A reordering of a {later.model_type} model cannot follow one of a {self.model_type} model with other "
                "channels. Compose reorderings of one model."
            )
        groups = ChannelMap(tuple({**self.groups.by_name, **later.groups.by_name}.values()))
        scores = {**self.scores, **scores_before(later.groups, self.orders, later.scores)}
        orders = compose_orders(groups, self.orders, later.orders)
        return dataclasses.replace(later, orders=orders, scores=scores, groups=groups)

    def summary(self) -> dict[str, Any]:
        """What was done, as plain JSON types: axes, channels moved, what was refused, the proof."""
        axes: dict[str, dict[str, int]] = {}
        for axis in self.axes:
            orders = [self.orders[group.name] for group in self.groups if group.axis == axis]
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
            lines.append("  equal function was NOT checked: the model was not run")
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

        Sums that lie there are of an earlier checkpoint and are removed.

        Returns:
            Both paths.
        """
        folder = Path(save_directory)
        checkpoint.remove_file(folder / SUMS_NAME)
        orders = checkpoint.write_bytes(folder / ORDERS_NAME, self.to_bytes())
        return self.config.save_pretrained(folder), orders

    def to_bytes(self) -> bytes:
        """The whole reordering as one safetensors file: orders and scores, the rest as JSON in its metadata."""
        return pack_orders(StoredOrders(self.orders, self.scores, self.groups, self.config, self.summary()))

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
        stored = unpack_orders(data)
        summary, proof = stored.summary, None
        try:
            if summary["verified"]:
                figures = [float(summary[name]) for name in ("max_abs_diff", "relative_diff", "output_scale")]
                proof = Proof(figures[0], figures[1], figures[2], tuple(summary["unproved"]))
            return cls(
                stored.config,
                stored.orders,
                stored.scores,
                stored.groups,
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


def check_writable(model: nn.Module) -> None:
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


def history_of(moved: Any) -> tuple[Reordering, ...] | None:
    """The reorderings that a live model or optimizer went through in this process, None if nothing is known."""
    history: tuple[Reordering, ...] | None = getattr(inner_model(moved), _HISTORY, None)
    return history


def is_in_order(moved: Any, reordering: Reordering) -> bool:
    """Whether a reordering is the last that a live model or optimizer went through in this process."""
    history = history_of(moved) or ()
    return bool(history) and history[-1].digest == reordering.digest


def total_of(moved: Any) -> Reordering | None:
    """All that a live model or optimizer went through as one reordering, None if that is nothing."""
    history = history_of(moved)
    return reduce(Reordering.then, history) if history else None


def remember(moved: Any, history: tuple[Reordering, ...] | None) -> None:
    """Note on a live model or optimizer which reorderings it went through, None if nothing is known."""
    setattr(inner_model(moved), _HISTORY, history)
