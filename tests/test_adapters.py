import copy

import pytest
import torch
from conftest import build_inputs, build_model, legal_axes, outputs_of, randomize, relative_difference
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from hf_spp import AdapterError, CheckpointError, SPPConfig, UnsupportedModelError, apply_spp

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT takes the vector of lora_B's bias for a part of a matrix.
    pytest.mark.filterwarnings(r"ignore:Adapter 'default'. \d+ LoRA tensor.s. have invalid shape"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]

ALL = ("qk", "vo", "heads", "ffn", "hidden")
CASES = {
    "vit": ("vit", {"target_modules": ["q_proj", "v_proj", "o_proj", "fc1", "fc2"], "modules_to_save": ["classifier"]}),
    "vit-dora": ("vit", {"target_modules": ["q_proj", "o_proj", "fc1", "fc2"], "use_dora": True}),
    "vit-patches": ("vit", {"target_modules": ["projection", "fc1"]}),
    "vit-patches-dora": ("vit", {"target_modules": ["projection", "fc1"], "use_dora": True}),
    "bert-bias": ("bert", {"target_modules": ["query", "value", "dense"], "lora_bias": True}),
    "bert-embedding": ("bert", {"target_modules": ["word_embeddings", "query"]}),
    "bert-embedding-dora": ("bert", {"target_modules": ["word_embeddings", "query"], "use_dora": True}),
    "llama": ("llama", {"target_modules": "all-linear"}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "gpt2-dora": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "use_dora": True}),
}


def adapt(model, **settings):
    """The model with a LoRA whose every tensor is random, so that none may stay behind unseen."""
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=3, **settings))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return adapted.double()


def legal(model):
    return tuple(axis for axis in ALL if axis in legal_axes(model))


@pytest.mark.parametrize("case", CASES)
def test_adapted_model_computes_the_same(case):
    name, settings = CASES[case]
    axes = legal(build_model(name))
    adapted = adapt(build_model(name), **settings)
    inputs = build_inputs(adapted.get_base_model())
    before = outputs_of(adapted, inputs)
    weights = {key: tensor.clone() for key, tensor in adapted.state_dict().items()}
    reordering = apply_spp(adapted, SPPConfig(axes=axes, metric="random"))
    assert reordering.changed
    assert relative_difference(before, outputs_of(adapted, inputs)) < 1e-10
    moved = {key for key, tensor in adapted.state_dict().items() if not torch.equal(tensor, weights[key])}
    assert any("lora_A" in key or "lora_embedding" in key for key in moved)
    reordering.undo(adapted)
    assert all(torch.equal(tensor, weights[key]) for key, tensor in adapted.state_dict().items())


@pytest.mark.parametrize("case", CASES)
def test_adapter_of_the_original_model_works_on_the_reordered_one(case, tmp_path):
    name, settings = CASES[case]
    base = build_model(name).double()
    reordered = copy.deepcopy(base)
    reordering = apply_spp(reordered, SPPConfig(axes=legal(base), metric="random"))
    adapted = adapt(base, **settings)
    inputs = build_inputs(base)
    before = outputs_of(adapted, inputs)
    adapted.save_pretrained(tmp_path / "original")
    there = reordering.remap_adapter(tmp_path / "original", "to_reordered", save_directory=tmp_path / "reordered")
    loaded = PeftModel.from_pretrained(reordered, tmp_path / "reordered", autocast_adapter_dtype=False)
    assert relative_difference(before, outputs_of(loaded, inputs)) < 1e-10
    back = reordering.remap_adapter(there, "to_original")
    original = load_file(tmp_path / "original" / "adapter_model.safetensors")
    assert back.keys() == original.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in original.items())


def test_orders_of_a_headless_model_carry_an_adapter_of_one_with_a_head():
    base = build_model("vit")
    reordering = apply_spp(build_model("vit", "base"), SPPConfig(metric="random"))
    adapted = adapt(base, target_modules=["fc1", "fc2"])
    inputs = build_inputs(base)
    before = outputs_of(adapted, inputs)
    state = {name: tensor for name, tensor in adapted.state_dict().items() if "lora" in name}
    remapped = reordering.remap_adapter(state)
    with torch.no_grad():
        reordering.apply(adapted)
        assert all(torch.equal(adapted.state_dict()[name], tensor) for name, tensor in remapped.items())
    assert relative_difference(before, outputs_of(adapted, inputs)) < 1e-10


def test_adapter_injected_by_transformers_moves_along():
    model = build_model("llama").double()
    model.add_adapter(LoraConfig(r=2, target_modules=["v_proj", "up_proj"]))
    randomize(model)
    inputs = build_inputs(model)
    before = outputs_of(model, inputs)
    assert apply_spp(model, SPPConfig(metric="random")).changed
    assert relative_difference(before, outputs_of(model, inputs)) < 1e-10


@pytest.mark.parametrize("metric", ["l1", "activation", "taylor"])
def test_scores_are_those_of_the_merged_model(metric):
    adapted = adapt(build_model("vit"), target_modules=["q_proj", "fc1", "fc2"], use_dora=True)
    adapted.eval()
    data = {} if metric == "l1" else {"calibration": [build_inputs(adapted.get_base_model())]}
    weights = {key: tensor.clone() for key, tensor in adapted.state_dict().items()}
    merged = copy.deepcopy(adapted).merge_and_unload()
    reordering = apply_spp(adapted, SPPConfig(metric=metric), **data)
    expected = apply_spp(merged, SPPConfig(metric=metric), **data)
    for name, scores in expected.scores.items():
        assert torch.allclose(reordering.scores[name], scores, rtol=1e-5, atol=1e-8)
    reordering.undo(adapted)
    assert all(torch.equal(tensor, weights[key]) for key, tensor in adapted.state_dict().items())


def test_tied_weight_moves_under_its_adapter():
    """The weight has its first name at the embeddings, and the adapter its own at the head."""
    model = build_model("gpt2").double()
    assert model.lm_head.weight is model.transformer.wte.weight
    adapted = adapt(model, target_modules=["lm_head"])
    inputs = build_inputs(model)
    before = outputs_of(adapted, inputs)
    reordering = apply_spp(adapted, SPPConfig(axes=("ffn", "hidden"), metric="random"))
    assert relative_difference(before, outputs_of(adapted, inputs)) < 1e-10
    state = {name: one for name, one in adapted.state_dict().items() if "lora_" in name}
    with pytest.raises(AdapterError, match="lm_head"):
        reordering.remap_adapter(state, "to_original")


@pytest.mark.parametrize("axes", [("ffn", "vo"), ("ffn", "hidden")], ids=str)
def test_trainable_tokens_move_along(axes):
    model = build_model("llama", tie_word_embeddings=False).double()
    adapted = adapt(model, target_modules=["up_proj"], trainable_token_indices=[1, 3])
    for name, parameter in adapted.named_parameters():
        if "trainable_tokens_delta" in name:
            torch.nn.init.normal_(parameter)
    inputs = build_inputs(model)
    before = outputs_of(adapted, inputs)
    weights = {key: tensor.clone() for key, tensor in adapted.state_dict().items()}
    reordering = apply_spp(adapted, SPPConfig(axes=axes))
    assert relative_difference(before, outputs_of(adapted, inputs)) < 1e-10
    state = {name: one for name, one in adapted.state_dict().items() if "lora_" in name or "tokens_delta" in name}
    back = reordering.remap_adapter(state, "to_original")
    assert all(torch.equal(one, weights[name]) for name, one in back.items())


def ia3(model):
    return get_peft_model(model, IA3Config(target_modules=["k_proj", "fc2"], feedforward_modules=["fc2"]))


def test_adapters_that_are_not_known_are_never_carried():
    reordering = apply_spp(build_model("vit"))
    state = {name: one for name, one in ia3(build_model("vit")).state_dict().items() if "ia3" in name}
    with pytest.raises(AdapterError, match="in a way that is not known"):
        reordering.remap_adapter(state)
    model = build_model("vit")
    model.add_adapter(IA3Config(target_modules=["k_proj", "fc2"], feedforward_modules=["fc2"]))
    with pytest.raises(UnsupportedModelError, match="of the type peft"):
        apply_spp(model)


def test_other_kinds_of_adapters_are_refused_by_name():
    with pytest.raises(UnsupportedModelError, match="of the type IA3"):
        apply_spp(ia3(build_model("vit")))


def test_adapter_of_another_model_is_refused():
    reordering = apply_spp(build_model("vit"))
    other = adapt(build_model("bert"), target_modules=["query"])
    state = {name: tensor for name, tensor in other.state_dict().items() if "lora" in name}
    with pytest.raises(AdapterError, match="the orders are of a model with"):
        reordering.remap_adapter(state)
    wider = adapt(build_model("vit", intermediate_size=28), target_modules=["fc1"])
    state = {name: tensor for name, tensor in wider.state_dict().items() if "lora" in name}
    with pytest.raises(AdapterError, match="has not the 1 x 20 channels"):
        reordering.remap_adapter(state)


def test_bad_requests_are_refused(tmp_path):
    reordering = apply_spp(build_model("vit"))
    with pytest.raises(AdapterError, match="'to_reordered' or 'to_original'"):
        reordering.remap_adapter({}, "forwards")
    with pytest.raises(CheckpointError, match=r"holds no adapter_model\.safetensors"):
        reordering.remap_adapter(tmp_path)
    with pytest.raises(AdapterError, match=r"no adapter_config\.json"):
        reordering.remap_adapter({}, save_directory=tmp_path)
