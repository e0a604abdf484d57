"""Text for the benchmarks: topics of Python's own documentation, which every Python installs as `pydoc_data.topics`.

The text differs between versions of Python, so results name the version (`PYTHON`). A paragraph that several topics
share counts for the longest of them alone. Whole topics go to one split, so no paragraph is in two of them.
"""

import platform
from collections.abc import Sequence
from functools import cache
from pydoc_data.topics import topics

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

PYTHON = platform.python_version()
# Topics are dealt out in this order, the longest first, again and again.
_DEALT = ("calibration", "test", "calibration", "tuning")
SPLITS = tuple(dict.fromkeys(_DEALT))


@cache
def paragraphs(split: str) -> tuple[tuple[str, ...], ...]:
    """Paragraphs of every topic of a split: `calibration`, `tuning` or `test`."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown. Known: {', '.join(SPLITS)}.")
    seen: set[str] = set()
    found = []
    for place, name in enumerate(sorted(topics, key=lambda name: (-len(topics[name]), name))):
        own = []
        for paragraph in topics[name].split("\n\n"):
            words = " ".join(paragraph.split())
            if words and words not in seen:
                seen.add(words)
                own.append(paragraph.strip("\n"))
        if _DEALT[place % len(_DEALT)] == split:
            found.append(tuple(own))
    return tuple(found)


def token_blocks(tokenizer: PreTrainedTokenizerBase, split: str, length: int) -> Tensor:
    """The topics of a split one behind the other, as blocks of tokens `[blocks, length]`; a rest is dropped."""
    texts = ["\n\n".join(own) for own in paragraphs(split)]
    tokens = [token for text in texts for token in [*tokenizer.encode(text), tokenizer.eos_token_id]]
    count = len(tokens) // length
    return torch.tensor(tokens[: count * length]).reshape(count, length)


def drawn(blocks: Tensor, count: int, seed: int) -> Tensor:
    """Some of the blocks, drawn without replacement."""
    return blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))[:count]]


def passages(split: str, *, least_words: int = 8) -> Sequence[str]:
    """Paragraphs of a split on one line each, without short ones and program text."""
    lines = [" ".join(one.split()) for own in paragraphs(split) for one in own if not one.lstrip().startswith(">>>")]
    return [line for line in lines if len(line.split()) >= least_words]
