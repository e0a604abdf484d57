"""Tiny models from configs, their inputs, and a wall against the network, for every test."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import contextlib
import socket
from collections.abc import Iterator, Mapping

import hypothesis
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, database=None, print_blob=False)
hypothesis.settings.load_profile("tests")

# Fixtures that the tests of all commands share.
pytest_plugins = ["command_line"]

NETWORK_MARKERS = ("hub", "slow", "distributed")

# Sizes differ from each other wherever a model allows it, so that a dimension taken for another shows.
_VISION = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "image_size": 12,
    "patch_size": 4,
    "num_labels": 5,
}
_ENCODER = {
    "vocab_size": 40,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "max_position_embeddings": 32,
    "num_labels": 5,
}
_DECODER = {
    "vocab_size": 40,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "intermediate_size": 20,
    "max_position_embeddings": 64,
    "num_labels": 5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_T5 = {
    "vocab_size": 40,
    "d_model": 28,
    "d_kv": 4,
    "d_ff": 20,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 3,
    "relative_attention_num_buckets": 8,
    "decoder_start_token_id": 0,
    "num_labels": 5,
}
_VISION_HEADS = {"base": "Model", "image-classification": "ForImageClassification"}
_ENCODER_HEADS = {
    "base": "Model",
    "sequence-classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
    "question-answering": "ForQuestionAnswering",
    "masked-lm": "ForMaskedLM",
    "multiple-choice": "ForMultipleChoice",
}
_DECODER_HEADS = {
    "base": "Model",
    "causal-lm": "ForCausalLM",
    "sequence-classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
    "question-answering": "ForQuestionAnswering",
}
_T5_HEADS = {
    "base": "Model",
    "encoder": "EncoderModel",
    "seq2seq": "ForConditionalGeneration",
    "sequence-classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
    "question-answering": "ForQuestionAnswering",
}
_GPT2_HEADS = {**_DECODER_HEADS, "causal-lm": "LMHeadModel", "double-heads": "DoubleHeadsModel"}

# Per architecture: prefix of its classes, config, heads (the first but `base` is the usual one).
_ARCHITECTURES = {
    "vit": ("ViT", {**_VISION, "encoder_stride": 4}, {**_VISION_HEADS, "masked-image": "ForMaskedImageModeling"}),
    "deit": (
        "DeiT",
        {**_VISION, "encoder_stride": 4},
        {**_VISION_HEADS, "teacher": "ForImageClassificationWithTeacher", "masked-image": "ForMaskedImageModeling"},
    ),
    "dinov2": ("Dinov2", {**_VISION, "mlp_ratio": 2}, {**_VISION_HEADS, "backbone": "Backbone"}),
    "dinov2-swiglu": ("Dinov2", {**_VISION, "mlp_ratio": 1, "use_swiglu_ffn": True}, _VISION_HEADS),
    "bert": (
        "Bert",
        _ENCODER,
        {
            **_ENCODER_HEADS,
            "next-sentence": "ForNextSentencePrediction",
            "pretraining": "ForPreTraining",
            "causal-lm": "LMHeadModel",
        },
    ),
    "roberta": (
        "Roberta",
        {**_ENCODER, "type_vocab_size": 1, "pad_token_id": 1},
        {**_ENCODER_HEADS, "causal-lm": "ForCausalLM"},
    ),
    "distilbert": (
        "DistilBert",
        {
            "vocab_size": 40,
            "dim": 24,
            "n_layers": 2,
            "n_heads": 3,
            "hidden_dim": 20,
            "max_position_embeddings": 32,
            "num_labels": 5,
        },
        _ENCODER_HEADS,
    ),
    "t5": ("T5", _T5, _T5_HEADS),
    "t5-gated": ("T5", {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, _T5_HEADS),
    "llama": (
        "Llama",
        {**_DECODER, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
        _DECODER_HEADS,
    ),
    "qwen2": ("Qwen2", {**_DECODER, "tie_word_embeddings": False}, _DECODER_HEADS),
    "qwen3": ("Qwen3", {**_DECODER, "tie_word_embeddings": True}, _DECODER_HEADS),
    "mistral": ("Mistral", {**_DECODER, "tie_word_embeddings": False, "sliding_window": 3}, _DECODER_HEADS),
    "gpt2": (
        "GPT2",
        {
            "vocab_size": 40,
            "n_embd": 24,
            "n_layer": 2,
            "n_head": 3,
            "n_inner": 20,
            "n_positions": 32,
            "num_labels": 5,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        _GPT2_HEADS,
    ),
}
ARCHITECTURES = tuple(_ARCHITECTURES)
VISION = tuple(name for name in ARCHITECTURES if _ARCHITECTURES[name][1].get("image_size"))
ROTARY = ("llama", "qwen2", "qwen3", "mistral")


def heads_of(name: str) -> tuple[str, ...]:
    """Names of the task heads that `build_model` knows for an architecture, `base` among them."""
    return tuple(_ARCHITECTURES[name][2])


def default_head(name: str) -> str:
    """The head an architecture is best known for."""
    usual = ("image-classification", "masked-lm", "seq2seq", "causal-lm")
    return next(head for head in heads_of(name) if head in usual)


def build_config(name: str, **changes):
    """The tiny config of an architecture."""
    prefix, values, _ = _ARCHITECTURES[name]
    return getattr(transformers, f"{prefix}Config")(**{**values, **changes})


def model_class(name: str, head: str | None = None) -> type[PreTrainedModel]:
    """The class of an architecture with a head."""
    prefix, _, heads = _ARCHITECTURES[name]
    suffix = heads[head or default_head(name)]
    if prefix == "GPT2" or suffix != "base":
        return getattr(transformers, f"{prefix}{suffix}")
    return getattr(transformers, prefix)


def build_model(
    name: str, head: str | None = None, dtype: torch.dtype = torch.float32, seed: int = 0, **changes
) -> PreTrainedModel:
    """A tiny model in evaluation mode, with every parameter random: biases, norms, tokens and padding rows too.

    Args:
        name: One of `ARCHITECTURES`.
        head: One of `heads_of(name)`; None means `default_head(name)`.
        dtype: Dtype of the weights.
        seed: Seed of the weights; the global generator stays untouched.
        changes: Changes of the config.
    """
    if head == "question-answering":
        changes = {"num_labels": 2, **changes}
    if head == "causal-lm" and name in ("bert", "roberta"):
        changes = {"is_decoder": True, **changes}
    with torch.random.fork_rng(devices=[]):
        model = model_class(name, head)(build_config(name, **changes))
    return randomize(model, seed).to(dtype).eval()


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every parameter anew, so that no two channels are alike and a wrong permutation shows."""
    generator = torch.Generator().manual_seed(seed)
    norms = tuple(f"{path}." for path, module in model.named_modules() if "norm" in type(module).__name__.lower())
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if (name.endswith("weight") and name.startswith(norms)) or "lambda" in name:
            noise = 1 + 0.4 * noise
        elif parameter.dim() > 1:
            noise = noise * 1.5 / parameter.shape[-1] ** 0.5
        parameter.copy_(0.5 * noise if parameter.dim() == 1 and not name.endswith("weight") else noise)
    return model


def build_inputs(model: PreTrainedModel, batch: int = 2, *, labels: bool = True, seed: int = 1) -> dict[str, Tensor]:
    """Forward arguments for a tiny model: padded text or whole images, with labels of the model's task.

    Args:
        model: What `build_model` gave.
        batch: Number of samples.
        labels: Whether to add what the head learns from, if it learns.
        seed: Seed of the values.
    """
    generator = torch.Generator().manual_seed(seed)

    def integers(high: int, *shape: int, low: int = 0) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    kind, config = type(model).__name__, model.config
    if "pixel_values" in model.main_input_name:
        height, width = (config.image_size,) * 2 if isinstance(config.image_size, int) else config.image_size
        pixels = torch.randn(batch, config.num_channels, height, width, generator=generator)
        inputs = {"pixel_values": pixels.to(model.dtype)}
        if kind.endswith("ForMaskedImageModeling"):
            inputs["bool_masked_pos"] = integers(2, batch, height * width // config.patch_size**2).bool()
        elif kind.endswith("ForImageClassification") and labels:
            inputs["labels"] = integers(5, batch)
        return inputs
    tokens = 7
    shape = (batch, 3, tokens) if "MultipleChoice" in kind or "DoubleHeads" in kind else (batch, tokens)
    inputs = {"input_ids": integers(40, *shape, low=3)}
    inputs["attention_mask"] = torch.ones(shape, dtype=torch.int64)
    inputs["attention_mask"][-1, ..., -2:] = 0
    if kind in ("T5Model", "T5ForConditionalGeneration", "T5ForQuestionAnswering"):
        inputs["decoder_input_ids"] = integers(40, batch, 5, low=3)
    if kind == "T5ForSequenceClassification":
        inputs["input_ids"][:, -3] = config.eos_token_id
    learns = not kind.endswith("Model") or kind.endswith(("LMHeadModel", "DoubleHeadsModel"))
    if not (learns and labels):
        return inputs
    return {**inputs, **_text_labels(kind, shape, integers)}


def _text_labels(kind: str, shape: tuple[int, ...], integers) -> dict[str, Tensor]:
    batch = shape[0]
    if kind.endswith("ForQuestionAnswering"):
        return {"start_positions": integers(shape[-1], batch), "end_positions": integers(shape[-1], batch)}
    if kind.endswith("ForPreTraining"):
        return {"labels": integers(40, *shape), "next_sentence_label": integers(2, batch)}
    if kind.endswith("DoubleHeadsModel"):
        return {"labels": integers(40, *shape), "mc_labels": integers(3, batch)}
    if kind.endswith("ForConditionalGeneration"):
        return {"labels": integers(40, batch, 5)}
    if kind.endswith("ForTokenClassification"):
        return {"labels": integers(5, *shape)}
    if kind.endswith("ForSequenceClassification"):
        return {"labels": integers(5, batch)}
    if kind.endswith(("ForMultipleChoice", "ForNextSentencePrediction")):
        return {"labels": integers(2, batch)}
    return {"labels": integers(40, *shape)}


@torch.no_grad()
def outputs_of(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every floating-point tensor that a forward returns, by its path, in float64.

    A float64 model computes in float64 throughout, also where its code asks for float32.
    """
    exact = everything_in_float64() if model.dtype == torch.float64 else contextlib.nullcontext()
    options = {"use_cache": False} if getattr(model.config, "use_cache", False) else {}
    with exact:
        return _flatten(model(**inputs, **options))


def _flatten(output, path: str = "output") -> dict[str, Tensor]:
    if isinstance(output, Tensor):
        return {path: output.double()} if output.is_floating_point() else {}
    items = output.items() if isinstance(output, Mapping) else enumerate(output or ())
    found = {}
    for key, value in items:
        found.update(_flatten(value, f"{path}.{key}"))
    return found


@contextlib.contextmanager
def everything_in_float64() -> Iterator[None]:
    """Code that asks for float32 gets float64: norms, softmax and rotary tables of many models do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


def relative_difference(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> float:
    """Largest difference of any output relative to that output's largest magnitude."""
    assert expected, "no output to compare"
    assert expected.keys() == found.keys()
    return max(float((found[name] - value).abs().max() / value.abs().max()) for name, value in expected.items())


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter and buffer, tied ones under each of their names."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict(keep_vars=True).items()}


def same_bits(model: nn.Module, weights: Mapping[str, Tensor]) -> bool:
    """Whether a model holds exactly these weights, bit for bit (NaN equals NaN, 0 differs from -0)."""
    own = model.state_dict()
    return own.keys() == weights.keys() and all(
        own[name].dtype == value.dtype and _bits(own[name]).equal(_bits(value)) for name, value in weights.items()
    )


def _bits(tensor: Tensor) -> Tensor:
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(integers[tensor.element_size()])


def legal_axes(model: PreTrainedModel) -> tuple[str, ...]:
    """Every axis that may move in a model, `hidden` included, in the package's order."""
    from hf_spp import channel_groups
    from hf_spp.config import AXES

    return tuple(axis for axis in AXES if axis in channel_groups(model).axes)


@pytest.fixture(autouse=True)
def _no_network(request, monkeypatch):
    """Fail a test that opens a connection, unless a marker says that it may."""
    if any(request.node.get_closest_marker(marker) for marker in NETWORK_MARKERS):
        return

    def refuse(sock, address, *rest):
        if sock.family != socket.AF_UNIX:
            pytest.fail(f"This test opens a connection to {address!r}. Mark it `hub`, or work offline.")
        return connect(sock, address, *rest)

    connect = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
