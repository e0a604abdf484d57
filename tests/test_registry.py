"""Architectures that a user registers: found, proved and refused like those of the written map."""

import pytest
import torch
from torch import nn

from hf_spp import (
    AttentionPattern,
    EqualFunctionError,
    FeedForwardPattern,
    SPPConfig,
    SPPConfigError,
    UnsupportedArchitectureError,
    UnsupportedModelError,
    apply_spp,
    channel_groups,
    register_architecture,
)
from hf_spp.architectures import registry

WIDTH, HEADS = 24, 3


class Listening(nn.Module):
    """An attention whose children have names that nobody else uses."""

    def __init__(self):
        super().__init__()
        self.ears = HEADS
        self.ask, self.offer, self.give, self.gather = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.loudness = nn.Parameter(torch.randn(HEADS, 1, 1))

    def forward(self, tokens):
        q, k, v = (
            layer(tokens).unflatten(-1, (self.ears, -1)).transpose(1, 2) for layer in (self.ask, self.offer, self.give)
        )
        scores = (q @ k.transpose(-1, -2) * self.loudness).softmax(-1)
        return self.gather((scores @ v).transpose(1, 2).flatten(2))


class Fused(nn.Module):
    """The same with one layer for q, k and v, side by side for each head or in blocks."""

    def __init__(self, layout):
        super().__init__()
        self.layout = layout
        self.everything, self.gather = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens):
        if self.layout == "heads":
            q, k, v = self.everything(tokens).unflatten(-1, (HEADS, 3, -1)).permute(3, 0, 2, 1, 4)
        else:
            q, k, v = self.everything(tokens).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.gather(((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attend = attention()
        self.widen, self.narrow = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def forward(self, tokens):
        tokens = tokens + self.attend(tokens)
        return tokens + self.narrow(self.widen(tokens).relu())


class Tiny(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.blocks = nn.Sequential(Block(attention), Block(attention))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, tokens):
        return self.head(self.blocks(tokens))


LISTENING = AttentionPattern("ask", "offer", "give", "gather", heads="ears", sides={"loudness": "(k r) 1 1"})
INPUTS = {"tokens": torch.randn(2, 7, WIDTH)}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTERED", {})


def test_a_module_of_ones_own_is_reordered_and_proved():
    register_architecture(Tiny, LISTENING, FeedForwardPattern(("widen",), "narrow"))
    model = Tiny(Listening).double()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    reordering = apply_spp(model, SPPConfig(metric="random"), example_inputs=INPUTS)
    assert reordering.proof.relative_diff < 1e-12
    moved = {group.axis for group in channel_groups(model)} - {"hidden"}
    assert moved == {"qk", "vo", "heads", "ffn"}
    loudness = "blocks.0.attend.loudness"
    assert not model.state_dict()[loudness].equal(before[loudness])
    reordering.undo(model)
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("layout", ["blocks", "heads"])
def test_one_layer_for_all_three(layout):
    register_architecture(Tiny, AttentionPattern(*["everything"] * 3, "gather", heads=HEADS, fused=layout))
    model = Tiny(lambda: Fused(layout)).double()
    assert apply_spp(model, SPPConfig(axes=("qk", "vo", "heads")), example_inputs=INPUTS).changed


def test_a_wrong_description_does_not_get_past_the_proof():
    register_architecture(Tiny, AttentionPattern(*["everything"] * 3, "gather", heads=HEADS, fused="blocks"))
    model = Tiny(lambda: Fused("heads")).double()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(EqualFunctionError, match="put back bit for bit"):
        apply_spp(model, SPPConfig(axes=("vo",), metric="random"), example_inputs=INPUTS)
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


def test_a_parameter_that_the_pattern_does_not_mention_is_refused():
    register_architecture(Tiny, AttentionPattern("ask", "offer", "give", "gather", heads="ears"))
    with pytest.raises(UnsupportedArchitectureError, match=r"attend: parameter .*loudness is not understood"):
        channel_groups(Tiny(Listening))


def test_what_no_head_reaches_is_named_beside():
    register_architecture(
        Tiny, AttentionPattern("ask", "offer", "give", "gather", heads=HEADS, beside=("loudness",), rotary=True)
    )
    groups = channel_groups(Tiny(Listening))
    assert "qk" not in groups.axes
    assert any(refusal.axis == "qk" and "rotary" in refusal.reason for refusal in groups.refused)


def test_a_pattern_that_fits_nothing_is_an_error():
    register_architecture(Tiny, LISTENING, FeedForwardPattern(("expand",), "shrink"))
    with pytest.raises(UnsupportedArchitectureError, match=r"fits no module: none has the children expand, shrink"):
        channel_groups(Tiny(Listening))


def test_a_number_of_heads_that_does_not_fit_is_an_error():
    register_architecture(Tiny, AttentionPattern("ask", "offer", "give", "gather", heads=5))
    with pytest.raises(UnsupportedArchitectureError, match=r"heads=5 gives 5, into which the 24 inputs of gather"):
        channel_groups(Tiny(Listening))


def test_an_unregistered_module_is_refused_with_what_to_do():
    with pytest.raises(UnsupportedModelError, match=r"register_architecture\(Tiny, …\)"):
        channel_groups(Tiny(Listening))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("Tiny",), "a subclass of torch.nn.Module is needed"),
        ((Tiny, {"query": "q"}), "an AttentionPattern or a FeedForwardPattern is needed"),
        ((Tiny, FeedForwardPattern((1,), "w2")), "names relative to the module are needed"),
        ((Tiny, AttentionPattern("q", "k", "v", "o", heads=2, fused="rows")), "fused='rows'; 'blocks' or 'heads'"),
    ],
)
def test_what_cannot_be_registered(arguments, message):
    with pytest.raises(SPPConfigError, match=message):
        register_architecture(*arguments)
