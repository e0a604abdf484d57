"""What `trainer_state.json` keeps of a run with reorderings, validated on reading."""

import base64
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import checkpoint
from .errors import CallbackError, CheckpointError
from .reordering import Reordering

STATE_NAME = "trainer_state.json"
# Orders are hardly smaller than their bytes, the JSON beside them shrinks to a tenth.
_LARGEST_RATIO = 100


@dataclass(frozen=True)
class StoredState:
    """What a checkpoint keeps of the callback.

    Attributes:
        step: The step of the checkpoint that it was written for.
        evaluations: How many evaluations there had been.
        adapters: In which order adapters were saved, `original` or `reordered`.
        beside: Names of the plain model's tensors that were saved with the adapters.
        fingerprint: Of the weights that were saved, None where they are divided among processes.
        reordering: From the original order to that of the model, None before the first reordering.
    """

    step: int
    evaluations: int
    adapters: str
    beside: tuple[str, ...]
    fingerprint: str | None
    reordering: Reordering | None


def pack_text(data: bytes) -> str:
    """Bytes as text that fits into JSON."""
    return base64.b64encode(zlib.compress(data)).decode()


def read_state(folder: Path) -> StoredState | None:
    """What a checkpoint's folder keeps of a run with reorderings, None if it was one without.

    Raises:
        CheckpointError: The state of the trainer is missing or damaged.
        CallbackError: That of the callback is damaged.
        OrdersError: An order in it is no permutation.
    """
    # Trainer writes the losses of a run that diverged as they are.
    state = checkpoint.read_json(folder / STATE_NAME, finite=False)
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{folder / STATE_NAME} holds no JSON object. Resume from an earlier checkpoint.")
    return stored_state(state.get("stateful_callbacks"))


def stored_state(entries: Any) -> StoredState | None:
    """What the states of a checkpoint's callbacks keep of a run with reorderings, None if it was one without.

    Raises:
        CallbackError: The state is damaged.
        CheckpointError: The reordering in it is damaged.
        OrdersError: An order in it is no permutation.
    """
    values = entries.values() if isinstance(entries, Mapping) else ()
    attributes = [value.get("attributes") for value in values if isinstance(value, Mapping)]
    # A subclass has its own name as the key.
    found = next((one.get("stored") for one in attributes if isinstance(one, Mapping) and "given_before" in one), None)
    if not found:
        return None
    try:
        return StoredState(
            int(found["step"]),
            int(found["evaluations"]),
            str(found["adapters"]),
            tuple(map(str, found["beside"])),
            found["fingerprint"],
            None if found["orders"] is None else Reordering.from_bytes(_unpacked(found["orders"])),
        )
    except (KeyError, TypeError, ValueError, OverflowError, zlib.error) as error:
        raise CallbackError(
            f"The state of SPPCallback in {STATE_NAME} is damaged ({error!r}). Resume from an earlier checkpoint."
        ) from error


def _unpacked(text: str) -> bytes:
    packed = base64.b64decode(text, validate=True)
    unpacking = zlib.decompressobj()
    data = unpacking.decompress(packed, _LARGEST_RATIO * len(packed))
    if not unpacking.eof:
        raise ValueError("the packed orders have no end")
    return data
