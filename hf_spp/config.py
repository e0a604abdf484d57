"""What to reorder and how: the configuration every other part reads."""

import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import checkpoint, hub
from .errors import CheckpointError, SPPConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from .channels import ChannelGroup

AXES = ("qk", "vo", "heads", "ffn", "experts", "hidden")
WEIGHT_METRICS = ("l1", "l2", "random")
CALIBRATED_METRICS = ("activation", "taylor")
METRICS = WEIGHT_METRICS + CALIBRATED_METRICS
CONFIG_NAME = "spp_config.json"
FORMAT_VERSION = 1

Metric = str | Callable[["ChannelGroup", Sequence["Tensor"]], "Tensor"]


@dataclass(frozen=True)
class SPPConfig:
    """Settings of one reordering.

    Attributes:
        axes: Axes to reorder, of `qk`, `vo`, `heads`, `ffn`, `experts`, `hidden`. None means every axis that is legal
            for the model except `hidden`, which changes the meaning of hidden states and must be asked for by name.
        towers: Parts of the model to reorder, as paths of modules below the base model: `("vision_tower",)` of a
            vision-language model, `("encoder",)` of an encoder-decoder. None means all; `channel_groups(model).towers`
            lists the topmost.
        metric: How channels are scored. `l1` and `l2` use the weights, `random` draws an order from `seed`,
            `activation` and `taylor` need calibration data. None picks `activation` when calibration data is given
            and `l1` otherwise; the reordering's own config then states which. A callable gets the group and its
            weight tensors viewed as `[blocks, size, ...]` and returns scores `[blocks, size]`; it saves by name only.
        calibration_batches: At most this many batches are read from the calibration data; None reads all of it.
        verify: Whether the model is run before and after to prove that its function is equal.
        tolerance: Largest allowed max|Δ| relative to the output's scale. None means 1e-10 in float64, 1e-4 in
            float32, 2e-2 in float16 and 8e-2 in bfloat16, whose rounding alone reaches these.
        seed: Seed of the `random` metric, of the proof's inputs and of label-free calibration targets.
    """

    axes: tuple[str, ...] | None = None
    towers: tuple[str, ...] | None = None
    metric: Metric | None = None
    calibration_batches: int | None = 32
    verify: bool = True
    tolerance: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.axes is not None:
            if isinstance(self.axes, str) or not isinstance(self.axes, Sequence):
                raise SPPConfigError(f"axes={self.axes!r} is no tuple of axis names. Give axes=('qk', 'ffn').")
            object.__setattr__(self, "axes", tuple(self.axes))
            self._check_axes(self.axes)
        if self.towers is not None:
            named = isinstance(self.towers, Sequence) and not isinstance(self.towers, str)
            if not named or not self.towers or not all(isinstance(tower, str) and tower for tower in self.towers):
                raise SPPConfigError(
                    f"towers={self.towers!r} is no tuple of module paths. Give towers=('encoder',), or None for all."
                )
            object.__setattr__(self, "towers", tuple(self.towers))
        if not (self.metric is None or callable(self.metric) or self.metric in METRICS):
            raise SPPConfigError(
                f"metric={self.metric!r} is unknown. Known: {', '.join(METRICS)}, or a callable "
                "(group, weights) -> scores. Set SPPConfig(metric='l1') for the paper's metric."
            )
        if self.calibration_batches is not None and not _is_int(self.calibration_batches, least=1):
            raise SPPConfigError(
                f"calibration_batches={self.calibration_batches!r} is no positive whole number. "
                "Give one, or None to read all of the calibration data."
            )
        if not isinstance(self.verify, bool):
            raise SPPConfigError(f"verify={self.verify!r} is neither True nor False.")
        if self.tolerance is not None and not (
            isinstance(self.tolerance, (int, float))
            and not isinstance(self.tolerance, bool)
            and 0 < self.tolerance <= sys.float_info.max
        ):
            raise SPPConfigError(f"tolerance={self.tolerance!r} is no positive number. Give one, or None.")
        if not _is_int(self.seed, least=0) or self.seed >= 2**63:
            raise SPPConfigError(f"seed={self.seed!r} is no whole number from 0 up to 2**63.")

    @staticmethod
    def _check_axes(axes: tuple[str, ...]) -> None:
        if not axes:
            raise SPPConfigError(
                f"axes=() names no axis, so nothing would move. Give some of {', '.join(AXES)}, or None for every "
                "legal axis but hidden."
            )
        for axis in axes:
            if axis not in AXES:
                raise SPPConfigError(f"axes={axes!r} has the unknown axis {axis!r}. Known axes: {', '.join(AXES)}.")
        if len(set(axes)) != len(axes):
            raise SPPConfigError(f"axes={axes!r} names an axis twice. Name each once.")

    @classmethod
    def raffm(cls, **changes: Any) -> "SPPConfig":
        """The paper's setting: query and key rows of each head, by the mean of their L1 norms.

        Reference:
            Yu, Muñoz and Jannesari, arXiv:2310.00247.
        """
        return cls(**{"axes": ("qk",), "metric": "l1", **changes})

    @property
    def metric_name(self) -> str | None:
        """The metric's name; a callable gives its `__name__`."""
        if self.metric is None or isinstance(self.metric, str):
            return self.metric
        return getattr(self.metric, "__name__", type(self.metric).__name__)

    @property
    def needs_calibration(self) -> bool:
        """Whether the metric is computed from calibration data."""
        return isinstance(self.metric, str) and self.metric in CALIBRATED_METRICS

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON types, with the format's version."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in ("axes", "towers"):
            values[name] = None if values[name] is None else list(values[name])
        if callable(self.metric):
            values["metric"] = {"callable": self.metric_name}
        return {"format_version": FORMAT_VERSION, **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SPPConfig":
        """Settings from what `to_dict` gave.

        A callable metric is stored by name only; it comes back as a function that raises when it is used.

        Raises:
            CheckpointError: The format is newer than this package reads.
            SPPConfigError: A key or value is not accepted.
        """
        if not isinstance(values, Mapping):
            raise SPPConfigError(f"{CONFIG_NAME} holds a {type(values).__name__}; a JSON object is needed.")
        values = dict(values)
        check_format_version(values.pop("format_version", None), CONFIG_NAME)
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise SPPConfigError(f"{CONFIG_NAME} has unknown keys {unknown}. Known: {', '.join(sorted(known))}.")
        metric = values.get("metric")
        if isinstance(metric, Mapping):
            values["metric"] = _missing_callable(str(metric.get("callable")))
        for name in ("axes", "towers"):
            if isinstance(values.get(name), list):
                values[name] = tuple(values[name])
        return cls(**values)

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> Path:
        """Write `spp_config.json` into a folder and return its path."""
        return checkpoint.write_json(Path(save_directory) / CONFIG_NAME, self.to_dict())

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> "SPPConfig":
        """Read `spp_config.json` from a folder or a Hub repo.

        Raises:
            CheckpointError: The file is missing, no JSON, or from a newer version.
            HubError: The repo cannot be reached.
        """
        path = hub.resolve_file(pretrained_model_name_or_path, CONFIG_NAME, revision=revision, token=token)
        return cls.from_dict(checkpoint.read_json(path))


def check_format_version(version: Any, name: str) -> None:
    """Refuse a file whose format this package does not read.

    Raises:
        CheckpointError: `version` is no whole number, or newer than this package reads.
    """
    if not _is_int(version, least=1):
        raise CheckpointError(f"{name} states format_version {version!r}; a number from 1 up is needed. Save it again.")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{name} has format_version {version}; this hf_spp reads up to {FORMAT_VERSION}. Upgrade hf-spp."
        )


def _is_int(value: Any, *, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _missing_callable(name: str) -> Metric:
    def missing(group: "ChannelGroup", weights: Sequence["Tensor"]) -> "Tensor":
        raise SPPConfigError(
            f"The metric {name!r} was a Python callable and is stored by name only. Pass it again: "
            "dataclasses.replace(config, metric=your_function)."
        )

    missing.__name__ = name
    return missing
