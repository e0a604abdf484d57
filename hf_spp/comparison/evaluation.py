"""Compare the original model, baselines and SPP after the same fine-tuning."""

import copy
import os
import re
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from .. import checkpoint
from ..cards import plots
from ..cards.results import METHODS, ComparisonResults, ResultsFile
from ..config import SPPConfig
from ..errors import SPPConfigError
from .classification import ClassificationTask, DatasetSource, Recipe, load_classification_data, prepare_task
from .fine_tuning import MethodRun, RunProgress, Spectrum, spectrum_of_task

# What the Trainer is told about logging, saving and hardware does not change a result.
_NEUTRAL_ARGUMENTS = re.compile(
    r"output_dir|seed|log_|logging_|disable_tqdm|report_to|run_name|project|trackio_|save_|hub_|push_to_hub|eval_s|"
    r"eval_delay|eval_on_start|load_best|metric_for_best|greater_is|do_|resume_from|local_rank|remove_unused|"
    r"label_names|ddp_|dataloader_(?!drop_last)|skip_memory|debug|restore_callback|prediction_loss_only|enable_jit"
)


def compare_methods(
    model: str | os.PathLike[str],
    datasets: Mapping[str, DatasetSource] | Sequence[str],
    methods: Sequence[str] = ("original", "pruning-rank", "spp"),
    args: TrainingArguments | None = None,
    *,
    recipe: Recipe | None = None,
    config: SPPConfig | None = None,
    output_dir: str | os.PathLike[str] = "spp-comparison",
    seed: int = 123,
    save_models: bool | Collection[str] = False,
    model_name: str | None = None,
    left_out: Mapping[str, str] | None = None,
) -> ComparisonResults:
    """Fine-tune and evaluate one pretrained model by several methods, each from the same seed.

    A method changes the pretrained weights, then `Trainer` fine-tunes them on the recipe's training set and evaluates
    accuracy and macro F1 on its validation set. `original` changes nothing, `pruning-rank` sorts query rows and key
    rows independently, `random` reorders at random, `spp-raffm` reorders as the paper does, and `spp` as `config`
    says.

    Each finished run is added to `results.json` at once. A later call with the same settings keeps these rows and
    runs what is missing. A row holds `dataset`, `method`, `accuracy` and `f1` (fractions of 1), `max_abs_diff` and
    `relative_diff` (change of the logits before training, on the first validation examples), `seconds`, `seed`,
    `versions`, `parameters` (`total`, `trainable`), `train_samples`, `eval_samples`, `model` and `fingerprint`.

    Args:
        model: Hub id or folder of the pretrained model.
        datasets: Sources by name, each a Hub id (`repo` or `repo:configuration`), a `Dataset`, a `DatasetDict` or a
            callable giving either; or Hub ids alone. Images or texts are told by column type.
        methods: Some of `original`, `pruning-rank`, `random`, `spp-raffm`, `spp`.
        args: Arguments of every fine-tuning, taken as they are except where the comparison decides: the seed, the
            output folder, saving and reporting. None means the paper's: one epoch, batch 16, learning rate 2e-4, with
            the mixed precision of `precision_arguments`.
        recipe: How data is split; None means the paper's.
        config: What `spp` does; None means `SPPConfig()`. Where its metric needs calibration, the training set is it.
        output_dir: Folder of `results.json`, `results.md`, `accuracy.png` and `saliency.png`.
        seed: Seed of every run: the new head, the order of examples, dropout.
        save_models: Whether to keep the fine-tuned checkpoint of `spp`, or the methods to keep, under
            `models/<dataset>-<method>`, with the orders of a reordered one.
        model_name: What rows call the model; None takes `model`.
        left_out: Data sets that the caller could not get, with the reason; reported beside the results.

    Returns:
        All rows of the folder, also of earlier calls.

    Raises:
        SPPConfigError: A method is unknown, no data set is given, or the folder holds results of other settings.
        DatasetError: A data set lacks a split or a column that classification needs.
        CheckpointError: `results.json` is damaged or written by a newer version.
        HubError: The model cannot be loaded.

    Reference:
        Yu, Muñoz and Jannesari, arXiv:2310.00247.
    """
    methods, saved = _check_methods(methods), _check_saved(save_models, methods)
    sources = _named_sources(datasets)
    recipe, config = recipe or Recipe(), config or SPPConfig()
    folder = Path(output_dir)
    name = model_name or os.fspath(model)
    with tempfile.TemporaryDirectory() as scratch:
        args = _own_arguments(args or recipe_arguments(), scratch, seed)
        settings = {
            "model": name,
            "seed": seed,
            "recipe": recipe.to_dict(),
            "config": config.to_dict(),
            "training_arguments": _deciding_arguments(args),
            "datasets": {},
            "left_out": dict(left_out or {}),
        }
        results = ResultsFile.open(folder, settings)
        spectra: dict[str, Spectrum] = {}
        with RunProgress() as progress:
            for dataset, source in sources.items():
                task = prepare_task(load_classification_data(dataset, source, recipe), model, recipe)
                results.add_dataset(dataset, task.data.describe())
                for method in methods:
                    kept = model_folder(folder, dataset, method) if method in saved else None
                    fingerprint = results.fingerprint(dataset, method, _method_config(method, config))
                    if results.has(dataset, method, fingerprint) and (kept is None or kept.is_dir()):
                        continue
                    run = MethodRun(task, method, _method_config(method, config), args, kept)
                    row, spectrum = run.execute(progress)
                    results.add_row({**row, "model": name, "fingerprint": fingerprint})
                    if spectrum is not None:
                        spectra.setdefault(method, spectrum)
        _write_reports(results, spectra, task, methods, config)
    return results.to_results()


def model_folder(output_dir: Path, dataset: str, method: str) -> Path:
    """Where `save_models` keeps the model that a method fine-tuned on a data set."""
    return output_dir / "models" / _folder_name(dataset, method)


def recipe_arguments(**changes: Any) -> TrainingArguments:
    """The paper's training arguments, with mixed precision where the device has it.

    Args:
        changes: `TrainingArguments` that replace the paper's.
    """
    paper = {
        "output_dir": "spp-comparison",
        "num_train_epochs": 1,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 64,
        "learning_rate": 2e-4,
        "report_to": "none",
    }
    precision = {} if {"bf16", "fp16"} & changes.keys() else precision_arguments()
    return TrainingArguments(**{**paper, **precision, **changes})


def precision_arguments() -> dict[str, bool]:
    """Mixed precision for `TrainingArguments`: bfloat16 where CUDA computes in it, else float16, else none."""
    if not torch.cuda.is_available():
        return {}
    return {"bf16": True} if torch.cuda.is_bf16_supported(including_emulation=False) else {"fp16": True}


def _check_methods(methods: Sequence[str]) -> tuple[str, ...]:
    known = ", ".join(METHODS)
    if isinstance(methods, str) or not methods:
        raise SPPConfigError(
            f"methods={methods!r} is no list of methods. Accepted: some of {known}. Give methods=('original', 'spp')."
        )
    for method in methods:
        if method not in METHODS:
            raise SPPConfigError(
                f"methods={tuple(methods)!r} has the unknown method {method!r}. Accepted: {known}. "
                "Correct the name, or leave it out."
            )
    return tuple(dict.fromkeys(methods))


def _check_saved(save_models: bool | Collection[str], methods: tuple[str, ...]) -> tuple[str, ...]:
    if save_models is False:
        return ()
    saved = ("spp",) if save_models is True else tuple(save_models)
    if isinstance(save_models, str) or not set(saved) <= set(methods):
        raise SPPConfigError(
            f"save_models={save_models!r} asks to keep models that methods={methods!r} does not make. Accepted: False, "
            "True for 'spp', or some of the methods. Add the method, or name another to keep."
        )
    return saved


def _named_sources(datasets: Mapping[str, DatasetSource] | Sequence[str]) -> dict[str, DatasetSource]:
    if not isinstance(datasets, Mapping) and (
        isinstance(datasets, str) or not all(isinstance(source, str) for source in datasets)
    ):
        raise SPPConfigError(
            f"datasets is a {type(datasets).__name__} of something else than Hub ids. Accepted: a list of Hub ids, or "
            "sources by name. Give datasets={'my-data': data}."
        )
    sources = dict(datasets) if isinstance(datasets, Mapping) else {source: source for source in datasets}
    if not sources:
        raise SPPConfigError(
            "datasets names no data set, so there is nothing to compare on. Accepted: Hub ids, or sources by name. "
            "Give datasets=['uoft-cs/cifar10']."
        )
    folders = {_folder_name(name, "").lower() for name in sources}
    if len(folders) < len(sources):
        raise SPPConfigError(
            f"datasets has names that give one folder name: {sorted(sources)}. Accepted: names that differ in letters "
            "or digits. Rename one."
        )
    return sources


def _folder_name(dataset: str, method: str) -> str:
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '-', dataset)}-{method}"


def _method_config(method: str, config: SPPConfig) -> SPPConfig | None:
    configs = {"spp": config, "spp-raffm": SPPConfig.raffm(), "random": SPPConfig(metric="random")}
    return configs.get(method)


def _own_arguments(args: TrainingArguments, folder: str, seed: int) -> TrainingArguments:
    own = copy.deepcopy(args)
    own.output_dir, own.seed = folder, seed
    own.report_to, own.disable_tqdm, own.push_to_hub = [], True, False
    own.save_strategy, own.eval_strategy = SaveStrategy.NO, IntervalStrategy.NO
    own.eval_on_start, own.load_best_model_at_end = False, False
    own.remove_unused_columns, own.label_names = False, ["labels"]
    # Pinning without an accelerator does nothing but warn.
    own.dataloader_pin_memory = own.dataloader_pin_memory and own.device.type != "cpu"
    return own


def _deciding_arguments(args: TrainingArguments) -> dict[str, Any]:
    """The training arguments that can change a result and are not transformers' defaults, and the usual ones."""
    usual = {"learning_rate", "num_train_epochs", "per_device_train_batch_size", "bf16", "fp16"}
    defaults = TrainingArguments(output_dir=str(args.output_dir)).to_dict()  # type: ignore[no-untyped-call]
    return {
        name: value
        for name, value in args.to_dict().items()  # type: ignore[no-untyped-call]
        if not _NEUTRAL_ARGUMENTS.match(name) and (name in usual or value != defaults.get(name))
    }


def _write_reports(
    results: ResultsFile,
    spectra: Mapping[str, Spectrum],
    task: ClassificationTask,
    methods: Sequence[str],
    config: SPPConfig,
) -> None:
    results.write()
    checkpoint.write_text(results.folder / "results.md", results.to_results().to_markdown())
    checkpoint.write_bytes(results.folder / "accuracy.png", plots.method_bars(results.rows))
    shown = next((method for method in ("spp", "spp-raffm") if method in methods), None)
    picture = results.folder / "saliency.png"
    if shown is None or (shown not in spectra and picture.exists()):
        return
    spectrum = spectra.get(shown) or spectrum_of_task(
        task, _method_config(shown, config) or config, results.settings["seed"]
    )
    checkpoint.write_bytes(picture, plots.saliency_spectrum(spectrum.scores, spectrum.groups))
