"""The command `hf-spp`: reads options, calls the library, prints. What needs torch is imported inside the commands."""

import dataclasses
import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from . import app_command, comparison_commands, hub_commands, width_commands
from .command_group import (
    CALIBRATION_SAMPLES,
    FAILED,
    Commands,
    ImageSize,
    Overwrite,
    Reordered,
    Revision,
    check_data_options,
    examples,
    split,
)
from .errors import CalibrationError, SPPConfigError
from .terminal import out, progress_bar, show_families, show_map, show_places, show_verification, working
from .version import __version__

if TYPE_CHECKING:
    from .config import SPPConfig

app = typer.Typer(
    cls=Commands,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Hub id or folder of a pretrained model.", show_default=False)
]


@app.callback(
    invoke_without_command=True,
    epilog=examples(
        "hf-spp demo --quick", "hf-spp reorder google/vit-base-patch16-224 ./vit-spp", "hf-spp COMMAND --help"
    ),
)
def hf_spp(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and all warnings.")] = False,
) -> None:
    """Order a transformer's channels by saliency, without changing what it computes.

    Any prefix of an ordered axis is then a good smaller network.
    """
    if version:
        print(f"hf-spp {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


comparison_commands.add_to(app)


@app.command(
    epilog=examples(
        "hf-spp reorder google/vit-base-patch16-224 ./vit-spp",
        "hf-spp reorder ./my-vit ./my-vit-spp --metric taylor --dataset cifar10",
        "hf-spp reorder ./my-bert ./my-bert-spp --axes ffn,heads --metric l2",
        "hf-spp reorder ./llama-70b ./llama-70b-spp --stream",
    )
)
def reorder(
    model: Model,
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.", show_default=False)],
    metric: Annotated[
        str, typer.Option(help="l1, l2 or random; taylor, the one to cut by, or activation need --dataset.")
    ] = "l1",
    dataset: Annotated[
        str | None,
        typer.Option(help="Classification data to run the model on, by a name as for compare; labels are not used."),
    ] = None,
    calibration_samples: Annotated[
        int | None, typer.Option(help="Most examples of the data that are used; 512 if not given.", min=1)
    ] = None,
    image_size: ImageSize = None,
    axes: Annotated[
        list[str] | None,
        typer.Option(help="Some of qk, vo, heads, ffn, experts, hidden; all legal ones but hidden if not given."),
    ] = None,
    towers: Annotated[
        list[str] | None,
        typer.Option(help="Parts to reorder, as vision_tower or decoder; all if not given."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Weights are reordered and written in it: float32, …; auto keeps the checkpoint's.")
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the metric random and of the proof's inputs.", min=0)] = 0,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Do not prove that the function is equal.")] = False,
    stream: Annotated[
        bool, typer.Option("--stream", help="For models larger than memory: tensor by tensor, without the proof.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Write a reordered copy of a model: a stock checkpoint, orders and card.

    The copy computes the same, which is measured before it is written. `transformers` alone loads it.

    With --stream a run that was stopped goes on where it was.
    """
    with working("Starting"):
        from .config import SPPConfig
        from .conversion import load_original, save_reordered
        from .curves.named_data import load_named_data
        from .folders import check_replaceable
        from .streaming import reorder_checkpoint
        from .transform import apply_spp
    names, parts = (tuple(split(values)) or None for values in (axes, towers))
    config = SPPConfig(axes=names, towers=parts, metric=metric, seed=seed, verify=not no_verify)
    _check_data(config, dataset, stream=stream)
    check_data_options(dataset, {"--calibration-samples": calibration_samples, "--image-size": image_size})
    check_replaceable(target, overwrite=overwrite)
    if stream:
        if dtype != "auto":
            raise SPPConfigError(
                f"--stream keeps every dtype, and --dtype is {dtype}. Accepted: one of them. Leave out --dtype."
            )
        with progress_bar("Reordering") as progress:
            reordering = reorder_checkpoint(model, target, config, overwrite=overwrite, progress=progress)
    else:
        # Downloads and calibration have bars of their own, which a spinner would break.
        loaded, batches = load_original(model, dtype), None
        if dataset is not None:
            data = load_named_data(dataset, model, image_size=image_size)
            with working("Preparing the data"):
                batches = data.calibration_batches(calibration_samples or CALIBRATION_SAMPLES)
            config = dataclasses.replace(config, calibration_batches=len(batches))
        with working(f"Reordering {type(loaded).__name__}") if batches is None else nullcontext():
            reordering = apply_spp(loaded, config, calibration=batches)
        save_reordered(loaded, reordering, model, target, overwrite=overwrite)
    out().print(escape(str(reordering)), soft_wrap=True)
    show_places({"Checkpoint": [target], "Card": [target / "README.md"], "Check it": [f"hf-spp verify {target}"]})


@app.command(epilog=examples("hf-spp verify ./vit-spp", "hf-spp verify my-name/vit-spp --revision v1"))
def verify(folder: Reordered, revision: Revision = None) -> None:
    """Check a reordered checkpoint: its files, and that it computes the same.

    The order is undone in memory and the outputs are compared. Exit code 1 says that they differ.
    """
    with working("Starting"):
        from .conversion import verify_checkpoint
    found = verify_checkpoint(folder, revision=revision)
    show_verification(found)
    if not found.equal:
        raise typer.Exit(FAILED)


width_commands.add_to(app)


@app.command(epilog=examples("hf-spp card ./spp-demo", "hf-spp card ./my-model --base google/vit-base-patch16-224"))
def card(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder of a checkpoint or of results.", show_default=False)
    ],
    base: Annotated[
        str | None, typer.Option(help="Hub id or folder whose license, language and task the card carries over.")
    ] = None,
    fine_tuned: Annotated[
        bool, typer.Option("--fine-tuned", help="The checkpoint was trained after its reordering.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Write the card of a folder anew from its orders, results and plots."""
    with working("Starting"):
        from .cards.reports import write_card
    show_places({"Card": [write_card(folder, source=base, fine_tuned=fine_tuned, overwrite=overwrite)]})


@app.command(
    epilog=examples(
        "hf-spp architectures",
        "hf-spp architectures --filter qwen",
        "hf-spp architectures meta-llama/Llama-3.2-1B",
        "hf-spp architectures qwen3_moe",
    )
)
def architectures(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Hub id, folder or model type.", show_default=False)
    ] = None,
    containing: Annotated[
        str | None,
        typer.Option("--filter", metavar="TEXT", help="List each model type whose name contains it; '' lists all."),
    ] = None,
) -> None:
    """List what may be reordered, and why the rest may not.

    Without MODEL by family, from a table made beforehand. Of a Hub id or folder only the config is read; a model type
    such as qwen3_moe stands for its default config.
    """
    if model is None or containing is not None:
        if model is not None:
            raise SPPConfigError(
                f"architectures got the model {model} and --filter. Accepted: one of them. Leave one out."
            )
        from .support.families import load_families

        return show_families(load_families(), containing)
    with working("Starting"):
        from .architectures import channel_groups
        from .support.survey import find_model
    described, origin = find_model(model)
    show_map(described, channel_groups(described), origin)


hub_commands.add_to(app)
app_command.add_to(app)


def main() -> None:
    """Run the command line; the entry point of `hf-spp`."""
    # Both are read when the libraries are imported, which is inside the commands.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    app()


def _check_data(config: "SPPConfig", dataset: str | None, *, stream: bool) -> None:
    """Refuse a metric and data that do not go together."""
    metric = config.metric_name
    if config.needs_calibration and stream:
        raise SPPConfigError(
            f"--metric {metric} runs the model, and --stream does not. Accepted with --stream: l1, l2, random. Choose "
            "one of them, or leave out --stream."
        )
    if config.needs_calibration and dataset is None:
        raise CalibrationError(
            f"--metric {metric} runs the model on data, and none is named. Accepted: a Hub id, a folder, or a built-in "
            "name such as cifar10. Add --dataset NAME."
        )
    if dataset is not None and not config.needs_calibration:
        raise SPPConfigError(
            f"--dataset {dataset} is given, and --metric {metric} uses no data. Accepted with --dataset: taylor, "
            "activation. Add --metric taylor, or leave out --dataset."
        )
