"""Reorder a checkpoint that is larger than memory: its files are read and written tensor by tensor, never loaded."""

import dataclasses
import os
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from . import folders
from .architectures import channel_groups
from .channels import ChannelMap
from .config import WEIGHT_METRICS, SPPConfig
from .conversion import complete_checkpoint
from .errors import CalibrationError, SPPConfigError
from .permutation import compose_orders, gather_indices, invert_orders, salient_order, scores_before
from .reordering import Reordering
from .saliency import weight_scores
from .stored_checkpoint import StoredCheckpoint, open_checkpoint
from .tensor_bytes import return_large_memory
from .tensor_stream import LiveTensors, Progress, TensorStream
from .transform import Plan, describe, select
from .unfinished_work import Job, fingerprint_of, work_folder


def reorder_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    config: SPPConfig | None = None,
    *,
    reordering: Reordering | str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Reordering:
    """Write a reordered copy of a checkpoint of any size, which is never loaded.

    Every tensor of the result is, bit for bit, what `apply_spp` and saving would have made of it. Shards, names, dtypes
    and metadata stay as they are, and other files are copied; weights that the model's class does not use are left out,
    as are weights in other formats. Of the weights one tensor is in memory at a time. An earlier reordering of the
    source is undone.

    The model is not run, so the equal function is not proved: the result's `proof` is None, and the card says so.

    The work lies beside the target, in a hidden folder, until it is whole. If the process was killed, the same call
    goes on: shards that are finished are compared with their sums and kept. If source or settings have changed
    meanwhile, it begins anew.

    Args:
        source: A folder or a Hub id.
        target: Folder to make.
        config: What to reorder and how; None means `SPPConfig()`, by `l1`. Metrics that need calibration data are not
            possible here.
        reordering: Orders to apply instead, of any metric, for the source in its original order: a reordering or a
            folder or Hub id that holds one.
        overwrite: Whether a folder with content may be replaced.
        progress: Called now and then with the bytes that were read or written, and with those there will be.

    Returns:
        The reordering, without a proof.

    Raises:
        CheckpointError: Source files are damaged, or the target may not be replaced or cannot be written.
        UnsupportedModelError: The checkpoint is quantized, or is converted while loading in a way that is not known.
        CalibrationError: The metric needs more than weights.
        IllegalAxisError: A configured axis may not move in this model.
        NonFiniteWeightsError: A weight is NaN or infinite.
        OrdersError: The given orders do not fit the model.
    """
    config = _checked_settings(config, reordering)
    place = Path(os.path.realpath(target))
    folders.check_replaceable(place, overwrite=overwrite)
    return_large_memory()
    if reordering is not None and not isinstance(reordering, Reordering):
        reordering = Reordering.from_pretrained(reordering)
    origin = open_checkpoint(source)
    with work_folder(place) as work, ExitStack() as stack:
        files = TensorStream(origin, stack, progress)
        job = Job(work, fingerprint_of(origin, config, reordering))
        done = job.resume()
        if done is None:
            done = job.begin(_decide(files, config) if reordering is None else _given(origin, reordering))
        indices = _moves(origin, done)
        files.scored = _scored(origin, done, given=reordering is not None)
        for name in origin.stored:
            origin.names.gather(name, indices)  # refuses now what cannot be carried over
        sums = job.write(files, done, indices)
        complete_checkpoint(job.built, done, beside=origin.beside, source=source, sums=sums)
        folders.place_folder(job.built, place)
    return done


def _checked_settings(config: SPPConfig | None, reordering: Any) -> SPPConfig:
    if config is not None and reordering is not None:
        raise SPPConfigError(
            "reorder_checkpoint got a config and a reordering, which has orders already. Accepted: one of them. Leave "
            "one out."
        )
    config = SPPConfig() if config is None else config
    if not isinstance(config, SPPConfig):
        raise SPPConfigError(f"config is {config!r}; an SPPConfig is needed. Give SPPConfig(metric='l1', …).")
    if config.needs_calibration or callable(config.metric):
        raise CalibrationError(
            f"Metric {config.metric_name!r} needs the model in memory, and this checkpoint is not loaded. Accepted: "
            f"{', '.join(WEIGHT_METRICS)}, or orders that were made elsewhere, with reordering=…."
        )
    return config


def _decide(files: TensorStream, config: SPPConfig) -> Reordering:
    """Score the channels of a checkpoint and order them."""
    origin = files.origin
    groups, config = select(origin.model, config)
    metric = cast(str, config.metric)
    read = list(dict.fromkeys(member.tensor for group in groups for member in group.scored_members))
    if metric != "random":
        files.expect(sum(origin.stored[one].nbytes for name in read for one in origin.names.layout(name).sources))
    scores = weight_scores(groups, LiveTensors(files, read), metric, config.seed)
    if origin.earlier is not None and metric != "random":
        scores = scores_before(groups, origin.earlier.orders, scores)
    orders = {name: salient_order(values) for name, values in scores.items()}
    planned = Plan(groups, dataclasses.replace(config, verify=False), scores, orders)
    return describe(origin.model, planned, origin.dtype)


def _given(origin: StoredCheckpoint, reordering: Reordering) -> Reordering:
    """Given orders, for the record of this checkpoint."""
    reordering.indices(origin.model)  # refuses orders that do not fit
    groups = [group for group in channel_groups(origin.model) if group.name in reordering.orders]
    config = dataclasses.replace(reordering.config, verify=False)
    planned = Plan(ChannelMap(tuple(groups), reordering.refused), config, reordering.scores, reordering.orders)
    return describe(origin.model, planned, origin.dtype)


def _moves(origin: StoredCheckpoint, reordering: Reordering) -> dict[str, dict[int, Tensor]]:
    """The gather of the model's tensors that brings the source, as it lies in its files, into the new order."""
    groups, orders = channel_groups(origin.model), reordering.orders
    if origin.earlier is not None:
        origin.earlier.indices(origin.model)  # refuses orders that do not fit
        orders = compose_orders(groups, invert_orders(groups, origin.earlier.orders), orders)
    return gather_indices(groups, orders, origin.shapes)


def _scored(origin: StoredCheckpoint, reordering: Reordering, *, given: bool) -> Collection[str]:
    """The stored tensors whose values need no check: those that a norm has read, or all where orders were given."""
    if given:
        return set(origin.stored)
    if reordering.config.metric == "random":
        return ()
    read = {member.tensor for group in reordering.groups for member in group.scored_members}
    return {source for name in read for source in origin.names.layout(name).sources}
