"""What all commands of `hf-spp` have in common: one line and an exit code for bad input, and quiet libraries."""

import logging
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperGroup

from .errors import SPPConfigError, SPPError
from .terminal import err

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
# Where `curve` writes and `app` looks.
WIDTHS_FOLDER = Path("spp-widths")
# Examples that scores and compensation take, if not told otherwise.
CALIBRATION_SAMPLES = 512

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what lies there.")]
ImageSize = Annotated[
    int | None, typer.Option(help="Side in pixels; the preset's, or the model's own, if not given.", min=1)
]
Reordered = Annotated[
    str, typer.Argument(metavar="DIR", help="Folder or Hub id of a reordered checkpoint.", show_default=False)
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub repository.")]


def examples(*lines: str) -> str:
    """The epilog of a command: calls to copy."""
    return "\n\n".join(["[bold]Examples[/]", *(f"[cyan]{escape(line)}[/]" for line in lines)])


def split(values: list[str] | None) -> list[str]:
    """The parts of an option that is repeated, or takes commas."""
    return [part.strip() for value in values or () for part in value.split(",") if part.strip()]


def check_data_options(dataset: str | None, options: dict[str, Any]) -> None:
    """Refuse options of data without data.

    Raises:
        SPPConfigError: One was given, and no data set.
    """
    if dataset is None and (stated := given(options)):
        name, value = next(iter(stated.items()))
        raise SPPConfigError(
            f"{name} {value} is about data, and none is named. Accepted: it together with --dataset. Add --dataset "
            f"NAME, or leave out {name}."
        )


def given(values: dict[str, Any]) -> dict[str, Any]:
    """Those options that were given."""
    return {name: value for name, value in values.items() if value is not None}


class Commands(TyperGroup):
    """Turns bad input into one line and an exit code, and accepts `--debug` anywhere."""

    def main(  # type: ignore[override]
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any
    ) -> Any:
        """Run a command and exit."""
        given = list(sys.argv[1:] if args is None else args)
        debug = "--debug" in given
        extra |= {"prog_name": "hf-spp", "standalone_mode": False}
        try:
            with _quiet(debug):
                code = super().main([word for word in given if word != "--debug"], **extra)
        except typer.Abort:
            code = INTERRUPTED
        except Exception as error:
            # Only the parser's own errors have this method; the library that defines them differs between versions.
            usage = getattr(error, "format_message", None)
            if not (usage or isinstance(error, SPPError)):
                raise
            if debug:
                traceback.print_exc()
            message = _usage(error, usage()) if usage else str(error)
            err().print(f"[bold red]Error:[/] {escape(' '.join(message.split()))}", soft_wrap=True)
            code = BAD_INPUT
        sys.exit(code if isinstance(code, int) else 0)


def _usage(error: Any, message: str) -> str:
    path = getattr(getattr(error, "ctx", None), "command_path", "hf-spp")
    return f"{message.rstrip('.')}. See `{path} --help`."


@contextmanager
def _quiet(debug: bool) -> Iterator[None]:
    """Show this package's warnings as notes, and nobody's else unless `debug`."""
    notes = logging.StreamHandler()
    notes.setFormatter(logging.Formatter("Note: %(message)s"))
    ours = logging.getLogger("hf_spp")
    ours.addHandler(notes)
    ours.propagate = False
    try:
        with warnings.catch_warnings():
            if not debug:
                warnings.simplefilter("ignore")
            yield
    finally:
        ours.removeHandler(notes)
        ours.propagate = True
