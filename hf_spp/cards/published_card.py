"""The card of a repository: what this package says of a checkpoint, beside what others wrote there."""

import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub.repocard_data import EvalResult, model_index_to_eval_results

from .card_header import (
    METHOD_ARGUMENT,
    join_card,
    merge_index,
    model_index,
    name_of,
    patch_header,
    read_header,
    split_card,
)
from .card_sections import find_section, replace_section
from .model_card import SECTION_END, SECTION_START, TAGS
from .result_rows import unique

CARD_START = "<!-- hf_spp card:start -->"
CARD_END = "<!-- hf_spp card:end -->"

_FOLDER = 'from_pretrained(".")'
_FOLDER_NOTE = 'The path `"."` starts at the folder of this card.\n\n'
_OWN_HEADINGS = ("\n## What was reordered\n", "\n## How it was made\n")


def is_own_card(card_text: str) -> bool:
    """Whether the whole of a card was written by this package."""
    header, body = split_card(card_text)
    tags = read_header(header).get("tags")
    ours = isinstance(tags, list) and TAGS[0] in tags
    return ours and CARD_START not in body and all(heading in body for heading in _OWN_HEADINGS)


def published_card(card_text: str, theirs: str | None = None, *, repo_id: str | None = None) -> str:
    """The card that a repository gets for a checkpoint's own.

    An earlier card of this package is replaced. One that somebody else wrote stays and gets this one's body as a
    marked section, which a later push replaces. Evaluation results of others stay in either case.

    Args:
        card_text: The checkpoint's card, which this package wrote.
        theirs: The card that the repository has.
        repo_id: Id of the repository, which the code examples then load.

    Raises:
        CardError: A header or a marker is damaged.
    """
    if repo_id is not None:
        card_text = card_text.replace(_FOLDER, f'from_pretrained("{repo_id}")').replace(_FOLDER_NOTE, "")
    if theirs is None:
        return card_text
    header, body = split_card(card_text)
    their_header, their_body = split_card(theirs)
    metadata, their_metadata = read_header(header), read_header(their_header)
    index = _joined_index(metadata, their_metadata, body)
    results = {"model-index": index} if index else {}
    if is_own_card(theirs):
        return join_card(patch_header(header, results), body)
    joined = {
        key: unique([*_listed(their_metadata.get(key)), *_listed(metadata[key])])
        for key in ("tags", "metrics")
        if metadata.get(key)
    }
    added = {key: value for key, value in metadata.items() if key not in their_metadata}
    their_header = patch_header(their_header, {**added, **joined, **results})
    section = f"{CARD_START}\n{_without_title(body)}\n{CARD_END}"
    if find_section(their_body, CARD_START, CARD_END) is None:
        # What an evaluation wrote into their card is in the section now.
        place = find_section(their_body, SECTION_START, SECTION_END)
        their_body = their_body if place is None else their_body[: place[0]] + their_body[place[1] :]
    return join_card(their_header, replace_section(their_body, section, CARD_START, CARD_END))


def _without_title(body: str) -> str:
    return re.sub(r"\A\s*# .*\n", "## Reordered channels\n", body).strip()


def _joined_index(metadata: Mapping[str, Any], theirs: Mapping[str, Any], body: str) -> list[dict[str, Any]]:
    """Results of others in both cards, and this package's of the new one."""
    ours, their_index = model_index(metadata), model_index(theirs)
    results: list[EvalResult] = model_index_to_eval_results(ours)[1] if ours else []
    if not results and not their_index:
        return []
    held = {_identity(one) for one in (model_index_to_eval_results(their_index)[1] if their_index else [])}
    new = [one for one in results if METHOD_ARGUMENT in (one.metric_args or {}) or _identity(one) not in held]
    name = name_of(theirs, "") if their_index else name_of(metadata, body)
    return [entry for entry in merge_index(their_index, name, new) if entry["results"]]


def _identity(result: EvalResult) -> tuple[Any, ...]:
    return (result.unique_identifier, result.metric_type, result.metric_name, repr(result.metric_value))


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list) else [value]
