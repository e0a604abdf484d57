"""`SubnetworkSpec`: which part of a model to keep."""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from .. import checkpoint
from ..architectures import channel_groups, model_type_of
from ..channels import ChannelGroup, ChannelMap
from ..config import check_format_version
from ..errors import OrdersError, SubnetworkError
from ..orders_file import ORDERS_NAME
from ..permutation import check_orders
from ..reordering import Reordering, history_of, total_of
from ..structure import inner_model
from .allocation import allocate, ranked_worth, spread_evenly
from .costs import Description, ParameterCount, count_flops, describe, inputs_of, measure_latency
from .edits import find_edits, narrowed_model, rigid_groups
from .widths import CUTS, Request, Widths, cut_of, default_multiple, resolve_widths

FORMAT_VERSION = 1
SPEC_NAME = "spp_spec.json"
_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}
# Changes of the loss compare across layers, what flows through channels does not.
_COMPARABLE = ("taylor",)


@dataclass(frozen=True)
class SubnetworkSpec:
    """Which channels of a reordered model to keep: of every axis the first ones.

    A float is a fraction of the channels, an int a count in each block: neurons of a feed-forward layer, key-value
    heads with their query heads, rows of a head. A list has one entry for each group of the axis, in the order of
    `channel_groups(model)`, which for most models is one for each layer.

    Attributes:
        ffn: Neurons of each feed-forward layer, or of each expert.
        heads: Key-value heads of each attention, with the query heads that they serve.
        query_heads: Query heads that share a key-value head.
        qk: Rows of queries and keys inside each head; scores are scaled as before.
        vo: Rows of values inside each head.
        experts: Experts of each mixture, in each group that the router knows.
        hidden: Channels of the residual stream.
        multiple_of: What fractions and budgets round widths to, one for all axes or by axis. None means 8 for widths
            of matrices, 64 where the model lies on an accelerator, and 1 for heads and experts.
        model_type: The model type that lists of widths are for; None means any.
    """

    ffn: Request | None = None
    heads: Request | None = None
    query_heads: Request | None = None
    qk: Request | None = None
    vo: Request | None = None
    experts: Request | None = None
    hidden: Request | None = None
    multiple_of: int | Mapping[str, int] | None = None
    model_type: str | None = None

    def __post_init__(self) -> None:
        for cut in CUTS:
            value = getattr(self, cut)
            if isinstance(value, Sequence) and not isinstance(value, str):
                object.__setattr__(self, cut, tuple(value))
            for one in value if isinstance(value, (list, tuple)) else (() if value is None else (value,)):
                _check_width(cut, one)
            if isinstance(value, (list, tuple)) and not value:
                raise SubnetworkError(f"{cut} is an empty list. Give one width for all, or one for each layer.")
        if self.model_type is not None and not isinstance(self.model_type, str):
            raise SubnetworkError(f"model_type={self.model_type!r} is no name of a model type. Give one, or None.")
        given = self.multiple_of
        each: Mapping[str, Any] = given if isinstance(given, Mapping) else {"ffn": 1 if given is None else given}
        for cut, multiple in each.items():
            if cut not in CUTS or not _is_int(multiple) or multiple < 1:
                raise SubnetworkError(
                    f"multiple_of={given!r} is no positive whole number, nor one by axis of {', '.join(CUTS)}. "
                    "Give multiple_of=8, or multiple_of={'ffn': 64}."
                )

    @classmethod
    def uniform(cls, model: Any, width: float, **changes: Any) -> "SubnetworkSpec":
        """The same fraction of the neurons and of the heads of every layer, as far as the model lets them be cut."""
        _check_width("width", width)
        groups = channel_groups(model)
        rigid = rigid_groups(inner_model(model), groups)
        widths: dict[str, Any] = {}
        for cut in ("ffn", "heads", "query_heads"):
            # Query heads leave with their key-value head, if that is not the only one.
            own = [group for group in groups if cut_of(group) == cut]
            each = [1.0 if group.name in rigid or group.parent else width for group in own]
            if width in each:
                widths[cut] = width if len(set(each)) == 1 else each
        return cls(**{**widths, **changes})

    @classmethod
    def from_budget(
        cls,
        model: Any,
        *,
        params: int | str | None = None,
        fraction: float | None = None,
        flops: float | str | None = None,
        latency_ms: float | None = None,
        axes: Sequence[str] = ("heads", "query_heads", "ffn"),
        within: str | None = None,
        reordering: Reordering | None = None,
        allocation: Literal["global", "even"] | None = None,
        multiple_of: int | Mapping[str, int] | None = None,
        example_inputs: Mapping[str, Any] | None = None,
    ) -> "SubnetworkSpec":
        """The best slice within a budget.

        With scores of the metric `taylor`, which compare across layers, channels are given up where the estimated
        change of the loss per parameter is smallest, in the whole model at once: every layer gets a width of its own.
        Otherwise every layer keeps the same share.

        Args:
            model: The reordered model.
            params: Parameters that may stay, such as `"11M"`.
            fraction: Share of the parameters that may stay.
            flops: Floating-point operations for each token, or sample where inputs are no tokens, such as `"2G"`.
            latency_ms: Milliseconds of a forward pass on `example_inputs`, measured on this machine.
            axes: What may be cut; what the model does not have is left out.
            within: Path of the module whose parameters `params` and `fraction` count; the whole model by default.
            reordering: The reordering with the scores; by default that of the live model, or of the folder that it
                was loaded from.
            allocation: `global` or `even`; None means `global` where scores compare.
            multiple_of: As in the spec.
            example_inputs: Forward arguments to count operations and time on; by default made from the config.

        Raises:
            SubnetworkError: Not exactly one budget is given, it is below the smallest slice, or scores are missing.
        """
        groups, inner = channel_groups(model), inner_model(model)
        budget = _Budget.of(params=params, fraction=fraction, flops=flops, latency_ms=latency_ms)
        for axis in axes:
            if axis not in CUTS:
                raise SubnetworkError(f"axes={tuple(axes)!r} has the unknown axis {axis!r}. Known: {', '.join(CUTS)}.")
        rigid = rigid_groups(inner, groups)
        chosen = [group for group in groups if cut_of(group) in axes and group.name not in rigid]
        if not chosen:
            raise SubnetworkError(f"{type(inner).__name__} has none of the axes {', '.join(axes)}.")
        if within is not None and not any(name.startswith(f"{within}.") for name, _ in inner.named_parameters()):
            raise SubnetworkError(f"within={within!r} is no module of {type(inner).__name__} that holds parameters.")
        reordering = known_reordering(model) if reordering is None else reordering
        worth = _worth(chosen, reordering)
        if allocation == "global" and worth is None:
            raise SubnetworkError(
                "allocation='global' needs scores that compare across layers, and there are none for every axis. Call "
                "apply_spp with metric 'taylor' and calibration data, or give its reordering."
            )
        spec = cls(multiple_of=multiple_of, model_type=model_type_of(inner))
        multiples, count = spec._multiples(inner), ParameterCount(inner, groups, within)
        fits = budget.within(inner, groups, count, example_inputs)
        if worth is not None and allocation != "even":
            widths = allocate(chosen, worth, multiples, count, fits)
        else:
            widths = spread_evenly(chosen, multiples, fits)
        if widths is None:
            raise SubnetworkError(
                f"{budget} is below the smallest slice of {type(inner).__name__} along {', '.join(axes)}. Give more, "
                "or cut further axes."
            )
        return spec.with_widths(groups, widths)

    def with_widths(self, groups: ChannelMap, widths: Widths) -> "SubnetworkSpec":
        """The spec that keeps given widths, as counts for each group.

        Args:
            groups: The groups of the model.
            widths: Channels kept in each block, by name of the groups that are cut.
        """
        lists: dict[str, list[int]] = {}
        for group in groups:
            lists.setdefault(cut_of(group), []).append(widths.get(group.name, group.size))
        cut = {cut_of(groups.by_name[name]) for name in widths}
        found: dict[str, Any] = {
            name: values[0] if len(set(values)) == 1 else tuple(values) for name, values in lists.items() if name in cut
        }
        return dataclasses.replace(self, **found)

    def widths(self, model: Any, groups: ChannelMap | None = None) -> dict[str, int]:
        """Channels that each group of a model keeps in each block, by name of the groups that are cut.

        Raises:
            SubnetworkError: The spec does not fit the model.
        """
        inner = inner_model(model)
        groups = channel_groups(model) if groups is None else groups
        if self.model_type is not None and model_type_of(inner) != self.model_type:
            raise SubnetworkError(
                f"This spec was made for a {self.model_type} model; a {model_type_of(inner)} model "
                f"({type(inner).__name__}) was given. Make one with SubnetworkSpec.from_budget(model, ...)."
            )
        requests = {cut: getattr(self, cut) for cut in CUTS if getattr(self, cut) is not None}
        return resolve_widths(groups, requests, self._multiples(inner), type(inner).__name__)

    def describe(self, model: Any, example_inputs: Mapping[str, Any] | None = None) -> Description:
        """Parameters, bytes and floating-point operations of the slice, per layer and in all.

        The model runs twice on a small input, at full and at the spec's width.

        Args:
            model: The model.
            example_inputs: Forward arguments to count on; by default made from the config.
        """
        groups = channel_groups(model)
        return describe(inner_model(model), groups, self.widths(model, groups), example_inputs)

    def _multiples(self, model: Any) -> dict[str, int]:
        device = device_of(model)
        given = self.multiple_of if isinstance(self.multiple_of, Mapping) else {}
        multiple = None if isinstance(self.multiple_of, Mapping) else self.multiple_of
        return {cut: given.get(cut) or multiple or default_multiple(cut, device) for cut in CUTS}

    def to_dict(self) -> dict[str, Any]:
        """The spec as plain JSON types, with the format's version."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        if isinstance(self.multiple_of, Mapping):
            values["multiple_of"] = dict(self.multiple_of)
        return {"format_version": FORMAT_VERSION, **{name: one for name, one in values.items() if one is not None}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SubnetworkSpec":
        """A spec from what `to_dict` gave.

        Raises:
            CheckpointError: The format is newer than this package reads.
            SubnetworkError: A key or value is not accepted.
        """
        if not isinstance(values, Mapping):
            raise SubnetworkError(f"A spec is a {type(values).__name__}; a JSON object is needed.")
        values = dict(values)
        check_format_version(values.pop("format_version", None), SPEC_NAME)
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise SubnetworkError(f"A spec has the unknown keys {unknown}. Known: {', '.join(sorted(known))}.")
        return cls(**values)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the spec as JSON and return the path."""
        return checkpoint.write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "SubnetworkSpec":
        """Read a spec that `save` wrote.

        Raises:
            CheckpointError: The file is missing, no JSON, or from a newer version.
            SubnetworkError: A key or value is not accepted.
        """
        return cls.from_dict(checkpoint.read_json(path))


def known_reordering(model: Any) -> Reordering | None:
    """What a model went through here, or before it was saved in the folder that it comes from; None if unknown."""
    if history_of(model) is not None:
        return total_of(model)
    folder = Path(str(getattr(inner_model(model), "name_or_path", "")))
    if not (folder / ORDERS_NAME).is_file():
        return None
    reordering = Reordering.from_pretrained(folder)
    try:
        check_orders(channel_groups(model), reordering.orders)
    except OrdersError:
        return None
    return reordering


def device_of(model: Any) -> torch.device:
    """The device of a model's first parameter."""
    device: torch.device = next(model.parameters()).device
    return device


@dataclass(frozen=True)
class _Budget:
    name: str
    value: float

    def __str__(self) -> str:
        return f"{self.name}={self.value:,.6g}"

    @classmethod
    def of(cls, **given: Any) -> "_Budget":
        stated = {name: value for name, value in given.items() if value is not None}
        if len(stated) != 1:
            raise SubnetworkError(
                f"from_budget got {', '.join(stated) or 'no budget'}; exactly one of {', '.join(given)} is needed. "
                "Give params='11M', for example."
            )
        name, value = stated.popitem()
        number = _number(name, value)
        if number <= 0 or (name == "fraction" and number > 1):
            limit = " up to 1" if name == "fraction" else ""
            raise SubnetworkError(f"{name}={value!r} is no number above 0{limit}.")
        return cls(name, number)

    def within(self, model: Any, groups: ChannelMap, count: ParameterCount, inputs: Mapping[str, Any] | None) -> Any:
        """A function that says whether widths are within the budget."""
        if self.name == "params":
            return lambda widths: count(widths) <= self.value
        if self.name == "fraction":
            whole = count({})
            return lambda widths: count(widths) <= self.value * whole
        inputs = inputs_of(model, groups, inputs)
        if self.name == "flops":
            return lambda widths: count_flops(model, groups, widths, inputs) <= self.value

        def is_fast(widths: Widths) -> bool:
            with narrowed_model(model, find_edits(model, groups, widths)):
                return measure_latency(model, inputs).milliseconds <= self.value

        return is_fast


def _worth(groups: Sequence[ChannelGroup], reordering: Reordering | None) -> dict[str, Any] | None:
    """What the channel at each place of each group is worth, None if scores do not compare or are not there."""
    if reordering is None or reordering.config.metric_name not in _COMPARABLE:
        return None
    if any(group.name not in reordering.orders for group in groups):
        return None
    return {
        group.name: ranked_worth(group, reordering.orders[group.name], reordering.scores[group.name])
        for group in groups
    }


def _number(name: str, value: Any) -> float:
    if isinstance(value, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([KMGBT]?)\s*", value.upper())
        if found is None:
            raise SubnetworkError(f"{name}={value!r} is no number such as 11000000, '11M' or '1.5G'.")
        return float(found[1]) * _UNITS[found[2]]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise SubnetworkError(f"{name}={value!r} is no number such as 11000000, '11M' or '1.5G'.")
    return float(value)


def _check_width(cut: str, width: Any) -> None:
    if _is_int(width) and width >= 1:
        return
    if isinstance(width, float) and 0 < width <= 1:
        return
    raise SubnetworkError(
        f"{cut}={width!r} is no width. Give a fraction above 0 and up to 1 as a float, such as 0.5, or a count from 1 "
        "as an int."
    )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
