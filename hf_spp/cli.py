"""The command `hf-spp`: reads options, calls the library, prints. What needs torch is imported inside the commands."""

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from . import app_command, hub_commands
from .command_group import FAILED, WIDTHS_FOLDER, Commands, Overwrite, Reordered, Revision, examples
from .errors import CalibrationError, SPPConfigError
from .terminal import (
    out,
    progress_bar,
    show_comparison,
    show_families,
    show_map,
    show_places,
    show_slice,
    show_verification,
    show_widths,
    working,
)
from .version import __version__

if TYPE_CHECKING:
    from .cards.results import ComparisonResults
    from .comparison.presets import Preset

DEMO_FOLDER = Path("spp-demo")
COMPARISON_FOLDER = Path("spp-comparison")
WIDTHS = ("0.25", "0.5", "0.75")
CALIBRATION_BATCH = 32

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
Seed = Annotated[int, typer.Option(help="Seed of every run.", min=0)]
ImageSize = Annotated[
    int | None, typer.Option(help="Side in pixels; the preset's, or the model's own, if not given.", min=1)
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


@app.command(epilog=examples("hf-spp demo", "hf-spp demo --quick --out ./results"))
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="One small data set; about two minutes.")] = False,
    folder: Annotated[Path, typer.Option("--out", help="Folder of the results.", file_okay=False)] = DEMO_FOLDER,
    seed: Seed = 123,
) -> None:
    """Reorder, fine-tune and compare DINOv2-small on real images, on a CPU.

    Leaves results, plots, a model card and the reordered checkpoint. Needs 5 to 8 minutes, or 2 with --quick.

    Run it again to continue where it was stopped.
    """
    with working("Starting"):
        from .comparison.presets import PRESETS, run_preset
    _finish(run_preset("demo", folder, quick=quick, seed=seed), PRESETS["demo"].model())


@app.command(
    epilog=examples(
        "hf-spp compare --preset raffm-table1 --dataset cifar10 --max-train-samples 2000",
        "hf-spp compare --model bert-base-uncased --dataset stanfordnlp/sst2 --method original,spp",
    )
)
def compare(
    preset: Annotated[
        str | None, typer.Option(help="raffm-table1 (the paper's), demo or demo-text; other options change it.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Hub id or folder of a pretrained model.")] = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option(
            help="Hub id (repo or repo:configuration), folder, or a built-in name: cifar10, cifar100, flowers102; "
            "without the Hub fashion-mnist, mnist-5k, digits, fortunes."
        ),
    ] = None,
    method: Annotated[list[str] | None, typer.Option(help="original, pruning-rank, random, spp-raffm, spp.")] = None,
    folder: Annotated[Path, typer.Option("--out", help="Folder of the results.", file_okay=False)] = COMPARISON_FOLDER,
    quick: Annotated[bool, typer.Option("--quick", help="The preset's quick variant.")] = False,
    epochs: Annotated[float | None, typer.Option(help="Passes over the training set.", min=0)] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples per training step.", min=1)] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.", min=0)] = None,
    image_size: Annotated[int | None, typer.Option(help="Side in pixels.", min=1)] = None,
    max_train_samples: Annotated[int | None, typer.Option(help="Most examples to train on.", min=1)] = None,
    max_eval_samples: Annotated[int | None, typer.Option(help="Most examples to evaluate on.", min=1)] = None,
    save_models: Annotated[bool, typer.Option("--save-models", help="Keep the fine-tuned models of spp.")] = False,
    seed: Seed = 123,
) -> None:
    """Fine-tune a model by several methods, and compare accuracy and F1.

    Lists take commas or repeated options. Run it again to continue where it was stopped.
    """
    with working("Starting"):
        from .comparison.presets import run_preset
    sizes = {"image_size": image_size, "max_train_samples": max_train_samples, "max_eval_samples": max_eval_samples}
    chosen = _comparison(preset, model, _split(dataset), _split(method), _given(sizes), quick)
    training = {
        "num_train_epochs": epochs,
        "per_device_train_batch_size": batch_size,
        "learning_rate": learning_rate,
    }
    results = run_preset(chosen, folder, seed=seed, save_models=save_models, training=_given(training))
    _finish(results, chosen.model())


@app.command(
    epilog=examples(
        "hf-spp reorder google/vit-base-patch16-224 ./vit-spp",
        "hf-spp reorder ./my-bert ./my-bert-spp --axes ffn,heads --metric l2",
        "hf-spp reorder ./llama-70b ./llama-70b-spp --stream",
    )
)
def reorder(
    model: Model,
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.", show_default=False)],
    metric: Annotated[str, typer.Option(help="l1, l2 or random.")] = "l1",
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
        from .config import WEIGHT_METRICS, SPPConfig
        from .conversion import load_original, save_reordered
        from .folders import check_replaceable
        from .streaming import reorder_checkpoint
        from .transform import apply_spp
    names, parts = (tuple(_split(values)) or None for values in (axes, towers))
    config = SPPConfig(axes=names, towers=parts, metric=metric, seed=seed, verify=not no_verify)
    if config.needs_calibration:
        raise CalibrationError(
            f"--metric {metric} needs calibration data, which this command does not take. "
            f"Accepted here: {', '.join(WEIGHT_METRICS)}. In Python: apply_spp(model, SPPConfig(metric={metric!r}), "
            "calibration=batches)."
        )
    check_replaceable(target, overwrite=overwrite)
    if stream:
        if dtype != "auto":
            raise SPPConfigError(
                f"--stream keeps every dtype, and --dtype is {dtype}. Accepted: one of them. Leave out --dtype."
            )
        with progress_bar("Reordering") as progress:
            reordering = reorder_checkpoint(model, target, config, overwrite=overwrite, progress=progress)
    else:
        loaded = load_original(model, dtype)
        with working(f"Reordering {type(loaded).__name__}"):
            reordering = apply_spp(loaded, config)
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


@app.command(
    "slice",
    epilog=examples(
        "hf-spp slice ./vit-spp ./vit-half --width 0.5",
        "hf-spp slice ./vit-spp ./vit-11m --params 11M --dataset cifar10",
    ),
)
def cut(
    source: Reordered,
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.", show_default=False)],
    width: Annotated[
        float | None, typer.Option(help="Share of the neurons and heads of every layer.", min=0, max=1)
    ] = None,
    params: Annotated[str | None, typer.Option(help="Parameters that may stay, such as 11M.")] = None,
    fraction: Annotated[float | None, typer.Option(help="Share of the parameters that may stay.", min=0, max=1)] = None,
    flops: Annotated[str | None, typer.Option(help="FLOPs for each token or sample, such as 2G.")] = None,
    latency_ms: Annotated[float | None, typer.Option(help="Milliseconds of a forward pass on this machine.")] = None,
    spec: Annotated[Path | None, typer.Option(help="File that SubnetworkSpec.save wrote.", dir_okay=False)] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Data to compensate on, by a name as for compare; labels are not used.")
    ] = None,
    calibration_samples: Annotated[int, typer.Option(help="Examples to compensate on.", min=1)] = 512,
    image_size: ImageSize = None,
    overwrite: Overwrite = False,
) -> None:
    """Cut a smaller model out of a reordered checkpoint.

    Say how much stays by exactly one of --width, … and --spec.

    With --dataset the layers behind what was cut are refitted, without training.
    """
    budgets = {"params": params, "fraction": fraction, "flops": flops, "latency_ms": latency_ms}
    stated = _given({"width": width, **budgets, "spec": spec})
    if len(stated) != 1:
        options = [f"--{name.replace('_', '-')}" for name in ("width", *budgets, "spec")]
        raise SPPConfigError(
            f"slice got {' and '.join('--' + name.replace('_', '-') for name in stated) or 'no width'}. Accepted: "
            f"exactly one of {', '.join(options)}. {'Leave out the others' if stated else 'Give --width 0.5'}."
        )
    with working("Starting"):
        from .conversion import load_reordered
        from .curves.checkpoints import save_slice
        from .curves.named_data import load_named_data
        from .folders import check_replaceable
        from .subnetworks import SubnetworkSpec, extract_subnetwork
    check_replaceable(target, overwrite=overwrite)
    chosen = None if spec is None else SubnetworkSpec.load(spec)
    model, _ = load_reordered(source)
    data = None if dataset is None else load_named_data(dataset, source, image_size=image_size)
    with working(f"Cutting {type(model).__name__}"):
        if width is not None:
            chosen = SubnetworkSpec.uniform(model, width)
        elif chosen is None:
            inputs = None if data is None else data.example_inputs()
            chosen = SubnetworkSpec.from_budget(model, **_given(budgets), example_inputs=inputs)
        batches = None if data is None else data.calibration_batches(calibration_samples, CALIBRATION_BATCH)
        small = extract_subnetwork(model, chosen, calibration=batches)
        saved = save_slice(model, small, source, target, overwrite=overwrite)
    show_slice(saved, dataset)


@app.command(
    epilog=examples(
        "hf-spp curve ./spp-demo/checkpoint --dataset fashion-mnist --max-eval-samples 500",
        "hf-spp curve ./my-model-spp --dataset stanfordnlp/sst2 --widths 0.5,0.75 --out ./widths",
    )
)
def curve(
    source: Reordered,
    dataset: Annotated[str, typer.Option(help="Name of a data set as for compare.", show_default=False)],
    widths: Annotated[
        list[str] | None, typer.Option(help="Shares of the neurons and heads of every layer; 0.25,0.5,0.75.")
    ] = None,
    folder: Annotated[Path, typer.Option("--out", help="Folder of the results.", file_okay=False)] = WIDTHS_FOLDER,
    batch_size: Annotated[int, typer.Option(help="Examples in a batch, which is also timed.", min=1)] = 16,
    image_size: ImageSize = None,
    max_eval_samples: Annotated[int | None, typer.Option(help="Most examples to evaluate on.", min=1)] = None,
    calibration_samples: Annotated[int, typer.Option(help="Examples to compensate on; 0 for none.", min=0)] = 512,
    latency_runs: Annotated[int, typer.Option(help="Timed forward passes for each width; 0 for none.", min=0)] = 10,
) -> None:
    """Measure what each width of a reordered checkpoint is worth and costs.

    Plain and compensated slices, beside slices in random order: quality, size, time.

    Quality is accuracy and F1, perplexity, or without a head the cosine to DIR.

    The card of a local DIR gets a section with the table and the plots.
    """
    with working("Starting"):
        from .cards.card_header import CARD_NAME
        from .cards.width_results import check_report_folder
        from .conversion import load_reordered
        from .curves.measurement import width_report
        from .curves.named_data import load_named_data
    check_report_folder(folder)
    shares = [_share(text) for text in _split(widths) or WIDTHS]
    model, _ = load_reordered(source)
    data = load_named_data(dataset, source, image_size=image_size, max_eval_samples=max_eval_samples)
    with working("Preparing the data"):
        batches = list(data.evaluation_batches(model, batch_size))
        calibration = data.calibration_batches(calibration_samples, CALIBRATION_BATCH)
    report = width_report(
        model,
        batches,
        shares,
        calibration=calibration or None,
        latency_runs=latency_runs,
        dataset_name=dataset,
        output_dir=folder,
    )
    has_card = (Path(source) / CARD_NAME).is_file()
    show_widths(report, folder, report.add_to_card(source) if has_card else None)


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


def _split(values: list[str] | None) -> list[str]:
    return [part.strip() for value in values or () for part in value.split(",") if part.strip()]


def _share(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise SPPConfigError(
            f"--widths has {text!r}. Accepted: shares above 0 and up to 1, such as 0.25,0.5,0.75. Correct it."
        ) from error


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _comparison(
    preset: str | None, model: str | None, datasets: list[str], methods: list[str], sizes: dict[str, Any], quick: bool
) -> "Preset":
    """The named preset with the given options in place of its own, or one of the options alone."""
    from .comparison.classification import Recipe
    from .comparison.presets import PRESETS, Preset

    if preset is not None and preset not in PRESETS:
        raise SPPConfigError(f"--preset {preset} is unknown. Accepted: {', '.join(PRESETS)}. Correct the name.")
    if preset is None and not (model and datasets):
        raise SPPConfigError(
            f"compare got {'a model' if model else 'no model'} and {len(datasets)} data sets. Accepted: --model and "
            f"--dataset, or --preset with one of {', '.join(PRESETS)}. Add what is missing."
        )
    if preset is None:
        known = Preset("", str(model), lambda: str(model), {}, Recipe(), 2e-4, ("original", "pruning-rank", "spp"), {})
    else:
        known = PRESETS[preset]
        known = dataclasses.replace(known, **known.quick) if quick else known
    changes: dict[str, Any] = {"recipe": dataclasses.replace(known.recipe, **sizes)}
    if model is not None:
        changes |= {"model_name": model, "model": lambda: model}
    if datasets:
        every = PRESETS[preset].datasets if preset else {}
        changes["datasets"] = {name: every.get(name, name) for name in datasets}
    if methods:
        changes["methods"] = tuple(methods)
    return dataclasses.replace(known, **changes)


def _finish(results: "ComparisonResults", source: str | os.PathLike[str]) -> None:
    from transformers.utils.logging import disable_progress_bar

    from .conversion import finish_comparison

    disable_progress_bar()  # type: ignore[no-untyped-call]
    with working("Writing checkpoint and card"):
        saved = finish_comparison(results, source)
    show_comparison(results, saved)
