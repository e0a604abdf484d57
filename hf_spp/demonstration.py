"""How the demo ends: a fine-tuned model, put in order by what each channel is worth, and measured narrower."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .cards.results import ComparisonResults
from .comparison.evaluation import model_folder
from .config import SPPConfig
from .conversion import load_original, save_reordered
from .curves.named_data import NamedData, load_named_data
from .transform import apply_spp

ORDERED_NAME, WIDTHS_NAME = "ordered", "widths"
SHARES = (0.5,)


def order_fine_tuned(results: ComparisonResults, datasets: Iterable[str], samples: int) -> tuple[Path, Any, NamedData]:
    """Put the model that `spp` fine-tuned into the order of `taylor`, in the folder of the results.

    With the call of `measure_checkpoint` that follows, it is what these commands do:

        hf-spp reorder models/NAME-spp ordered --metric taylor --dataset NAME
        hf-spp curve ordered --dataset NAME --widths 0.5 --out widths

    Args:
        results: What the comparison gave, with its models kept.
        datasets: Names of its data sets; the first that could be fetched is taken.
        samples: Examples to score on.

    Returns:
        Folder of the ordered checkpoint, the model, and the data that it was fine-tuned on.

    Raises:
        SPPError: Whatever loading, reordering and saving raise.
    """
    name = next(name for name in datasets if name not in results.left_out)
    source, folder = model_folder(results.output_dir, name, "spp"), results.output_dir / ORDERED_NAME
    data, model = load_named_data(name, source), load_original(source)
    reordering = apply_spp(model, SPPConfig(metric="taylor"), calibration=data.calibration_batches(samples))
    save_reordered(model, reordering, source, folder, overwrite=True)
    return folder, model, data
