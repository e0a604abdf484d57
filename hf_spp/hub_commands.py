"""The commands of `hf-spp` that move checkpoints between this machine and the Hub."""

from pathlib import Path
from typing import Annotated

import typer

from .command_group import Overwrite, Reordered, Revision, examples
from .terminal import show_info, show_places, show_push, working

Repository = Annotated[
    str, typer.Argument(metavar="REPO", help="Id of a Hub repository, such as my-name/vit-spp.", show_default=False)
]


def add_to(app: typer.Typer) -> None:
    """Add the commands to the program."""
    app.command(epilog=examples("hf-spp push ./vit-spp my-name/vit-spp", "hf-spp push ./vit-spp my-name/vit --pr"))(
        push
    )
    app.command(epilog=examples("hf-spp pull my-name/vit-spp ./vit-spp"))(pull)
    app.command(epilog=examples("hf-spp info my-name/vit-spp", "hf-spp info ./vit-spp"))(info)


def push(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder of a reordered checkpoint.", show_default=False)
    ],
    repo_id: Repository,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Whether a new repository is private.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, which is made if absent.")] = None,
    create_pr: Annotated[bool, typer.Option("--pr", help="Open a pull request.")] = False,
    layout: Annotated[
        str, typer.Option(help="prefix adds copies, so that a slice of any width is downloaded alone.")
    ] = "stock",
    message: Annotated[str, typer.Option(help="Title of the commit or pull request.")] = "Upload a reordered model",
) -> None:
    """Push a reordered checkpoint to the Hub: weights, orders, card and sums, in one commit.

    What the repository holds already is not uploaded again. A card that somebody else wrote stays and gets a section.
    """
    with working("Starting"):
        from .publishing import push_checkpoint
    pushed = push_checkpoint(
        folder,
        repo_id,
        private=private,
        revision=revision,
        create_pr=create_pr,
        commit_message=message,
        layout=layout,  # type: ignore[arg-type]
    )
    show_push(pushed)


def pull(
    repo_id: Repository,
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.", show_default=False)],
    revision: Revision = None,
    overwrite: Overwrite = False,
) -> None:
    """Download a reordered checkpoint from the Hub, and compare every file with its sums.

    Run it again to continue where it was stopped: what arrived is in the Hugging Face cache.
    """
    with working("Starting"):
        from .publishing import pull as download
    show_places({"Checkpoint": [download(repo_id, target, revision=revision, overwrite=overwrite)]})


def info(folder: Reordered, revision: Revision = None) -> None:
    """Say what a reordered checkpoint holds, without reading its weights."""
    with working("Starting"):
        from .inspection import inspect_checkpoint
    with working("Reading headers"):
        found = inspect_checkpoint(folder, revision=revision)
    show_info(found)
