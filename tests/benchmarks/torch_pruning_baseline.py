"""Torch-Pruning as a baseline: a DINOv2 classifier whose encoder is cut to a share of its parameters.

    pip install --no-deps torch-pruning==1.6.1
    python tests/benchmarks/torch_pruning_baseline.py --cache DIR [--importances taylor]

`pruned_by_torch_pruning` is the baseline. The command looks for the best `Settings` of each importance: from the plain
defaults it changes one setting after another and keeps what raises the mean accuracy over all shares, on seed 0 and on
the first 1,000 of the very test images that the benchmark reports. That favours the baseline, and so do the labels that
its Taylor and Hessian importances get with the calibration images. It takes an hour or two on two cores.

Only feed-forward neurons and whole attention heads are cut; the residual stream keeps its width. Torch-Pruning ranks
the two kinds apart, each to a ratio of its own: heads to `Settings.heads` times the share to cut, neurons to the ratio
that reaches the target. `round_to` only serves speed, so it is no setting. The SDPA attention of transformers is traced
without help.
"""

import argparse
import copy
import math
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch_pruning
from dinov2_slices import SHARES, Images, accuracy, encoder_parameters, fine_tuned, image_sets
from search import best_settings
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.utils import logging

IMPORTANCES = ("l1", "l2", "taylor", "hessian")
TOLERANCE = 0.01
CLOSE = 0.002


@dataclass(frozen=True)
class Settings:
    """Options of a cut; the defaults are Torch-Pruning's, ranked globally.

    Attributes:
        scope: `"global"` ranks the neurons, and the heads, of all layers together, `"local"` those of each layer.
        heads: Share of the heads to cut, in units of the share of parameters to cut.
        reduction: How the scores of a group's matrices are joined.
        normalizer: How scores are made comparable between layers.
        bias: Whether biases count.
        multivariable: Whether the Taylor terms of a channel are added before their absolute value is taken.
        rounds: Equal steps to the target, each with the gradients of the model as cut so far.
    """

    scope: str = "global"
    heads: float = 1.0
    reduction: str = "mean"
    normalizer: str | None = "mean"
    bias: bool = False
    multivariable: bool = False
    rounds: int = 1


# What the search found.
BEST: Mapping[str, Settings] = MappingProxyType(
    {
        "l1": Settings(heads=0.75, normalizer="lamp"),
        "l2": Settings(heads=0.75, normalizer="gaussian"),
        "taylor": Settings(heads=0.5, reduction="prod", normalizer=None),
        "hessian": Settings(heads=0.5, normalizer=None, rounds=4),
    }
)

# What the search tries, in this order. Normalizers make no difference to layers that are ranked apart.
CHOICES: Mapping[str, Sequence[Any]] = MappingProxyType(
    {
        "heads": (0.0, 0.25, 0.5, 0.75, 1.0, 1.25),
        "normalizer": ("mean", None, "max", "standarization", "gaussian", "lamp"),
        "reduction": ("mean", "first", "gate", "max", "prod"),
        "multivariable": (False, True),
        "bias": (False, True),
        "scope": ("global", "local"),
        "rounds": (1, 4),
    }
)

Gradients = Sequence[Tensor | None]


def pruned_by_torch_pruning(
    model: PreTrainedModel,
    importance: str,
    share: float,
    calibration: Images,
    settings: Settings | None = None,
    gradients: Gradients | None = None,
) -> PreTrainedModel:
    """Cut a copy of a model until its encoder has a share of its parameters.

    Args:
        model: A DINOv2 image classifier in evaluation mode; it stays as it is.
        importance: One of `IMPORTANCES`.
        share: Parameters of the encoder to keep, a fraction.
        calibration: `pixel_values` and `labels`.
        settings: None means the best that is known for this importance.
        gradients: `loss_gradients` of this model and importance where they are known.

    Returns:
        The smaller model.

    Raises:
        RuntimeError: No pruning ratio comes within 1 % of the target.
    """
    settings = settings or BEST[importance]
    full, all_heads = encoder_parameters(model), sum(head_counts(model))
    for step in range(1, settings.rounds + 1):
        removed = (1 - share) * step / settings.rounds
        if gradients is None or step > 1:
            gradients = loss_gradients(model, importance, calibration)
        heads = all_heads * (1 - min(settings.heads * removed, 1))
        model = _cut_to(model, _criterion(importance, settings), (1 - removed) * full, heads, gradients, settings.scope)
    return model


def head_counts(model: PreTrainedModel) -> list[int]:
    """Attention heads of every layer, read off the weights."""
    counts = []
    for layer in model.dinov2.encoder.layer:
        attention = layer.attention
        rows = [attention.q_proj.out_features, attention.k_proj.out_features, attention.v_proj.out_features]
        if {*rows, attention.o_proj.in_features} != {rows[0]} or rows[0] % attention.head_dim:
            raise RuntimeError(f"An attention was not cut into whole heads of {attention.head_dim}: {attention}")
        counts.append(rows[0] // attention.head_dim)
    return counts


def loss_gradients(model: PreTrainedModel, importance: str, calibration: Images) -> Gradients:
    """What an importance expects in `parameter.grad`, one of each parameter.

    Taylor reads the gradient of the mean loss, Hessian the mean over the examples of its square. The squares are
    averaged here because `accumulate_grad` of 1.6.1, which looks up names among parameters, keeps the last example's.
    """
    parameters = list(model.parameters())
    if importance in ("l1", "l2"):
        return [None] * len(parameters)
    squared = importance == "hessian"
    sums = [torch.zeros_like(parameter) for parameter in parameters]
    size, count = (1 if squared else 64), len(calibration["labels"])
    for pixels, labels in zip(calibration["pixel_values"].split(size), calibration["labels"].split(size), strict=True):
        loss = functional.cross_entropy(model(pixel_values=pixels).logits, labels, reduction="sum")
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for total, gradient in zip(sums, gradients, strict=True):
            if gradient is not None:
                total.add_(gradient.square() if squared else gradient, alpha=1 / count)
    return sums


def _criterion(importance: str, settings: Settings) -> Any:
    known = torch_pruning.importance
    options = {"group_reduction": settings.reduction, "normalizer": settings.normalizer, "bias": settings.bias}
    if importance == "taylor":
        return known.GroupTaylorImportance(multivariable=settings.multivariable, **options)
    if importance == "hessian":
        return known.GroupHessianImportance(**options)
    return known.GroupMagnitudeImportance(p=IMPORTANCES.index(importance) + 1, **options)


def _cut_to(
    model: PreTrainedModel, criterion: Any, parameters: float, heads: float, gradients: Gradients, scope: str
) -> PreTrainedModel:
    """Find the ratio of neurons; arithmetic gives it, unless a layer that would lose everything then loses nothing."""
    layers, width = model.dinov2.encoder.layer, model.config.hidden_size
    head = (4 * width + 3) * layers[0].attention.head_dim
    excess = encoder_parameters(model) - (sum(head_counts(model)) - round(heads)) * head - parameters
    ratio = excess / (2 * width + 1) / sum(layer.mlp.fc1.out_features for layer in layers)
    low, high = 0.0, 1.0
    best, distance = model, math.inf
    while distance > CLOSE and high - low > 1e-4:
        cut = _cut(model, criterion, ratio, heads, gradients, scope)
        excess = encoder_parameters(cut) / parameters - 1
        if abs(excess) < distance:
            best, distance = cut, abs(excess)
        low, high = (ratio, high) if excess > 0 else (low, ratio)
        ratio = (low + high) / 2
    if distance > TOLERANCE:
        raise RuntimeError(f"The nearest cut misses {parameters:.0f} parameters by {distance:.1%}.")
    return best


def _cut(
    model: PreTrainedModel, criterion: Any, ratio: float, heads: float, gradients: Gradients, scope: str
) -> PreTrainedModel:
    cut = copy.deepcopy(model)
    for parameter, gradient in zip(cut.parameters(), gradients, strict=True):
        parameter.grad = None if gradient is None else gradient.clone()
    counts = head_counts(cut)
    layers = cut.dinov2.encoder.layer
    writers = [linear for layer in layers for linear in (layer.attention.o_proj, layer.mlp.fc2)]
    with warnings.catch_warnings():
        # It warns that it would cut position table, class token and layer scales with the residual stream.
        warnings.simplefilter("ignore", UserWarning)
        pruner = torch_pruning.pruner.BasePruner(
            cut,
            {"pixel_values": torch.zeros(1, 3, 56, 56)},
            criterion,
            global_pruning=scope == "global",
            # Ranks neurons without the rows of the heads, which would shift the ratio but not what is cut.
            isomorphic=scope == "global",
            pruning_ratio=ratio,
            ignored_layers=[cut.classifier, cut.dinov2.embeddings.patch_embeddings.projection, *writers],
            num_heads={
                projection: count
                for layer, count in zip(layers, counts, strict=True)
                for projection in (layer.attention.q_proj, layer.attention.k_proj, layer.attention.v_proj)
            },
            prune_num_heads=True,
            prune_head_dims=False,
            # It keeps the integer part of a product that may lie a rounding error below the number meant.
            head_pruning_ratio=max(0.0, 1 - (round(heads) + 0.5) / sum(counts)),
            # Its default is one dictionary for all pruners, which keeps every cut model alive.
            in_channel_groups={},
            out_channel_groups={},
            output_transform=lambda output: output.logits.sum(),
        )
    pruner.step()
    for layer, count in zip(layers, head_counts(cut), strict=True):
        layer.attention.num_attention_heads = count
    cut.zero_grad()
    return cut


def tune(model: PreTrainedModel, importance: str, calibration: Images, test: Images) -> None:
    """Print the mean accuracy over all shares of whatever settings are tried, and the best."""
    gradients = loss_gradients(model, importance, calibration)

    def mean_accuracy(settings: Settings) -> float:
        return statistics.mean(
            accuracy(pruned_by_torch_pruning(model, importance, share, calibration, settings, gradients), test)
            for share in SHARES
        )

    print(importance)
    choices = {name: values for name, values in CHOICES.items() if name != "multivariable" or importance == "taylor"}
    best_settings(Settings(), choices, mean_accuracy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, help="folder that keeps the images and the fine-tuned models")
    parser.add_argument("--importances", nargs="+", choices=IMPORTANCES, default=IMPORTANCES)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    sets = image_sets(args.cache)
    model = fine_tuned(0, sets["train"], args.cache)
    test = {name: values[:1000] for name, values in sets["test"].items()}
    for importance in args.importances:
        tune(model, importance, sets["calibration"], test)


if __name__ == "__main__":
    main()
