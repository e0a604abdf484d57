"""Reorder a pretrained model, save it as a stock checkpoint, load that with transformers alone, and undo it.

python examples/reorder.py [FOLDER]
"""

import sys

import torch
from transformers import AutoModel, AutoTokenizer

from hf_spp import Reordering, SPPConfig, apply_spp
from hf_spp.assets import minilm

folder = sys.argv[1] if len(sys.argv) > 1 else "minilm-spp"
model, tokenizer = AutoModel.from_pretrained(minilm()), AutoTokenizer.from_pretrained(minilm())
sentence = tokenizer("A prefix of each axis is a smaller network.", return_tensors="pt")
with torch.no_grad():
    before = model(**sentence).last_hidden_state

reordering = apply_spp(model, SPPConfig(metric="l1"))
print(reordering)
model.save_pretrained(folder)
reordering.save_pretrained(folder)

stock = AutoModel.from_pretrained(folder)
with torch.no_grad():
    after = stock(**sentence).last_hidden_state
print(f"stock transformers, largest difference: {(after - before).abs().max():.1e}")

Reordering.from_pretrained(folder).undo(stock)
original = AutoModel.from_pretrained(minilm()).state_dict()
print("undone bit for bit:", all(torch.equal(stock.state_dict()[name], original[name]) for name in original))
