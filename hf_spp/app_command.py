"""The command `hf-spp app`: the page to play with."""

import threading
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from .command_group import WIDTHS_FOLDER, Reordered, Revision, examples
from .terminal import out, working


def add_to(program: typer.Typer) -> None:
    """Add the command to the program."""
    program.command(
        epilog=examples(
            "hf-spp app ./vit-spp",
            "hf-spp app ./spp-demo/ordered --dataset fashion-mnist --widths ./spp-demo/widths",
            "hf-spp app my-name/vit-spp --port 8000 --no-browser",
        )
    )(app)


def app(
    source: Reordered,
    widths: Annotated[
        Path | None,
        typer.Option(help="Results of `hf-spp curve`; DIR's own, or ./spp-widths, if not given.", file_okay=False),
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Data whose held-out examples are offered, by a name as for compare.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(help="Side of images in pixels; the checkpoint's own if not given.", min=1)
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(help="Port on this machine; the first free one from 7860 if not given.", min=1, max=65535),
    ] = None,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open it in the browser.")] = True,
    revision: Revision = None,
) -> None:
    """Open a page to play with: pick a width, see what it costs, is worth and predicts.

    Full model and slice answer side by side; a heat map shows the saliency of each head and layer.

    Only this machine can reach the page. Ctrl+C ends it. Needs the extra app: pip install "hf-spp\\[app]".
    """
    with working("Starting"):
        from .app.page import import_gradio, serve

        import_gradio()
        from .app.contents import Contents
    with working("Loading"):
        contents = Contents.open(
            source, revision=revision, widths=widths, places=[WIDTHS_FOLDER], dataset=dataset, image_size=image_size
        )
    with serve(contents, port=port, open_browser=browser) as address:
        out().print(f"[bold]Page[/]  {escape(address)}\nCtrl+C ends it.")
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            out().print()
