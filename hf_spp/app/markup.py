"""HTML of the page's tables and heat maps. Every text from outside is escaped here."""

from collections.abc import Mapping, Sequence
from html import escape

from .heat_map import HeatMap, Line, kept_cells
from .measured import MeasuredWidths
from .tasks import Comparison

CSS = """
.gradio-container { max-width: 1180px !important; margin: 0 auto; }
.spp table { width: 100%; border-collapse: collapse; border: 0 !important; margin: 0; font-size: 14px;
  font-variant-numeric: tabular-nums; }
.spp th, .spp td { padding: 5px 8px; text-align: right; border: 0 !important; vertical-align: top;
  border-bottom: 1px solid var(--border-color-primary) !important; }
.spp th { font-weight: 600; }
.spp th:first-child, .spp td:first-child { text-align: left; overflow-wrap: anywhere; }
.spp table.fixed { table-layout: fixed; }
.spp table.fixed th:first-child, .spp table.fixed td:first-child { width: 27%; }
.spp table.headless thead { display: none; }
.spp table.answers { table-layout: fixed; }
.spp tr, .spp thead, .spp tbody { border: 0 !important; background: none !important; }
.spp tr.here td { font-weight: 600; background: #0072b226; }
.spp h2 { margin: 0; font-size: 26px; overflow-wrap: anywhere; }
.spp h3 { margin: 0 0 4px; font-size: 16px; }
.spp p { margin: 4px 0; font-size: 14px; }
.spp .small { font-size: 12px; opacity: .75; }
.spp .summary { font-size: 17px; font-weight: 600; overflow-wrap: anywhere; }
.spp td.text { text-align: left; white-space: pre-wrap; overflow-wrap: anywhere; }
.spp .bar { height: 6px; margin-top: 2px; border-radius: 3px; background: #8884; }
.spp .bar i { display: block; height: 100%; border-radius: 3px; background: #6e6e6e; }
.spp .bar.slice i { background: #0072b2; }
.spp .maps { display: flex; flex-wrap: wrap; gap: 8px 40px; }
.spp .maps svg { display: block; height: auto; max-width: 100%; }
.spp svg text { fill: var(--body-text-color); font-family: inherit; }
.spp svg .cut rect { opacity: .3; }
.spp code { overflow-wrap: anywhere; white-space: pre-wrap; }
.tight { gap: 0 !important; }
.picture img { width: 100% !important; height: 100% !important; object-fit: contain; }
"""

_CELL = 24
_LEFT = 26
# A light and a dark end, and how dark a cell is from which its text is white.
_LIGHT, _DARK, _TURN = (232, 240, 248), (0, 74, 128), 0.55
_MOST_TALL = 16
# Answers up to this length are set flush right, as numbers are.
_SHORT = 24


def block(*parts: str) -> str:
    """Parts of HTML in the page's style."""
    return f'<div class="spp">{"".join(parts)}</div>'


def heading(text: str, level: int = 3) -> str:
    """A heading of plain text."""
    return f"<h{level}>{escape(text)}</h{level}>"


def paragraph(text: str, kind: str = "", *, command: str = "") -> str:
    """A paragraph of plain text, with a command at its end."""
    code = f" <code>{escape(command)}</code>" if command else ""
    return f'<p class="{kind}">{escape(text)}{code}</p>'


def table(header: Sequence[str], body: Sequence[Sequence[str]], *, here: int | None = None, kind: str = "") -> str:
    """A table of plain texts, with one line marked."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    lines = []
    for number, line in enumerate(body):
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in line)
        lines.append(f'<tr class="here">{cells}</tr>' if number == here else f"<tr>{cells}</tr>")
    return f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>'


def comparison(found: Comparison) -> str:
    """What full model and slice answer, side by side."""
    if not found.answers:
        return block(paragraph(found.summary))
    long = any(len(text) > _SHORT for answer in found.answers for text in answer.texts)
    lines = []
    for answer in found.answers:
        cells = []
        for number, text in enumerate(answer.texts):
            if answer.shares is None:
                cells.append(f'<td class="{"text" if long else ""}">{escape(text)}</td>')
                continue
            kind = "bar slice" if number else "bar"
            width = f"{100 * min(max(answer.shares[number], 0.0), 1.0):.1f}%"
            cells.append(f'<td>{escape(text)}<div class="{kind}"><i style="width:{width}"></i></div></td>')
        lines.append(f"<tr><td>{escape(answer.name)}</td>{''.join(cells)}</tr>")
    share = 48 if long else 30
    head = f'<tr><th></th><th style="width:{share}%">Full model</th><th style="width:{share}%">Slice</th></tr>'
    return block(paragraph(found.summary, "summary"), f'<table class="answers">{head}{"".join(lines)}</table>')


def measured(found: MeasuredWidths, widths: Mapping[str, int]) -> str:
    """The measured widths as a table, the line of the present one marked."""
    return block(
        paragraph(found.caption),
        table(found.header, found.body, here=found.line_of(widths)),
        paragraph(f"{found.how} From {found.source}.".strip(), "small"),
    )


def maps(found: Sequence[HeatMap], widths: Mapping[str, int], metric: str) -> str:
    """Heat maps side by side, with what is cut at some widths faded."""
    pictures = "".join(f"<div>{paragraph(_title(one), 'small')}{_picture(one, widths)}</div>" for one in found)
    text = (
        f"Each line is a layer, in the checkpoint's order: most salient first. Color: saliency by {metric}, as a share "
        "of the largest in its line. Faded: cut at this width."
    )
    if any(line.origins and len(one.lines) <= _MOST_TALL for one in found for line in one.lines):
        text += " Numbers: the head's place in the original model."
    return block(heading("Saliency by layer"), f'<div class="maps">{pictures}</div>', paragraph(text, "small"))


def _title(found: HeatMap) -> str:
    size, parts = found.lines[0].size, len(found.lines[0].values)
    cells = "" if size == parts else f", in {parts} parts"
    return f"{found.name[0].upper()}{found.name[1:]} ({len(found.lines)} × {size:,}){cells}"


def _picture(found: HeatMap, widths: Mapping[str, int]) -> str:
    tall = _CELL if len(found.lines) <= _MOST_TALL else _CELL // 2
    columns = max(len(line.values) for line in found.lines)
    left = _LEFT if all(len(line.name) < 4 for line in found.lines) else 8 * max(len(line.name) for line in found.lines)
    width, height = left + columns * _CELL + 2, len(found.lines) * tall + 2
    lines = "".join(_cells(line, number * tall, tall, left, widths) for number, line in enumerate(found.lines))
    return (
        f'<svg class="heat-map" data-cut="{escape(found.cut)}" viewBox="0 0 {width} {height}" width="{width}" '
        f'role="img" aria-label="{escape(_title(found))}">{lines}</svg>'
    )


def _cells(line: Line, top: int, tall: int, left: int, widths: Mapping[str, int]) -> str:
    kept = kept_cells(line, widths)
    place = f'x="{left - 6}" y="{top + tall / 2 + 4:g}" text-anchor="end" font-size="{min(11, tall - 1)}"'
    parts = [f"<text {place}>{escape(line.name)}</text>"]
    for number, value in enumerate(line.values):
        origin = None if line.origins is None else line.origins[number]
        color = "#" + "".join(f"{round(a + (b - a) * value):02x}" for a, b in zip(_LIGHT, _DARK, strict=True))
        gone = number + 0.5 > kept
        kind = "cell cut" if gone else "cell"
        x = left + number * _CELL
        label = "" if origin is None else f"head {origin}, "
        parts.append(
            f'<g class="{kind}"><title>{escape(f"layer {line.name}, {label}{value:.2f}")}</title><rect x="{x}" '
            f'y="{top}" width="{_CELL - 1}" height="{tall - 1}" fill="{color}"/>'
        )
        if origin is not None and tall == _CELL:
            ink = "var(--body-text-color)" if gone else "#fff" if value > _TURN else "#222"
            parts.append(
                f'<text x="{x + _CELL / 2:g}" y="{top + tall / 2 + 4:g}" text-anchor="middle" font-size="11" '
                f'style="fill:{ink}">{origin}</text>'
            )
        parts.append("</g>")
    edge = left + kept * _CELL - 0.5
    if kept < len(line.values):
        parts.append(f'<path d="M{edge:.1f} {top}v{tall - 1}" stroke="#d55e00" stroke-width="2"/>')
    return "".join(parts)
