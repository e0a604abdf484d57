import copy

import pytest
import torch
from conftest import build_model
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from torch import nn
from torch.optim.swa_utils import AveragedModel

from hf_spp import UnsupportedModelError, channel_groups
from hf_spp.structure import Part, inner_model, is_sharded, part_of, plain_structure, unwrapped

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("vit.layers.0.mlp.fc1.weight", Part("vit.layers.0.mlp.fc1.weight", None, "weight")),
        ("layers.0.mlp.fc1.base_layer.bias", Part("layers.0.mlp.fc1.bias", None, "bias")),
        ("layers.0.fc1.lora_A.default.weight", Part("layers.0.fc1.weight", "lora_A", "weight")),
        ("layers.0.fc1.lora_B.bias", Part("layers.0.fc1.weight", "lora_B", "bias")),
        ("layers.0.fc1.lora_magnitude_vector", Part("layers.0.fc1.weight", "lora_magnitude_vector", "weight")),
        ("emb.lora_embedding_A.default", Part("emb.weight", "lora_embedding_A", "weight")),
        ("classifier.modules_to_save.default.weight", Part("classifier.weight", None, "weight")),
        ("classifier.original_module.bias", Part("classifier.bias", None, "bias")),
        ("layers.0._checkpoint_wrapped_module._orig_mod.fc1.weight", Part("layers.0.fc1.weight", None, "weight")),
    ],
)
def test_names_are_read(name, part):
    assert part_of(name) == part


def adapted(**settings):
    return get_peft_model(build_model("vit"), LoraConfig(r=2, target_modules=["q_proj", "fc1", "fc2"], **settings))


def test_map_of_an_adapted_model_is_that_of_the_plain_one():
    model = adapted(modules_to_save=["classifier"])
    before = [(name, type(module), id(module)) for name, module in model.named_modules()]
    assert channel_groups(model) == channel_groups(build_model("vit"))
    assert [(name, type(module), id(module)) for name, module in model.named_modules()] == before


def test_structure_comes_back_after_an_error():
    model = adapted()
    before = [id(module) for module in model.modules()]

    def fail():
        with plain_structure(model) as plain:
            assert isinstance(plain.vit.layers[0].mlp.fc1, nn.Linear)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [id(module) for module in model.modules()] == before


def test_trained_copy_stands_for_its_original():
    model = adapted(modules_to_save=["classifier"])
    wrapper = model.base_model.model.classifier
    with plain_structure(model) as plain:
        assert plain.classifier is wrapper.modules_to_save["default"]


def test_wrappers_are_taken_off():
    model = build_model("vit")
    assert unwrapped(torch.compile(model, backend="eager")) is model
    assert unwrapped(nn.DataParallel(model)) is model
    averaged = AveragedModel(model)
    assert unwrapped(averaged) is averaged.module
    peft = adapted()
    assert inner_model(peft) is peft.get_base_model()
    assert inner_model(model) is model
    assert not is_sharded(model)


def test_compiled_layers_move_as_plain_ones():
    model = build_model("vit")
    expected = channel_groups(model)
    compiled = copy.deepcopy(model)
    for index, layer in enumerate(compiled.vit.layers):
        compiled.vit.layers[index] = torch.compile(layer, backend="eager")
    assert channel_groups(compiled) == expected


def test_adapters_without_channels_are_refused_by_name():
    model = get_peft_model(
        build_model("bert", "sequence-classification"), PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)
    )
    with pytest.raises(UnsupportedModelError, match="of the type PREFIX_TUNING"):
        channel_groups(model)
