"""The commands of `hf-spp` that fine-tune and compare methods."""

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .command_group import CALIBRATION_SAMPLES, examples, given, split
from .errors import SPPConfigError
from .terminal import out, show_comparison, show_widths, working

if TYPE_CHECKING:
    from .cards.results import ComparisonResults
    from .comparison.presets import Preset

DEMO_FOLDER = Path("spp-demo")
COMPARISON_FOLDER = Path("spp-comparison")

Seed = Annotated[int, typer.Option(help="Seed of every run.", min=0)]


def add_to(app: typer.Typer) -> None:
    """Add the commands to the program."""
    app.command(epilog=examples("hf-spp demo", "hf-spp demo --quick --out ./results"))(demo)
    app.command(
        epilog=examples(
            "hf-spp compare --preset raffm-table1 --dataset cifar10 --max-train-samples 2000",
            "hf-spp compare --model bert-base-uncased --dataset stanfordnlp/sst2 --method original,spp",
        )
    )(compare)


def demo(
    quick: Annotated[bool, typer.Option("--quick", help="One small data set; about two minutes.")] = False,
    folder: Annotated[Path, typer.Option("--out", help="Folder of the results.", file_okay=False)] = DEMO_FOLDER,
    seed: Seed = 123,
) -> None:
    """Reorder, fine-tune and compare DINOv2-small on real images, on a CPU.

    Then put a fine-tuned one in order by what its channels are worth, and measure what half of it is worth.

    Leaves results, plots, model cards and checkpoints. Took 5 minutes on two idle cores, and 2 with --quick.

    Run it again to continue where it was stopped.
    """
    with working("Starting"):
        from .comparison.presets import PRESETS, run_preset
        from .curves.checkpoints import measure_checkpoint
        from .demonstration import SHARES, WIDTHS_NAME, order_fine_tuned
    preset = PRESETS["demo"]
    datasets = preset.quick["datasets"] if quick else preset.datasets
    results = run_preset(preset, folder, quick=quick, seed=seed, save_models=True)
    _finish(results, preset.model())
    with working("Ordering a fine-tuned model by what its channels are worth"):
        ordered, model, data = order_fine_tuned(results, datasets, CALIBRATION_SAMPLES)
    widths = folder / WIDTHS_NAME
    report, card = measure_checkpoint(ordered, model, data, SHARES, widths, calibration_samples=CALIBRATION_SAMPLES)
    out().print(f"\n[bold]What is left of the model of {data.name}[/], in order by taylor, when half is cut")
    places: dict[str, list[object]] = {
        "Checkpoint": [ordered],
        "Cut it": [f"hf-spp slice {ordered} ./half --width 0.5 --dataset {data.name}"],
        "Play": [f"hf-spp app {ordered} --dataset {data.name} --widths {widths}", "(needs the extra app)"],
    }
    show_widths(report, widths, card, places)


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
    chosen = _comparison(preset, model, split(dataset), split(method), given(sizes), quick)
    training = {
        "num_train_epochs": epochs,
        "per_device_train_batch_size": batch_size,
        "learning_rate": learning_rate,
    }
    results = run_preset(chosen, folder, seed=seed, save_models=save_models, training=given(training))
    _finish(results, chosen.model())


def _comparison(
    preset: str | None, model: str | None, datasets: list[str], methods: list[str], sizes: dict[str, Any], quick: bool
) -> "Preset":
    """The named preset with the given options in place of its own, or one of the options alone."""
    from .comparison.classification import Recipe
    from .comparison.presets import PRESETS, Preset, find_source

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
        changes["datasets"] = {name: find_source(name)[0] for name in datasets}
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
