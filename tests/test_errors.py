"""Bad input raises its own error, says what to do, and leaves the model as it was; so does a crash."""

import copy
import dataclasses
import inspect

import pytest
import torch
import transformers
from conftest import build_inputs, build_model, legal_axes, same_bits, weights_of
from torch import nn

import hf_spp
from hf_spp import (
    CalibrationError,
    EqualFunctionError,
    ExampleInputsError,
    IllegalAxisError,
    NonFiniteWeightsError,
    OrdersError,
    SPPConfig,
    SPPConfigError,
    SPPError,
    UnsupportedArchitectureError,
    UnsupportedModelError,
    apply_spp,
    channel_groups,
    errors,
    transform,
)
from hf_spp import apply as writing
from hf_spp.proof import Witness

NAN, INF = float("nan"), float("inf")
ERRORS = [one for _, one in inspect.getmembers(errors, inspect.isclass) if issubclass(one, SPPError)]


def refused(error, model, *parts, config=None, **arguments):
    """Assert that `apply_spp` raises exactly this error, with every part in its message, and writes nothing."""
    before = weights_of(model)
    modes = [module.training for module in model.modules()]
    with pytest.raises(SPPError) as caught:
        apply_spp(model, config, **arguments)
    assert type(caught.value) is error
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert same_bits(model, before)
    assert [module.training for module in model.modules()] == modes
    assert not hasattr(model, "_spp_history")
    return message


# --- the errors themselves --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_every_error_is_an_spp_error_and_a_builtin(error):
    assert error.__module__ == "hf_spp.errors"
    assert error.__doc__
    if error is not SPPError:
        builtins = [base for base in error.__mro__ if base.__module__ == "builtins"]
        assert builtins[0] not in (Exception, BaseException), "the nearest built-in is a base as well"
        assert getattr(hf_spp, error.__name__) is error


# --- the list of the issue --------------------------------------------------------------------------------------------


def test_unknown_architecture():
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])
    model = transformers.ResNetModel(config).eval()
    refused(UnsupportedArchitectureError, model, "'resnet' (ResNetModel)", "hf-spp architectures")


def test_model_without_groups():
    model = build_model("vit")
    model.vit.layers = nn.ModuleList()
    refused(UnsupportedArchitectureError, model, "'vit' (ViTForImageClassification) has no channel group")


def test_model_whose_groups_are_all_refused():
    model = build_model("vit")
    for layer in model.vit.layers:
        layer.attention.register_parameter("scale", nn.Parameter(torch.ones(8)))
        layer.mlp.register_parameter("scale", nn.Parameter(torch.ones(8)))
    refused(UnsupportedArchitectureError, model, "parameter layers.*.attention.scale is not understood")


@pytest.mark.parametrize(
    ("name", "head", "axis", "reason"),
    [
        ("llama", None, "qk", "rotary position embedding"),
        ("bert", "base", "hidden", "the model has no head"),
    ],
)
def test_axis_that_is_not_legal(name, head, axis, reason):
    model = build_model(name, head)
    legal = f"Legal axes here: {', '.join(channel_groups(model).axes)}"
    refused(
        IllegalAxisError, model, f"Axis {axis!r} may not move in {type(model).__name__}", reason, legal, "Leave it out",
        config=SPPConfig(axes=("ffn", axis)),
    )  # fmt: skip


def test_axis_without_channels():
    model = build_model("bert", num_attention_heads=1)
    refused(IllegalAxisError, model, "the model has no such channels", config=SPPConfig(axes=("heads",)))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=str)
def test_quantized_weights(dtype):
    model = build_model("vit")
    weight = nn.Parameter(torch.zeros(20, 24, dtype=dtype), requires_grad=False)
    model.vit.layers[1].mlp.fc1.weight = weight
    refused(UnsupportedModelError, model, "vit.layers.1.mlp.fc1.weight", str(dtype), "quantize the result")


@pytest.mark.parametrize("flag", ["is_quantized", "hf_quantizer"])
def test_quantized_model(flag):
    model = build_model("vit")
    setattr(model, flag, True)
    refused(UnsupportedModelError, model, "ViTForImageClassification holds quantized weights", "quantize the result")


@pytest.mark.parametrize("verify", [True, False])
def test_weights_in_eight_bits(verify):
    model = build_model("vit")
    model.vit.layers[1].mlp.fc1.to(torch.float8_e4m3fn)
    with pytest.raises(UnsupportedModelError, match=r"vit\.layers\.1\.mlp\.fc1\.weight.*float8"):
        apply_spp(model, SPPConfig(axes=("ffn",), verify=verify, metric="random"))


@pytest.mark.parametrize("part", ["", "classifier"])
def test_meta_device(part):
    model = build_model("vit")
    model.get_submodule(part).to("meta")
    with pytest.raises(
        UnsupportedModelError, match=r"is on the meta device and holds no values.*Load the weights first"
    ):
        apply_spp(model)
    fresh = build_model("vit")
    reordering = apply_spp(fresh)
    for verb in (reordering.apply, reordering.undo):
        with pytest.raises(UnsupportedModelError, match="is on the meta device"):
            verb(model)


@pytest.mark.parametrize("given", [None, "bert", transformers.ViTModel, nn.Linear(2, 2), 5], ids=str)
def test_no_model(given):
    with pytest.raises(UnsupportedModelError, match="a transformers PreTrainedModel is needed"):
        apply_spp(given)


def test_wrapped_model():
    with pytest.raises(UnsupportedModelError, match=r"A DataParallel was given.*Unwrap it first"):
        apply_spp(nn.DataParallel(build_model("vit")))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("metric", ["l1", "random"])
@pytest.mark.parametrize("where", ["mlp.fc1.weight", "mlp.fc2.bias", "attention.v_proj.weight", "layernorm_after.bias"])
def test_non_finite_weights(where, metric, value):
    model = build_model("vit")
    model.get_parameter(f"vit.layers.1.{where}").data.view(-1)[7] = value
    message = refused(
        NonFiniteWeightsError, model, f"vit.layers.1.{where}", "NaN or infinity", config=SPPConfig(metric=metric)
    )
    assert "Reload the checkpoint, or repair the weight" in message


@pytest.mark.parametrize(
    "config",
    [SPPConfig(), SPPConfig(verify=False), SPPConfig(metric="random"), SPPConfig(metric="random", verify=False)],
    ids=["l1", "l1-unverified", "random", "random-unverified"],
)
@pytest.mark.parametrize("name", ["bert", "dinov2"])
def test_non_finite_weight_anywhere(name, config):
    """Rows of an embedding, biases and tokens that a short proof does not read are weights as well."""
    original, silent = build_model(name), []
    for key, _ in original.named_parameters():
        model = copy.deepcopy(original)
        model.get_parameter(key).data.view(-1)[-1] = NAN
        before = weights_of(model)
        try:
            apply_spp(model, config)
            silent.append(key)
        except NonFiniteWeightsError as error:
            if key not in str(error) or not same_bits(model, before):
                silent.append(f"{key}: {error}")
    assert silent == []


def test_orders_of_another_model():
    reordering = apply_spp(build_model("bert", "base"))
    for name, changes in (
        ("vit", {}),
        ("bert", {"intermediate_size": 28}),
        ("bert", {"num_hidden_layers": 1}),
        ("bert", {"num_attention_heads": 4}),
    ):
        other = build_model(name, "base", **changes)
        before = weights_of(other)
        for verb in (reordering.apply, reordering.undo):
            with pytest.raises(OrdersError, match="Use the orders that were saved with this checkpoint"):
                verb(other)
        assert same_bits(other, before)


@pytest.mark.parametrize(("one", "other"), [("bert", "roberta"), ("vit", "deit"), ("llama", "mistral")])
def test_orders_of_another_model_type_of_the_same_shape(one, other):
    reordering, model = apply_spp(build_model(one, "base")), build_model(other, "base")
    before = weights_of(model)
    for verb in (reordering.apply, reordering.undo):
        with pytest.raises(OrdersError, match=f"{one}.*{other}"):
            verb(model)
        assert same_bits(model, before)


@pytest.mark.parametrize(
    "change",
    [
        lambda order: order.fill_(0),
        lambda order: order.sub_(1),
        lambda order: order.add_(1),
        lambda order: order[:, :-1],
        lambda order: order[0],
        lambda order: order.int(),
        lambda order: order.float(),
        lambda order: order.t(),
    ],
    ids=["repeated", "negative", "too-large", "too-short", "flat", "int32", "float", "transposed"],
)
def test_orders_that_are_no_permutation(change):
    model = build_model("vit")
    good = apply_spp(copy.deepcopy(model))
    orders = {name: order.clone() for name, order in good.orders.items()}
    orders["layers.0.mlp.ffn"] = change(orders["layers.0.mlp.ffn"])
    bad = dataclasses.replace(good, orders=orders)
    before = weights_of(model)
    with pytest.raises(OrdersError, match=r"The order of 'layers\.0\.mlp\.ffn' is"):
        bad.apply(model)
    assert same_bits(model, before)


def test_no_axes():
    with pytest.raises(
        SPPConfigError, match=r"axes=\(\) names no axis.*Give some of qk, vo, heads, ffn, experts, hidden, or None"
    ):
        SPPConfig(axes=())


def test_unknown_metric():
    with pytest.raises(SPPConfigError, match=r"metric='magnitude' is unknown. Known: l1, l2, .*callable.*metric='l1'"):
        SPPConfig(metric="magnitude")


@pytest.mark.parametrize("metric", ["activation", "taylor"])
def test_metric_without_calibration(metric):
    model = build_model("vit")
    refused(
        CalibrationError, model, f"Metric {metric!r} needs calibration data and none was given", "l1, l2, random",
        config=SPPConfig(metric=metric),
    )  # fmt: skip


@pytest.mark.parametrize("metric", ["l1", "random", lambda group, weights: weights[0].flatten(2).sum(-1)])
def test_calibration_that_the_metric_ignores(metric):
    model = build_model("vit")
    config = SPPConfig(metric=metric)
    refused(CalibrationError, model, "does not use it", config=config, calibration=[build_inputs(model)])


# --- inputs of the proof ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "part"),
    [({}, "[]"), ({"pixels": 1}, "['pixels']"), ({"pixel_values": torch.ones(1, 3, 5, 5)}, "['pixel_values']")],
    ids=["empty", "unknown", "wrong-size"],
)
def test_example_inputs_that_do_not_run(inputs, part):
    model = build_model("vit").train()
    refused(
        ExampleInputsError, model, f"does not run on the given example_inputs {part}",
        "Give a dict of arguments that its forward accepts", example_inputs=inputs,
    )  # fmt: skip


@pytest.mark.parametrize("inputs", [5, torch.ones(1, 3, 12, 12), [torch.ones(1)]], ids=["number", "tensor", "list"])
def test_example_inputs_that_are_no_dict(inputs):
    with pytest.raises(ExampleInputsError, match=rf"a {type(inputs).__name__}.* dict"):
        apply_spp(build_model("vit"), example_inputs=inputs)


@pytest.mark.parametrize("config", ["l1", {"metric": "l1"}, SPPConfig], ids=["text", "dict", "class"])
def test_config_that_is_none(config):
    with pytest.raises(SPPConfigError, match="SPPConfig"):
        apply_spp(build_model("vit"), config)


def test_no_inputs_can_be_built():
    model = build_model("vit")

    class Odd(type(model)):
        def forward(self, waves):
            return super().forward(pixel_values=waves)

    model.__class__ = Odd
    refused(ExampleInputsError, model, "Pass example_inputs=dict(...)", "SPPConfig(verify=False)")
    reordering = apply_spp(model, example_inputs={"waves": torch.ones(1, 3, 12, 12)})
    assert reordering.relative_diff < 1e-5
    unproved = apply_spp(model, SPPConfig(verify=False, metric="random"))
    assert unproved.proof is unproved.max_abs_diff is unproved.tolerance is None
    assert "equal function was NOT checked" in str(unproved)


def test_outputs_that_are_not_finite_because_of_the_inputs():
    model = build_model("vit")
    inputs = {"pixel_values": torch.full((1, 3, 12, 12), NAN)}
    refused(ExampleInputsError, model, "puts out NaN or infinity on the inputs of the proof", example_inputs=inputs)


# --- failing proofs and crashes ---------------------------------------------------------------------------------------


def wrong_rotary_rows(monkeypatch):
    """A map that claims rotary rows may move, as a wrong map would."""
    monkeypatch.setattr("hf_spp.architectures.patterns.ROTARY_NAMES", "(?!)")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_failing_proof_restores_every_bit(dtype, monkeypatch):
    wrong_rotary_rows(monkeypatch)
    model = build_model("llama", dtype=dtype)
    message = refused(EqualFunctionError, model, "put back bit for bit", config=SPPConfig(axes=legal_axes(model)))
    assert "qk" in message


def test_unproved_wrong_map_would_have_changed_the_model(monkeypatch):
    """The control: without the proof the same call goes through."""
    wrong_rotary_rows(monkeypatch)
    model = build_model("llama")
    before = weights_of(model)
    assert apply_spp(model, SPPConfig(axes=("qk",), verify=False)).changed
    assert not same_bits(model, before)


def test_tolerance_is_what_the_user_says():
    model = build_model("bert")
    config = SPPConfig(axes=legal_axes(model), metric="random", tolerance=1e-12)
    refused(EqualFunctionError, model, "up to 1e-12 is accepted", config=config)
    assert apply_spp(model, SPPConfig(axes=legal_axes(model), metric="random", tolerance=1e-4)).tolerance == 1e-4


def test_message_of_a_failing_proof_names_axes():
    """Not names of groups: with grouped-query attention one of those is called query_heads."""
    with pytest.raises(EqualFunctionError, match=r"one of [a-z_, ]*\bheads\b") as caught:
        apply_spp(build_model("llama"), SPPConfig(metric="random", tolerance=1e-30))
    assert "query_heads" not in str(caught.value)


@pytest.mark.parametrize("crash_at", range(12))
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_crash_between_tensors(crash_at, error, monkeypatch):
    model = build_model("gpt2")
    before, gather, calls = weights_of(model), writing._gather, []

    def crash(tensor, dims):
        calls.append(dims)
        if len(calls) == crash_at + 1:
            raise error("crash")
        gather(tensor, dims)

    monkeypatch.setattr(writing, "_gather", crash)
    with pytest.raises(error):
        apply_spp(model, SPPConfig(axes=legal_axes(model), metric="random"))
    assert len(calls) >= crash_at + 1
    assert same_bits(model, before)
    assert not hasattr(model, "_spp_history")


@pytest.mark.parametrize("crash_at", [0, 1, 4, 5, 6, 11])
@pytest.mark.parametrize("axes", [("ffn",), ("qk", "vo", "heads", "ffn", "hidden")], ids=["ffn", "all"])
def test_crash_inside_a_tensor(axes, crash_at, monkeypatch):
    """Columns are gathered some rows at a time, and copies may run out of memory."""
    monkeypatch.setattr(writing, "_PIECE_BYTES", 400)
    model = build_model("bert")
    before, copy_, calls = weights_of(model), torch.Tensor.copy_, []

    def crash(self, *arguments, **options):
        calls.append(self.shape)
        if len(calls) == crash_at + 1:
            raise MemoryError("crash")
        return copy_(self, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "copy_", crash)
    with pytest.raises(MemoryError):
        apply_spp(model, SPPConfig(axes=axes, metric="random"))
    assert same_bits(model, before)


@pytest.mark.parametrize("value", [NAN, INF])
def test_outputs_that_are_not_finite_afterwards_fail_every_tolerance(value):
    """Comparisons with NaN are false, so one must not decide whether the outputs are equal."""
    model = build_model("vit")
    witness = Witness(model)
    assert witness.compare(model).relative_diff == 0
    model.classifier.bias.data[0] = value
    assert witness.compare(model).relative_diff == witness.compare(model).max_abs_diff == INF


@pytest.mark.parametrize("verb", ["undo", "apply"])
def test_crash_of_undo_and_apply(verb, monkeypatch):
    model = build_model("vit")
    fresh = copy.deepcopy(model)
    reordering = apply_spp(model, SPPConfig(metric="random"))
    target = model if verb == "undo" else fresh
    before, gather, calls = weights_of(target), writing._gather, []

    def crash(tensor, dims):
        calls.append(dims)
        if len(calls) == 5:
            raise RuntimeError("crash")
        gather(tensor, dims)

    with monkeypatch.context() as patch:
        patch.setattr(writing, "_gather", crash)
        with pytest.raises(RuntimeError, match="crash"):
            getattr(reordering, verb)(target)
    assert same_bits(target, before)
    getattr(reordering, verb)(target)
    assert not same_bits(target, before)


def test_crash_while_the_model_runs_again(monkeypatch):
    model = build_model("vit").train()
    before = weights_of(model)

    def crash(self, model, *arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_spp.proof.Witness.compare", crash)
    with pytest.raises(KeyboardInterrupt):
        apply_spp(model, SPPConfig(metric="random"))
    assert same_bits(model, before)


@pytest.mark.parametrize("where", ["default_tolerance", "remember", "_versions", "Reordering"])
def test_crash_before_the_orders_are_returned(where, monkeypatch):
    model = build_model("vit")
    before = weights_of(model)

    def crash(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(transform, where, crash)
    with pytest.raises(KeyboardInterrupt):
        apply_spp(model, SPPConfig(metric="random"))
    assert same_bits(model, before)


def test_apply_spp_keeps_modes_gradients_and_generators():
    model = build_model("bert", "sequence-classification").train()
    model.bert.encoder.layer[0].eval()
    model.classifier.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    wants = [parameter.requires_grad for parameter in model.parameters()]
    state = torch.get_rng_state()
    apply_spp(model, SPPConfig(axes=legal_axes(model)))
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == wants
    assert all(parameter.grad is None and parameter.is_leaf for parameter in model.parameters())
    assert torch.get_rng_state().equal(state)
