"""Seconds that resolving the channel map takes on the largest configs, on the meta device.

    python tests/benchmarks/resolve_cost.py [--models llama-405b gpt-oss-120b] [--repeats 5] [--profile]

Prints per model its size, the seconds to build it without weights, and the median, least and most seconds of
`channel_groups`; on one thread. Exit code 1 where a median is over the limit of 2 seconds.
"""

import argparse
import cProfile
import pstats
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import logging

from hf_spp import channel_groups
from hf_spp.loading import meta_model

LIMIT_S = 2.0

_QWEN_235B = {
    "hidden_size": 4096, "num_hidden_layers": 94, "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128,
    "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 1536, "intermediate_size": 12288,
    "vocab_size": 151936,
}  # fmt: skip
# Model type, class and settings as in the published config, where they are not the type's defaults.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama-70b": ("llama", "LlamaForCausalLM", {
        "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
        "intermediate_size": 28672, "vocab_size": 128256,
    }),
    "llama-405b": ("llama", "LlamaForCausalLM", {
        "hidden_size": 16384, "num_hidden_layers": 126, "num_attention_heads": 128, "num_key_value_heads": 8,
        "intermediate_size": 53248, "vocab_size": 128256,
    }),
    "mixtral-8x22b": ("mixtral", "MixtralForCausalLM", {
        "hidden_size": 6144, "num_hidden_layers": 56, "num_attention_heads": 48, "num_key_value_heads": 8,
        "intermediate_size": 16384, "vocab_size": 32768,
    }),
    "gpt-oss-120b": ("gpt_oss", "GptOssForCausalLM", {"num_hidden_layers": 36, "num_local_experts": 128}),
    "qwen3-moe-235b": ("qwen3_moe", "Qwen3MoeForCausalLM", _QWEN_235B),
    "deepseek-v3": ("deepseek_v3", "DeepseekV3ForCausalLM", {}),
    "qwen3-vl-235b": ("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration", {
        "text_config": _QWEN_235B,
        "vision_config": {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "out_hidden_size": 4096},
    }),
    "nllb-moe-54b": ("nllb-moe", "NllbMoeForConditionalGeneration", {
        "d_model": 2048, "encoder_layers": 24, "decoder_layers": 24, "encoder_ffn_dim": 8192, "decoder_ffn_dim": 8192,
    }),
    "qwen2.5-omni": ("qwen2_5_omni", "Qwen2_5OmniForConditionalGeneration", {}),
}  # fmt: skip


def build(name: str) -> PreTrainedModel:
    model_type, model_class, settings = MODELS[name]
    return meta_model(AutoConfig.for_model(model_type, architectures=[model_class], **settings))


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def measure(name: str, repeats: int) -> float:
    start = time.perf_counter()
    model = build(name)
    built = time.perf_counter() - start
    groups = channel_groups(model)
    times = [seconds(lambda: channel_groups(model)) for _ in range(repeats)]
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    median = statistics.median(times)
    spread = f"{min(times):.3f} to {max(times):.3f}"
    print(
        f"{name:<16}{size:>9.1f} B{len(list(model.modules())):>9}{len(groups):>8}{built:>9.2f}{median:>9.3f}  {spread}",
        flush=True,
    )
    return median


def profile(name: str) -> None:
    model = build(name)
    profiler = cProfile.Profile()
    profiler.runcall(channel_groups, model)
    pstats.Stats(profiler).sort_stats("cumulative").print_stats("hf_spp", 20)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="print where the time goes instead")
    args = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    if args.profile:
        for name in args.models:
            profile(name)
        return 0
    print(f"{'model':<16}{'weights':>11}{'modules':>9}{'groups':>8}{'build s':>9}{'map s':>9}  least to most")
    medians = [measure(name, args.repeats) for name in args.models]
    return int(max(medians) > LIMIT_S)


if __name__ == "__main__":
    sys.exit(main())
