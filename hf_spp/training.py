"""A model in training and all that moves with it: its optimizer's state, its adapters, copies of its weights.

The callback decides when; here is how.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.utils import logging

from .apply import Indices, Move, Moves, carry, invert_indices, live_moves
from .channels import ChannelMap
from .config import SPPConfig
from .errors import CallbackError
from .optimizers import inner_optimizer, optimizer_moves
from .permutation import kendall_tau
from .proof import Witness
from .reordering import Reordering, history_of, is_in_order, remember
from .saving import fingerprint, is_saved_with_adapter
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
    named = dict(inner_model(model).named_parameters())
    if not isinstance(copy, Mapping):
        trained = {name: one for name, one in named.items() if one.requires_grad}
        names = tuple(named if len(copy) == len(named) else trained)
        copy = dict(zip(names, copy, strict=len(copy) == len(names)))
    # A state dict of the model around this one has its names with a prefix.
    copy = {name.removeprefix("module.").removeprefix("base_model.model."): one for name, one in copy.items()}
    if wrong := [name for name, one in copy.items() if name not in named or one.shape != named[name].shape]:
        raise CallbackError(
            f"The registered copy holds {wrong[0]!r} {list(copy[wrong[0]].shape)}, which is no parameter of the "
            f"{type(model).__name__} in training, or has another shape there. Register a copy of the model, a dict of "
            "tensors by parameter name, or a list of tensors in the order of model.parameters()."
        )
    return {name: (copy[name], dims) for name, (_, dims) in live_moves(model, indices).items() if name in copy}


class LiveModel:
    """A model in training, and the way that it has come from its original order.

    Args:
        model: The model, plain, PEFT's or sharded.
        optimizer: The optimizer that trains it, or accelerate's wrapper; None if its state is not to move.
        copies: Copies of its weights.
        example_inputs: Forward arguments for proofs; None builds them from the model's config.
        reordering: What it went through already, None if nothing.
    """

    def __init__(
        self,
        model: Any,
        optimizer: Any,
        copies: Sequence[Copy] = (),
        *,
        example_inputs: Mapping[str, Any] | None = None,
        reordering: Reordering | None = None,
    ) -> None:
        self.model, self.optimizer, self.copies = model, optimizer, copies
        self.reordering = reordering
        self._inputs = example_inputs
        self._prepared: tuple[ChannelMap, SPPConfig] | None = None
        # Copies of other models are refused before training.
        moves_along(model, optimizer, copies, {})

    def reorder(
        self, config: SPPConfig, calibration: Iterable[Mapping[str, Any]] | None = None, min_change: float | None = None
    ) -> dict[str, float]:
        """Put the model in order with all that moves along; every process of a run calls it.

        Args:
            config: What to reorder and how.
            calibration: Dict batches for the metrics that need them.
            min_change: Leave the order as it is if fewer than this share of channel pairs would change places, unless
                it is the first.

        Returns:
            Figures to log.
        """
        if self._prepared is None:
            self._prepared = prepare(self.model, config, calibration)
        groups, settled = self._prepared
        planned = plan(self.model, groups, settled, calibration, together=True)
        logs = {}
        if min_change is not None and self.reordering is not None:
            tau = logs["spp_kendall_tau"] = kendall_tau(planned.orders)
            if (1 - tau) / 2 < min_change:
                return logs
        witness = None
        if planned.config.verify:
            witness = Witness(self.model, self._inputs, planned.config.seed, planned.groups)
            # Inputs that were built once serve again.
            self._inputs = witness.inputs
        done = carry_out(self.model, planned, witness, partial(moves_along, self.model, self.optimizer, self.copies))
        total, history = done, history_of(self.model) or ()
        if self.reordering is not None:
            total, history = self.reordering.then(done), history[:-1]
        self._settle(total, history[:-1])
        logger.info(str(done))
        for axis, count in done.summary()["axes"].items():
            logs[f"spp_moved_{axis}"] = float(count["moved"])
        if done.proof is not None:
            logs |= {"spp_max_abs_diff": done.proof.max_abs_diff, "spp_relative_diff": done.proof.relative_diff}
        return logs

    def take_up(self, target: Reordering | None, loaded: str | None, *, portable: bool) -> None:
        """Take up the order of weights that were loaded into the model, with an optimizer state in the same order.

        Of a model with adapters these alone were loaded; the base model is brought into their order.

        Args:
            target: The order of what was loaded, None for the original one.
            loaded: Fingerprint of the whole model as it was saved, None if there is none.
            portable: Whether adapters were saved for the original base model.

        Raises:
            CallbackError: The model does not hold what was saved.
        """
        if tuner_layers(self.model):
            self._bring_base(target)
            if portable and target is not None:
                self._restore(target, adapters=True)
        if loaded is not None and fingerprint(self.model) != loaded:
            raise CallbackError(
                f"This {type(self.model).__name__} does not hold the weights of its checkpoint, so its channels are "
                "not in the stored order: the Trainer did not load all of them. Pass the callback when the Trainer is "
                "built (callbacks=[SPPCallback(...)]), and the same dtype and base model as in the first run."
            )
        self._settle(target, ())

    def bring_along(self, target: Reordering | None) -> None:
        """Bring the optimizer's state and copies from the present order to another one; the model stays as it is."""
        if digest_of(self.reordering) == digest_of(target):
            return
        for one, backwards in ((self.reordering, True), (target, False)):
            if one is not None:
                indices: Indices = one.indices(self.model)
                indices = invert_indices(indices) if backwards else indices
                carry(moves_along(self.model, self.optimizer, self.copies, indices))

    def _settle(self, reordering: Reordering | None, before: tuple[str, ...]) -> None:
        """Note the order that everything is in."""
        self.reordering = reordering
        history = before if reordering is None else (*before, reordering.digest)
        remember(self.model, history)
        if self.optimizer is not None:
            remember(inner_optimizer(self.optimizer), history)

    def _bring_base(self, target: Reordering | None) -> None:
        """Bring the base model of adapters from the order that it is in to another one."""
        history = history_of(self.model) or ()
        if history and (self.reordering is None or not is_in_order(self.model, self.reordering)):
            if target is not None and is_in_order(self.model, target):
                return
            raise CallbackError(
                f"The base model of the adapters, a {type(inner_model(self.model)).__name__}, is in an order that this "
                "callback did not make. Load the base model again."
            )
        present = self.reordering if history else None
        if digest_of(present) == digest_of(target):
            return
        if present is not None:
            self._restore(present, adapters=False, backwards=True)
        if target is not None:
            self._restore(target, adapters=False)

    def _restore(self, reordering: Reordering, *, adapters: bool, backwards: bool = False) -> None:
        """Move the adapters alone, or the base model alone, into an order or out of it."""
        indices: Indices = reordering.indices(self.model)
        moves = live_moves(self.model, invert_indices(indices) if backwards else indices)
        carry({name: move for name, move in moves.items() if is_saved_with_adapter(name) == adapters})


def digest_of(reordering: Reordering | None) -> str | None:
    """The digest of a reordering, None for the original order."""
    return None if reordering is None else reordering.digest
