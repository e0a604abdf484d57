"""What a `Trainer` pushes: weights with their own orders, a card that keeps what this package says, and sums."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import Trainer

from . import checkpoint
from .cards.card_header import CARD_NAME
from .cards.published_card import carry_over
from .cards.width_section import keep_widths
from .orders_file import ORDERS_NAME
from .saving import replacing_checkpoint
from .sums import files_of, write_list, write_sums

# What Trainer copies from a checkpoint into the folder that it pushes, and what belongs to it.
_COPIED = ("model", "config.json", "generation_config.json", "spp_")


def calling_trainer() -> Trainer | None:
    """The Trainer that is calling a callback, which it does not hand over."""
    frame = inspect.currentframe()
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), Trainer):
            trainer: Trainer = frame.f_locals["self"]
            return trainer
        frame = frame.f_back
    return None


def prepare_push(trainer: Trainer, saved: Path, render: Callable[[], str | None]) -> None:
    """Make what a Trainer is about to push from its output folder whole.

    It pushes in the background, so files may only change once that has ended.

    Args:
        trainer: The Trainer.
        saved: The checkpoint that it is about to copy into its output folder, if it is.
        render: Gives this package's card, None where there is nothing to say.
    """
    running = getattr(trainer, "push_in_progress", None)
    if running is not None:
        running.wait_until_done()
    if (saved / ORDERS_NAME).is_file():
        files = {name: path for name, path in files_of(saved).items() if name.startswith(_COPIED)}
        with replacing_checkpoint(str(trainer.args.output_dir)) as folder:
            checkpoint.copy_missing(files, folder)
            # The card is not final yet.
            write_list(folder, {name: checkpoint.sha256_of(path) for name, path in files.items()})
    vars(trainer)["create_model_card"] = CompletedCard(trainer, render)


class CompletedCard:
    """The `create_model_card` of a Trainer, which then writes what this package says into the card, and the sums.

    Args:
        trainer: The Trainer.
        render: Gives this package's card, None where there is nothing to say.
    """

    def __init__(self, trainer: Trainer, render: Callable[[], str | None]) -> None:
        self.trainer, self.render = trainer, render

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Write the card; arguments are those of Trainer's own method."""
        folder = Path(str(self.trainer.args.output_dir))
        path = folder / CARD_NAME
        earlier = checkpoint.read_text(path) if path.is_file() else ""
        Trainer.create_model_card(self.trainer, *args, **kwargs)
        ours = self.render()
        if ours is not None and path.is_file():
            checkpoint.write_text(path, carry_over(keep_widths(ours, earlier), checkpoint.read_text(path)))
        if (folder / ORDERS_NAME).is_file():
            write_sums(folder)
