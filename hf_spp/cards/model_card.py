"""Model cards: what was reordered, the proof, the results. Data in, Markdown out; no disk, no network."""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, cast
from urllib.parse import quote

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from transformers.modelcard import TASK_MAPPING
from transformers.models.auto import modeling_auto

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
    task_of,
)
from .card_sections import replace_section
from .markdown import Markdown, code, literal, plain, url
from .result_rows import (
    METHODS,
    METRICS,
    Row,
    check_line,
    check_method,
    check_rows,
    dataset_slug,
    model_label,
    results_table,
    runs_table,
    science,
    unique,
)

TAGS = ("hf_spp", "salient-parameter-prioritization")
SECTION_START = "<!-- hf_spp:start -->"
SECTION_END = "<!-- hf_spp:end -->"

AXES = {
    "qk": "rows of query and key inside a head, together",
    "vo": "rows of value and columns of the attention output inside a head, together",
    "heads": "whole attention heads",
    "ffn": "intermediate neurons of the feed-forward network",
    "experts": "experts with their rows of the router",
    "hidden": "channels of the residual stream, in every layer at once",
}


@dataclass(frozen=True)
class CardLicense:
    """License of a model as its card states it.

    Attributes:
        identifier: Hub license identifier, for example `apache-2.0`; a tuple where a card states several.
        name: Name of the license; only with the identifier `other`.
        link: Link to its text, a URL or a file of the repository; only with the identifier `other`.
    """

    identifier: str | tuple[str, ...]
    name: str | None = None
    link: str | None = None

    @property
    def identifiers(self) -> tuple[str, ...]:
        """All identifiers, also where there is one."""
        return (self.identifier,) if isinstance(self.identifier, str) else self.identifier


@dataclass(frozen=True)
class CardContent:
    """Everything a model card says, grouped by who fills it in.

    Attributes:
        model_name: User: title of the card and name in its model-index, one line.
        repo_id: User: Hub id that the code examples load; without it they load `folder`.
        folder: User: folder of the checkpoint, relative to the card.
        base_model: User: Hub id of the model that was reordered.
        license: User: license, usually carried over with `license_of`.
        language: User: language codes, for example `("en",)`.
        tags: User: tags besides those of this package.
        datasets: User: Hub ids of the data sets the model was trained on.
        pipeline_tag: User: task, for example `image-classification`; needed where there are rows.
        rows: Evaluation: result rows; accuracy and F1 are fractions.
        settings: Evaluation: training settings that produced the rows.
        measured: Evaluation: whether the rows are of this checkpoint as it is, not of models trained for each row.
        plots: Evaluation: caption to path of the picture, relative to the card.
        summary: Computed: `Reordering.summary()`.
        method: Computed: which method's rows are the results of this very checkpoint.
        fine_tuned: Computed: whether the model was trained after its reordering.

    Raises:
        CardError: A value would break the card or be refused by the Hub.
    """

    model_name: str
    summary: Mapping[str, Any]
    repo_id: str | None = None
    folder: str = "."
    base_model: str | None = None
    license: CardLicense | None = None
    language: Sequence[str] = ()
    tags: Sequence[str] = ()
    datasets: Sequence[str] = ()
    pipeline_tag: str | None = None
    rows: Sequence[Row] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    measured: bool = False
    plots: Mapping[str, str] = field(default_factory=dict)
    method: str = "spp"
    fine_tuned: bool = False

    def __post_init__(self) -> None:
        check_line("model_name", self.model_name)
        check_method(self.method, "CardContent.method")
        for name in ("language", "tags", "datasets"):
            if isinstance(getattr(self, name), str):
                raise CardError(
                    f"{name} {getattr(self, name)!r} in CardContent is one string. Accepted: a sequence of strings. "
                    f"Write ({getattr(self, name)!r},)."
                )
        for tag in (*self.tags, *self.language):
            check_line("tag or language", tag)
        if self.pipeline_tag is not None:
            check_line("pipeline_tag", self.pipeline_tag)
        if self.license is not None:
            _check_license(self.license)
        _check_class(self.summary["model_class"])
        _check_hub_ids("repo_id", self.repo_id)
        _check_hub_ids("base_model", self.base_model)
        _check_hub_ids("datasets", *self.datasets)
        _check_relative("folder", self.folder)
        for caption, path in self.plots.items():
            check_line("caption of a plot", caption)
            _check_relative("plots", path)
        if self.rows and self.pipeline_tag is None:
            raise CardError(
                "pipeline_tag None in CardContent was given with result rows. Accepted: the task that the rows "
                "measure, such as 'image-classification'. Set pipeline_tag."
            )
        check_rows(self.rows)


def render_card(content: CardContent) -> ModelCard:
    """Render a model card: YAML header with the evaluation results, Markdown body.

    Returns:
        The card; `str(card)` is the text of a README.

    Reference:
        Card metadata of the Hugging Face Hub; method of arXiv:2310.00247.
    """
    terms = content.license
    data = ModelCardData(
        library_name="transformers",
        base_model=content.base_model,
        license=_scalar_or_list(terms.identifiers) if terms else None,  # type: ignore[arg-type]
        license_name=terms.name if terms else None,
        license_link=_license_link(terms, content.base_model),
        language=_scalar_or_list(content.language),
        pipeline_tag=content.pipeline_tag,
        tags=[*TAGS, *content.tags],
        datasets=list(content.datasets) or None,
    )
    if content.rows:
        data.metrics = _metric_names(content.rows)
        data.model_name = content.model_name
        task = cast(str, content.pipeline_tag)
        data.eval_results = evaluation_results(content.rows, task=task, method=content.method)
    model_class = str(content.summary["model_class"])
    body = _template().render(
        content=content,
        summary=content.summary,
        axes=AXES,
        loading_class=Markdown(_loading_class(str(content.summary["model_type"]), model_class)),
        **_evaluation_context(content.rows, content.settings, content.method, content.fine_tuned or content.measured),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")


def evaluation_results(rows: Sequence[Row], *, task: str, method: str = "spp") -> list[EvalResult]:
    """Turn result rows into the entries of a model-index, accuracy and macro F1 or other metrics.

    Rows of `method`, which the checkpoint is, are called `Accuracy` and `F1`; those of the others carry their method,
    for example `Accuracy (original)`.

    Args:
        rows: Result rows; accuracy and F1 are fractions and stay as they are.
        task: Hub task, for example `image-classification`.
        method: Method of the checkpoint that the card describes.

    Raises:
        CardError: A row is malformed, repeated, or cannot be told from another one.
    """
    check_rows(rows)
    check_method(method, "method")
    results = []
    for row in rows:
        suffix = "" if row["method"] == method else f" ({row['method']})"
        arguments = {METHOD_ARGUMENT: row["method"]}
        arguments |= {
            key: value for key, value in (("seed", row.get("seed")), ("model", model_label(row))) if value is not None
        }
        ours = [(metric, name, row[metric]) for metric, name in METRICS.items() if metric in row]
        others = [(metric, metric, value) for metric, value in row.get("metrics", {}).items()]
        for metric, name, value in ours + others:
            results.append(
                EvalResult(
                    task_type=task,
                    dataset_type=dataset_slug(row["dataset"]),
                    dataset_name=row["dataset"],
                    metric_type=metric,
                    metric_name=name + suffix,
                    metric_value=float(value),
                    metric_args=arguments | {"average": "macro"} if (metric, name) == ("f1", "F1") else arguments,
                )
            )
    return results


def _metric_names(rows: Sequence[Row]) -> list[str]:
    return unique(name for row in rows for name in (*(m for m in METRICS if m in row), *row.get("metrics", {})))


def license_of(card_text: str) -> CardLicense | None:
    """Read the license that a model card states, None where it states none.

    A license that is no Hub identifier is carried over as `other` with that name. A link is carried over if it is one
    to the web or a file.

    Raises:
        CardError: The card's header is no YAML mapping.
    """
    header, _ = split_card(card_text)
    metadata = read_header(header)
    stated = tuple(" ".join(str(one).split()) for one in _listed(metadata.get("license")))
    if not any(stated):
        return None
    if not all(re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", identifier) for identifier in stated):
        return CardLicense("other", name=", ".join(stated))
    if stated != ("other",):
        return CardLicense(stated[0] if len(stated) == 1 else stated)
    name, link = (" ".join(str(metadata.get(key) or "").split()) for key in ("license_name", "license_link"))
    return CardLicense("other", name or None, link if _is_web_or_file(link) else None)


def update_card_with_evaluation(
    card_text: str,
    rows: Sequence[Row],
    *,
    method: str = "spp",
    task: str | None = None,
    model_name: str | None = None,
    settings: Mapping[str, Any] | None = None,
    fine_tuned: bool = True,
) -> str:
    """Write evaluation results into an existing card, for example one that `Trainer` wrote.

    The header gains the tags, the metrics and the results; the body gains one marked section, or has it replaced.
    Everything else stays as it is, and the same rows written twice change nothing the second time.

    Args:
        card_text: Text of the card, with or without a YAML header.
        rows: All result rows; earlier results of this package are replaced by them.
        method: Method of the checkpoint that the card describes.
        task: Hub task; read from the card where None.
        model_name: Name in the model-index; read from the card where None.
        settings: Training settings that produced the rows.
        fine_tuned: Whether the checkpoint is the model that was measured; otherwise it was fine-tuned for each row.

    Raises:
        CardError: A row is malformed, the card's header or markers are damaged, or the card does not say the task
            or the name and none was given.
    """
    header, body = split_card(card_text)
    metadata = read_header(header)
    results = evaluation_results(rows, task=task or task_of(metadata), method=method)
    values = {
        "tags": unique([*_listed(metadata.get("tags")), *TAGS]),
        "metrics": unique([*_listed(metadata.get("metrics")), *_metric_names(rows)]),
        "model-index": merge_index(model_index(metadata), model_name or name_of(metadata, body), results),
    }
    template = _template()
    context = template.new_context(_evaluation_context(rows, settings or {}, method, fine_tuned))
    section = "".join(template.blocks["evaluation"](context)).strip("\n")
    return join_card(patch_header(header, values), replace_section(body, section, SECTION_START, SECTION_END))


def task_of_class(model_class: str) -> str:
    """Hub task that a model class solves, `feature-extraction` for a model without a task head."""
    for task, names in cast(Mapping[str, Mapping[str, Any]], TASK_MAPPING).items():
        if any(model_class == name or model_class in name for name in names.values()):
            return str(task)
    return "feature-extraction"


def _evaluation_context(
    rows: Sequence[Row], settings: Mapping[str, Any], method: str, fine_tuned: bool
) -> dict[str, Any]:
    return {
        "rows": rows,
        "fine_tuned": fine_tuned,
        "settings": _settings_text(settings),
        "method_label": METHODS[method],
        "has_method": any(row["method"] == method for row in rows),
        "results_table": results_table(rows) if any(metric in row for row in rows for metric in METRICS) else "",
        "runs_table": runs_table(rows),
        "evaluation_versions": unique(_versions_line(row["versions"]) for row in rows if row.get("versions")),
    }


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hf_spp.cards", "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
        finalize=plain,
    )
    environment.filters |= {
        "code": code,
        "literal": literal,
        "science": science,
        "url": url,
        "versions": _versions_line,
    }
    return environment.get_template("model_card.md.j2")


def _loading_class(model_type: str, model_class: str) -> str:
    """Auto class that gives back `model_class`, or that class itself where no auto class would."""
    head = re.search(r"For[A-Z]\w*$", model_class)
    if head is None:
        return model_class
    constant = "MODEL_" + re.sub(r"(?<=[a-z])(?=[A-Z])", "_", head.group()).upper() + "_MAPPING_NAMES"
    registered = getattr(modeling_auto, constant, {}).get(model_type, ())
    found = model_class in ((registered,) if isinstance(registered, str) else registered)
    return f"AutoModel{head.group()}" if found else model_class


def _license_link(terms: CardLicense | None, base_model: str | None) -> str | None:
    """Link to the license text; a file of the base model's repository becomes a URL, as it is not copied along."""
    if terms is None or terms.link is None or base_model is None or "://" in terms.link:
        return terms.link if terms else None
    return f"https://huggingface.co/{base_model}/blob/main/{quote(terms.link.removeprefix('./'), safe='/')}"


def _value(value: object) -> Markdown:
    return code(value if isinstance(value, str) else json.dumps(value, default=str))


def _settings_text(settings: Mapping[str, Any]) -> Markdown:
    """One line of plain values, then a list item for each group of settings that is not empty."""

    def listed(values: Mapping[str, Any]) -> str:
        return ", ".join(f"{plain(name)} {_value(value)}" for name, value in values.items())

    single = {name: value for name, value in settings.items() if not isinstance(value, Mapping)}
    if "model" in single:
        single["model"] = model_label(single)
    groups = {name: value for name, value in settings.items() if isinstance(value, Mapping) and value}
    if not single and not groups:
        return Markdown()
    first = f"Settings: {listed(single)}." if single else "Settings:"
    items = [f"- {plain(name)}: {listed(group)}" for name, group in groups.items()]
    return Markdown("\n".join([first, *([""] if items else []), *items]))


def _versions_line(versions: Mapping[str, Any]) -> Markdown:
    return Markdown(", ".join(f"{plain(name)} {plain(version)}" for name, version in versions.items()))


def _check_hub_ids(name: str, *identifiers: str | None) -> None:
    for identifier in identifiers:
        try:
            if identifier is not None:
                validate_repo_id(identifier)
        except HFValidationError as error:
            raise CardError(
                f"{name} {identifier!r} in CardContent is no Hub id. Accepted: 'name' or 'owner/name'. "
                f"Give the id on the Hub, or leave {name} out for something that is not there."
            ) from error


def _check_license(terms: CardLicense) -> None:
    for identifier in terms.identifiers:
        check_line("license", identifier)
    if terms.name is not None:
        check_line("license name", terms.name)
    if terms.link is not None and not _is_web_or_file(terms.link):
        raise CardError(
            f"license link {terms.link!r} in CardContent is no link. Accepted: an address with https:// or http://, or "
            "a file of the repository. Correct it, or leave it out."
        )


def _is_web_or_file(link: str) -> bool:
    inside = link.partition("://")[2] if link.startswith(("https://", "http://")) else link
    plain_path = link is not inside or (":" not in link and not PurePosixPath(link).is_absolute())
    return bool(inside) and plain_path and link.isprintable() and " " not in link


def _check_class(name: object) -> None:
    if not isinstance(name, str) or not name.isidentifier():
        raise CardError(
            f"model_class {name!r} in the card is no name of a class. Accepted: a summary of a Reordering. Save the "
            "reordering again."
        )


def _check_relative(name: str, path: str) -> None:
    check_line(name, path)
    if ":" in path.partition("/")[0] or PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise CardError(
            f"Path {path!r} in CardContent.{name} does not lie beside the card. Accepted: a relative path with '/' and "
            "without '..'. Save what it names in the card's folder."
        )


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list) else [value]


def _scalar_or_list(values: Sequence[str]) -> str | list[str] | None:
    return (values[0] if len(values) == 1 else list(values)) if values else None
