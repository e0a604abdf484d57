"""Judging the channel map of one model: every axis in a random order, in float64, beside a wrong order as control."""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_spp import channel_groups
from hf_spp.apply import Indices, gather_model, invert_indices, named_tensors
from hf_spp.channels import ChannelGroup, ChannelMap, Member
from hf_spp.config import AXES
from hf_spp.errors import SPPError
from hf_spp.forward import Float64Throughout, evaluation_mode, fixed_rng, output_tensors, run_model
from hf_spp.permutation import Orders, gather_indices

VERDICTS = ("wrong", "error", "equal", "not shown", "refused")
"""From the one that decides first, when classes of a type differ, to the one that decides last."""

TOLERANCE = 1e-9
"""Largest max|Δ| of an output, relative to its largest magnitude, that counts as equal."""
SHOWN = 1e-6
"""A wrong order must change some output by more than this, relative to its largest magnitude."""

_TRIES = 24
# Masks are filled with infinity or the lowest number; beside these no difference would show.
_FILLED = 1e30
_ATTENTION = re.compile(r"Attention|Attn")
_FEED_FORWARD = re.compile(r"MLP|Mlp|FeedForward|FFN|Ffn|Experts|Intermediate|Dense(Gated)?Act|LayerFF")


@dataclass
class Finding:
    """The verdict on one axis of one model, and what it rests on.

    Attributes:
        verdict: One of `VERDICTS`.
        reason: Why, except for `equal`.
        groups: How many groups of the axis moved.
        difference: By how much the outputs changed, relative to their largest magnitude.
        control: By how much a wrong order changed them: in each group only the first matrix moves, or only the last.
        wrong_groups: Groups that change the outputs on their own; one for each name without its indices.
        idle_groups: Groups whose modules the inputs never reach, names with `*` for indices.
    """

    verdict: str
    reason: str = ""
    groups: int = 0
    difference: float | None = None
    control: float | None = None
    wrong_groups: list[str] = field(default_factory=list)
    idle_groups: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.verdict}: {self.reason}" if self.reason else self.verdict


def judge_model(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    find_groups: Callable[[PreTrainedModel], ChannelMap] = channel_groups,
) -> dict[str, Finding]:
    """Reorder a model along every axis and compare its outputs on the inputs; the model becomes float64.

    Args:
        model: The model; its weights are afterwards what they were, in float64, unless the verdict is `wrong`.
        inputs: Arguments of its forward.
        find_groups: What gives the channel map.

    Returns:
        A finding for each of `AXES`.
    """
    _make_float64(model)
    try:
        groups = find_groups(model)
    except SPPError as error:
        return _everywhere("refused", one_line(error))
    except Exception as error:  # the table reports whatever is raised
        return _everywhere("error", described(error))
    if not groups.axes:
        return {axis: _refusal(groups, axis) for axis in AXES}
    try:
        subject = Subject(model, inputs)
        flaw = subject.flaw
    except Exception as error:
        flaw = f"the model does not run in float64, {described(error)}"
    findings = {axis: _refusal(groups, axis) for axis in AXES}
    if flaw:
        return {**findings, **{axis: Finding("not shown", flaw) for axis in groups.axes}}
    findings.update({axis: _judge_axis(subject, groups.select([axis])) for axis in groups.axes})
    if not subject.has_its_outputs():
        for axis in groups.axes:
            findings[axis].verdict, findings[axis].reason = "wrong", "undoing does not restore the outputs bit for bit"
    return findings


class Subject:
    """A model with fixed inputs, its outputs on them, and its weights, to compare with after a change."""

    def __init__(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> None:
        self.model, self.inputs = model, _to_float64(inputs)
        self.shapes = {name: tensor.shape for name, tensor in named_tensors(model).items()}
        self.weights = {name: tensor.clone() for name, tensor in named_tensors(model).items()}
        with _modules_that_run(model) as self.ran:
            self.before = self.run()
        self.flaw = self._find_flaw()

    @torch.no_grad()
    def run(self, hidden_orders: Sequence[Tensor] = ()) -> dict[str, Tensor]:
        """The outputs of the model as it is now; embeddings that it is given come in the order of its stream."""
        inputs = dict(self.inputs)
        for order in hidden_orders:
            embeddings = inputs.get("inputs_embeds")
            if embeddings is not None and embeddings.shape[-1] == len(order):
                inputs["inputs_embeds"] = embeddings.index_select(-1, order)
        with evaluation_mode(self.model), fixed_rng(self.model, 0), Float64Throughout(), _float64_by_default():
            outputs = output_tensors(run_model(self.model, inputs))
        return {name: value.detach().clone() for name, value in outputs.items()}

    def difference(self, hidden_orders: Iterable[Tensor] = ()) -> float:
        """Run the model and measure how far its outputs are from those before, relative to their magnitude.

        Args:
            hidden_orders: Orders of residual streams, `[hidden]`. A hidden state that comes out beside other outputs
                may be in one of these.
        """
        hidden_orders = list(hidden_orders)
        after = self.run(hidden_orders)
        if after.keys() != self.before.keys():
            return float("inf")
        # Where hidden states are all that comes out, their order is part of the function.
        orders = [] if all("hidden_state" in name for name in self.before) else hidden_orders
        return max(
            min(_relative(version, after[name]) for version in _versions(name, expected, orders))
            for name, expected in self.before.items()
        )

    def difference_with(self, groups: Iterable[ChannelGroup], orders: Orders) -> float:
        """The difference that reordering makes; the model is put back afterwards."""
        groups = list(groups)
        hidden = [orders[group.name].flatten() for group in groups if group.axis == "hidden"]
        with gathered(self.model, gather_indices(groups, orders, self.shapes)):
            return self.difference(hidden)

    def has_its_weights(self) -> bool:
        """Whether the weights are, bit for bit, what they were."""
        return _same_bits(self.weights, named_tensors(self.model))

    def has_its_outputs(self) -> bool:
        """Run the model; whether the outputs are, bit for bit, what they were."""
        return _same_bits(self.before, self.run())

    def is_reached(self, group: ChannelGroup) -> bool:
        """Whether the inputs reach a module that holds a member of the group."""
        return any(map(self._is_read, group.members))

    def one_sided(self, group: ChannelGroup, place: int) -> ChannelGroup:
        """The group with only one of the matrices that the inputs reach, so that moving its channels is wrong."""
        matrices = group.scored_members or group.members
        reached = list(filter(self._is_read, matrices)) or matrices
        return dataclasses.replace(group, members=(reached[place],))

    def _is_read(self, member: Member) -> bool:
        path = member.tensor.rpartition(".")[0]
        # Some modules are only read by the one around them, as in torch's own attention.
        return path in self.ran or path.rpartition(".")[0] in self.ran

    def _find_flaw(self) -> str:
        if not self.before:
            return "no floating-point tensor comes out"
        if broken := [name for name, value in self.before.items() if value.isnan().any()]:
            return f"NaN comes out ({', '.join(broken[:3])})"
        if not self.has_its_outputs():
            return f"the model is not deterministic, two runs differ by {self.difference():.1e}"
        return ""


@contextlib.contextmanager
def gathered(model: nn.Module, indices: Indices) -> Iterator[None]:
    """Run the block on a reordered model, and undo the reordering afterwards."""
    gather_model(model, indices)
    try:
        yield
    finally:
        gather_model(model, invert_indices(indices))


def random_orders(groups: Iterable[ChannelGroup], seed: int = 0) -> dict[str, Tensor]:
    """An order for each group that is random in each block, and the identity in none with more than one channel."""
    generator = torch.Generator().manual_seed(seed)

    def draw(size: int) -> Tensor:
        order = torch.randperm(size, generator=generator)
        return order.roll(1) if torch.equal(order, torch.arange(size)) else order

    return {group.name: torch.stack([draw(group.size) for _ in range(group.blocks)]) for group in groups}


def without_indices(name: str) -> str:
    """A name with `*` in place of every number that stands alone in it."""
    return re.sub(r"(?<![^.\s])\d+(?![^.\s])", "*", name)


def holds_units(model: nn.Module) -> tuple[bool, bool]:
    """Whether a model holds attention and feed-forward units, judged by the class names of modules with parameters."""
    modules = [module for module in model.modules() if next(module.parameters(), None) is not None]
    attention = any(_ATTENTION.search(type(m).__name__) or isinstance(m, nn.MultiheadAttention) for m in modules)
    return attention, any(_FEED_FORWARD.search(type(m).__name__) for m in modules)


def _judge_axis(subject: Subject, groups: ChannelMap) -> Finding:
    finding = Finding("equal", groups=len(groups))
    try:
        _compare(subject, groups, finding)
    except Exception as error:
        finding.verdict, finding.reason = "error", described(error)
    return finding


def _compare(subject: Subject, groups: ChannelMap, finding: Finding) -> None:
    orders = random_orders(groups)
    idle = [group for group in groups if not subject.is_reached(group)]
    finding.idle_groups = sorted({without_indices(group.name) for group in idle})
    finding.difference = subject.difference_with(groups, orders)
    if not subject.has_its_weights():
        finding.verdict, finding.reason = "wrong", "undoing does not restore the weights bit for bit"
    elif not finding.difference <= TOLERANCE:
        finding.verdict, finding.reason = "wrong", f"the outputs change by {finding.difference:.1e}"
        finding.wrong_groups = _wrong_groups(subject, groups, orders)
    else:
        finding.control = subject.difference_with([subject.one_sided(group, 0) for group in groups], orders)
        if not finding.control > SHOWN:
            finding.control = subject.difference_with([subject.one_sided(group, -1) for group in groups], orders)
        if not finding.control > SHOWN:
            why = "its modules never run" if len(idle) == len(groups) else "the outputs ignore a wrong order"
            finding.verdict, finding.reason = "not shown", why


def _wrong_groups(subject: Subject, groups: Iterable[ChannelGroup], orders: Orders) -> list[str]:
    alike: dict[str, list[ChannelGroup]] = {}
    for group in groups:
        alike.setdefault(without_indices(group.name), []).append(group)
    # The first of each kind, then the others.
    ranked = sorted((place, kind) for kind, members in alike.items() for place in range(len(members)))
    wrong: dict[str, str] = {}
    for place, kind in ranked[:_TRIES]:
        group = alike[kind][place]
        if kind not in wrong and not subject.difference_with([group], orders) <= TOLERANCE:
            wrong[kind] = group.name
    return list(wrong.values()) or ["none on its own"]


def _refusal(groups: ChannelMap, axis: str) -> Finding:
    reasons = dict.fromkeys(refusal.reason for refusal in groups.refused if refusal.axis == axis)
    return Finding("refused", one_line("; ".join(reasons)) or "the model has no such channels")


def _everywhere(verdict: str, reason: str) -> dict[str, Finding]:
    return {axis: Finding(verdict, reason) for axis in AXES}


def described(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(error)}"


def one_line(text: object) -> str:
    return " ".join(str(text).split())[:400]


def _make_float64(model: nn.Module) -> None:
    """Make the model run in float64 where its author did not think of it."""
    model.double()
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, Tensor):  # remembered from an earlier run
                vars(module)[name] = _to_float64(value)
            elif isinstance(value, list):  # modules that were not registered
                for unregistered in (item for item in value if isinstance(item, nn.Module)):
                    unregistered.double()
            elif isinstance(value, PreTrainedConfig):
                value._experts_implementation = "eager"


def _to_float64(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: _to_float64(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_to_float64(item) for item in value)
    return value


@contextlib.contextmanager
def _float64_by_default() -> Iterator[None]:
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(usual)


@contextlib.contextmanager
def _modules_that_run(model: nn.Module) -> Iterator[set[str]]:
    ran: set[str] = set()
    hooks = [
        module.register_forward_hook(lambda *_, path=path: ran.add(path), always_call=True)
        for path, module in model.named_modules()
    ]
    try:
        yield ran
    finally:
        for hook in hooks:
            hook.remove()


def _versions(name: str, expected: Tensor, hidden_orders: Sequence[Tensor]) -> Iterator[Tensor]:
    """What an output may be after the residual stream moved; images have their channels in dimension 1."""
    yield expected
    if "hidden_state" in name:
        for order in hidden_orders:
            for dim in {expected.dim() - 1, 1}:
                if dim < expected.dim() and expected.shape[dim] == len(order):
                    yield expected.index_select(dim, order)


def _relative(expected: Tensor, found: Tensor) -> float:
    """Largest difference relative to the largest magnitude; infinity where shapes or NaN differ."""
    if expected.shape != found.shape or not torch.equal(_fillings(expected), _fillings(found)):
        return float("inf")
    plain = _fillings(expected) == 0
    if not plain.any():
        return 0.0
    expected, found = expected[plain], found[plain]
    scale, difference = float(expected.abs().max()), float((found - expected).abs().max())
    return difference / scale if scale else difference


def _fillings(tensor: Tensor) -> Tensor:
    """What each number is filled with: 0 for an ordinary one, else its sign; NaN gives 2."""
    signs = torch.where(tensor.abs() > _FILLED, tensor.sign(), torch.zeros_like(tensor))
    return torch.where(tensor.isnan(), torch.full_like(tensor, 2), signs)


def _same_bits(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        value.numpy().tobytes() == right[name].numpy().tobytes() for name, value in left.items()
    )
