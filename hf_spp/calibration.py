"""Scores from calibration data: what flows through the channels when the model runs on a user's batches.

One pass over the data. A channel is watched where it is read, at the input of the layer that consumes it; query and key
rows, which no layer consumes, at the output of their projections. What experts and nn.MultiheadAttention read and write
inside is watched there. Memory does not grow with the data.
"""

from collections.abc import Iterable, Mapping, Sized
from contextlib import AbstractContextManager
from itertools import islice
from typing import Any, Protocol

from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from .activations import ActivationWatch
from .channels import ChannelGroup
from .errors import CalibrationError
from .forward import evaluation_mode, fixed_rng, unfused
from .gradients import TaylorWatch


class Watch(Protocol):
    """Collects what a metric needs while the model runs."""

    def attached(self) -> AbstractContextManager[None]:
        """Watch every run of the model inside the block."""

    def run(self, batch: Mapping[str, Any]) -> None:
        """Run the model on a batch."""

    def scores(self, group: ChannelGroup) -> Tensor:
        """Scores of a group's channels, `[blocks, size]`."""


def calibrated_scores(
    model: PreTrainedModel,
    groups: Iterable[ChannelGroup],
    batches: Iterable[Mapping[str, Any]],
    metric: str,
    *,
    max_batches: int | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Score channels by running the model on calibration data, in evaluation mode.

    `activation`: root mean square of the channel's activation times the L2 norm of the weights that read it; for query
    and key rows the product of both activations' root mean squares, their share in the attention logits.
    `taylor`: root mean square, over samples, of the first-order change of the loss when the channel is zeroed,
    `sum over tokens of activation * dloss/dactivation`. The loss is the model's own if the batch has labels; otherwise
    cross-entropy with the model's own most likely outputs or, for a model without logits, a seeded random projection
    of its outputs.

    The channel of an expert is all of its neurons; means are over the tokens that reach its layer, so an expert that no
    token reaches scores zero. Where experts or nn.MultiheadAttention are among the groups, `taylor` takes one sample
    at a time and holds the gradients of their weights.

    Args:
        model: The model; parameters and gradients stay untouched, frozen models work.
        groups: The groups to score.
        batches: Any iterable of dict batches of forward arguments: a DataLoader, a list, a generator.
        metric: `activation` or `taylor`.
        max_batches: Read at most this many batches; None reads all.
        seed: Seed of the random projection.

    Returns:
        Scores by group name, `[blocks, size]`, float64, on the CPU.

    Raises:
        CalibrationError: There is no batch, a batch is no mapping, the model does not run on it, or what flows through
            a group was not seen.

    Reference:
        Activation times weight norm: Sun et al., Wanda, arXiv:2306.11695. First-order Taylor: Molchanov et al.,
        arXiv:1906.10771, with gates as in Michel et al., arXiv:1905.10650.
    """
    if not isinstance(batches, Iterable):
        raise CalibrationError(
            f"The calibration data is a {type(batches).__name__}; an iterable of dict batches of forward arguments is "
            "needed. Give a DataLoader or a list of batches."
        )
    groups = tuple(groups)
    watch: Watch = ActivationWatch(model, groups) if metric == "activation" else TaylorWatch(model, groups, seed)
    total = max_batches
    if isinstance(batches, Sized):
        total = len(batches) if max_batches is None else min(len(batches), max_batches)
    count = 0
    # A DataLoader draws the seed of its workers from the global generator, and some models draw in evaluation mode.
    with evaluation_mode(model), unfused(model), watch.attached(), fixed_rng(model, seed):
        for batch in logging.tqdm(
            islice(batches, max_batches), total=total, desc=f"Calibrating ({metric})", leave=False
        ):
            check_batch(batch)
            try:
                watch.run(batch)
            except CalibrationError:
                raise
            except Exception as error:  # whatever a forward raises only means that the batch does not suit it
                raise CalibrationError(
                    f"{type(model).__name__} does not run on calibration batch {count} with the arguments "
                    f"{sorted(batch)}: {error}. Give dict batches of forward arguments."
                ) from error
            count += 1
    if count == 0:
        raise CalibrationError(
            f"The calibration data holds no batch; metric {metric!r} needs at least one. Give a non-empty iterable of "
            "dict batches (a generator that was read before is empty)."
        )
    scores = {group.name: watch.scores(group) for group in groups}
    for name, values in scores.items():
        if not bool(values.isfinite().all()):
            raise CalibrationError(
                f"Metric {metric!r} is NaN or infinite for group {name}. Check the weights and the calibration data "
                "for such values, or run the model in float32."
            )
    return scores


def check_batch(batch: Any) -> None:
    """Refuse what is no batch of calibration data.

    Raises:
        CalibrationError: It is no dict.
    """
    if not isinstance(batch, Mapping):
        raise CalibrationError(
            f"A calibration batch is a {type(batch).__name__}; a dict of forward arguments is needed. "
            "Use a DataLoader whose collator returns dicts, or put a single dict into a list."
        )
