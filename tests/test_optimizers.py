import copy

import pytest
import torch
from accelerate import Accelerator
from conftest import build_inputs, build_model, weights_of
from transformers import Adafactor, MixtralForCausalLM
from zoo import build

from hf_spp import OptimizerError, OrdersError, SPPConfig, apply_spp
from hf_spp.optimizers import inner_optimizer, optimizer_moves

SHUFFLE = SPPConfig(metric="random", axes=("qk", "vo", "heads", "ffn", "hidden"))


def matrices(model):
    return [one for name, one in model.named_parameters() if one.dim() == 2 and "classifier" not in name]


class Lion(torch.optim.Optimizer):
    """The sign of a moving average of gradients (arXiv:2302.06675)."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 1e-3})

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            average = self.state[parameter].setdefault("exp_avg", torch.zeros_like(parameter))
            parameter -= 1e-3 * average.lerp(parameter.grad, 0.1).sign()
            average.lerp_(parameter.grad, 0.01)


OPTIMIZERS = {
    "lion": lambda model: Lion(model.parameters()),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), amsgrad=True),
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "nadam": lambda model: torch.optim.NAdam(model.parameters()),
    "adamax": lambda model: torch.optim.Adamax(model.parameters()),
    "rprop": lambda model: torch.optim.Rprop(model.parameters()),
    "adadelta": lambda model: torch.optim.Adadelta(model.parameters()),
    "adagrad": lambda model: torch.optim.Adagrad(model.parameters()),
    "muon": lambda model: torch.optim.Muon(matrices(model)),
    "adafactor": lambda model: Adafactor(model.parameters(), beta1=0.9),
    "adafactor-torch": lambda model: torch.optim.Adafactor(model.parameters()),
}


def stepped(model, optimizer, gradients=None):
    """One step with the given gradients, by parameter name, or those of a batch."""
    if gradients is None:
        model(**build_inputs(model)).loss.backward()
    else:
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name].clone()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_is_that_of_a_model_trained_in_the_other_order(name):
    """State that moved equals state that grew in place: the same gradients, in the order of the model, give it."""
    model = build_model("vit").double()
    reordered = copy.deepcopy(model)
    reordering = apply_spp(reordered, SHUFFLE)
    model(**build_inputs(model)).loss.backward()
    gradients = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    # Gradients lie in the order of the weights.
    shadow = copy.deepcopy(model)
    with torch.no_grad():
        for key, parameter in shadow.named_parameters():
            parameter.copy_(gradients[key])
    reordering.apply(shadow)
    optimizer, expected = OPTIMIZERS[name](model), OPTIMIZERS[name](reordered)
    stepped(model, optimizer, gradients)
    stepped(reordered, expected, dict(shadow.named_parameters()))
    reordering.apply(model)
    reordering.apply_to_optimizer(optimizer, model)
    moved = 0
    for (key, one), other in zip(model.named_parameters(), reordered.parameters(), strict=True):
        for kind, value in optimizer.state.get(one, {}).items():
            if isinstance(value, torch.Tensor):
                # Muon's steps go through bfloat16, its state does not.
                assert torch.allclose(value, expected.state[other][kind], rtol=1e-9, atol=1e-12), (key, kind)
                moved += value.numel() > 1
    assert moved


def test_undo_takes_the_optimizer_along():
    model = build_model("vit")
    optimizer = torch.optim.AdamW(model.parameters())
    stepped(model, optimizer)
    weights, state = weights_of(model), copy.deepcopy(optimizer.state_dict())
    reordering = apply_spp(model, SHUFFLE)
    reordering.apply_to_optimizer(optimizer, model)
    reordering.undo(model, optimizer)
    assert all(torch.equal(one, weights[name]) for name, one in weights_of(model).items())
    for key, entry in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, state["state"][key][kind]) for kind, value in entry.items())
    # Both are as before, so it may start again.
    apply_spp(model, SHUFFLE).apply_to_optimizer(optimizer, model)


def test_misuse_is_refused():
    model = build_model("vit")
    optimizer = torch.optim.AdamW(model.parameters())
    stepped(model, optimizer)
    reordering = apply_spp(model, SHUFFLE)
    reordering.apply_to_optimizer(optimizer, model)
    with pytest.raises(OptimizerError, match="was moved by this reordering before"):
        reordering.apply_to_optimizer(optimizer, model)
    apply_spp(model, SPPConfig(metric="random", seed=5))
    with pytest.raises(OrdersError, match="not in the order of this reordering"):
        reordering.apply_to_optimizer(torch.optim.AdamW(model.parameters()), model)
    stranger = build_model("vit")
    foreign = torch.optim.AdamW(stranger.parameters())
    stepped(stranger, foreign)
    with pytest.raises(OptimizerError, match="trains none of the parameters"):
        apply_spp(model, SHUFFLE).apply_to_optimizer(foreign, model)


def test_fresh_optimizer_has_nothing_to_move():
    model = build_model("vit")
    assert optimizer_moves(torch.optim.AdamW(model.parameters()), model, {}) == {}
    assert optimizer_moves(None, model, {}) == {}


def test_wrapped_optimizer_is_found():
    optimizer = torch.optim.AdamW(build_model("vit").parameters())
    assert inner_optimizer(Accelerator(cpu=True).prepare(optimizer)) is optimizer
    assert inner_optimizer(optimizer) is optimizer


class Odd(torch.optim.SGD):
    """SGD that keeps one more entry of state for every weight."""

    def __init__(self, parameters, make):
        super().__init__(parameters, lr=0.1, momentum=0.9)
        self.make = make

    def step(self, closure=None):
        super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["odd"] = self.make(parameter)


class Blocks(torch.Tensor):
    """As packages for low precision make them: shaped like the weight, its values elsewhere."""


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: torch.zeros(p.shape[0] + 1, *p.shape[1:]), "which is not the shape of its weight"),
        (lambda p: torch.zeros(p.numel() // 256 + 2), "which is not the shape of its weight"),
        (lambda p: torch.zeros(p.shape, dtype=torch.uint8), r"is torch\.uint8, so it is quantized"),
        (lambda p: torch.zeros(p.shape).as_subclass(Blocks), "is a Blocks, which cannot be moved"),
        (lambda p: [torch.zeros(p.shape)], "is a list, which cannot be moved"),
        (lambda p: object(), "is a object, which cannot be moved"),
    ],
    ids=["other-shape", "blocks", "quantized", "subclass", "list", "object"],
)
def test_state_that_cannot_move_is_refused_and_nothing_moves(make, message):
    model = build_model("vit")
    optimizer = Odd(model.parameters(), make)
    stepped(model, optimizer)
    reordering = apply_spp(model, SHUFFLE)
    state = {key: value["momentum_buffer"].clone() for key, value in optimizer.state.items()}
    with pytest.raises(OptimizerError, match=message):
        reordering.apply_to_optimizer(optimizer, model)
    assert all(torch.equal(value["momentum_buffer"], state[key]) for key, value in optimizer.state.items())
    reordering.undo(model)


@pytest.mark.parametrize("value", [None, 3, 0.5, True, "text", torch.zeros(()), torch.zeros(1, dtype=torch.int64)])
def test_state_that_is_the_same_for_all_channels_stays(value):
    model = build_model("vit")
    optimizer = Odd(model.parameters(), lambda p: value)
    stepped(model, optimizer)
    apply_spp(model, SHUFFLE).apply_to_optimizer(optimizer, model)
    assert all(state["odd"] is value for state in optimizer.state.values())


def test_means_of_stacked_experts_move_with_them():
    """Row and column means of a weight `[experts, out, in]` have lost its last or its second dimension."""
    model = build("mixtral", MixtralForCausalLM).model.double()
    name, parameter = next((key, one) for key, one in model.named_parameters() if one.dim() == 3)
    optimizer = Adafactor([parameter], lr=1e-3, relative_step=False, scale_parameter=False)
    parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    parameter.grad = None
    state = optimizer.state[parameter]
    # A weight whose means are known: each row and column filled with its own mean.
    with torch.no_grad():
        parameter.copy_(state["exp_avg_sq_row"].unsqueeze(-1) * state["exp_avg_sq_col"].unsqueeze(-2))
    reordering = apply_spp(model, SPPConfig(metric="random", axes=("ffn", "experts"), verify=False))
    reordering.apply_to_optimizer(optimizer, model)
    product = state["exp_avg_sq_row"].unsqueeze(-1) * state["exp_avg_sq_col"].unsqueeze(-2)
    assert torch.equal(product, parameter), name


class Lookahead(torch.optim.Optimizer):
    """Slow weights beside those of another optimizer."""

    def __init__(self, inner):
        self.optimizer = inner
        super().__init__(inner.param_groups, {})

    def step(self, closure=None):
        self.optimizer.step()


class Preconditioned(torch.optim.SGD):
    """A matrix between the outputs of each weight, which has the shape of the weight where that is square."""

    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["preconditioner"] = parameter.grad @ parameter.grad.T
        super().step(closure)


def squares(model):
    return [one for one in model.parameters() if one.dim() == 2 and one.shape[0] == one.shape[1]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda model: torch.optim.LBFGS(model.parameters()), "keeps its state elsewhere"),
        (lambda model: Lookahead(torch.optim.AdamW(model.parameters())), "is built around AdamW"),
        (lambda model: Preconditioned(squares(model), lr=0.1), "which is square"),
    ],
    ids=["lbfgs", "lookahead", "square"],
)
def test_optimizer_whose_state_means_something_else_is_refused(make, message):
    model = build_model("vit")
    optimizer = make(model)
    model(**build_inputs(model)).loss.backward()
    optimizer.step(lambda: model(**build_inputs(model)).loss)
    optimizer.zero_grad()
    if isinstance(optimizer, Lookahead):
        optimizer.state[next(model.parameters())] = {}
    reordering = apply_spp(model, SHUFFLE)
    with pytest.raises(OptimizerError, match=message):
        reordering.apply_to_optimizer(optimizer, model)


def test_what_is_no_optimizer_is_refused():
    model = build_model("vit")
    reordering = apply_spp(model, SHUFFLE)
    with pytest.raises(OptimizerError, match="a torch optimizer is needed"):
        reordering.apply_to_optimizer({"state": {}}, model)


def test_state_that_did_not_move_is_not_moved_back():
    model = build_model("vit")
    optimizer = torch.optim.AdamW(model.parameters())
    stepped(model, optimizer)
    reordering = apply_spp(model, SHUFFLE)
    with pytest.raises(OptimizerError, match="was not moved by this reordering"):
        reordering.undo(model, optimizer)
    reordering.undo(model)
    first = apply_spp(model, SHUFFLE)
    first.apply_to_optimizer(optimizer, model)
    apply_spp(model, SPPConfig(metric="random", seed=5))
    third = apply_spp(model, SPPConfig(metric="random", seed=6))
    with pytest.raises(OptimizerError, match="has moved with 1 reorderings, and the model with 2"):
        third.apply_to_optimizer(optimizer, model)
