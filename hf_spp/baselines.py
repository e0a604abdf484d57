"""Baselines of the source experiment that are no reordering: they change what the model computes."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .apply import gather_tensors, named_tensors
from .architectures import channel_groups, model_type_of
from .errors import IllegalAxisError
from .saliency import channel_sums


def pruning_rank(model: PreTrainedModel) -> None:
    """Rank query rows and key rows by ordinary magnitude pruning, in place.

    The rows of the whole query matrix are sorted by their L1 norm, those of the key matrix by theirs, each on its own
    and across heads. Query and key rows no longer meet their partners, so attention breaks. This is what the paper
    compares with; it is not meant for use.

    Args:
        model: A model whose query and key rows may move, so without rotary position embedding.

    Raises:
        IllegalAxisError: The model has no such rows.

    Reference:
        The baseline "pruning rank" of arXiv:2310.00247.
    """
    groups = channel_groups(model).select(("qk",))
    if len(groups) == 0:
        raise IllegalAxisError(
            f"{type(model).__name__} (model_type {model_type_of(model)!r}) has no query and key rows that may move, "
            "so the baseline 'pruning-rank' is not defined for it. Leave this method out."
        )
    tensors = named_tensors(model)
    ranks: dict[tuple[str, int], Tensor] = {}
    indices: dict[str, dict[int, Tensor]] = {}
    for group in groups:
        for member in group.members:
            if member.role != "producer":
                continue
            module, start = member.tensor.rpartition(".")[0], member.span[0] if member.span else 0
            rows = member.positions(tensors[member.tensor].shape[member.dim], group).flatten().sort().values
            if member.is_matrix:
                norms = channel_sums(tensors[member.tensor], member.dim, power=1)[rows]
                ranks[module, start] = torch.sort(norms, descending=True, stable=True).indices
            index = torch.arange(tensors[member.tensor].shape[member.dim])
            index = indices.setdefault(member.tensor, {}).setdefault(member.dim, index)
            index[rows] = rows[ranks[module, start]]
    gather_tensors(tensors, indices)
