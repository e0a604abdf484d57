"""Scores from calibration data: against hand computation, finite differences, and what must stay untouched."""

import copy

import pytest
import torch
from conftest import build_inputs, build_model, legal_axes, outputs_of, same_bits, weights_of
from torch.utils.data import DataLoader

from hf_spp import CalibrationError, SPPConfig, apply_spp, channel_groups
from hf_spp.calibration import calibrated_scores


def scores_of(model, batches, metric, **options):
    return calibrated_scores(model, channel_groups(model), batches, metric, **options)


def assert_same_scores(found, expected, tolerance=1e-12):
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=tolerance, atol=tolerance, msg=name)


# --- activation -------------------------------------------------------------------------------------------------------


def test_activation_by_hand():
    """Root mean square of what flows, times the norm of what reads it; for q and k the product of both."""
    model = build_model("vit", dtype=torch.float64)
    batches = [build_inputs(model, seed=seed) for seed in (3, 4)]
    layer, flows = model.vit.layers[1], {}

    def watch(name, module, at_input):
        def keep(_, inputs, output):
            flows.setdefault(name, []).append((inputs[0] if at_input else output).detach().flatten(0, 1))

        return module.register_forward_hook(keep)

    attention = layer.attention
    handles = [
        watch("q", attention.q_proj, False),
        watch("k", attention.k_proj, False),
        watch("o", attention.o_proj, True),
        watch("down", layer.mlp.fc2, True),
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    energy = {name: torch.cat(parts).square().mean(0) for name, parts in flows.items()}
    reads_o = energy["o"] * attention.o_proj.weight.detach().square().sum(0)
    reads_down = energy["down"] * layer.mlp.fc2.weight.detach().square().sum(0)
    found = scores_of(model, batches, "activation")
    torch.testing.assert_close(found["layers.1.mlp.ffn"], reads_down.sqrt()[None])
    torch.testing.assert_close(found["layers.1.attention.vo"], reads_o.sqrt().view(3, 8))
    torch.testing.assert_close(found["layers.1.attention.heads"], reads_o.view(3, 8).sum(1).sqrt()[None])
    product = energy["q"].sqrt() * energy["k"].sqrt()
    torch.testing.assert_close(found["layers.1.attention.qk"], product.view(3, 8))


@pytest.mark.parametrize("name", ["vit", "bert", "llama", "gpt2", "t5"])
@pytest.mark.parametrize("metric", ["activation", "taylor"])
def test_dead_channels_come_last(name, metric):
    """A neuron that nothing reads, and a value row that is never written, matter to nobody."""
    model = build_model(name, dtype=torch.float64)
    group = next(group for group in channel_groups(model) if group.axis == "ffn")
    with torch.no_grad():
        for member in group.scored_members:
            if member.role == "consumer":
                model.get_parameter(member.tensor).select(member.dim, 4).zero_()
    reordering = apply_spp(model, SPPConfig(axes=("ffn",), metric=metric), calibration=[build_inputs(model)])
    assert reordering.scores[group.name][0, 4] == 0
    assert reordering.orders[group.name][0, -1] == 4


@pytest.mark.parametrize("head", ["base", "token-classification", "sequence-classification"])
def test_activation_ignores_padding(head):
    model = build_model("bert", head, torch.float64)
    short = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "attention_mask": torch.ones(1, 4, dtype=torch.int64)}
    assert_same_scores(scores_of(model, [padded(short)], "activation"), scores_of(model, [short], "activation"))


def padded(batch, tokens=3):
    """The same batch with more padding, and with no say of what stands there."""
    fill = {"input_ids": 9, "attention_mask": 0, "labels": -100}
    return {
        name: torch.cat([value, torch.full((len(value), tokens), fill[name])], 1) if value.dim() == 2 else value
        for name, value in batch.items()
    }


# --- taylor -----------------------------------------------------------------------------------------------------------


def scaled_loss(model, group, channel, factor, sample):
    """The loss of one sample when a channel is scaled wherever it is read, or written in q and k."""
    watched = [member for member in group.scored_members if member.role == "consumer"]
    watched = watched or [member for member in group.members if member.role == "producer"]
    undo = []
    with torch.no_grad():
        for member in watched:
            tensor = model.get_parameter(member.tensor)
            undo.append((tensor, tensor.clone()))
            places = member.positions(tensor.shape[member.dim], group).flatten(0, 1)[channel]
            tensor.index_copy_(member.dim, places, tensor.index_select(member.dim, places) * factor)
        loss = float(outputs_of(model, sample)["output.loss"])
        for tensor, value in reversed(undo):
            tensor.copy_(value)
    return loss


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("vit", None),
        ("bert", "sequence-classification"),
        ("bert", "token-classification"),
        ("gpt2", None),
        ("t5", None),
    ],
)
def test_taylor_is_the_first_order_change_of_the_loss(name, head):
    """Central differences of each sample's loss, root mean square over samples, for a few channels of every axis."""
    model = build_model(name, head, torch.float64)
    batch = build_inputs(model, batch=3)
    if "attention_mask" in batch:
        batch["attention_mask"][:] = 1
    samples = [{key: value[index : index + 1] for key, value in batch.items()} for index in range(3)]
    before = weights_of(model)
    found = scores_of(model, [batch], "taylor")
    step = 1e-5
    groups = {group.axis: group for group in channel_groups(model)}
    assert set(groups) == set(legal_axes(model))
    for group in groups.values():
        for channel in {0, group.channels // 2, group.channels - 1}:
            changes = [
                (scaled_loss(model, group, channel, 1 + step, s) - scaled_loss(model, group, channel, 1 - step, s))
                / (2 * step)
                for s in samples
            ]
            expected = torch.tensor(changes, dtype=torch.float64).square().mean().sqrt()
            torch.testing.assert_close(
                found[group.name].flatten()[channel], expected, rtol=1e-5, atol=1e-9, msg=f"{group.name} {channel}"
            )
    assert same_bits(model, before)


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("head", ["sequence-classification", "token-classification"])
def test_taylor_does_not_depend_on_the_batch_size(head, labels):
    model = build_model("bert", head, torch.float64)
    batch = build_inputs(model, batch=4, labels=labels)
    batch["attention_mask"][:] = 1
    single = [{name: value[index : index + 1] for name, value in batch.items()} for index in range(4)]
    assert_same_scores(scores_of(model, single, "taylor"), scores_of(model, [batch], "taylor"), tolerance=1e-9)


@pytest.mark.parametrize(
    ("head", "labels"),
    [
        ("sequence-classification", True),
        ("sequence-classification", False),
        ("token-classification", True),
        ("token-classification", False),
        ("masked-lm", False),
        ("base", False),
    ],
)
def test_taylor_ignores_padding(head, labels):
    model = build_model("bert", head, torch.float64)
    batch = build_inputs(model, batch=1, labels=labels)
    short = {name: value[:, :5] if value.dim() == 2 else value for name, value in batch.items()}
    assert_same_scores(scores_of(model, [padded(short)], "taylor"), scores_of(model, [short], "taylor"))


def test_taylor_uses_the_models_own_answer_without_labels():
    model = build_model("vit", dtype=torch.float64)
    batch = build_inputs(model, labels=False)
    with torch.no_grad():
        answer = model(**batch).logits.argmax(-1)
    labelled = scores_of(model, [{**batch, "labels": answer}], "taylor")
    assert_same_scores(scores_of(model, [batch], "taylor"), labelled, tolerance=1e-6)


@pytest.mark.parametrize("name", ["vit", "bert", "t5", "llama"])
def test_models_without_logits_use_a_seeded_target(name):
    model = build_model(name, "base", torch.float64)
    batches = [build_inputs(model)]
    first, again, other = (scores_of(model, batches, "taylor", seed=seed) for seed in (0, 0, 1))
    assert_same_scores(again, first)
    assert all(not other[key].equal(values) for key, values in first.items())


def test_frozen_model_has_taylor_scores():
    model = build_model("bert", "sequence-classification", torch.float64)
    batches = [build_inputs(model)]
    expected = scores_of(model, batches, "taylor")
    model.requires_grad_(False)
    with torch.no_grad():
        assert_same_scores(scores_of(model, batches, "taylor"), expected)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_no_gradient_reaches_a_group():
    model = build_model("t5", "base")

    class EncoderOnly(type(model)):
        def forward(self, **inputs):
            return self.encoder(**inputs)

    model.__class__ = EncoderOnly
    before = weights_of(model)
    with pytest.raises(
        CalibrationError, match=r"No gradient reached group decoder\.block\.0\..* use metric 'activation'"
    ):
        scores_of(model, [{"input_ids": torch.tensor([[5, 6, 7]])}], "taylor")
    assert same_bits(model, before)


# --- the data ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["activation", "taylor"])
def test_every_kind_of_iterable(metric):
    model = build_model("bert", "sequence-classification", torch.float64)
    samples = [{name: value[0] for name, value in build_inputs(model, seed=seed).items()} for seed in range(6)]
    loader = DataLoader(samples, batch_size=2)
    batches = list(loader)
    expected = scores_of(model, batches, metric)
    for data in (tuple(batches), iter(batches), (batch for batch in batches), loader):
        assert_same_scores(scores_of(model, data, metric), expected)


def test_data_is_read_once_and_no_further_than_asked():
    model, read = build_model("vit"), []

    def endless():
        while True:
            read.append(len(read))
            yield build_inputs(model, seed=len(read))

    config = SPPConfig(metric="activation", calibration_batches=3)
    reordering = apply_spp(model, config, calibration=endless())
    assert read == [0, 1, 2]
    assert reordering.config.metric == "activation"


def test_all_of_the_data_is_read_on_request():
    model = build_model("vit")
    batches = [build_inputs(model, seed=seed) for seed in range(40)]
    everything = apply_spp(
        copy.deepcopy(model), SPPConfig(metric="activation", calibration_batches=None), calibration=batches
    )
    first = apply_spp(copy.deepcopy(model), SPPConfig(metric="activation"), calibration=batches)
    same = apply_spp(copy.deepcopy(model), SPPConfig(metric="activation"), calibration=batches[:32])
    assert first.digest == same.digest
    assert not everything.scores["layers.0.mlp.ffn"].equal(first.scores["layers.0.mlp.ffn"])


def test_calibration_alone_means_activation():
    model = build_model("vit")
    reordering = apply_spp(model, calibration=[build_inputs(model)])
    assert reordering.config.metric == "activation"
    assert apply_spp(build_model("vit")).config.metric == "l1"


def test_labels_and_floats_are_placed_like_the_model():
    model = build_model("vit", dtype=torch.bfloat16)
    batch = build_inputs(build_model("vit"))
    assert batch["pixel_values"].dtype == torch.float32
    scores = scores_of(model, [batch], "taylor")
    assert all(values.dtype == torch.float64 and values.isfinite().all() for values in scores.values())


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([], "holds no batch; metric 'activation' needs at least one"),
        (iter(()), "a generator that was read before is empty"),
        ([(1, 2)], "A calibration batch is a tuple; a dict of forward arguments is needed"),
        ([torch.ones(2, 3)], "A calibration batch is a Tensor"),
        ({"pixel_values": torch.ones(1, 3, 12, 12)}, "A calibration batch is a str"),
        ([{"pixel_values": torch.ones(1, 3, 5, 5)}], "does not run on calibration batch 0"),
        ([{"pixel_values": torch.full((1, 3, 12, 12), float("nan"))}], "is NaN or infinite for group"),
    ],
    ids=["empty", "spent", "tuple", "tensor", "one-batch", "wrong-size", "nan"],
)
def test_data_that_does_not_suit(calibration, message):
    model = build_model("vit").train()
    before = weights_of(model)
    with pytest.raises(CalibrationError, match=message):
        apply_spp(model, calibration=calibration)
    assert same_bits(model, before)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    "calibration",
    [[{"pixels": torch.ones(1, 3, 12, 12)}], [{}], [{"pixel_values": "image.png"}], 5],
    ids=["unknown-argument", "no-argument", "text", "number"],
)
def test_data_that_does_not_suit_at_all(calibration):
    with pytest.raises(CalibrationError):
        apply_spp(build_model("vit"), calibration=calibration)


def test_an_error_of_the_users_generator_comes_through():
    model = build_model("vit")
    before = weights_of(model)

    def broken():
        yield build_inputs(model)
        raise LookupError("row 7 is gone")

    with pytest.raises(LookupError, match="row 7 is gone"):
        apply_spp(model, calibration=broken())
    assert same_bits(model, before)


# --- what must stay as it was -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["activation", "taylor"])
def test_nothing_but_the_scores(metric):
    model = build_model("bert", "sequence-classification")
    model.train()
    model.bert.encoder.layer[0].eval()
    model.bert.embeddings.requires_grad_(False)
    inputs = build_inputs(model)
    model(**inputs).loss.backward()
    before = weights_of(model)
    modes = [module.training for module in model.modules()]
    wants = [parameter.requires_grad for parameter in model.parameters()]
    gradients = {name: p.grad if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    state, grad_enabled = torch.get_rng_state(), torch.is_grad_enabled()
    batches = [inputs, inputs]
    contents = [{name: value.clone() for name, value in batch.items()} for batch in batches]

    scores = scores_of(model, batches, metric)

    assert all(not values.requires_grad for values in scores.values())
    assert same_bits(model, before)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == wants
    for name, parameter in model.named_parameters():
        kept = gradients[name]
        assert parameter.grad is None if kept is None else parameter.grad.equal(kept)
    assert torch.get_rng_state().equal(state)
    assert torch.is_grad_enabled() == grad_enabled
    assert all(
        batch[name].equal(value) for batch, old in zip(batches, contents, strict=True) for name, value in old.items()
    )
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("metric", ["activation", "taylor"])
def test_dropout_does_not_matter(metric):
    model = build_model("bert", "sequence-classification", torch.float64, hidden_dropout_prob=0.5)
    batches = [build_inputs(model)]
    expected = scores_of(model.eval(), batches, metric)
    assert_same_scores(scores_of(model.train(), batches, metric), expected)


@pytest.mark.parametrize("metric", ["activation", "taylor"])
def test_gradient_checkpointing_does_not_matter(metric):
    model = build_model("bert", "sequence-classification", torch.float64)
    batches = [build_inputs(model)]
    expected = scores_of(model, batches, metric)
    # The name is new in transformers 5; the old one warns.
    getattr(model.train(), "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    assert_same_scores(scores_of(model, batches, metric), expected)


def test_a_data_loader_leaves_the_global_generator_alone():
    model = build_model("vit")
    samples = [{name: value[0] for name, value in build_inputs(model).items()}] * 2
    state = torch.get_rng_state()
    apply_spp(model, calibration=DataLoader(samples, batch_size=2))
    assert torch.get_rng_state().equal(state)
