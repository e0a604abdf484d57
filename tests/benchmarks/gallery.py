"""Make the checkpoints of the gallery, push each to a Hub on this machine, and keep the card as it was pushed.

    python tests/benchmarks/gallery.py dinov2-small-fashion-mnist-spp
    python tests/benchmarks/gallery.py minilm-spp
    python tests/benchmarks/gallery.py smollm2-135m-spp

Each writes the card and its plots, as the Hub shows them, and the results that their figures come from into
`model_cards/NAME`, and the index of all into `model_cards/README.md`. `--work FOLDER` keeps the checkpoint too, and a
comparison that was stopped goes on there.
"""

import argparse
import copy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

# The tests' Hub, and the texts beside this file, however this file is reached.
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from hub_server import serving
from texts import drawn, token_blocks
from transformers import AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoTokenizer

from hf_spp import Reordering, SPPConfig, SubnetworkSpec, WidthReport, apply_spp, load_reordered, width_report
from hf_spp import checkpoint as files
from hf_spp.assets import dinov2_small, fashion_mnist, fortunes, minilm, smollm2
from hf_spp.cards.card_header import CARD_NAME
from hf_spp.cards.reports import PLOTS
from hf_spp.cards.results import METHODS, RESULTS_NAME, ComparisonResults
from hf_spp.cards.width_results import PLOTS as PLOTS_OF_WIDTHS
from hf_spp.cards.width_rows import metrics_caption, width_table
from hf_spp.comparison.classification import Recipe, load_classification_data, prepare_task
from hf_spp.comparison.evaluation import compare_methods, recipe_arguments
from hf_spp.comparison.presets import PRESETS, run_preset
from hf_spp.conversion import write_checkpoint
from hf_spp.curves.named_data import NamedData
from hf_spp.curves.quality import Batch, measured, perplexity

CARDS = Path(__file__).parents[2] / "model_cards"
SHARES = (0.25, 0.5, 0.75)
SEEDS = (0, 1, 2)
CALIBRATION, BATCH = 512, 16
# Of the language model's text: blocks of 256 tokens to test on, and of 128 to calibrate with.
BLOCKS, CALIBRATION_TEXTS = 16, 64
# What the orders say of themselves, which a card shows.
SUMMARY_NAME = "reordering.json"


def fine_tuned_dinov2(work: Path, folder: Path) -> None:
    """DINOv2-small fine-tuned on Fashion-MNIST by every method; that of SPP, ordered again by what it then computes."""
    recipe = Recipe(0.3, 1.0, max_train_samples=2000, max_eval_samples=1000, image_size=56)
    results = compare_methods(
        dinov2_small(),
        {"fashion-mnist": fashion_mnist},
        tuple(METHODS),
        recipe_arguments(learning_rate=5e-5),
        recipe=recipe,
        output_dir=work / "methods",
        save_models=True,
        model_name="facebook/dinov2-small",
    )
    trained = results.output_dir / "models" / "fashion-mnist-spp"
    data = _data("fashion-mnist", fashion_mnist, trained, recipe)
    model, earlier = load_reordered(trained)
    calibration = data.calibration_batches(CALIBRATION, BATCH)
    later = apply_spp(model, SPPConfig(metric="taylor"), calibration=calibration)
    _copy_results(results, folder)
    processor = AutoImageProcessor.from_pretrained(trained)
    write_checkpoint(
        folder, model, earlier.then(later), source=dinov2_small(), processing_class=processor, fine_tuned=True
    )
    _add_widths(
        folder, model, data.evaluation_batches(model, BATCH), "dinov2.encoder", SHARES, calibration, "fashion-mnist"
    )


def sentence_encoder(work: Path, folder: Path) -> None:
    """all-MiniLM-L6-v2 as it is; fine-tuned by every method for the comparison."""
    preset = PRESETS["demo-text"]
    results = run_preset(preset, work / "methods")
    data = _data("fortunes", fortunes, minilm(), preset.recipe)
    model, tokenizer = AutoModel.from_pretrained(minilm()).eval(), AutoTokenizer.from_pretrained(minilm())
    calibration = data.calibration_batches(CALIBRATION, BATCH)
    reordering = apply_spp(model, SPPConfig(metric="taylor"), calibration=calibration)
    _copy_results(results, folder)
    write_checkpoint(folder, model, reordering, source=minilm(), processing_class=tokenizer)
    _add_widths(folder, model, data.evaluation_batches(model, BATCH), "encoder", SHARES, calibration, "fortunes")


def language_model(work: Path, folder: Path) -> None:
    """SmolLM2-135M as it is. Pruning-Rank is not defined for it, whose query and key rows are rotated."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    tests = [{"input_ids": one, "labels": one} for one in token_blocks(tokenizer, "test", 256)[:BLOCKS].split(4)]
    texts = drawn(token_blocks(tokenizer, "calibration", 128), CALIBRATION_TEXTS, seed=0)
    calibration = [{"input_ids": one} for one in texts.split(4)]
    original = AutoModelForCausalLM.from_pretrained(smollm2()).eval()
    shuffled, model = copy.deepcopy(original), copy.deepcopy(original)
    apply_spp(shuffled, SPPConfig(metric="random"))
    reordering = apply_spp(model, SPPConfig(metric="taylor"), calibration=calibration)
    methods = {"original": original, "random": shuffled, "spp": model}
    rows = [
        {
            "dataset": "python-docs",
            "method": method,
            "metrics": measured(perplexity, one, tests),
            "eval_samples": BLOCKS,
        }
        for method, one in methods.items()
    ]
    write_checkpoint(folder, model, reordering, source=smollm2(), processing_class=tokenizer, rows=rows)
    files.write_json(work / RESULTS_NAME, {"rows": rows})
    _add_widths(folder, model, tests, "model.layers", (0.7, 0.8, 0.9), calibration, "python-docs")


GALLERY: Mapping[str, tuple[Callable[[Path, Path], None], str]] = {
    "dinov2-small-fashion-mnist-spp": (fine_tuned_dinov2, "DINOv2-small, fine-tuned on Fashion-MNIST"),
    "minilm-spp": (sentence_encoder, "all-MiniLM-L6-v2, a sentence encoder"),
    "smollm2-135m-spp": (language_model, "SmolLM2-135M-Instruct, a language model with grouped queries"),
}


def _data(name: str, source: Callable[[], Any], model: Path, recipe: Recipe) -> NamedData:
    return NamedData(name, prepare_task(load_classification_data(name, source, recipe), model, recipe))


def _copy_results(results: ComparisonResults, folder: Path) -> None:
    """The results that the checkpoint's card is to show."""
    for name in (RESULTS_NAME, *PLOTS.values()):
        files.copy_file(results.output_dir / name, folder / name)


def _add_widths(
    folder: Path,
    model: Any,
    data: Iterable[Batch],
    within: str,
    shares: Sequence[float],
    calibration: Sequence[Batch],
    name: str,
) -> None:
    """Measure what shares of the parameters below a module are worth, and add them to the card."""
    report = width_report(
        model,
        list(data),
        {
            f"{100 * one:g} % of {within.rpartition('.')[2]}": SubnetworkSpec.from_budget(
                model, fraction=one, within=within
            )
            for one in shares
        },
        calibration=calibration,
        random_control=SEEDS,
        dataset_name=name,
        output_dir=folder / "widths",
    )
    report.add_to_card(folder)


INDEX = """# Gallery

Model cards as `hf-spp push` writes them, with the results that their figures come from. Each was pushed to a Hub on one
machine under the name that it shows; the weights are not here, and the command beside each makes them again, on a CPU
and without the network. The first card is that of `hf-spp demo`. [`dinov2-small-spp/`](dinov2-small-spp),
[`minilm-spp/`](minilm-spp) and [`smollm2-135m-spp/`](smollm2-135m-spp) also hold the results of the benchmarks that the
[README](../README.md#what-was-measured) shows.

| card | what it is | made by |
| --- | --- | --- |
| [`dinov2-small-spp`](dinov2-small-spp/README.md) | DINOv2-small, compared on three image sets | `hf-spp demo` |
"""


def index() -> str:
    """The page that shows all cards: what each is, and what its widths are worth."""
    parts, shown = [INDEX.rstrip()], []
    for name, (_, described) in GALLERY.items():
        parts.append(f"| [`{name}`]({name}/README.md) | {described} | `python tests/benchmarks/gallery.py {name}` |")
        report = WidthReport.load(CARDS / name / "widths")
        shown += [
            f"## {described}",
            f"[The card]({name}/README.md) on {report.settings['dataset']}. {metrics_caption(report.rows)}.",
            width_table(report.rows),
            f"![Quality against parameters]({name}/{PLOTS_OF_WIDTHS['parameters']})",
        ]
    return "\n".join(parts) + "\n\n" + "\n\n".join(str(one).strip() for one in shown) + "\n"


def pushed(folder: Path, repo_id: str, target: Path) -> None:
    """Push a checkpoint to a Hub on this machine, and keep what its page shows and the results behind it."""
    with tempfile.TemporaryDirectory() as state, serving(state) as server:
        subprocess.run(["hf-spp", "push", folder, repo_id], env=server.environment(), check=True)
        shown = server.files(repo_id)
    for name, content in shown.items():
        if name == CARD_NAME or Path(name).name == RESULTS_NAME or (Path(name).suffix == ".png" and "/" not in name):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes(content)
    files.write_json(target / SUMMARY_NAME, Reordering.from_pretrained(folder).summary())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=GALLERY)
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = args.work or Path(scratch)
        folder = work / args.name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        GALLERY[args.name][0](work, folder)
        pushed(folder, f"tester/{args.name}", CARDS / args.name)
        if (work / RESULTS_NAME).is_file():
            shutil.copy(work / RESULTS_NAME, CARDS / args.name)
    (CARDS / CARD_NAME).write_text(index())


if __name__ == "__main__":
    main()
