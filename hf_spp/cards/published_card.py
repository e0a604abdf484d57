"""The card of a repository: what this package says of a checkpoint, beside what others wrote there."""

import re
from typing import Any

from huggingface_hub.repocard_data import EvalResult, model_index_to_eval_results

from ..errors import CardError
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


def has_own_section(card_text: str) -> bool:
    """Whether a card that somebody else wrote holds this package's section."""
    return find_section(split_card(card_text)[1], CARD_START, CARD_END) is not None


def published_card(card_text: str, theirs: str | None = None, *, repo_id: str | None = None) -> str:
    """The card that a repository gets for a checkpoint's own.

    An earlier card of this package is replaced. One that somebody else wrote stays and gets this one's body as a
    marked section, which a later push replaces. Evaluation results of others stay in either case.

    Args:
        card_text: The checkpoint's card. If it is itself somebody else's with such a section, it replaces the other.
        theirs: The card that the repository has.
        repo_id: Id of the repository, which the code examples then load.

    Raises:
        CardError: A header or a marker is damaged.
    """
    if repo_id is not None:
        card_text = card_text.replace(_FOLDER, f'from_pretrained("{repo_id}")').replace(_FOLDER_NOTE, "")
    if theirs is None:
        return card_text
    if is_own_card(theirs) or not is_own_card(card_text):
        header, body = split_card(card_text)
        index = _joined_index(card_text, theirs)
        return join_card(patch_header(header, {"model-index": index} if index else {}), body)
    return carry_over(card_text, theirs)


def renew_evaluation(card_text: str, earlier: str) -> str:
    """An earlier card of this package with the evaluation of a new one, and everything else as it is.

    Raises:
        CardError: A header or a marker is damaged.
    """
    body = split_card(card_text)[1]
    place = find_section(body, SECTION_START, SECTION_END)
    section = "" if place is None else body[place[0] : place[1]]
    header, their_body = split_card(earlier)
    metrics = [
        *_listed(read_header(header).get("metrics")),
        *_listed(read_header(split_card(card_text)[0]).get("metrics")),
    ]
    values = {"metrics": unique(metrics), "model-index": _joined_index(card_text, earlier)}
    patched = patch_header(header, {key: value for key, value in values.items() if value})
    return join_card(patched, replace_section(their_body, section, SECTION_START, SECTION_END))


def carry_over(card_text: str, theirs: str) -> str:
    """Somebody else's card with what this package says in another, as a section and in the header.

    Args:
        card_text: A card of this package, or one that holds its section.
        theirs: The card to write into.

    Raises:
        CardError: A header or a marker is damaged.
    """
    header, body = split_card(card_text)
    their_header, their_body = split_card(theirs)
    metadata, their_metadata = read_header(header), read_header(their_header)
    index = _joined_index(card_text, theirs)
    values = {key: value for key, value in metadata.items() if key not in their_metadata}
    for key in ("tags", "metrics"):
        if metadata.get(key):
            values[key] = unique([*_listed(their_metadata.get(key)), *_listed(metadata[key])])
    if index:
        values["model-index"] = index
    place = find_section(body, CARD_START, CARD_END)
    section = f"{CARD_START}\n{_without_title(body)}\n{CARD_END}" if place is None else body[place[0] : place[1]]
    if find_section(their_body, CARD_START, CARD_END) is None:
        # What an evaluation wrote into their card is in the section now.
        old = find_section(their_body, SECTION_START, SECTION_END)
        their_body = their_body if old is None else their_body[: old[0]] + their_body[old[1] :]
    patched = patch_header(their_header, values)
    return join_card(patched, replace_section(their_body, section, CARD_START, CARD_END))


def _without_title(body: str) -> str:
    return re.sub(r"\A\s*# .*\n", "## Reordered channels\n", body).strip()


def _joined_index(card_text: str, theirs: str) -> list[dict[str, Any]]:
    """Results of others in both cards, and this package's of the first."""
    header, body = split_card(card_text)
    metadata, their_metadata = read_header(header), read_header(split_card(theirs)[0])
    ours, their_index = model_index(metadata), model_index(their_metadata)
    results = _results_of(ours)
    if not results and not their_index:
        return []
    held = set(map(_identity, _results_of(their_index)))
    new = [one for one in results if _is_ours(one) or _identity(one) not in held]
    name = name_of(their_metadata, "") if their_index else name_of(metadata, body)
    return [entry for entry in merge_index(their_index, name, new) if entry["results"]]


def _results_of(index: list[dict[str, Any]]) -> list[EvalResult]:
    try:
        return list(model_index_to_eval_results(index)[1]) if index else []
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CardError(
            f"model-index in a card's header lacks what the Hub needs ({error!r}). Accepted: models with a name and "
            "results, each with a task, a named dataset and values of metrics. Repair it, or remove it."
        ) from error


def _is_ours(result: EvalResult) -> bool:
    return isinstance(result.metric_args, dict) and METHOD_ARGUMENT in result.metric_args


def _identity(result: EvalResult) -> str:
    # Values that somebody else wrote may have no hash.
    return repr([result.unique_identifier, result.metric_type, result.metric_name, result.metric_value])


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list) else [value]
