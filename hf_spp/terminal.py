"""What the command line prints: tables and places on standard output, spinners on standard error."""

import os
import re
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from .errors import SPPConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .cards.results import ComparisonResults
    from .cards.width_results import WidthReport
    from .channels import ChannelMap, Refusal
    from .conversion import Verification
    from .curves.checkpoints import SavedSlice
    from .hub import Pushed
    from .inspection import CheckpointInfo
    from .support.families import Families, Row

VERDICT_STYLES = {"yes": "green", "part": "yellow", "no": "red"}
# Verdicts that fewer families share are not in the short list.
COMMON = 5
MOST_PLACES = 4


def out() -> Console:
    """Standard output; wide where it is no terminal, so that nothing is folded in a file."""
    console = Console(highlight=False)
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(highlight=False, width=160)


def err() -> Console:
    """Standard error."""
    return Console(stderr=True, highlight=False)


@contextmanager
def working(text: str) -> Iterator[None]:
    """Show a spinner during the block, on a terminal only."""
    console = err()
    if console.is_terminal:
        with console.status(f"{escape(text)} …"):
            yield
    else:
        yield


@contextmanager
def progress_bar(text: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar of bytes during the block, on a terminal only; gives what is called with bytes done and in all."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err(), disable=not err().is_terminal, transient=True) as bar:
        task = bar.add_task(escape(text), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def show_places(places: Mapping[str, Sequence[object]]) -> None:
    """Print where things lie, one name and its paths after the other."""
    width = max(map(len, places))
    for name, values in places.items():
        for label, value in zip((name, *[""] * len(values)), values, strict=False):
            out().print(f"[bold]{label:<{width}}[/]  {escape(str(value))}", soft_wrap=True)


def show_comparison(results: "ComparisonResults", saved: Path | None) -> None:
    """Print the results' table, what was left out, and where everything lies."""
    from .cards.card_header import CARD_NAME
    from .cards.reports import PLOTS
    from .cards.result_rows import results_cells
    from .cards.results import RESULTS_NAME

    header, body, labels = results_cells(results.rows)
    table = Table(title="Accuracy / macro F1, %", title_justify="left", title_style="bold")
    for number, name in enumerate(header):
        table.add_column(escape(name), justify="left" if number < labels else "right")
    for line in body:
        table.add_row(*map(escape, line))
    out().print(table)
    for name, reason in results.left_out.items():
        out().print(f"[yellow]Left out:[/] {escape(f'{name}: {reason}')}", soft_wrap=True)
    folder = results.output_dir
    show_places(
        {
            "Card": [folder / CARD_NAME],
            "Plots": [folder / name for name in PLOTS.values() if (folder / name).is_file()],
            "Results": [folder / RESULTS_NAME],
            "Checkpoint": [] if saved is None else [saved],
            "Check it": [] if saved is None else [f"hf-spp verify {saved}"],
        }
    )


def show_slice(saved: "SavedSlice", dataset: str | None) -> None:
    """Print what was cut, what is left, and who can load it."""
    from .cards.width_rows import megabytes

    (before, after), sizes = saved.parameters, [megabytes(size) for size in saved.bytes]
    out().print(Text(f"What stays of {saved.model_class}", style="bold"))
    table = Table("Axis")
    for column in ("Groups", "Kept", "Of"):
        table.add_column(column, justify="right")
    for axis, (groups, channels, fewest, most) in saved.cuts.items():
        kept = f"{fewest:,}" if fewest == most else f"{fewest:,}–{most:,}"
        table.add_row(axis, f"{groups:,}", kept, f"{channels:,}")
    out().print(table)
    share = f"{100 * after / before:.1f} %"
    out().print(f"Parameters {before:,} → {after:,} ({share}), {' → '.join(sizes)} MB")
    if dataset is None:
        out().print("Not compensated; --dataset NAME refits the layers behind what was cut.")
    else:
        out().print(f"Compensated on {escape(dataset)}: {saved.compensated} layers refitted.")
    if saved.reason is None:
        call = f"{saved.model_class}.from_pretrained({str(saved.folder)!r})"
        text = Text.assemble(("Stock transformers loads it: ", "bold green"), call)
    else:
        call = f"hf_spp.load_subnetwork({str(saved.folder)!r})"
        text = Text.assemble(("Needs hf_spp to load: ", "bold yellow"), call, f"\nbecause {saved.reason}")
    out().print(text, soft_wrap=True)
    show_places({"Checkpoint": [saved.folder]})


def show_widths(
    report: "WidthReport", folder: Path, card: Path | None, more: Mapping[str, Sequence[object]] = MappingProxyType({})
) -> None:
    """Print the table of a width report, how it was measured, and where everything lies, and what more is given."""
    from .cards.results import RESULTS_NAME
    from .cards.width_results import PLOTS
    from .cards.width_rows import metrics_caption, width_cells
    from .cards.width_section import measured_how

    header, body, labels = width_cells(report.rows)
    table = Table(title=metrics_caption(report.rows), title_justify="left", title_style="bold")
    for number, name in enumerate(header):
        table.add_column(escape(name), justify="left" if number < labels else "right")
    for line in body:
        table.add_row(*map(escape, line))
    out().print(table)
    out().print(Text(measured_how(report.rows, report.settings)[0], style="dim"))
    show_places(
        {
            "Card": [] if card is None else [card],
            "Plots": [folder / name for name in PLOTS.values() if (folder / name).is_file()],
            "Results": [folder / RESULTS_NAME],
            **more,
        }
    )


def show_push(pushed: "Pushed") -> None:
    """Print what became of a push, and where it is seen."""
    if pushed.note is not None:
        out().print(f"[yellow]Note:[/] {escape(pushed.note)}", soft_wrap=True)
    show_places(
        {
            "Pushed": [pushed.url],
            "Commit": [pushed.commit],
            "Uploaded": [f"{pushed.files} files, {decimal(pushed.bytes)}"],
        }
    )


def show_info(found: "CheckpointInfo") -> None:
    """Print what a checkpoint holds, and what was done to it."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("Checkpoint", escape(found.name))
    if found.commit is not None:
        table.add_row("Commit", found.commit)
    kinds = ", ".join(f"{count:,} in {name}" for name, count in found.dtypes.items())
    table.add_row("Weights", f"{found.parameters:,} ({kinds}), {decimal(found.bytes)} in {found.files} files")
    table.add_row("Widths", escape(", ".join(found.widths)) or "none published; any can be cut")
    table.add_row("Layout", "stock, and copies for slices" if found.prefix_layout else "stock")
    table.add_row("Sums", "yes" if found.summed else "no SHA256SUMS")
    out().print(table)
    out().print(escape(str(found.reordering)), soft_wrap=True)


def show_verification(found: "Verification") -> None:
    """Print what was found out about a checkpoint, and the verdict."""
    reordering, proof = found.reordering, found.proof
    scores: dict[bool | None, str] = {
        True: "match the weights",
        False: "are not those of the weights, as after fine-tuning",
    }
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("Model", f"{reordering.model_class} ({reordering.dtype})")
    table.add_row("Files", "as their SHA256SUMS say" if found.summed else "not checked: there is no SHA256SUMS")
    table.add_row("Orders", f"{len(reordering.orders)}, permutations that fit, of {', '.join(reordering.axes)}")
    table.add_row("Scores", f"{reordering.config.metric_name}, {scores.get(found.scores_match, 'not checked')}")
    table.add_row("Outputs moved", f"{proof.max_abs_diff:.2e}, {proof.relative_diff:.1e} of their scale")
    table.add_row("Accepted", f"{found.tolerance:.0e} of their scale")
    out().print(table)
    if found.equal:
        out().print("[bold green]Equal:[/] undoing the order changes nothing that the model computes.")
    else:
        out().print("[bold red]Differs:[/] undoing the order changes what the model computes.")


def show_families(table: "Families", containing: str | None = None) -> None:
    """Print what may move by family: in short for verdicts that many share, or each type whose name contains a text.

    Raises:
        SPPConfigError: No type's name contains it.
    """
    left_out: dict[str, str] = {}
    if containing is None:
        rows = [row for row in table.rows(table.whole()) if len(row[1]) >= COMMON]
    else:
        found = [name for name in sorted(table.families) if containing.lower() in name.lower()]
        rows = [(table.families[name].cells(table.axes), [name]) for name in found]
        left_out = {name: reason for name, reason in table.left_out.items() if containing.lower() in name.lower()}
    if not rows and not left_out:
        raise SPPConfigError(
            f"--filter {containing} is in no model type of transformers {table.transformers}. Accepted: a part of a "
            "name, such as qwen. Shorten it."
        )
    for line in _verdict_lines(table.axes, rows, out().width):
        out().print(line, soft_wrap=True)
    for name, reason in left_out.items():
        out().print(Text(f"{name} is not in the table: {reason}"))
    out().print()
    numbers = sorted({int(number) for cells, _ in rows for cell in cells for number in re.findall(r"\d+", cell)})
    out().print(_listing((f"[{number}]", Text(table.reasons[number - 1])) for number in numbers))
    hints = [f"Default configs, transformers {table.transformers}. part: some layers; –: no such channels."]
    if containing is None:
        rest = len(table.whole()) - sum(len(names) for _, names in rows)
        hints.append(f"{rest} more families, each with few like it: hf-spp architectures --filter TEXT")
    hints.append("One model, in full: hf-spp architectures MODEL")
    out().print(Text("\n".join(hints), style="dim"))


def _verdict_lines(axes: Sequence[str], rows: "Sequence[Row]", width: int) -> Iterator[Text]:
    """A line of verdicts for each row, with its name before it, or its names below it where there are several."""
    labels = [names[0] if len(names) == 1 else f"{len(names)} families" for _, names in rows]
    columns = zip(axes, *(cells for cells, _ in rows), strict=True)
    widths = [max(map(len, column)) + 2 for column in columns]
    room = max(14, min(width - sum(widths), max(map(len, labels), default=0) + 2))

    def line(label: str, cells: Sequence[str], styles: Mapping[str, str]) -> Text:
        alone = len(label) >= room
        text = Text(f"{label}\n{' ' * room}" if alone else label.ljust(room))
        for cell, size in zip(cells, widths, strict=True):
            text.append(cell.ljust(size), styles.get(cell.split()[0]))
        text.rstrip()
        return text

    if rows:
        yield line("", axes, dict.fromkeys(axes, "bold"))
    for label, (cells, names) in zip(labels, rows, strict=True):
        yield line(label, cells, VERDICT_STYLES)
        if len(names) > 1:
            below = textwrap.fill(", ".join(names), width - 2, break_on_hyphens=False)
            yield Text(textwrap.indent(below, "  "), style="cyan")


def show_map(model: "PreTrainedModel", groups: "ChannelMap", origin: str = "") -> None:
    """Print what may move in one model, and what stays in place where and why."""
    from .config import AXES

    count = sum(parameter.numel() for parameter in model.parameters())
    size = f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"
    out().print(Text(", ".join(filter(None, (type(model).__name__, origin, f"{size} parameters"))), style="bold"))
    table = Table("Axis")
    for column in ("Groups", "Channels", "Tensors"):
        table.add_column(column, justify="right")
    for axis in (axis for axis in AXES if axis in groups.axes):
        of_axis = [group for group in groups if group.axis == axis]
        tensors = {member.tensor for group in of_axis for member in group.members}
        table.add_row(axis, f"{len(of_axis)}", f"{sum(group.channels for group in of_axis):,}", f"{len(tensors):,}")
    out().print(table)
    if groups.refused:
        out().print(Text("Stays in place", style="bold"))
        out().print(_listing(_staying(groups, type(model).__name__)))
    absent = [axis for axis in AXES if axis not in groups.axes and axis not in {one.axis for one in groups.refused}]
    if absent:
        out().print(Text(f"No such channels: {', '.join(absent)}", style="dim"))


def _staying(groups: "ChannelMap", whole: str) -> Iterator[tuple[str, Text]]:
    """Axes that stay in place, and why and where, those with the same reason at the same places together."""
    from .support.families import general_reason

    kinds = [(general_reason(one.reason), one.where, one) for one in groups.refused]
    entries: dict[tuple[str, str], list[Refusal]] = defaultdict(list)
    for kind, where, one in kinds:
        alike = [other.axis for reason, place, other in kinds if (reason, place) == (kind, where)]
        # The residual stream stays as a whole, whatever the place is that keeps it.
        axes = ["hidden"] if one.axis == "hidden" else [axis for axis in dict.fromkeys(alike) if axis != "hidden"]
        entries[kind, ", ".join(axes)].append(one)
    for (kind, shown), found in entries.items():
        reasons = {one.reason for one in found}
        text = Text(reasons.pop() if len(reasons) == 1 else kind)
        places = [where for where in dict.fromkeys(one.where for one in found) if where != whole]
        more = f" and {len(places) - MOST_PLACES} more" if len(places) > MOST_PLACES else ""
        if places:
            text.append(f"\nat {', '.join(places[:MOST_PLACES])}{more}", style="dim")
        yield shown, text


def _listing(rows: Iterable[tuple[str, Text]]) -> Table:
    """Two columns without lines, the second folded beside the first."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="yellow")
    table.add_column(overflow="fold")
    for first, second in rows:
        table.add_row(Text(first), second)
    return table
