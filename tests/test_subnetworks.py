"""Slices against masks of this file's own, which know nothing of the package's map."""

import contextlib
import copy
import pickle
import warnings

import pytest
import torch
import transformers
from conftest import (
    ARCHITECTURES,
    build_inputs,
    build_model,
    everything_in_float64,
    legal_axes,
    outputs_of,
    relative_difference,
    same_bits,
    weights_of,
)
from torch import nn

from hf_spp import (
    SPPConfig,
    SubnetworkError,
    SubnetworkSpec,
    apply_spp,
    channel_groups,
    extract_subnetwork,
    subnetwork_view,
)

# The layers that read all heads, and the neurons, by the end of their names.
READS_HEADS = (
    "attention.o_proj", "attention.output.dense", "attention.out_lin", "SelfAttention.o", "EncDecAttention.o",
    "self_attn.o_proj", "attn.c_proj",
)  # fmt: skip
READS_NEURONS = (
    "mlp.fc2",
    "output.dense",
    "ffn.lin2",
    "DenseReluDense.wo",
    "mlp.down_proj",
    "mlp.c_proj",
    "mlp.weights_out",
)
HEADS, KEY_VALUE_HEADS = (
    {"llama": 6, "qwen2": 6, "qwen3": 6, "mistral": 6},
    {"llama": 2, "qwen2": 2, "qwen3": 2, "mistral": 2},
)


@pytest.fixture(autouse=True)
def _one_thread():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def attention_sizes(name, model):
    """Key-value heads, and query heads for each."""
    config = model.config
    heads = HEADS.get(name) or next(
        getattr(config, key)
        for key in ("num_attention_heads", "n_heads", "num_heads", "n_head")
        if hasattr(config, key)
    )
    shared = KEY_VALUE_HEADS.get(name, heads)
    return shared, heads // shared


@contextlib.contextmanager
def masked(name, model, **kept):
    """Zero what the layers behind cut channels read."""
    groups, shared = attention_sizes(name, model)
    handles = []

    def heads_hook(_, args):
        states = args[0].clone()
        each = states.view(*states.shape[:-1], groups, shared, -1)
        each[..., kept.get("heads", groups) :, :, :] = 0
        each[..., kept.get("query_heads", shared) :, :] = 0
        each[..., kept.get("vo", each.shape[-1]) :] = 0
        return (states, *args[1:])

    def neurons_hook(_, args):
        states = args[0].clone()
        states[..., kept.get("ffn", states.shape[-1]) :] = 0
        return (states, *args[1:])

    for path, module in model.named_modules():
        if path.endswith(READS_HEADS):
            handles.append(module.register_forward_pre_hook(heads_hook))
        elif path.endswith(READS_NEURONS):
            handles.append(module.register_forward_pre_hook(neurons_hook))
    assert len(handles) >= 4
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def ordered(name, **changes):
    """A tiny model in random order along every axis but the stream, and its inputs."""
    model = build_model(name, dtype=torch.float64, **changes)
    axes = tuple(axis for axis in legal_axes(model) if axis != "hidden")
    apply_spp(model, SPPConfig(axes=axes, metric="random", verify=False))
    return model, build_inputs(model)


CUTS = [{"ffn": 12}, {"heads": 1}, {"vo": 3}, {"ffn": 8, "heads": 2}, {"heads": 2, "vo": 4, "ffn": 7}]
GROUPED = [{"heads": 1, "ffn": 12}, {"query_heads": 2}, {"heads": 1, "query_heads": 1, "vo": 2}]


def cases():
    for name in ARCHITECTURES:
        for cut in GROUPED if name in HEADS else CUTS:
            yield pytest.param(name, cut, id=f"{name}-{'-'.join(cut)}")


@pytest.mark.parametrize(("name", "cut"), list(cases()))
def test_a_slice_computes_what_the_masked_model_does(name, cut):
    model, inputs = ordered(name)
    weights, spec = weights_of(model), SubnetworkSpec(**cut)
    with everything_in_float64():
        whole = outputs_of(model, inputs)
        with masked(name, model, **cut):
            expected = outputs_of(model, inputs)
        small = extract_subnetwork(model, spec)
        assert relative_difference(expected, outputs_of(small, inputs)) < 1e-10
        with subnetwork_view(model, spec):
            assert relative_difference(expected, outputs_of(model, inputs)) < 1e-10
            assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in small.parameters())
        assert relative_difference(expected, whole) > 1e-3
    assert type(small) is type(model)
    assert same_bits(model, weights)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    assert not {p.data_ptr() for p in small.parameters()} & {p.data_ptr() for p in model.parameters()}


@pytest.mark.parametrize("name", [n for n in ARCHITECTURES if n not in HEADS])
def test_rows_of_queries_and_keys_keep_the_scale_of_scores(name):
    model, inputs = ordered(name)
    for cut in ({"qk": 4}, {"qk": 4, "vo": 4}):
        masked_model = copy.deepcopy(model)
        zero_query_rows(name, masked_model, 4)
        with everything_in_float64(), masked(name, masked_model, **{k: v for k, v in cut.items() if k == "vo"}):
            expected = outputs_of(masked_model, inputs)
        small = extract_subnetwork(model, SubnetworkSpec(**cut))
        with everything_in_float64():
            assert relative_difference(expected, outputs_of(small, inputs)) < 1e-10
            with subnetwork_view(model, SubnetworkSpec(**cut)):
                assert relative_difference(expected, outputs_of(model, inputs)) < 1e-10


@torch.no_grad()
def zero_query_rows(name, model, kept):
    """Zero rows of the queries of each head, which zeroes their products with keys."""
    _, heads = attention_sizes(name, model)
    heads = attention_sizes(name, model)[0] * heads
    for path, module in model.named_modules():
        if path.endswith(("q_proj", ".query", "q_lin", "SelfAttention.q", "EncDecAttention.q")):
            for tensor in module.parameters():
                tensor.view(heads, -1, *tensor.shape[1:])[:, kept:] = 0
        elif path.endswith("attn.c_attn"):
            width = module.weight.shape[0]
            module.weight[:, :width].unflatten(1, (heads, -1))[:, :, kept:] = 0
            module.bias[:width].view(heads, -1)[:, kept:] = 0


@pytest.mark.parametrize("name", ["vit", "bert", "llama", "t5", "gpt2"])
def test_the_whole_is_the_same_function(name):
    model, inputs = ordered(name)
    small = extract_subnetwork(model, SubnetworkSpec(ffn=1.0, heads=1.0))
    assert relative_difference(outputs_of(model, inputs), outputs_of(small, inputs)) == 0
    assert {**small.config.to_dict(), "dtype": None} == {**model.config.to_dict(), "dtype": None}


@pytest.mark.parametrize("name", ["vit", "bert", "llama", "gpt2"])
def test_layers_of_several_widths(name):
    model, inputs = ordered(name)
    small = extract_subnetwork(model, SubnetworkSpec(ffn=(8, 16), heads=(2, 1)))
    one = extract_subnetwork(model, SubnetworkSpec(ffn=8, heads=2))
    other = extract_subnetwork(model, SubnetworkSpec(ffn=16, heads=1))
    sizes = [{n: p.shape for n, p in each.named_parameters()} for each in (small, one, other)]
    for key in sizes[0]:
        first = any(f"{stack}.0." in key for stack in ("layers", "layer", "h"))
        assert sizes[0][key] == sizes[1 if first else 2][key]
    with subnetwork_view(model, SubnetworkSpec(ffn=(8, 16), heads=(2, 1))):
        assert relative_difference(outputs_of(small, inputs), outputs_of(model, inputs)) < 1e-12


def test_a_view_of_heads_that_the_code_counts_in_the_config():
    config = transformers.Phi3Config(
        vocab_size=40, hidden_size=24, intermediate_size=20, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    model = transformers.Phi3Model(config).eval()
    apply_spp(model)
    spec, inputs = SubnetworkSpec(heads=1, query_heads=2), {"input_ids": torch.arange(8)[None]}
    expected = outputs_of(extract_subnetwork(model, spec), inputs)
    with subnetwork_view(model, spec):
        assert relative_difference(expected, outputs_of(model, inputs)) < 1e-5
    assert model.config.num_attention_heads == 6
    assert all(layer.self_attn.config is model.config for layer in model.layers)


def test_heads_that_the_code_takes_from_the_residual_stream_stay_whole():
    model = transformers.GroupViTTextModel(
        transformers.GroupViTTextConfig(
            vocab_size=40, hidden_size=24, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4
        )
    )
    apply_spp(model)
    with pytest.raises(SubnetworkError, match="GroupViTAttention computes the size of its heads from the residual"):
        extract_subnetwork(model, SubnetworkSpec(heads=2))
    assert {name.rpartition(".")[2] for name in SubnetworkSpec.uniform(model, 0.5).widths(model)} == {"ffn"}


@pytest.mark.parametrize("name", ["vit", "dinov2", "bert", "llama", "gpt2", "t5"])
def test_gradients_of_a_view_reach_the_whole_weights(name):
    model, inputs = ordered(name)
    spec = SubnetworkSpec(ffn=8, heads=1)
    small = extract_subnetwork(model, spec)
    small(**inputs).loss.backward()
    with subnetwork_view(model, spec):
        loss = model(**inputs).loss
    loss.backward()
    for (key, parameter), other in zip(model.named_parameters(), small.parameters(), strict=True):
        assert isinstance(parameter, nn.Parameter)
        if other.grad is None:
            assert parameter.grad is None
            assert "mask_token" in key
        else:
            assert parameter.grad.shape == parameter.shape
            assert float(parameter.grad.abs().sum()) == pytest.approx(float(other.grad.abs().sum()), rel=1e-9)


def test_a_view_holds_no_copy_of_separate_projections():
    model, _ = ordered("vit")
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with subnetwork_view(model, SubnetworkSpec(ffn=8, heads=2)):
        assert {p.untyped_storage().data_ptr() for p in model.parameters()} == storages
        assert model.vit.layers[0].mlp.fc1.weight.shape[0] == model.vit.layers[0].mlp.fc1.out_features == 8
    assert model.vit.layers[0].mlp.fc1.out_features == 20


def test_a_view_puts_everything_back_after_an_error():
    model, _ = ordered("vit")
    weights = weights_of(model)
    with pytest.raises(KeyError), subnetwork_view(model, SubnetworkSpec(heads=2, vo=4)):
        raise KeyError
    assert same_bits(model, weights)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_view_follows_weights_that_change():
    model, inputs = ordered("vit")
    spec = SubnetworkSpec(ffn=8)
    with subnetwork_view(model, spec):
        before = outputs_of(model, inputs)
    with torch.no_grad():
        model.vit.layers[0].mlp.fc1.weight.mul_(2)
    with subnetwork_view(model, spec):
        after = outputs_of(model, inputs)
    assert relative_difference(before, after) > 1e-3


def test_generation_with_a_cache():
    model, inputs = ordered("llama")
    small = extract_subnetwork(model, SubnetworkSpec(ffn=8, heads=(1, 2), query_heads=2)).float()
    ids = inputs["input_ids"][:, :4]
    mask = torch.ones_like(ids)
    arguments = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    cached = small.generate(ids, **arguments)
    assert cached.shape[1] > 4
    assert torch.equal(cached, small.generate(ids, use_cache=False, **arguments))


def test_copies_of_a_slice_compute_the_same(tmp_path):
    model, inputs = ordered("bert")
    small = extract_subnetwork(model, SubnetworkSpec(heads=2, vo=4, ffn=8))
    for copied in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert relative_difference(outputs_of(small, inputs), outputs_of(copied, inputs)) == 0
    again = extract_subnetwork(extract_subnetwork(model, SubnetworkSpec(ffn=16)), SubnetworkSpec(ffn=8))
    assert (
        relative_difference(
            outputs_of(extract_subnetwork(model, SubnetworkSpec(ffn=8)), inputs), outputs_of(again, inputs)
        )
        == 0
    )


def test_mode_dtype_and_attention_are_those_of_the_model():
    model, _ = ordered("llama", attn_implementation="eager")
    model.generation_config.max_new_tokens = 3
    model.model.layers[0].mlp.down_proj.weight.requires_grad_(False)
    small = extract_subnetwork(model.train().to(torch.bfloat16), SubnetworkSpec(ffn=8))
    assert (small.training, small.dtype, small.config._attn_implementation) == (True, torch.bfloat16, "eager")
    assert small.generation_config.max_new_tokens == 3
    assert not small.model.layers[0].mlp.down_proj.weight.requires_grad
    assert small.model.layers[0].mlp.up_proj.weight.requires_grad
    assert small.get_output_embeddings().weight is small.get_input_embeddings().weight


@pytest.mark.parametrize(("name", "cut", "fields"), [
    ("vit", {"ffn": 8, "heads": 2}, {"intermediate_size": 8, "num_attention_heads": 2, "head_dim": 8}),
    ("vit", {"qk": 4, "vo": 4}, {"head_dim": 4, "num_attention_heads": 3}),
    ("dinov2", {"ffn": 24, "heads": 1}, {"mlp_ratio": 1, "num_attention_heads": 1, "head_dim": 8}),
    ("llama", {"ffn": 8, "heads": 1}, {"intermediate_size": 8, "num_attention_heads": 3, "num_key_value_heads": 1}),
    ("llama", {"query_heads": 2}, {"num_attention_heads": 4, "num_key_value_heads": 2}),
    ("t5", {"heads": 1, "ffn": 8}, {"num_heads": 1, "d_ff": 8}),
    ("gpt2", {"ffn": 8}, {"n_inner": 8}),
    ("bert", {"heads": 2, "hidden": 16}, {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 20}),
])  # fmt: skip
def test_the_config_states_the_sizes(name, cut, fields):
    model, inputs = ordered(name)
    small = extract_subnetwork(model, SubnetworkSpec(**cut), allow_unordered="hidden" in cut)
    assert {key: getattr(small.config, key) for key in fields} == fields
    stock = type(model)(small.config).to(torch.float64).eval()
    stock.load_state_dict(small.state_dict())
    assert relative_difference(outputs_of(small, inputs), outputs_of(stock, inputs)) < 1e-12


def test_trains_with_trainer(tmp_path):
    model, _ = ordered("bert")
    small = extract_subnetwork(model.float(), SubnetworkSpec(heads=(2, 1), ffn=8))
    inputs = build_inputs(small, batch=4)
    rows = [{key: value[i] for key, value in inputs.items()} for i in range(4)]
    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=2, report_to=[], use_cpu=True, learning_rate=1e-2
    )
    before = {name: p.detach().clone() for name, p in small.named_parameters()}
    transformers.Trainer(small, args, train_dataset=rows).train()
    assert any(not torch.equal(p, before[name]) for name, p in small.named_parameters())


def test_a_model_that_was_never_reordered():
    model = build_model("vit")
    with pytest.warns(UserWarning, match="no better than random"):
        extract_subnetwork(model, SubnetworkSpec(ffn=0.5))
    with pytest.warns(UserWarning, match="apply_spp"), subnetwork_view(model, SubnetworkSpec(ffn=0.5)):
        pass
    extract_subnetwork(model, SubnetworkSpec(ffn=0.5), allow_unordered=True)
    apply_spp(model, SPPConfig(axes=("ffn",)))
    extract_subnetwork(model, SubnetworkSpec(ffn=0.5))
    with pytest.warns(UserWarning, match="all axes that are cut"):
        extract_subnetwork(model, SubnetworkSpec(ffn=0.5, heads=2))


@pytest.mark.parametrize(("spec", "words"), [
    (SubnetworkSpec(ffn=21), "from 1 to 20"),
    (SubnetworkSpec(heads=4), "has 3 channels"),
    (SubnetworkSpec(ffn=(8, 8, 8)), "has 2 groups"),
    (SubnetworkSpec(experts=1), "experts cannot be cut"),
    (SubnetworkSpec(query_heads=1), "query_heads cannot be cut"),
    (SubnetworkSpec(ffn=8, model_type="bert"), "made for a bert model"),
    ({"ffn": 0.5}, "SubnetworkSpec is needed"),
])  # fmt: skip
def test_specs_that_do_not_fit(spec, words):
    model, _ = ordered("vit")
    weights = weights_of(model)
    with pytest.raises(SubnetworkError, match=words):
        extract_subnetwork(model, spec)
    with pytest.raises(SubnetworkError, match=words), subnetwork_view(model, spec):
        pass
    assert same_bits(model, weights)


def test_quantized_layers_and_adapters_are_refused():
    peft = pytest.importorskip("peft")
    model, _ = ordered("vit")
    model.is_quantized = True
    with pytest.raises(TypeError, match="quantized"):
        extract_subnetwork(model, SubnetworkSpec(ffn=0.5))
    model.is_quantized = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(SubnetworkError, match="merge_and_unload"):
        extract_subnetwork(adapted, SubnetworkSpec(ffn=0.5))


def test_an_attention_that_computes_its_head_size():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, states):
            states = states + self.attention(states, states, states)[0]
            return states + self.fc2(self.fc1(states).relu())

    from hf_spp import FeedForwardPattern, register_architecture

    register_architecture(Model, FeedForwardPattern(("fc1",), "fc2"))
    model = Model().double().eval()
    with pytest.raises(SubnetworkError, match="MultiheadAttention"):
        extract_subnetwork(model, SubnetworkSpec(heads=1), allow_unordered=True)
    assert SubnetworkSpec.uniform(model, 0.5) == SubnetworkSpec(ffn=0.5)
    small = extract_subnetwork(model, SubnetworkSpec(ffn=8), allow_unordered=True)
    states = torch.randn(2, 3, 8, dtype=torch.float64)
    masked_model = copy.deepcopy(model)
    with torch.no_grad():
        masked_model.fc2.weight[:, 8:] = 0
        torch.testing.assert_close(small(states), masked_model(states), rtol=1e-12, atol=1e-12)


def test_heads_that_stay_whole_beside_others():
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Blip2Config(
        vision_config={**layers, "image_size": 8, "patch_size": 4},
        qformer_config={**layers, "encoder_hidden_size": 16, "vocab_size": 20},
        text_config={"model_type": "opt", **layers, "ffn_dim": 32, "word_embed_proj_dim": 16, "vocab_size": 20},
        num_query_tokens=2,
    )
    model = Blip2ForConditionalGeneration(config).double().eval()
    with pytest.raises(SubnetworkError, match=r"vision_model.*Blip2Attention computes the size.*list of widths"):
        extract_subnetwork(model, SubnetworkSpec(heads=1), allow_unordered=True)
    for spec in (
        SubnetworkSpec.uniform(model, 0.5),
        SubnetworkSpec.from_budget(model, fraction=0.98),
    ):
        heads = {name: width for name, width in spec.widths(model).items() if name.endswith("heads")}
        assert heads
        assert not any("vision_model" in name for name in heads)
        model.vision_model(torch.zeros(1, 3, 8, 8, dtype=torch.float64))
        with subnetwork_view(model, spec, allow_unordered=True):
            model.vision_model(torch.zeros(1, 3, 8, 8, dtype=torch.float64))


@pytest.mark.parametrize("cut", [{"query_heads": 2}, {"query_heads": (3, 1)}])
def test_query_heads_that_share_the_only_key_value_head(cut):
    model = build_model("llama", dtype=torch.float64, num_key_value_heads=1)
    apply_spp(model, SPPConfig(axes=("heads",), metric="random", verify=False))
    inputs = build_inputs(model)
    masked_model = copy.deepcopy(model)
    size = model.config.head_dim
    for index, layer in enumerate(masked_model.model.layers):
        width = cut["query_heads"] if isinstance(cut["query_heads"], int) else cut["query_heads"][index]
        with torch.no_grad():
            layer.self_attn.o_proj.weight[:, width * size :] = 0
    small = extract_subnetwork(model, SubnetworkSpec(**cut))
    with everything_in_float64():
        expected = outputs_of(masked_model, inputs)
        assert relative_difference(expected, outputs_of(small, inputs)) < 1e-10
        with subnetwork_view(model, SubnetworkSpec(**cut)):
            assert relative_difference(expected, outputs_of(model, inputs)) < 1e-10
    assert SubnetworkSpec.uniform(model, 0.5) == SubnetworkSpec(ffn=0.5, query_heads=0.5)


@pytest.mark.parametrize("heads", [2, (1, 3)])
def test_code_that_reads_the_number_of_heads_from_the_config(heads):
    from transformers import FunnelConfig, FunnelForMaskedLM

    config = FunnelConfig(
        vocab_size=40, block_sizes=[1], num_decoder_layers=1, d_model=16, n_head=4, d_head=4, d_inner=32
    )
    torch.manual_seed(0)
    model = FunnelForMaskedLM(config).double().eval()
    apply_spp(model, SPPConfig(axes=("heads",), metric="random", verify=False))
    inputs = {"input_ids": torch.arange(12).reshape(2, 6)}
    small = extract_subnetwork(model, SubnetworkSpec(heads=heads))
    masked_model = copy.deepcopy(model)
    widths = SubnetworkSpec(heads=heads).widths(model)
    for group in channel_groups(model):
        if group.name in widths:
            for member in group.members:
                if member.role == "consumer":
                    with torch.no_grad():
                        masked_model.get_parameter(member.tensor)[:, widths[group.name] * 4 :] = 0
    with everything_in_float64():
        expected = outputs_of(masked_model, inputs)
        assert relative_difference(expected, outputs_of(small, inputs)) < 1e-10
        with subnetwork_view(model, SubnetworkSpec(heads=heads)):
            assert relative_difference(expected, outputs_of(model, inputs)) < 1e-10
    assert model.config.n_head == 4


def test_a_norm_over_neurons_is_named(caplog):
    from transformers import BitNetConfig, BitNetForCausalLM

    config = BitNetConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    model = BitNetForCausalLM(config).eval()
    data = [{"input_ids": torch.arange(12).reshape(2, 6)}]
    with caplog.at_level("WARNING", "hf_spp"):
        extract_subnetwork(model, SubnetworkSpec(ffn=8), calibration=data, allow_unordered=True)
        assert "statistics" not in caplog.text
        extract_subnetwork(model, SubnetworkSpec(ffn=8), allow_unordered=True)
    assert "BitNetRMSNorm of BitNetForCausalLM computes statistics over the channels" in caplog.text
