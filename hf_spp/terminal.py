"""What the command line prints: tables and places on standard output, spinners on standard error."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from .cards.results import ComparisonResults
    from .channels import ChannelMap
    from .conversion import Verification


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


def show_places(places: Mapping[str, Sequence[object]]) -> None:
    """Print where things lie, one name and its paths after the other."""
    width = max(map(len, places))
    for name, values in places.items():
        for label, value in zip((name, *[""] * len(values)), values, strict=False):
            out().print(f"[bold]{label:<{width}}[/]  {escape(str(value))}", soft_wrap=True)


def show_comparison(results: "ComparisonResults", saved: Path | None) -> None:
    """Print the results' table, what was left out, and where everything lies."""
    from .cards.reports import CARD_NAME, PLOTS
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


def show_verification(found: "Verification") -> None:
    """Print what was found out about a checkpoint, and the verdict."""
    reordering, proof = found.reordering, found.proof
    scores: dict[bool | None, str] = {
        True: "match the weights",
        False: "are not those of the weights, as after fine-tuning",
    }
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("Model", f"{reordering.model_class} ({reordering.dtype})")
    table.add_row("Orders", f"{len(reordering.orders)}, permutations that fit, of {', '.join(reordering.axes)}")
    table.add_row("Scores", f"{reordering.config.metric_name}, {scores.get(found.scores_match, 'not checked')}")
    table.add_row("Outputs moved", f"{proof.max_abs_diff:.2e}, {proof.relative_diff:.1e} of their scale")
    table.add_row("Accepted", f"{found.tolerance:.0e} of their scale")
    out().print(table)
    if found.equal:
        out().print("[bold green]Equal:[/] undoing the order changes nothing that the model computes.")
    else:
        out().print("[bold red]Differs:[/] undoing the order changes what the model computes.")


def show_families(maps: "Sequence[tuple[str, ChannelMap]]") -> None:
    """Print families by axes, with the reasons where one may not move."""
    from .config import AXES

    table = Table(title="Axes that may move (models with a task head)", title_justify="left", title_style="bold")
    table.add_column("Family")
    for axis in AXES:
        table.add_column(axis, justify="center")
    reasons: list[str] = []
    for family, groups in maps:
        cells = []
        for axis in AXES:
            if axis in groups.axes:
                cells.append("[green]yes[/]")
                continue
            reason = next((refusal.reason for refusal in groups.refused if refusal.axis == axis), None)
            if reason is None:
                cells.append("–")
                continue
            if reason not in reasons:
                reasons.append(reason)
            cells.append(f"[red]no[/] [{reasons.index(reason) + 1}]")
        table.add_row(family, *cells)
    out().print(table)
    for number, reason in enumerate(reasons, 1):
        out().print(f"[{number}] {escape(reason)}", soft_wrap=True)


def show_map(name: str, groups: "ChannelMap") -> None:
    """Print what may move in one model, and why the rest may not."""
    from .config import AXES

    table = Table("Axis", title=name, title_justify="left", title_style="bold")
    for column in ("Groups", "Channels", "Tensors"):
        table.add_column(column, justify="right")
    for axis in (axis for axis in AXES if axis in groups.axes):
        of_axis = [group for group in groups if group.axis == axis]
        tensors = {member.tensor for group in of_axis for member in group.members}
        table.add_row(axis, f"{len(of_axis)}", f"{sum(group.channels for group in of_axis):,}", f"{len(tensors):,}")
    out().print(table)
    for refusal in groups.refused:
        place = escape(f"{refusal.where}: {refusal.reason}")
        out().print(f"[yellow]{refusal.axis} stays in place[/] at {place}", soft_wrap=True)
