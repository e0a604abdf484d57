"""The commands of `hf-spp` that cut a reordered checkpoint and measure what is cut."""

from pathlib import Path
from typing import Annotated

import typer

from .command_group import (
    CALIBRATION_SAMPLES,
    WIDTHS_FOLDER,
    ImageSize,
    Overwrite,
    Reordered,
    check_data_options,
    examples,
    given,
    split,
)
from .errors import SPPConfigError
from .terminal import show_slice, show_widths, working

WIDTHS = ("0.25", "0.5", "0.75")


def add_to(app: typer.Typer) -> None:
    """Add the commands to the program."""
    app.command(
        "slice",
        epilog=examples(
            "hf-spp slice ./vit-spp ./vit-half --width 0.5",
            "hf-spp slice ./vit-spp ./vit-11m --params 11M --dataset cifar10",
        ),
    )(cut)
    app.command(
        epilog=examples(
            "hf-spp curve ./spp-demo/ordered --dataset fashion-mnist --max-eval-samples 500",
            "hf-spp curve ./my-model-spp --dataset stanfordnlp/sst2 --widths 0.5,0.75 --out ./widths",
        )
    )(curve)


def cut(
    source: Reordered,
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.", show_default=False)],
    width: Annotated[
        float | None, typer.Option(help="Share of the neurons and heads of every layer, above 0 and up to 1.")
    ] = None,
    params: Annotated[str | None, typer.Option(help="Parameters that may stay, such as 11M.")] = None,
    fraction: Annotated[
        float | None, typer.Option(help="Share of the parameters that may stay, above 0 and up to 1.")
    ] = None,
    flops: Annotated[str | None, typer.Option(help="FLOPs for each token or sample, such as 2G.")] = None,
    latency_ms: Annotated[float | None, typer.Option(help="Milliseconds of a forward pass on this machine.")] = None,
    spec: Annotated[Path | None, typer.Option(help="File that SubnetworkSpec.save wrote.", dir_okay=False)] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Data to compensate on, by a name as for compare; labels are not used.")
    ] = None,
    calibration_samples: Annotated[
        int | None, typer.Option(help="Examples to compensate on; 512 if not given.", min=1)
    ] = None,
    image_size: ImageSize = None,
    overwrite: Overwrite = False,
) -> None:
    """Cut a smaller model out of a reordered checkpoint.

    Say how much stays by exactly one of --width, … and --spec.

    With --dataset the layers behind what was cut are refitted, without training.
    """
    budgets = {"params": params, "fraction": fraction, "flops": flops, "latency_ms": latency_ms}
    stated = given({"width": width, **budgets, "spec": spec})
    if len(stated) != 1:
        options = [f"--{name.replace('_', '-')}" for name in ("width", *budgets, "spec")]
        raise SPPConfigError(
            f"slice got {' and '.join('--' + name.replace('_', '-') for name in stated) or 'no width'}. Accepted: "
            f"exactly one of {', '.join(options)}. {'Leave out the others' if stated else 'Give --width 0.5'}."
        )
    check_data_options(dataset, {"--calibration-samples": calibration_samples, "--image-size": image_size})
    for name, share in given({"--width": width, "--fraction": fraction}).items():
        _share(name, share)
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
            chosen = SubnetworkSpec.from_budget(model, **given(budgets), example_inputs=inputs)
        batches = None if data is None else data.calibration_batches(calibration_samples or CALIBRATION_SAMPLES)
        small = extract_subnetwork(model, chosen, calibration=batches)
        saved = save_slice(model, small, source, target, overwrite=overwrite)
    show_slice(saved, dataset)


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
    calibration_samples: Annotated[
        int, typer.Option(help="Examples to compensate on; 0 for none.", min=0)
    ] = CALIBRATION_SAMPLES,
    latency_runs: Annotated[int, typer.Option(help="Timed forward passes for each width; 0 for none.", min=0)] = 10,
) -> None:
    """Measure what each width of a reordered checkpoint is worth and costs.

    Plain and compensated slices, beside slices in random order: quality, size, time.

    Quality is accuracy and F1, perplexity, or without a head the cosine to DIR.

    The card of a local DIR gets a section with the table and the plots.
    """
    with working("Starting"):
        from .cards.width_results import check_report_folder
        from .conversion import load_reordered
        from .curves.checkpoints import measure_checkpoint
        from .curves.named_data import load_named_data
    check_report_folder(folder)
    shares = [_share("--widths", text) for text in split(widths) or WIDTHS]
    model, _ = load_reordered(source)
    data = load_named_data(dataset, source, image_size=image_size, max_eval_samples=max_eval_samples)
    report, card = measure_checkpoint(
        source,
        model,
        data,
        shares,
        folder,
        calibration_samples=calibration_samples,
        batch_size=batch_size,
        latency_runs=latency_runs,
    )
    show_widths(report, folder, card)


def _share(option: str, text: str | float) -> float:
    """A share that an option names."""
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise SPPConfigError(
            f"{option} has {text!r}. Accepted: shares above 0 and up to 1, such as 0.25, 0.5, 0.75. Correct it."
        )
    return share
