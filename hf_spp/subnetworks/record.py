"""How a model was cut out of another one, and what is saved of that."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import logging

from .. import checkpoint
from ..config import check_format_version
from ..errors import CheckpointError, SPPError
from ..saving import save_together
from .spec import SubnetworkSpec
from .widths import Widths

logger = logging.get_logger(__name__)

RECORD_NAME = "spp_subnetwork.json"
FORMAT_VERSION = 1
_ATTRIBUTE = "_spp_subnetwork"


@dataclass(frozen=True)
class SubnetworkRecord:
    """How a model was cut out of another one.

    Attributes:
        spec: The spec.
        widths: Channels kept in each block, by name of the groups that were cut.
        model_class: Class of both.
        reason: Why no stock config states the widths; None where one does.
        compensated: Names of the tensors that were refitted.
    """

    spec: SubnetworkSpec
    widths: Widths
    model_class: str
    reason: str | None
    compensated: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The record as plain JSON types, with the format's version."""
        return {
            "format_version": FORMAT_VERSION,
            "spec": self.spec.to_dict(),
            "widths": dict(self.widths),
            "model_class": self.model_class,
            "reason": self.reason,
            "compensated": list(self.compensated),
        }

    @classmethod
    def from_dict(cls, values: Any, name: str) -> "SubnetworkRecord":
        """A record from what `to_dict` gave.

        Args:
            values: The record, from a file.
            name: What to call the file in an error.

        Raises:
            CheckpointError: It is no such record, or from a newer version.
        """
        if not isinstance(values, Mapping):
            raise CheckpointError(f"{name} holds a {type(values).__name__}; a JSON object is needed. Save it again.")
        check_format_version(values.get("format_version"), name)
        widths, compensated = values.get("widths"), values.get("compensated")
        reason, model_class = values.get("reason"), values.get("model_class")
        sound = (
            isinstance(widths, Mapping)
            and all(isinstance(one, int) and not isinstance(one, bool) and one > 0 for one in widths.values())
            and isinstance(compensated, list)
            and all(isinstance(one, str) for one in compensated)
            and isinstance(model_class, str)
            and (reason is None or isinstance(reason, str))
        )
        if not sound:
            raise CheckpointError(f"{name} is damaged: widths, model_class or compensated is missing. Save it again.")
        try:
            spec = SubnetworkSpec.from_dict(values.get("spec", {}))
        except SPPError as error:
            raise CheckpointError(f"The spec in {name} is damaged: {error}") from error
        return cls(spec, dict(widths or {}), str(model_class), reason, tuple(compensated or ()))


class SubnetworkSaving:
    """The `save_pretrained` of a sub-network, which says how it was cut beside the weights.

    Args:
        model: The sub-network.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> Any:
        """Save the model into a folder; arguments are those of the model's own `save_pretrained`."""
        record = record_of(self.model)
        if record is None:
            return type(self.model).save_pretrained(self.model, save_directory, *args, **kwargs)
        result = save_together(
            self.model,
            save_directory,
            args,
            kwargs,
            lambda folder: checkpoint.write_json(folder / RECORD_NAME, record.to_dict()),
        )
        if record.reason is not None:
            logger.warning(
                f"No config of transformers states the widths of this {record.model_class} ({record.reason}). Load "
                "the folder with hf_spp.load_subnetwork."
            )
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return SubnetworkSaving(memo.get(id(self.model)) or copy.deepcopy(self.model, memo))

    def __reduce__(self) -> Any:
        return SubnetworkSaving, (self.model,)


def record_of(model: Any) -> SubnetworkRecord | None:
    """How a model was cut out of another one, None if it was not."""
    record: SubnetworkRecord | None = getattr(model, _ATTRIBUTE, None)
    return record


def note_record(model: Any, record: SubnetworkRecord) -> None:
    """Note on a model how it was cut out of another one, so that it is saved with that."""
    setattr(model, _ATTRIBUTE, record)
    if hasattr(model, "save_pretrained"):
        model.save_pretrained = SubnetworkSaving(model)
