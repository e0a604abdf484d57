"""Search for the best settings of a baseline, one setting after another."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

Settings = TypeVar("Settings", bound=Any)


def best_settings(
    start: Settings, choices: Mapping[str, Sequence[Any]], score: Callable[[Settings], float]
) -> Settings:
    """Change one setting after another while that raises the score, until none does.

    Args:
        start: A dataclass instance.
        choices: Values to try, by field, in this order.
        score: How good settings are. Settings that cannot be met raise `RuntimeError`.
    """
    known: dict[Any, float] = {}

    def scored(settings: Settings) -> float:
        if settings not in known:
            try:
                known[settings] = score(settings)
                print(f"{known[settings]:10.3f}  {settings}", flush=True)
            except RuntimeError as error:
                known[settings] = float("-inf")
                print(f"{error}  {settings}", flush=True)
        return known[settings]

    best, before = start, None
    while best != before:
        before = best
        for name, values in choices.items():
            # Of equals, the settings so far stay.
            best = max([best, *(dataclasses.replace(best, **{name: value}) for value in values)], key=scored)
    print(f"best: {best}", flush=True)
    return best
