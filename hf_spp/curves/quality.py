"""How good a model is on labelled batches: accuracy and F1, perplexity, or nearness to another model."""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import EvalPrediction, default_data_collator

from ..cards.model_card import task_of_class
from ..comparison.metrics import classification_metrics
from ..errors import DatasetError, NonFiniteWeightsError, SPPConfigError
from ..forward import evaluation_mode, fixed_rng, run_model
from ..structure import inner_model

Batch = Mapping[str, Any]
Metric = Callable[[Any, Sequence[Batch]], Mapping[str, float]]

LABELS = ("labels", "label")
# What losses leave out.
_IGNORED = -100


def read_batches(dataset: Any, collator: Callable[[list[Any]], Any] | None, batch_size: int) -> list[Batch]:
    """Read a data set once, so that every model sees the same batches.

    Args:
        dataset: An iterable of dict batches, or a data set of single examples (`datasets.Dataset`, or anything with a
            length and an index).
        collator: Makes a batch of examples; None takes transformers' default. Not for what holds batches already.
        batch_size: Examples in a batch.

    Raises:
        DatasetError: It is no data set, holds nothing, or examples cannot be made into dict batches.
    """
    examples = _is_examples(dataset, collator)
    if isinstance(dataset, (Mapping, str)) or not (examples or isinstance(dataset, Iterable)):
        raise DatasetError(
            f"The data set is a {type(dataset).__name__}. Accepted: an iterable of dict batches with labels, such as a "
            "DataLoader or a list, or a datasets.Dataset with a collator. Put a single batch into a list; of a "
            "DatasetDict give one split."
        )
    if collator is not None and not examples:
        raise DatasetError(
            f"A collator was given for a {type(dataset).__name__}, whose items are read as whole batches. Accepted: a "
            "collator with a datasets.Dataset or a list of examples. Leave it out, or give the data set itself."
        )
    found = _collated(dataset, collator or default_data_collator, batch_size) if examples else dataset
    batches: list[Batch] = []
    for batch in found:
        if not isinstance(batch, Mapping):
            raise DatasetError(
                f"A batch of the data set is a {type(batch).__name__}. Accepted: a dict of forward arguments with "
                "labels. Use a collator that returns dicts."
            )
        batches.append(dict(batch))
    if not batches:
        raise DatasetError(
            "The data set holds no batch. Accepted: at least one (a generator that was read before is empty)."
        )
    return batches


def _is_examples(dataset: Any, collator: Any) -> bool:
    """Whether a data set holds single examples that are to be collated."""
    indexed = hasattr(type(dataset), "__getitem__") and hasattr(type(dataset), "__len__")
    return indexed and (collator is not None or not isinstance(dataset, (list, tuple)))


def _collated(dataset: Any, collator: Callable[[list[Any]], Any], batch_size: int) -> Iterator[Any]:
    for start in range(0, len(dataset), batch_size):
        examples = [dataset[index] for index in range(start, min(start + batch_size, len(dataset)))]
        try:
            yield collator(examples)
        except Exception as error:  # whatever a collator raises only means that it does not suit the examples
            columns = sorted(examples[0]) if isinstance(examples[0], Mapping) else type(examples[0]).__name__
            raise DatasetError(
                f"Examples of the data set with {columns} cannot be made into a batch by "
                f"{getattr(collator, '__name__', type(collator).__name__)}: {_line(error)} Accepted: examples of "
                "forward arguments and labels, and a collator that pads them. Give collator=, such as "
                "DataCollatorWithPadding(tokenizer), and tokenize before."
            ) from error


def forward_arguments(batch: Batch) -> dict[str, Any]:
    """A batch without its labels."""
    return {name: value for name, value in batch.items() if name not in LABELS}


def batch_length(batch: Batch) -> int:
    """Samples in a batch."""
    return next((len(value) for value in batch.values() if isinstance(value, Tensor) and value.dim() > 0), 1)


def default_metric(model: Any, batches: Sequence[Batch]) -> Metric:
    """How models with such a head are measured.

    Accuracy and macro F1 for classifiers, perplexity for causal language models, and for models without a head the mean
    cosine of their mean hidden states to those of the given model.

    Args:
        model: The full model.
        batches: What it will be measured on.

    Raises:
        DatasetError: The batches have no labels that fit the head, or the model does not run on them.
        SPPConfigError: Nothing is known for such a head.
    """
    model = inner_model(model)
    if task_of_class(type(model).__name__) == "text-generation":
        return perplexity
    with _fixed(model):
        first = run_on(model, batches[0])
    logits, hidden = (_output(first, name) for name in ("logits", "last_hidden_state"))
    labels = labels_of(batches[0])
    if logits is not None:
        classes = labels is not None and not labels.is_floating_point() and labels.shape == logits.shape[:-1]
        if (classes and logits.dim() == 2) or task_of_class(type(model).__name__) == "token-classification":
            return accuracy_and_f1
        if logits.dim() == 2 and labels is None:
            raise _no_labels(batches[0])
    elif hidden is not None:
        return cosine_to(model, batches)
    raise SPPConfigError(
        f"No quality is known for {type(model).__name__} on batches of {sorted(batches[0])}. Accepted without a "
        "metric: classifiers with a class index per sample, causal language models with labels, models without a head. "
        "Give metric=, a function (model, batches) -> dict of numbers."
    )


def accuracy_and_f1(model: Any, batches: Sequence[Batch]) -> dict[str, float]:
    """Accuracy and macro F1 of a classifier of samples or tokens, fractions of 1.

    Raises:
        DatasetError: A batch has no labels, or the model does not run on it.
    """
    logits, classes = [], []
    for batch in batches:
        labels = labels_of(batch)
        if labels is None:
            raise _no_labels(batch)
        found = _output(run_on(model, batch), "logits")
        if found is None or found.shape[:-1] != labels.shape:
            raise DatasetError(
                f"Labels of shape {list(labels.shape)} do not fit the logits of {type(model).__name__}, "
                f"{None if found is None else list(found.shape)}. Accepted: one class index for each. Check the labels."
            )
        kept = labels.flatten() != _IGNORED
        logits.append(found.flatten(0, -2).float().cpu()[kept])
        classes.append(labels.flatten()[kept].cpu())
    values, wanted = torch.cat(logits), torch.cat(classes)
    if not len(wanted) or int(wanted.min()) < 0 or int(wanted.max()) >= values.shape[-1]:
        raise DatasetError(
            f"The labels are no class indices of {type(model).__name__}, which tells {values.shape[-1]} classes. "
            f"Accepted: from 0 to {values.shape[-1] - 1}, and {_IGNORED} for what does not count. Check the labels."
        )
    if not bool(values.isfinite().all()):
        return {"accuracy": math.nan, "f1": math.nan}
    return classification_metrics(EvalPrediction(values.numpy(), np.asarray(wanted)))


def perplexity(model: Any, batches: Sequence[Batch]) -> dict[str, float]:
    """Perplexity of a causal language model over all labelled tokens: each is predicted from those before it.

    Raises:
        DatasetError: A batch has no labels for its tokens, or the model does not run on it.
    """
    total, count = 0.0, 0
    for batch in batches:
        labels = labels_of(batch)
        logits = _output(run_on(model, batch), "logits")
        if labels is None or logits is None or logits.shape[:-1] != labels.shape:
            raise DatasetError(
                f"{type(model).__name__} needs a label for each token, and a batch has "
                f"{'none' if labels is None else f'labels of shape {list(labels.shape)}'}. Accepted: the input ids as "
                f"labels, with {_IGNORED} for padding. Use DataCollatorForLanguageModeling(tokenizer, mlm=False)."
            )
        targets = labels[:, 1:].to(logits.device).flatten()
        losses = functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), targets, ignore_index=_IGNORED, reduction="none"
        )
        total += float(losses.double().sum())
        count += int((targets != _IGNORED).sum())
    if not count:
        raise DatasetError(f"All labels are {_IGNORED}, so no token counts. Accepted: at least one. Check the labels.")
    return {"perplexity": float(np.exp(np.float64(total / count))) if total / count < 700 else math.inf}


def cosine_to(model: Any, batches: Sequence[Batch]) -> Metric:
    """A metric that compares models without a head with this one: mean cosine of their mean hidden states.

    Args:
        model: The model to compare with.
        batches: What all of them are run on.
    """
    with _fixed(model):
        wanted = [mean_state(model, batch) for batch in batches]

    def cosine(other: Any, batches: Sequence[Batch]) -> dict[str, float]:
        found = [functional.cosine_similarity(mean_state(other, b), w) for b, w in zip(batches, wanted, strict=True)]
        return {"cosine": float(torch.cat(found).mean())}

    return cosine


def measured(metric: Metric, model: Any, batches: Sequence[Batch], *, full: bool = False) -> dict[str, float | None]:
    """Measure a model in evaluation mode, without gradients and on fixed random numbers.

    Args:
        metric: The metric.
        model: The model.
        batches: What it is measured on.
        full: Whether it is the full model, whose quality must be a number.

    Returns:
        The values by name, None for what is not finite.

    Raises:
        SPPConfigError: The metric gives something else than numbers by name.
        NonFiniteWeightsError: A value of the full model is NaN or infinite.
    """
    with _fixed(model):
        found = metric(model, batches)
    try:
        values = {str(name): float(value) for name, value in dict(found).items()}
    except (TypeError, ValueError) as error:
        raise SPPConfigError(
            f"metric {getattr(metric, '__name__', type(metric).__name__)} gave {type(found).__name__} {found!r:.100}. "
            "Accepted: a dict of numbers by name. Return {'cosine': 0.97}, for example."
        ) from error
    if full and (not values or not all(map(math.isfinite, values.values()))):
        raise NonFiniteWeightsError(
            f"The quality of the full {type(model).__name__} is {values}. Accepted: finite numbers. Check the weights, "
            "the data, and the precision that the model runs in."
        )
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def run_on(model: Any, batch: Batch) -> Any:
    """Run a model on a batch without its labels.

    Raises:
        DatasetError: It does not run.
    """
    inner = inner_model(model)
    try:
        return run_model(inner, forward_arguments(batch))
    except Exception as error:  # whatever a forward raises only means that the batch does not suit it
        raise DatasetError(
            f"{type(inner).__name__} does not run on a batch with {sorted(batch)}: {_line(error)} Accepted: arguments "
            f"of its forward, which takes {_taken(inner)}, and labels, which it does not get. Remove other columns, "
            "give a collator that does, or measure with metric= of your own."
        ) from error


@contextmanager
def _fixed(model: Any) -> Iterator[None]:
    """Evaluation mode, no gradients, and the same random numbers every time."""
    inner = inner_model(model)
    with torch.no_grad(), evaluation_mode(inner), fixed_rng(inner, 0):
        yield


def labels_of(batch: Batch) -> Tensor | None:
    """Labels of a batch, None where it has none."""
    found = next((batch[name] for name in LABELS if batch.get(name) is not None), None)
    return None if found is None else torch.as_tensor(found)


def mean_state(model: Any, batch: Batch) -> Tensor:
    """The mean hidden state of each sample of a batch, of its tokens without padding: `[samples, hidden]`, float32.

    Raises:
        DatasetError: The model gives no hidden states, or does not run on the batch.
    """
    hidden = _output(run_on(model, batch), "last_hidden_state")
    if hidden is None:
        raise DatasetError(
            f"{type(inner_model(model)).__name__} gives no last_hidden_state. Give metric=, a function "
            "(model, batches) -> dict of numbers."
        )
    hidden = hidden.float().flatten(1, -2).cpu()
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.shape != hidden.shape[:2]:
        return hidden.mean(1)
    weights = mask.to(hidden).unsqueeze(-1)
    return (hidden * weights).sum(1) / weights.sum(1).clamp_min(1)


def _output(output: Any, name: str) -> Tensor | None:
    found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
    return found if isinstance(found, Tensor) else None


def _taken(model: Any) -> str:
    taken = list(inspect.signature(type(model).forward).parameters)
    names = [name for name in taken if name not in ("self", "args", "kwargs", *LABELS)]
    return ", ".join(names[:6]) + (", …" if len(names) > 6 else "")


def _no_labels(batch: Batch) -> DatasetError:
    return DatasetError(
        f"A batch of the data set has {sorted(batch)} and no labels, which accuracy needs. Accepted: dict batches with "
        "'labels', a class index for each sample. Add them, or give metric=."
    )


def _line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".:") + "."
