"""What a sub-network learns from the full model's outputs, and how far its own are from them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import SubnetworkError


def learnt_from(outputs: Any) -> dict[str, Tensor]:
    """The outputs that sub-networks learn from, by name: logits, or the last hidden state where there are none."""
    known = outputs if isinstance(outputs, Mapping) else {}
    values = {name: value for name, value in known.items() if isinstance(value, Tensor) and value.is_floating_point()}
    logits = {
        name: value
        for name, value in values.items()
        if name == "logits" or name.startswith("logits_per_") or (name.endswith("_logits") and "router" not in name)
    }
    if logits:
        return logits
    if "last_hidden_state" in values:
        return {"last_hidden_state": values["last_hidden_state"]}
    raise SubnetworkError(
        f"The model put out {', '.join(known) or type(outputs).__name__}, which has neither logits nor a last hidden "
        "state to learn from. Set distillation=0.0, with which sub-networks learn from the labels."
    )


def distance(
    model: Any,
    outputs: Mapping[str, Any],
    targets: Mapping[str, Tensor],
    inputs: Mapping[str, Any],
    labels: Any,
    temperature: float,
) -> Tensor:
    """How far the outputs of a sub-network are from those of the full model, as a mean over a batch.

    Args:
        model: The plain model.
        outputs: What the sub-network put out.
        targets: What the full model put out, detached, by the name of each output that is learnt from.
        inputs: Forward arguments.
        labels: The label of every place of the logits, None if they have none.
        temperature: What logits are divided by.

    Raises:
        SubnetworkError: An output has a shape that does not say what is to be learnt from it.
    """
    losses = []
    for name, target in targets.items():
        output = outputs[name]
        if output.shape != target.shape:
            raise SubnetworkError(
                f"{name} is of shape {list(output.shape)} in a sub-network and of {list(target.shape)} in the full "
                "model, so it cannot be learnt from. Leave hidden out of the widths, or set distillation=0.0."
            )
        output, target = _exact(output), _exact(target)
        if name == "last_hidden_state":
            output, target = _masked(output, target, inputs.get("attention_mask"))
            losses.append(_mean_square(output, target))
        elif _is_regression(model, target):
            losses.append(_mean_square(output, target))
        elif labels is not None and labels.is_floating_point() and labels.shape == target.shape:
            losses.append(_binary_divergence(output, target, temperature))
        else:
            output, target = _positions(name, output, target, labels, inputs)
            losses.append(_divergence(output, target, temperature))
    return torch.stack(losses).mean()


def _positions(
    name: str, output: Tensor, target: Tensor, labels: Any, inputs: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """Logits of the places that are learnt, classes last."""
    shape, mask = target.shape[:-1], inputs.get("attention_mask")
    if isinstance(labels, Tensor) and labels.shape == shape:
        return _masked(output, target, labels.ne(-100))
    if target.dim() == 4 and isinstance(labels, Tensor) and labels.dim() == 3:
        # Of every pixel, in a coarser image than that of the labels.
        return output.movedim(1, -1), target.movedim(1, -1)
    if target.dim() > 3:
        raise SubnetworkError(
            f"{name} is of shape {list(target.shape)}, and the labels do not say which axis is that of classes. "
            "Override distillation_loss, or set distillation=0.0."
        )
    return _masked(output, target, mask)


def _masked(output: Tensor, target: Tensor, mask: Any) -> tuple[Tensor, Tensor]:
    """The places that a mask of all places leaves, or all of them where there is none."""
    if not isinstance(mask, Tensor) or mask.shape != target.shape[:-1]:
        return output, target
    places = mask.to(device=target.device, dtype=torch.bool)
    return output[places], target[places]


def _exact(values: Tensor) -> Tensor:
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _is_regression(model: Any, logits: Tensor) -> bool:
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    return problem == "regression" or logits.shape[-1] == 1


def _mean_square(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().sum() / max(target.numel(), 1)


def _divergence(output: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence of the softmax, a mean over all places."""
    log_target, log_output = ((values / temperature).log_softmax(-1) for values in (target, output))
    total = functional.kl_div(log_output, log_target, reduction="sum", log_target=True)
    return total * temperature**2 / max(target[..., 0].numel(), 1)


def _binary_divergence(output: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence of the sigmoid, a mean over all logits."""
    probability, logits = (target / temperature).sigmoid(), output / temperature
    entropy = functional.binary_cross_entropy_with_logits(target / temperature, probability)
    cross = functional.binary_cross_entropy_with_logits(logits, probability)
    return (cross - entropy) * temperature**2
