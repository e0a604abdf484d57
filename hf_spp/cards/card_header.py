"""The YAML header of an existing card: read it, change some of its keys, merge results into its model-index."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from huggingface_hub import EvalResult
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.repocard_data import eval_results_to_model_index

from ..errors import CardError
from .markdown import unescaped
from .yaml_text import read_yaml, write_yaml

# The file of a folder or repository that is its card.
CARD_NAME = "README.md"
# Marks the results of this package inside a model-index that others write to as well.
METHOD_ARGUMENT = "spp_method"


def split_card(text: str) -> tuple[str, str]:
    """Cut a card into the YAML between its first two `---` lines, empty where it has none, and its body."""
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    match = REGEX_YAML_BLOCK.search(text)
    return (match.group(2), text[match.end() :]) if match else ("", f"\n{text}")


def join_card(header: str, body: str) -> str:
    """The card that `split_card` would cut into these parts."""
    return f"---\n{header}\n---\n{body}"


def read_header(header: str) -> dict[str, Any]:
    """Parse a header.

    Raises:
        CardError: It is no YAML mapping.
    """
    try:
        found = read_yaml(header)
        if found is None:
            return {}
        if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
            raise CardError(f"it is a {type(found).__name__}, or has keys that are no text")
    except CardError as error:
        raise CardError(
            f"The card's header is no YAML mapping: {error}. Accepted: the block between the first two '---' lines in "
            "YAML, with text keys. Repair the header."
        ) from error
    return found


def patch_header(header: str, values: Mapping[str, Any]) -> str:
    """Replace top-level keys in a header and leave the other lines alone, comments and quoting included."""
    metadata = read_header(header)
    values = {key: value for key, value in values.items() if value != metadata.get(key)}
    if not values:
        return header
    lines = header.split("\n") if header else []
    for key, value in values.items():
        start = next((i for i, line in enumerate(lines) if re.match(rf"[\"']?{key}[\"']?\s*:", line)), len(lines))
        end = min(start + 1, len(lines))
        while end < len(lines) and (not lines[end] or lines[end][0] in " \t-#"):
            end += 1
        while end > start + 1 and (not lines[end - 1].strip() or lines[end - 1].startswith("#")):
            end -= 1
        lines[start:end] = write_yaml({key: value}).split("\n")
    patched, wanted = "\n".join(lines), {**metadata, **values}
    try:
        if read_header(patched) == wanted:
            return patched
    except CardError:
        pass  # flow style or anchors: no line of its own for each key, so the header is written anew
    return write_yaml(wanted)


def model_index(metadata: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The model-index of a header, empty where it has none.

    Raises:
        CardError: It is damaged.
    """
    index = metadata.get("model-index") or []
    try:
        for entry in index:
            for result in entry.get("results", ()):
                kinds = [result["task"]["type"], result["dataset"]["type"], *(one["type"] for one in result["metrics"])]
                if not all(isinstance(kind, str) for kind in kinds):
                    raise TypeError(f"types {kinds}")
    except (AttributeError, KeyError, TypeError) as error:
        raise CardError(
            f"model-index in the card's header is damaged ({error!r}). Accepted: a list of models with results, each "
            "with a task, a dataset and metrics. Repair it, or remove it."
        ) from error
    return cast(list[dict[str, Any]], index)


def merge_index(index: Sequence[Mapping[str, Any]], name: str, results: list[EvalResult]) -> list[dict[str, Any]]:
    """Replace this package's results in a model-index and leave the others as they are."""
    merged = []
    for entry in index or [{"name": name}]:
        kept = []
        for result in entry.get("results", ()):
            metrics = [metric for metric in result["metrics"] if not _is_ours(metric)]
            if metrics or not result["metrics"]:
                kept.append({**result, "metrics": metrics})
        merged.append({**entry, "results": kept})
    home = next((entry for entry in merged if entry.get("name") == name), merged[0])
    existing = {_result_key(result): result for result in reversed(home["results"]) if "source" not in result}
    for result in eval_results_to_model_index(name, results)[0]["results"]:
        if _result_key(result) in existing:
            existing[_result_key(result)]["metrics"] += result["metrics"]
        else:
            home["results"].append(result)
    return merged


def _is_ours(metric: Mapping[str, Any]) -> bool:
    arguments = metric.get("args")
    return isinstance(arguments, Mapping) and METHOD_ARGUMENT in arguments


def _result_key(result: Mapping[str, Any]) -> str:
    """What huggingface_hub groups results by."""
    dataset = result["dataset"]
    return repr([result["task"]["type"], *(dataset.get(key) for key in ("type", "config", "split", "revision"))])


def task_of(metadata: Mapping[str, Any]) -> str:
    """The Hub task that a header states.

    Raises:
        CardError: It states none.
    """
    tasks = [result["task"]["type"] for entry in model_index(metadata) for result in entry.get("results", ())]
    task = metadata.get("pipeline_tag") or next(iter(tasks), None)
    if not isinstance(task, str):
        raise CardError(
            "task None was given for a card that names no task. Accepted: a Hub task such as 'image-classification', "
            "or a card with pipeline_tag or a model-index. Pass task=."
        )
    return task


def name_of(metadata: Mapping[str, Any], body: str) -> str:
    """The model's name by the header's model-index, or the body's title.

    Raises:
        CardError: Neither names it.
    """
    title = re.search(r"^# +(\S.*?)[ \t]*$", body, flags=re.MULTILINE)
    stated = (entry["name"] for entry in model_index(metadata) if entry.get("name"))
    name = next(stated, title and unescaped(title.group(1)))
    if not name:
        raise CardError(
            "model_name None was given for a card that names no model. Accepted: a name, or a card with a model-index "
            "or a '# ' title. Pass model_name=."
        )
    return str(name)
