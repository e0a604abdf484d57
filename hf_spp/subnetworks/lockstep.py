"""Running a model on many batches at once, a layer at a time: every batch waits where the next layer is called.

Each batch runs in a coroutine of its own, which a hook suspends. So what a layer reads on all of the data is known, and
the layer may be changed, before anything behind it runs.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from ..forward import run_model
from ..watch import token_mask, unpadded


class _Pass(greenlet):  # type: ignore[misc]
    """A forward pass that hooks suspend."""

    def __init__(self, model: Any, batch: Mapping[str, Any]) -> None:
        super().__init__(lambda: run_model(model, batch) and None)
        self.model, self.mask = model, token_mask(model, batch)


class SteppedRun:
    """A forward pass of a model on one batch that stops at some of its layers, inside of `stopping`.

    Args:
        model: The model, in evaluation mode.
        batch: Forward arguments.
    """

    def __init__(self, model: Any, batch: Mapping[str, Any]) -> None:
        self._model, self._batch = model, batch
        self._pass: _Pass | None = None
        self._stop = -1

    def reach(self, stop: int) -> tuple[Tensor, ...]:
        """Run on to the stop of an index: what flows there, `[tokens, features]`, without padding."""
        if self._pass is None or self._stop >= stop:
            self.close()
            self._pass, self._stop = _Pass(self._model, self._batch), -1
        while self._stop < stop:
            found: tuple[Tensor, ...] = self._pass.switch()
            self._stop += 1
        return found

    def close(self) -> None:
        """Let go of all that the pass holds; the next stop starts again."""
        if self._pass is not None and not self._pass.dead:
            self._pass.throw(GreenletExit)
        self._pass = None


@contextmanager
def stopping(model: nn.Module, paths: tuple[str, ...], *, behind: bool) -> Iterator[None]:
    """Stop runs of a model inside the block at some of its layers.

    Args:
        model: The model.
        paths: Paths of the layers.
        behind: Whether to stop behind a layer, with what it has read and written, or before it, with what it will read.
    """

    def stop(*flows: Tensor) -> None:
        current = getcurrent()
        if isinstance(current, _Pass) and current.model is model and current.parent is not None:
            current.parent.switch(tuple(unpadded(flow, current.mask) for flow in flows))

    handles = []
    for path in paths:
        layer = model.get_submodule(path)
        if behind:
            handles.append(layer.register_forward_hook(lambda _, args, output: stop(args[0], output)))
        else:
            handles.append(layer.register_forward_pre_hook(lambda _, args: stop(args[0])))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
