"""Scores from calibration data: against hand computation, finite differences, and what must stay untouched."""

import copy

import pytest
import torch
import transformers
from conftest import (
    build_inputs,
    build_model,
    everything_in_float64,
    legal_axes,
    outputs_of,
    randomize,
    same_bits,
    weights_of,
)
from torch import nn
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


# --- structures whose channels no module gets or gives ----------------------------------------------------------------

_EXPERTS = {
    "vocab_size": 40,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 6,
    "intermediate_size": 8,
    "num_local_experts": 7,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}


def build_experts(kind, implementation="eager", dtype=torch.float64):
    config = {"mixtral": transformers.MixtralConfig, "gpt_oss": transformers.GptOssConfig}[kind]
    model = {"mixtral": transformers.MixtralForCausalLM, "gpt_oss": transformers.GptOssForCausalLM}[kind]
    with torch.random.fork_rng(devices=[]):
        return randomize(model(config(**_EXPERTS, experts_implementation=implementation))).to(dtype).eval()


def expert_scores(model, batches, metric):
    return calibrated_scores(model, channel_groups(model).select(("ffn", "experts")), batches, metric)


def text_batch(samples=3, tokens=6, seed=1):
    """Token ids and a mask with padding, and labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 40, (samples, tokens), generator=generator)
    mask = torch.ones(samples, tokens, dtype=torch.int64)
    mask[-1, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def neurons_of(experts, expert, states):
    """What an expert's neurons are on some tokens, and the matrix that reads them, `[neurons, hidden]`."""
    up = experts.gate_up_proj[expert]
    if not hasattr(experts, "gate_up_proj_bias"):
        gate, up = (states @ up.T).chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up, experts.down_proj[expert].T
    both = states @ up + experts.gate_up_proj_bias[expert]
    gate, up = both[:, ::2].clamp(max=experts.limit), both[:, 1::2].clamp(-experts.limit, experts.limit)
    return (up + 1) * gate * torch.sigmoid(gate * experts.alpha), experts.down_proj[expert]


@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [("eager", torch.float64), ("batched_mm", torch.float64), ("grouped_mm", torch.float32)],
    ids=["eager", "batched", "grouped"],
)
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_activation_of_experts_by_hand(kind, implementation, dtype):
    """Over all tokens that are no padding, of which an expert sees those that the router sends to it."""
    model = build_experts(kind, implementation, dtype)
    batches = [text_batch(seed=seed) for seed in (1, 2)]
    experts, seen = model.model.layers[1].mlp.experts, []
    handle = experts.register_forward_pre_hook(lambda _, args: seen.append(args))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    energy = torch.zeros(7, 8, dtype=torch.float64)
    with torch.no_grad():
        for batch, (states, chosen, _) in zip(batches, seen, strict=True):
            kept = batch["attention_mask"].flatten().bool()
            for token in kept.nonzero().flatten():
                for expert in chosen[token]:
                    neurons, reader = neurons_of(experts, expert, states[token : token + 1])
                    energy[expert] += neurons[0].double().square() * reader.double().square().sum(1)
    energy /= sum(int(batch["attention_mask"].sum()) for batch in batches)
    found, allowed = expert_scores(model, batches, "activation"), 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(found["layers.1.mlp.experts.ffn"], energy.sqrt(), rtol=allowed, atol=allowed)
    whole = energy.sum(1).sqrt()[None]
    torch.testing.assert_close(found["layers.1.mlp.experts.experts"], whole, rtol=allowed, atol=allowed)
    assert model.config._experts_implementation == implementation
    assert "forward" not in vars(experts)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_taylor_of_experts_is_the_first_order_change_of_the_loss(kind):
    """Central differences of each sample's loss when an expert, or what one neuron is read with, is scaled."""
    model = build_experts(kind)
    batch = text_batch()
    samples = [{key: value[index : index + 1] for key, value in batch.items()} for index in range(3)]
    before = weights_of(model)
    weight, step = model.model.layers[0].mlp.experts.down_proj, 1e-5
    with everything_in_float64():
        found = expert_scores(model, [batch], "taylor")

    @torch.no_grad()
    def changes(part):
        kept, losses = part.clone(), []
        for factor in (1 + step, 1 - step):
            part.copy_(kept * factor)
            losses.append(torch.stack([outputs_of(model, sample)["output.loss"] for sample in samples]))
        part.copy_(kept)
        return ((losses[0] - losses[1]) / (2 * step)).square().mean().sqrt()

    for expert in range(7):
        whole = weight.data[expert]
        neuron = whole[2] if kind == "gpt_oss" else whole[:, 2]
        for name, value, part in (
            ("experts", found["layers.0.mlp.experts.experts"][0, expert], whole),
            ("ffn", found["layers.0.mlp.experts.ffn"][expert, 2], neuron),
        ):
            torch.testing.assert_close(value, changes(part), rtol=1e-5, atol=1e-9, msg=f"{name} {expert}")
    assert same_bits(model, before)


@pytest.mark.parametrize("metric", ["activation", "taylor"])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_experts_do_not_depend_on_padding_and_batches(kind, metric):
    model = build_experts(kind)
    batch = text_batch()
    del batch["labels"]
    single = [
        {key: value[index : index + 1, : int(mask.sum())] for key, value in batch.items()}
        for index, mask in enumerate(batch["attention_mask"])
    ]
    found, expected = (expert_scores(model, batches, metric) for batches in ([batch], single))
    assert_same_scores(found, expected, tolerance=1e-9)


def test_experts_whose_parameters_are_in_a_part_of_them():
    """DBRX keeps all matrices below each other in one, in a module that sees the tokens of one expert at a time."""
    config = transformers.DbrxConfig(
        vocab_size=40, d_model=12, n_heads=2, n_layers=1, max_seq_len=16, pad_token_id=0,
        attn_config={"kv_n_heads": 1, "clip_qkv": 8.0, "rope_theta": 1e4},
        ffn_config={"ffn_hidden_size": 8, "moe_num_experts": 3},
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        model = randomize(transformers.DbrxForCausalLM(config)).double().eval()
    batch, flows = text_batch(), {}
    inner = model.transformer.blocks[0].ffn.experts.mlp
    single = [
        {"input_ids": ids[: int(mask.sum())][None]}
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]

    def watch(_, args):
        states, w1, v1, w2 = args
        expert = (w2.storage_offset() - inner.w2.storage_offset()) // w2.numel()
        neurons = inner.activation_fn(states @ w1.T) * (states @ v1.T)
        flows[expert] = flows.get(expert, 0) + neurons.square().sum(0) * w2.square().sum(1)

    handle = inner.register_forward_pre_hook(watch)
    with torch.no_grad():
        for sample in single:
            model(**sample)
    handle.remove()
    found = expert_scores(model, [batch], "activation")["blocks.0.ffn.experts.mlp.ffn"]
    tokens = int(batch["attention_mask"].sum())
    for expert in range(3):
        torch.testing.assert_close(found[expert], (flows.get(expert, torch.zeros(8).double()) / tokens).sqrt())


@pytest.mark.parametrize("metric", ["activation", "taylor"])
def test_experts_that_no_token_reaches_score_zero(metric):
    model = build_experts("mixtral")
    for layer in model.model.layers:
        layer.mlp.gate.weight.data.zero_()  # equal scores send every token to the same experts
    reordering = apply_spp(model, SPPConfig(axes=("ffn", "experts"), metric=metric), calibration=[text_batch()])
    scores = reordering.scores["layers.0.mlp.experts.experts"][0]
    assert (scores > 0).sum() == 2
    assert reordering.scores["layers.0.mlp.experts.ffn"].gt(0).any(1).equal(scores > 0)


@pytest.mark.parametrize("metric", ["activation", "taylor"])
def test_expert_modules_that_no_token_reaches_score_zero(metric):
    """Experts of other models are modules of their own, which then never run."""
    config = transformers.SwitchTransformersConfig(
        vocab_size=40, d_model=12, d_kv=4, d_ff=5, num_heads=3, num_layers=2, num_decoder_layers=2, num_experts=3,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, decoder_start_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        model = randomize(transformers.SwitchTransformersForConditionalGeneration(config)).double().eval()
    for name, parameter in model.named_parameters():
        if "router" in name:
            parameter.data.zero_()
    batch = {"input_ids": torch.tensor([[5, 6, 7]]), "decoder_input_ids": torch.tensor([[0, 8]])}
    found = scores_of(model, [batch], metric)
    experts = {name: values for name, values in found.items() if "decoder.block.1.layer.2.mlp.experts" in name}
    assert [bool((values > 0).any()) for values in experts.values()] == [True, False, False]
    assert all(values.shape == (1, 5) for values in experts.values())


class Mixer(transformers.PreTrainedModel):
    """nn.MultiheadAttention over text, and a feed-forward of convolutions."""

    config_class = transformers.BertConfig
    main_input_name = "input_ids"

    def __init__(self, config, batch_first=True, separate=False):
        super().__init__(config)
        width = config.hidden_size
        self.embedding = nn.Embedding(config.vocab_size, width)
        sizes = {"kdim": width, "vdim": width} if separate else {}
        self.attention = nn.MultiheadAttention(width, config.num_attention_heads, batch_first=batch_first, **sizes)
        if separate:
            self.attention._qkv_same_embed_dim = False
            self.attention.in_proj_weight = None
            for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
                setattr(self.attention, name, nn.Parameter(torch.empty(width, width)))
        self.mlp = nn.Module()
        self.mlp.fc1 = nn.Conv1d(width, config.intermediate_size, 1)
        self.mlp.fc2 = nn.Conv1d(config.intermediate_size, width, 3, padding=1)
        self.classifier = nn.Linear(width, config.num_labels)
        self.post_init()

    def states(self, input_ids):
        return self.embedding(input_ids)

    def forward(self, input_ids, attention_mask=None, labels=None):
        states = self.states(input_ids)
        turned = states if self.attention.batch_first else states.transpose(0, 1)
        padding = None if attention_mask is None else attention_mask == 0
        states = self.attention(turned, turned, value=turned, key_padding_mask=padding, need_weights=False)[0]
        states = states if self.attention.batch_first else states.transpose(0, 1)
        self.neurons = torch.relu(self.mlp.fc1(states.transpose(1, 2)))
        logits = self.classifier(self.mlp.fc2(self.neurons).transpose(1, 2)).mean(1)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits} if labels is not None else {"logits": logits}


def build_mixer(**options):
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=12, num_attention_heads=3, intermediate_size=8, num_labels=4
    )
    with torch.random.fork_rng(devices=[]):
        return randomize(Mixer(config, **options)).double().eval()


def mixer_batch(seed=1):
    batch = text_batch(samples=3, tokens=6, seed=seed)
    return {**batch, "labels": torch.tensor([0, 3, 1])}


MIXERS = {
    "batch-first": {"batch_first": True},
    "tokens-first": {"batch_first": False},
    "separate": {"batch_first": False, "separate": True},
}


@pytest.mark.parametrize("options", MIXERS.values(), ids=MIXERS)
def test_activation_of_multihead_attention_and_convolutions_by_hand(options):
    model, batch = build_mixer(**options), mixer_batch()
    kept, attention = batch["attention_mask"].bool(), model.attention
    fast = torch.backends.mha.get_fastpath_enabled()
    found = scores_of(model, [batch], "activation")
    assert torch.backends.mha.get_fastpath_enabled() == fast
    with torch.no_grad():
        states = model.states(batch["input_ids"])
        weights = attention.in_proj_weight
        if weights is None:
            weights = torch.cat([attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight])
        q, k, v = (states @ weights.T + attention.in_proj_bias).split(12, -1)
        split = [one.unflatten(-1, (3, 4)).transpose(1, 2) for one in (q, k, v)]
        logits = split[0] @ split[1].transpose(-1, -2) / 2
        logits = logits.masked_fill(~kept[:, None, None], -torch.inf)
        mixed = (logits.softmax(-1) @ split[2]).transpose(1, 2).flatten(2)
        energy = mixed[kept].square().mean(0) * attention.out_proj.weight.square().sum(0)
        rows = q[kept].square().mean(0).sqrt() * k[kept].square().mean(0).sqrt()
        model(**batch)
        neurons = model.neurons.transpose(1, 2)[kept].square().mean(0) * model.mlp.fc2.weight.square().sum((0, 2))
    torch.testing.assert_close(found["attention.qk"], rows.view(3, 4))
    torch.testing.assert_close(found["attention.vo"], energy.sqrt().view(3, 4))
    torch.testing.assert_close(found["attention.heads"], energy.view(3, 4).sum(1).sqrt()[None])
    torch.testing.assert_close(found["mlp.ffn"], neurons.sqrt()[None])


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("options", MIXERS.values(), ids=MIXERS)
def test_taylor_of_multihead_attention_and_convolutions(options, labels):
    """The gradient of a scale of one on each channel, by hand, sample by sample."""
    model, batch = build_mixer(**options), mixer_batch()
    if not labels:
        del batch["labels"]
    before = weights_of(model)
    found = scores_of(model, [batch], "taylor")
    assert same_bits(model, before)
    attention = model.attention
    names = ["in_proj_weight"] if attention.in_proj_weight is not None else ["q_proj_weight", "k_proj_weight"]
    expected = {"qk": 0, "vo": 0, "ffn": 0}
    for index in range(3):
        sample = {key: value[index : index + 1] for key, value in batch.items()}
        out = model(**sample)
        loss = out["loss"] if labels else nn.functional.cross_entropy(out["logits"], out["logits"].detach().argmax(-1))
        parameters = [*(getattr(attention, name) for name in names), attention.in_proj_bias, attention.out_proj.weight]
        parameters.append(model.mlp.fc2.weight)
        *projections, bias, output, convolution = (
            parameter.detach() * gradient
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True)
        )
        rows = torch.cat(projections).sum(1)[:24] + bias[:24]
        expected["qk"] += (rows[:12] + rows[12:]).square() / 3
        expected["vo"] += output.sum(0).square() / 3
        expected["ffn"] += convolution.sum((0, 2)).square() / 3
    torch.testing.assert_close(found["attention.qk"].flatten(), expected["qk"].sqrt())
    torch.testing.assert_close(found["attention.vo"].flatten(), expected["vo"].sqrt())
    torch.testing.assert_close(found["mlp.ffn"].flatten(), expected["ffn"].sqrt())


def test_pooling_head_of_a_vision_model():
    """Its attention has a query of its own, of one token."""
    sizes = {"hidden_size": 12, "num_attention_heads": 3, "num_hidden_layers": 1, "intermediate_size": 8}
    config = transformers.SiglipVisionConfig(image_size=8, patch_size=4, **sizes)
    with torch.random.fork_rng(devices=[]):
        model = randomize(transformers.SiglipVisionModel(config)).double().eval()
    batches = [{"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))}]
    head, seen = model.head, []
    handle = head.attention.register_forward_pre_hook(lambda _, args: seen.append(args[:2]))
    with torch.no_grad():
        model(**batches[0])
        handle.remove()
        query, key = seen[0]
        weights, bias = head.attention.in_proj_weight, head.attention.in_proj_bias
        q, k = query @ weights[:12].T + bias[:12], key @ weights[12:24].T + bias[12:24]
        rows = q.square().mean((0, 1)).sqrt() * k.square().mean((0, 1)).sqrt()
    found = scores_of(model, batches, "activation")
    torch.testing.assert_close(found["head.attention.qk"], rows.view(3, 4))
    assert all(bool((values > 0).all()) for values in scores_of(model, batches, "taylor").values())


def test_tied_layers_are_watched_wherever_they_run():
    """Layers that share parameters, not modules, count as one."""
    model = build_model("bert", "sequence-classification", torch.float64)
    first, second = (layer.intermediate.dense for layer in model.bert.encoder.layer)
    first_out, second_out = (layer.output.dense for layer in model.bert.encoder.layer)
    second.weight, second.bias, second_out.weight = first.weight, first.bias, first_out.weight
    batch, flows = build_inputs(model, batch=1), []
    handles = [one.register_forward_pre_hook(lambda _, args: flows.append(args[0])) for one in (first_out, second_out)]
    with torch.no_grad():
        model(**{**batch, "attention_mask": torch.ones_like(batch["attention_mask"])})
    for handle in handles:
        handle.remove()
    batch["attention_mask"][:] = 1
    energy = torch.cat([one.flatten(0, 1) for one in flows]).square().mean(0)
    expected = (energy * first_out.weight.detach().square().sum(0)).sqrt()
    found = scores_of(model, [batch], "activation")
    torch.testing.assert_close(found["encoder.layer.0.ffn"], expected[None])


# --- groups that cannot be watched ------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["activation", "taylor"])
def test_part_of_the_model_that_does_not_run(metric):
    model = build_model("t5", "base")

    class EncoderOnly(type(model)):
        def forward(self, **inputs):
            return self.encoder(**inputs)

    model.__class__ = EncoderOnly
    before = weights_of(model)
    with pytest.raises(CalibrationError, match=r"reached group decoder\.block\.0.*Give batches that run this part"):
        scores_of(model, [{"input_ids": torch.tensor([[5, 6, 7]])}], metric)
    assert same_bits(model, before)


def test_experts_that_hide_their_products():
    """Matrices that are copied before they are used cannot be recognized; their gradients can."""
    model = build_experts("mixtral")

    class Hiding(type(model.model.layers[0].mlp.experts)):
        def forward(self, states, chosen, weights):
            down = self.down_proj
            self._parameters["down_proj"] = down * 1
            try:
                return super().forward(states, chosen, weights)
            finally:
                self._parameters["down_proj"] = down

    batches = [text_batch()]
    expected = expert_scores(model, batches, "taylor")
    model.model.layers[1].mlp.experts.__class__ = Hiding
    message = r"through group layers\.1\.mlp\.experts\.\w+ cannot be watched: Hiding computes.*Use metric 'taylor'"
    with pytest.raises(CalibrationError, match=message):
        expert_scores(model, batches, "activation")
    assert_same_scores(expert_scores(model, batches, "taylor"), expected)
    assert not any("forward" in vars(module) for module in model.modules())


def test_batch_that_cannot_be_split():
    model = build_experts("mixtral")
    batch = {**text_batch(), "position_ids": torch.arange(6).repeat(2, 1)}
    with pytest.raises(CalibrationError, match=r"cannot be split: position_ids has 2 entries. Give batches of one"):
        scores_of(model, [batch], "taylor")
    with pytest.raises(CalibrationError, match=r"does not run on calibration batch 0 with the arguments \['ids'\]"):
        scores_of(model, [{"ids": text_batch()["input_ids"]}], "taylor")


def test_batch_whose_samples_do_not_run():
    model = build_mixer()

    class Joined(type(model)):
        def forward(self, input_ids, **rest):
            return super().forward(input_ids.view(3, 6), **rest)

    model.__class__ = Joined
    with pytest.raises(CalibrationError, match=r"a batch of 3 cannot be split: shape.*Give batches of one sample"):
        scores_of(model, [mixer_batch()], "taylor")


MIXING = {
    "in-a-row": (lambda states: states.flatten(0, 1), lambda states, like: states.view_as(like)),
    "tokens-first": (lambda states: states.transpose(0, 1), lambda states, like: states.transpose(0, 1)),
}


@pytest.mark.parametrize(("mix", "unmix"), MIXING.values(), ids=MIXING)
def test_samples_are_told_apart_where_features_mix_them(mix, unmix):
    """A gate for each sample has no place where tokens of all samples are in a row, or come before the samples."""
    model = build_model("bert", "sequence-classification", torch.float64)
    batch = build_inputs(model, batch=7)  # as many as tokens
    batch["attention_mask"][:] = 1
    expected = scores_of(model, [batch], "taylor")

    class Mixing(type(model.bert.encoder.layer[0])):
        def feed_forward_chunk(self, states):
            return unmix(super().feed_forward_chunk(mix(states)), states)

    for layer in model.bert.encoder.layer:
        layer.__class__ = Mixing
    assert_same_scores(scores_of(model, [batch], "taylor"), expected, tolerance=1e-9)
