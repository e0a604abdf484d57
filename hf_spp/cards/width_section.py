"""The section of a model card that says what each width of the model costs and is worth."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import CardError
from .card_sections import find_section, replace_section
from .markdown import plain, url
from .model_card import SECTION_END
from .result_rows import is_count, is_texts, unique
from .width_rows import Row, metrics_caption, width_table

WIDTHS_START = "<!-- hf_spp widths:start -->"
WIDTHS_END = "<!-- hf_spp widths:end -->"


def width_section(rows: Sequence[Row], settings: Mapping[str, Any], plots: Mapping[str, str]) -> str:
    """The section as Markdown, between its markers.

    Args:
        rows: Rows of a width report.
        settings: What they share.
        plots: Caption to path of the picture, relative to the card.
    """
    parts = [
        WIDTHS_START,
        "## Widths",
        _introduction(rows, settings),
        width_table(rows),
        *(f"![{plain(caption)}]({url(path)})" for caption, path in plots.items()),
        *measured_how(rows, settings),
        WIDTHS_END,
    ]
    return "\n\n".join(part for part in parts if part)


def update_card_with_widths(card_text: str, section: str) -> str:
    """Write the section into a card, in place of an earlier one; everything else stays as it is.

    A card without one gets it behind its evaluation results, or at its end.

    Args:
        card_text: Text of the card.
        section: What `width_section` gave.

    Raises:
        CardError: The markers in the card are damaged.
    """
    return replace_section(card_text, section, WIDTHS_START, WIDTHS_END, after=SECTION_END)


def keep_widths(card_text: str, earlier: str) -> str:
    """A card with the section of an earlier one, for a card that is written anew.

    Raises:
        CardError: The markers in a card are damaged.
    """
    place = find_section(earlier, WIDTHS_START, WIDTHS_END)
    return card_text if place is None else update_card_with_widths(card_text, earlier[place[0] : place[1]])


def check_width_settings(settings: Mapping[str, Any]) -> None:
    """Check what the rows of a width report share, as far as it is shown.

    Raises:
        CardError: A value is missing, or of another kind.
    """
    sound = (
        is_count(settings.get("samples"))
        and isinstance(settings.get("ordered"), bool)
        and isinstance(settings.get("dtype"), str)
        and is_texts(settings.get("versions"))
        and isinstance(settings.get("dataset"), str | None)
        and (settings.get("calibration_samples") is None or is_count(settings["calibration_samples"]))
        and isinstance(settings.get("random_seeds"), list | tuple | None)
    )
    if not sound:
        raise CardError(
            "The settings of the widths lack samples, ordered, dtype or versions, or have a value of another kind. "
            "Accepted: settings of width_report. Measure again."
        )


def measured_how(rows: Sequence[Row], settings: Mapping[str, Any]) -> list[str]:
    """How the rows were measured, in a few sentences without machine names."""
    sentences = []
    if settings.get("calibration_samples"):
        sentences.append(
            "Compensated: the projections behind cut channels are refitted by least squares on "
            f"{settings['calibration_samples']:,} unlabelled examples, nothing is trained."
        )
    seeds = settings.get("random_seeds") or []
    if seeds:
        sentences.append(
            "Random order: the same widths of the same weights with their channels shuffled"
            f"{f', {len(seeds)} seeds' if len(seeds) > 1 else ''}."
        )
    times = [one for row in rows for one in row["latency"]]
    if times:
        runs, threads = times[0]["runs"], times[0]["threads"]
        sentences.append(
            f"Milliseconds: median (shortest–longest) of {runs} forward passes on {plain(times[0]['device'])}, "
            f"{threads} thread{'s' * (threads != 1)}, {plain(settings['dtype'])}, in turns with the other widths."
        )
    versions = ", ".join(f"{plain(name)} {plain(version)}" for name, version in settings["versions"].items())
    return [" ".join(sentences), f"Measured with {versions}."]


def _introduction(rows: Sequence[Row], settings: Mapping[str, Any]) -> str:
    data = f" of {plain(settings['dataset'])}" if settings.get("dataset") else ""
    given = "" if settings["ordered"] else " The channels of this model are in no known order of saliency."
    stock = unique(row["stock"] for row in rows if row["kind"] != "full")
    loads = {
        (True,): "Stock `transformers` loads each of them once it is cut and saved.",
        (False,): "`hf_spp.load_subnetwork` loads them once they are cut and saved.",
    }.get(tuple(stock), "")
    return (
        "Smaller networks made of the first channels of each axis, cut out and measured as they are, without training, "
        f"on {settings['samples']:,} examples{data}. {plain(metrics_caption(rows))}.{given} {loads}"
    ).rstrip()
