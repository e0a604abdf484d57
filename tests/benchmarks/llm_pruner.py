"""LLM-Pruner as a baseline: a Llama model whose decoder layers are cut to a share of their parameters.

Written from the paper (Ma, Fang and Wang, arXiv:2305.11627), without its code. Structures that depend on each other
are one group: a neuron's rows of the gate and up projections with its column of the down projection; a key-value head's
rows of k and v with its query heads' rows of q and columns of o. Importances of a group's matrices are summed.
Block-wise, the first and last layers stay whole and the others lose the same ratio; globally, groups of all these
layers are ranked together. The paper keeps 4 layers at the beginning and 2 at the end of 32, prunes once, and trains
with LoRA afterwards; here nothing is trained.

Heads are counted in whole: with `r` the ratio that the cut layers lose, `round(r * heads)` of them go, and neurons make
up the rest of the budget, so that every setting ends at the same number of parameters.
"""

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

IMPORTANCES = ("l1", "l2", "vector", "element1", "element2", "second")
PROJECTIONS = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1, "gate_proj": 0, "up_proj": 0, "down_proj": 1}


@dataclass(frozen=True)
class Settings:
    """Options of a cut; the defaults are the paper's, for 32 layers.

    Attributes:
        importance: `l1` and `l2` sum |w| and w². Of the first-order change of the loss, `vector` takes the absolute
            value of the sum over a row or column, `element1` the sum of absolute values. `element2` adds the
            second-order term with the diagonal of the Fisher information, `second` takes that term alone.
        scope: `"layer"` takes the same ratio from every layer, `"global"` ranks the groups of all layers together.
        heads: What leaves an attention: `"key-value"` heads with their query heads, as many `"query"` heads of each
            key-value head, or `"none"`.
        first: Layers that stay whole at the beginning.
        last: Layers that stay whole at the end.
        by_size: Whether a global ranking divides importances by the number of weights of the group.
    """

    importance: str = "element1"
    scope: str = "layer"
    heads: str = "key-value"
    first: int = 4
    last: int = 2
    by_size: bool = False

    def __post_init__(self) -> None:
        known = {"importance": IMPORTANCES, "scope": ("layer", "global"), "heads": ("key-value", "query", "none")}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown. Known: {', '.join(values)}.")


@dataclass(frozen=True)
class Gradients:
    """Of each cut weight, by name: the gradient of the mean loss, and the mean over samples of its square."""

    mean: Mapping[str, Tensor]
    squared: Mapping[str, Tensor]


@dataclass
class Units:
    """What can leave a layer one by one: its neurons, or its heads.

    Attributes:
        kind: `"neurons"`, `"key-value"` or `"query"`.
        layer: Index of the layer.
        scores: Importance of each unit, float64.
        size: Weights of one unit.
        parts: The neurons, key-value heads or query heads of each unit, `[units, parts]`.
        gone: Which units leave.
    """

    kind: str
    layer: int
    scores: Tensor
    size: int
    parts: Tensor
    gone: Tensor = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.gone = torch.zeros(len(self.scores), dtype=torch.bool)

    def drop(self, count: int) -> int:
        """Let go of the units of the lowest scores; how many weights those are."""
        self.gone[self.scores.argsort(stable=True)[:count]] = True
        return count * self.size


def decoder_parameters(model: LlamaForCausalLM) -> int:
    """Count the parameters of the decoder layers."""
    return sum(parameter.numel() for parameter in model.model.layers.parameters())


def loss_gradients(model: LlamaForCausalLM, batches: Sequence[Mapping[str, Tensor]], *, squared: bool) -> Gradients:
    """Gradients of the next-token loss on calibration text.

    Args:
        model: The model, in evaluation mode.
        batches: `input_ids` of sequences of one length; their own tokens are the labels.
        squared: Whether the squares are needed too; then each sequence runs on its own.
    """
    weights = {f"{path}.weight": layer.weight for path, layer, _ in _projections(model)}
    mean = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    squares = {name: torch.zeros_like(weight) for name, weight in weights.items()} if squared else {}
    count = sum(len(batch["input_ids"]) for batch in batches)
    pieces = (
        piece for batch in batches for piece in (batch["input_ids"].split(1) if squared else [batch["input_ids"]])
    )
    for tokens in pieces:
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        found = torch.autograd.grad(loss, list(weights.values()))
        for name, gradient in zip(weights, found, strict=True):
            mean[name].add_(gradient, alpha=len(tokens) / count)
            if squared:
                squares[name].addcmul_(gradient, gradient, value=1 / count)
    return Gradients(mean, squares)


def pruned_by_llm_pruner(
    model: LlamaForCausalLM, share: float, settings: Settings, gradients: Gradients | None = None
) -> LlamaForCausalLM:
    """Cut a copy of a model until its decoder layers have a share of their parameters.

    Args:
        model: The model; it stays as it is.
        share: Parameters of the decoder layers to keep, a fraction.
        settings: How to choose what leaves.
        gradients: Of `loss_gradients`; not needed for `l1` and `l2`, with squares for `element2` and `second`.

    Returns:
        The smaller model. Its config still states the old sizes, so it cannot be saved for `from_pretrained`.
    """
    layers = range(settings.first, len(model.model.layers) - settings.last)
    removed = (1 - share) * decoder_parameters(model)
    units = [one for index in layers for one in _units(model, index, settings, gradients)]
    if settings.scope == "layer":
        _drop_by_layer(units, removed, len(layers))
    else:
        _drop_globally(units, removed, by_size=settings.by_size)
    cut = copy.deepcopy(model)
    for one in units:
        _cut(cut, one)
    return cut


def _drop_by_layer(units: Sequence[Units], removed: float, layers: int) -> None:
    ratio = removed / sum(len(one.scores) * one.size for one in units)
    for one in units:
        if one.kind != "neurons":
            removed -= one.drop(min(round(ratio * len(one.scores)), len(one.scores) - 1))
    for one in units:
        if one.kind == "neurons":
            one.drop(min(round(removed / layers / one.size), len(one.scores) - 1))


def _drop_globally(units: Sequence[Units], removed: float, *, by_size: bool) -> None:
    ranked = []
    for one in units:
        order = one.scores.argsort(stable=True)
        # One unit stays, so that every layer can still be run.
        ranked += [(float(one.scores[place]) / (one.size if by_size else 1), one, int(place)) for place in order[:-1]]
    ranked.sort(key=lambda entry: entry[0])
    for _, one, place in ranked:
        if removed < one.size / 2:
            break
        one.gone[place] = True
        removed -= one.size


def _units(model: LlamaForCausalLM, index: int, settings: Settings, gradients: Gradients | None) -> Iterator[Units]:
    layer = model.model.layers[index]
    path = f"model.layers.{index}"
    rows = {
        name: _importance(f"{path}.{name}.weight", projection.weight, dim, settings.importance, gradients)
        for name, projection, dim in _projections(layer)
    }
    neurons = rows["mlp.gate_proj"] + rows["mlp.up_proj"] + rows["mlp.down_proj"]
    hidden = layer.mlp.gate_proj.in_features
    yield Units("neurons", index, neurons, 3 * hidden, torch.arange(len(neurons)).unsqueeze(1))
    width = layer.self_attn.head_dim
    queries = (rows["self_attn.q_proj"] + rows["self_attn.o_proj"]).unflatten(0, (-1, width)).sum(1)
    keys = (rows["self_attn.k_proj"] + rows["self_attn.v_proj"]).unflatten(0, (-1, width)).sum(1)
    shared = queries.unflatten(0, (len(keys), -1))
    group = shared.shape[1]
    if settings.heads == "key-value":
        places = torch.arange(len(keys)).unsqueeze(1)
        yield Units("key-value", index, shared.sum(1) + keys, 2 * (group + 1) * width * hidden, places)
    elif settings.heads == "query":
        # The first unit holds the least important query head of every key-value head, and so on.
        scores, order = shared.sort(dim=1, stable=True)
        places = order + group * torch.arange(len(keys)).unsqueeze(1)
        yield Units("query", index, scores.sum(0), 2 * len(keys) * width * hidden, places.T)


def _importance(name: str, weight: Tensor, dim: int, importance: str, gradients: Gradients | None) -> Tensor:
    """Importance of each row of a matrix (`dim` 0), or of each column, float64."""
    weight = weight.detach().double()
    if importance in ("l1", "l2"):
        return weight.abs().pow(IMPORTANCES.index(importance) + 1).sum(1 - dim)
    if gradients is None:
        raise ValueError(f"importance={importance!r} needs gradients. Give those of loss_gradients.")
    change = weight * gradients.mean[name].double()
    if importance == "vector":
        return change.sum(1 - dim).abs()
    if importance == "element1":
        return change.abs().sum(1 - dim)
    curvature = weight.square() * gradients.squared[name].double() / 2
    return (curvature if importance == "second" else change - curvature).abs().sum(1 - dim)


def _projections(module: nn.Module) -> Iterator[tuple[str, Any, int]]:
    """Path, layer, and the dimension of its weight that is cut, of every projection below a module."""
    for path, layer in module.named_modules():
        name = path.rpartition(".")[2]
        if name in PROJECTIONS:
            yield path, layer, PROJECTIONS[name]


def _cut(model: LlamaForCausalLM, units: Units) -> None:
    """Take the units that leave out of a model, in place."""
    layer = model.model.layers[units.layer]
    attention, width = layer.self_attn, layer.self_attn.head_dim
    kept = units.parts[~units.gone].flatten().sort().values
    if units.kind == "neurons":
        for projection in (layer.mlp.gate_proj, layer.mlp.up_proj):
            _keep(projection, 0, kept)
        _keep(layer.mlp.down_proj, 1, kept)
        return
    queries, group = kept, attention.num_key_value_groups
    if units.kind == "key-value":
        queries = (kept.unsqueeze(1) * group + torch.arange(group)).flatten()
        for projection in (attention.k_proj, attention.v_proj):
            _keep(projection, 0, _rows(kept, width))
    else:
        attention.num_key_value_groups = int((~units.gone).sum())
    _keep(attention.q_proj, 0, _rows(queries, width))
    _keep(attention.o_proj, 1, _rows(queries, width))


def _rows(heads: Tensor, width: int) -> Tensor:
    return (heads.unsqueeze(1) * width + torch.arange(width)).flatten()


@torch.no_grad()
def _keep(projection: Any, dim: int, places: Tensor) -> None:
    projection.weight = nn.Parameter(projection.weight.index_select(dim, places), projection.weight.requires_grad)
    if dim == 0:
        projection.out_features = len(places)
        if projection.bias is not None:
            projection.bias = nn.Parameter(projection.bias[places], projection.bias.requires_grad)
    else:
        projection.in_features = len(places)
