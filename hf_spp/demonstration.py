"""How the demo ends: a fine-tuned model, put in order by what each channel is worth, and measured narrower."""

from pathlib import Path

from .cards.results import ComparisonResults
from .cards.width_results import WidthReport
from .comparison.evaluation import model_folder
from .config import SPPConfig
from .conversion import reorder_pretrained
from .curves.checkpoints import measure_checkpoint
from .curves.named_data import load_named_data

ORDERED_NAME, WIDTHS_NAME = "ordered", "widths"
SHARES = (0.5,)
SAMPLES = 256
LATENCY_RUNS = 5


def measure_narrower(results: ComparisonResults) -> tuple[Path, WidthReport]:
    """Order a fine-tuned model by `taylor`, and measure what half of its neurons and heads are worth.

    It is what these commands do, in the folder of the results:

        hf-spp reorder MODEL ordered --metric taylor --dataset NAME
        hf-spp curve ordered --dataset NAME --widths 0.5 --out widths

    Args:
        results: What the comparison gave, with its models kept; that of `spp` on the first data set is taken.

    Returns:
        Folder of the ordered checkpoint, whose card shows the widths, and the report.

    Raises:
        SPPError: Whatever reordering and measuring raise.
    """
    folder, name = results.output_dir / ORDERED_NAME, next(iter(results.settings["datasets"]))
    model = model_folder(results.output_dir, name, "spp")
    data = load_named_data(name, model)
    ordered, _ = reorder_pretrained(
        model, folder, SPPConfig(metric="taylor"), calibration=data.calibration_batches(SAMPLES), overwrite=True
    )
    report, _ = measure_checkpoint(
        folder,
        ordered,
        data,
        SHARES,
        results.output_dir / WIDTHS_NAME,
        calibration_samples=SAMPLES,
        latency_runs=LATENCY_RUNS,
    )
    return folder, report
