"""What a reordered checkpoint holds, without reading its weights."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from . import hub
from .config import CONFIG_NAME
from .fetching import check_reordered
from .loading import check_folder, load_config
from .orders_file import ORDERS_NAME
from .reordering import Reordering
from .subnetworks.loading import published_widths
from .subnetworks.prefix_layout import PREFIX_INDEX
from .subnetworks.record import RECORD_NAME
from .subnetworks.weight_files import open_folder, open_repository
from .sums import SUMS_NAME
from .tensor_files import INDEX_NAME

_READ = ("config.json", CONFIG_NAME, ORDERS_NAME, RECORD_NAME, INDEX_NAME, PREFIX_INDEX, SUMS_NAME)


@dataclass(frozen=True)
class CheckpointInfo:
    """What a reordered checkpoint holds.

    Attributes:
        name: Its folder or Hub id.
        commit: The commit of a repository, None for a folder.
        reordering: What was done to the model.
        parameters: Number of stored weights.
        files: Number of weight files.
        bytes: Their size.
        dtypes: How many stored weights there are of each type, as safetensors names it.
        widths: Names of the published widths.
        prefix_layout: Whether it holds copies from which any width is downloaded alone.
        summed: Whether it has sums of its files.
    """

    name: str
    commit: str | None
    reordering: Reordering
    parameters: int
    files: int
    bytes: int
    dtypes: Mapping[str, int]
    widths: tuple[str, ...]
    prefix_layout: bool
    summed: bool


def inspect_checkpoint(
    repo_or_dir: str | os.PathLike[str], *, revision: str | None = None, token: str | bool | None = None
) -> CheckpointInfo:
    """Say what a reordered checkpoint holds; of its weights only the headers of the files are read.

    Args:
        repo_or_dir: A folder, or a Hub id.
        revision: Branch, tag or commit of a repository.
        token: Hub token, `True` for the stored one, `False` for none.

    Raises:
        CheckpointError: It holds no orders, or a file is missing or damaged.
        OrdersError: An order is no permutation.
        HubError: The repository cannot be read.
    """
    check_folder(repo_or_dir)
    name, commit, folder = os.fspath(repo_or_dir), None, Path(repo_or_dir)
    if not folder.is_dir():
        commit = hub.resolve_commit(name, revision, token)
        found = hub.find_files(name, _READ, revision=commit, token=token)
        folder = next((path.parent for path in found.values()), folder)
    load_config(folder)
    check_reordered(folder, name)
    reordering = Reordering.from_pretrained(folder)
    weights = open_folder(folder) if commit is None else open_repository(name, folder, token)
    dtypes: dict[str, int] = {}
    for places in weights.places.values():
        tensor = places[0].tensor
        dtypes[tensor.dtype] = dtypes.get(tensor.dtype, 0) + math.prod(tensor.shape)
    names = hub.list_files(folder if commit is None else name, commit, token)
    return CheckpointInfo(
        name,
        commit,
        reordering,
        sum(dtypes.values()),
        len(weights.sizes),
        sum(weights.sizes),
        dtypes,
        tuple(published_widths(names)),
        PREFIX_INDEX in names,
        SUMS_NAME in names,
    )
