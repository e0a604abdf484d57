"""Put a causal language model with grouped-query heads in order, cut a smaller one out of it, and let both write.

    python examples/causal_language_model.py [--model HUB_ID_OR_FOLDER] [--width 0.75] [--output_dir FOLDER]

Without arguments it is SmolLM2-135M, which has three key-value heads with three query heads each and installs without
the Hub. Text to calibrate and to measure on are the topics of Python's own documentation. Prints what moves, and what
stays where it is because of rotary positions; then perplexity and a continuation of the model before and after, and of
the slice as it is cut. `extract_subnetwork(..., calibration=calibration)` refits it too, which takes a minute more:

    before   134,515,008 parameters, perplexity 24.5: 'The capital of France is Paris. The answer is: 201'
    Reordering of LlamaForCausalLM by activation (float32)
      vo        30 groups     5663 of 5760 channels moved
      heads     60 groups      235 of 360 channels moved
      ffn       30 groups    46053 of 46080 channels moved
      qk     stays in place at layers.*.self_attn: rotary position embedding: each frequency belongs to a fixed row of q and k
      equal function: max|Δ| = 5.29e-05, 1.6e-06 of the output's scale (accepted up to 1e-04)
    after    134,515,008 parameters, perplexity 24.5: 'The capital of France is Paris. The answer is: 201'
    slice    114,608,448 parameters, perplexity 33.7: 'The capital of France is 1000 years. The answer is'
"""  # noqa: E501

import math
from dataclasses import dataclass
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from transformers.hf_argparser import HfArg

from hf_spp import SPPConfig, SubnetworkSpec, apply_spp, extract_subnetwork
from hf_spp.assets import smollm2


@dataclass
class Options:
    model: str | None = HfArg(
        default=None, help="Hub id or folder of a pretrained model; SmolLM2-135M-Instruct if not given."
    )
    width: float = HfArg(default=0.75, help="Share of the neurons and heads that is kept.")
    prompt: str = HfArg(default="The capital of France is", help="What the models continue.")
    output_dir: str = HfArg(default="causal-language-model-spp", help="Folder of what is written.")


(options,) = HfArgumentParser(Options).parse_args_into_dataclasses()
source = options.model or smollm2()
tokenizer = AutoTokenizer.from_pretrained(source)
model = AutoModelForCausalLM.from_pretrained(source).eval()

ids = tokenizer("\n\n".join(topics[name] for name in sorted(topics)), return_tensors="pt").input_ids[0]
blocks = ids[: len(ids) // 128 * 128].reshape(-1, 128)[:: len(ids) // 128 // 22][:22]
calibration = [{"input_ids": block, "labels": block} for block in blocks[:16].split(4)]
test = blocks[16:]


@torch.no_grad()
def report(name, model):
    loss = sum(model(block[None], labels=block[None]).loss.item() for block in test) / len(test)
    prompt = tokenizer(options.prompt, return_tensors="pt")
    text = " ".join(tokenizer.decode(model.generate(**prompt, max_new_tokens=12, do_sample=False)[0]).split())
    print(f"{name:<8}{model.num_parameters():>12,} parameters, perplexity {math.exp(loss):.1f}: {text!r}")


report("before", model)
print(apply_spp(model, SPPConfig(metric="activation"), calibration=calibration))
report("after", model)
small = extract_subnetwork(model, SubnetworkSpec(ffn=options.width))
report("slice", small)
small.save_pretrained(options.output_dir)
tokenizer.save_pretrained(options.output_dir)
