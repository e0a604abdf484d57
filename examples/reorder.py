"""Reorder a pretrained model, save it as a stock checkpoint, load that with transformers alone, and undo it.

    python examples/reorder.py [--model HUB_ID_OR_FOLDER] [--output_dir FOLDER]

Without arguments all-MiniLM-L6-v2 is reordered, which installs without the Hub. Prints what moved and what did not
change by it:

    Reordering of BertModel by l1 (float32)
      qk         6 groups     2230 of 2304 channels moved
      vo         6 groups     2236 of 2304 channels moved
      heads      6 groups       65 of 72 channels moved
      ffn        6 groups     9208 of 9216 channels moved
      equal function: max|Δ| = 2.74e-06, 5.0e-07 of the output's scale (accepted up to 1e-04)
    loaded by transformers alone, largest difference: 3.1e-06
    undone bit for bit: True
"""

from dataclasses import dataclass

import torch
from transformers import AutoModel, AutoTokenizer, HfArgumentParser
from transformers.hf_argparser import HfArg

from hf_spp import Reordering, SPPConfig, apply_spp
from hf_spp.assets import minilm


@dataclass
class Options:
    model: str | None = HfArg(
        default=None, help="Hub id or folder of a pretrained model; all-MiniLM-L6-v2 if not given."
    )
    output_dir: str = HfArg(default="minilm-spp", help="Folder of what is written.")


(options,) = HfArgumentParser(Options).parse_args_into_dataclasses()
source, folder = options.model or minilm(), options.output_dir
model, tokenizer = AutoModel.from_pretrained(source), AutoTokenizer.from_pretrained(source)
sentence = tokenizer("A prefix of each axis is a smaller network.", return_tensors="pt")
with torch.no_grad():
    before = model(**sentence).last_hidden_state

reordering = apply_spp(model, SPPConfig(metric="l1"))
print(reordering)
model.save_pretrained(folder)
reordering.save_pretrained(folder)
tokenizer.save_pretrained(folder)

stock = AutoModel.from_pretrained(folder)
with torch.no_grad():
    after = stock(**sentence).last_hidden_state
print(f"loaded by transformers alone, largest difference: {(after - before).abs().max():.1e}")

Reordering.from_pretrained(folder).undo(stock)
original = AutoModel.from_pretrained(source).state_dict()
print("undone bit for bit:", all(torch.equal(stock.state_dict()[name], original[name]) for name in original))
