"""A model in training and all that moves with it: its optimizer's state, its adapters, copies of its weights.

The callback decides when; here is how.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers.utils import logging

from .apply import Indices, Move, Moves, carry, invert_indices, live_moves
from .config import SPPConfig
from .errors import CallbackError
from .optimizers import inner_optimizer, optimizer_moves
from .permutation import kendall_tau
from .proof import Witness
from .reordering import Reordering, history_of, remember, total_of
from .saving import fingerprint, is_in_adapter_file
from .structure import inner_model, tuner_layers, unwrapped
from .transform import carry_out, plan, prepare

logger = logging.get_logger(__name__)

Copy = nn.Module | Mapping[str, Tensor] | Sequence[Tensor]


def moves_along(model: nn.Module, optimizer: Any, copies: Sequence[Copy], indices: Indices) -> dict[str, Move]:
    """Everything outside of a model that moves with it: the optimizer's state and copies of the weights.

    Raises:
        OptimizerError: The optimizer's state cannot be moved by index.
        CallbackError: A copy is none of this model.
    """
    moves = optimizer_moves(optimizer, model, indices)
    for number, copy in enumerate(copies):
        moves |= {f"{name} in copy {number}": move for name, move in _copy_moves(model, copy, indices).items()}
    return moves


def _copy_moves(model: nn.Module, copy: Copy, indices: Indices) -> Moves:
    """The moves of a copy of the model's weights, such as their moving averages."""
    if isinstance(copy, nn.Module):
        inner = unwrapped(copy)
        if type(inner) is not type(inner_model(model)):
            raise CallbackError(
                f"The registered copy is a {type(inner).__name__}; one of the {type(inner_model(model)).__name__} in "
                "training is needed."
            )
        return live_moves(inner, indices)
    inner = inner_model(model)
    if not isinstance(copy, Mapping):
        named = dict(inner.named_parameters())
        trained = [name for name, one in named.items() if one.requires_grad]
        names = next((some for some in ([*named], trained) if len(some) == len(copy)), None)
        if names is None:
            raise CallbackError(
                f"The registered copy is a list of {len(copy)} tensors; the {type(inner).__name__} in training has "
                f"{len(named)} parameters, {len(trained)} of them trained. Give one tensor for each, in the order of "
                "model.parameters()."
            )
        copy = dict(zip(names, copy, strict=True))
    # A state dict of the model around this one has its names with a prefix.
    copy = {name.removeprefix("module.").removeprefix("base_model.model."): one for name, one in copy.items()}
    own = {**dict(inner.named_parameters(remove_duplicate=False)), **dict(inner.named_buffers(remove_duplicate=False))}
    if wrong := [name for name, one in copy.items() if name not in own or one.shape != own[name].shape]:
        raise CallbackError(
            f"The registered copy holds {wrong[0]!r} {list(copy[wrong[0]].shape)}, which is no tensor of the "
            f"{type(inner).__name__} in training, or has another shape there. Register a copy of the model, a dict of "
            "tensors by name, or a list of tensors in the order of model.parameters()."
        )
    moved = {id(own[name]): dims for name, (_, dims) in live_moves(model, indices).items()}
    # What is tied in the copy moves once.
    tensors = {one.data_ptr(): (name, one) for name, one in reversed(copy.items())}
    return {name: (one, moved[id(own[name])]) for name, one in tensors.values() if id(own[name]) in moved}


class TrainingBatches:
    """Batches of the training set, the same every time they are read; the Trainer's own loader is not advanced.

    Args:
        loader: The loader of the run.
        seed: Seed of their order.

    Raises:
        CallbackError: The data set cannot be read twice.
    """

    def __init__(self, loader: DataLoader[Any], seed: int) -> None:
        if isinstance(loader.dataset, IterableDataset):
            raise CallbackError(
                "The training set is an IterableDataset, whose examples cannot be read twice. "
                "Pass SPPCallback(config, calibration=<dict batches>)."
            )
        self.loader, self.seed = loader, seed

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        size = self.loader.batch_size or getattr(self.loader, "total_batch_size", None) or 8
        generator = torch.Generator().manual_seed(self.seed)
        data, collate = self.loader.dataset, self.loader.collate_fn
        return iter(DataLoader(data, size, shuffle=True, generator=generator, collate_fn=collate))


class LiveModel:
    """A model in training, the order that it is in, and all that moves with it.

    Args:
        model: The model, plain, PEFT's or sharded.
        optimizer: The optimizer that trains it, or accelerate's wrapper.
        copies: Copies of its weights.
        config: What to reorder and how.
        calibration: Dict batches for the metrics that need them.
        example_inputs: Forward arguments for proofs; None builds them from the model's config.
    """

    def __init__(
        self,
        model: Any,
        optimizer: Any,
        copies: Sequence[Copy],
        config: SPPConfig,
        calibration: Iterable[Mapping[str, Any]] | None = None,
        example_inputs: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.optimizer, self.copies = model, inner_optimizer(optimizer), copies
        self.calibration = calibration
        self._inputs = example_inputs
        # What cannot be is refused before training, not when it is due.
        self.groups, self.config = prepare(model, config, calibration)
        moves_along(model, optimizer, copies, {})

    @property
    def reordering(self) -> Reordering | None:
        """From the original order to that of the model now, None if it is in its original order."""
        return total_of(self.model)

    def reorder(self, min_change: float | None = None) -> dict[str, float]:
        """Put the model in order with all that moves along; every process of a run calls it.

        Args:
            min_change: Leave the order as it is if fewer than this share of channel pairs would change places, unless
                the model is in its original order.

        Returns:
            Figures to log.
        """
        before = self.reordering
        planned = plan(self.model, self.groups, self.config, self.calibration, together=True)
        logs = {}
        if min_change is not None and before is not None:
            tau = logs["spp_kendall_tau"] = kendall_tau(planned.orders)
            if (1 - tau) / 2 < min_change:
                return logs
        witness = None
        if planned.config.verify:
            witness = Witness(self.model, self._inputs, planned.config.seed, planned.groups)
            # Inputs that were built once serve again.
            self._inputs = witness.inputs
        done = carry_out(self.model, planned, witness, partial(moves_along, self.model, self.optimizer, self.copies))
        self._settle(done if before is None else before.then(done))
        logger.info(str(done))
        for axis, count in done.summary()["axes"].items():
            logs[f"spp_moved_{axis}"] = float(count["moved"])
        if done.proof is not None:
            logs |= {"spp_max_abs_diff": done.proof.max_abs_diff, "spp_relative_diff": done.proof.relative_diff}
        return logs

    def take_up(
        self, target: Reordering | None, loaded: str | None, *, portable: bool, beside: Collection[str] = ()
    ) -> None:
        """Take up the order of weights that were loaded into the model, with an optimizer state in the same order.

        Of a model with adapters these alone were loaded; the base model is brought into their order.

        Args:
            target: The order that the model was in when it was saved, None for the original one.
            loaded: Fingerprint of what was saved, None if there is none.
            portable: Whether adapters were saved for the original base model.
            beside: Names of the plain model's tensors that were saved with the adapters.

        Raises:
            CallbackError: The model does not hold what was saved.
        """
        if tuner_layers(self.model):
            present = self.reordering
            if digest_of(present) != digest_of(target):
                self._restore(present, lambda name: not is_in_adapter_file(name, beside), backwards=True)
                self._restore(target, lambda name: not is_in_adapter_file(name, beside))
            if portable:
                self._restore(target, lambda name: is_in_adapter_file(name, beside))
        if loaded is not None and fingerprint(self.model) != loaded:
            raise CallbackError(
                f"This {type(self.model).__name__} does not hold the weights of its checkpoint, so its channels are "
                "not in the stored order: the Trainer did not load all of them. Give the Trainer the model itself, not "
                "model_init, and the callback when it is built (callbacks=[SPPCallback(...)]), with the dtype of the "
                "first run."
            )
        self._settle(target)

    def bring_along(self, target: Reordering | None, *, optimizer: bool = True) -> None:
        """Bring copies, and the optimizer's state, from the model's order to another one; the model stays as it is."""
        self._move_others(self.reordering, target, self.optimizer if optimizer else None, self.copies)

    def align_optimizer(self) -> None:
        """Bring the optimizer's state into the model's order, if it is known to be in another one."""
        if history_of(self.optimizer) is not None:
            self._move_others(total_of(self.optimizer), self.reordering, self.optimizer, ())
            remember(self.optimizer, history_of(self.model))

    def _move_others(
        self, present: Reordering | None, target: Reordering | None, optimizer: Any, copies: Sequence[Copy]
    ) -> None:
        if digest_of(present) == digest_of(target):
            return
        for one, backwards in ((present, True), (target, False)):
            if one is not None:
                indices: Indices = one.indices(self.model)
                carry(moves_along(self.model, optimizer, copies, invert_indices(indices) if backwards else indices))

    def _settle(self, reordering: Reordering | None) -> None:
        """Note the order that everything is in."""
        history = () if reordering is None else (reordering,)
        remember(self.model, history)
        if self.optimizer is not None:
            remember(self.optimizer, history)

    def _restore(self, reordering: Reordering | None, which: Callable[[str], bool], *, backwards: bool = False) -> None:
        """Move those of the live model's tensors that are named into an order or out of it."""
        if reordering is not None:
            indices: Indices = reordering.indices(self.model)
            moves = live_moves(self.model, invert_indices(indices) if backwards else indices)
            carry({name: move for name, move in moves.items() if which(name)})


def digest_of(reordering: Reordering | None) -> str | None:
    """The digest of a reordering, None for the original order."""
    return None if reordering is None else reordering.digest
