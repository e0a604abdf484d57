"""Marked sections of a card's body: found by their markers, replaced, everything else left alone."""

import re

from ..errors import CardError


def find_section(text: str, start: str, end: str) -> tuple[int, int] | None:
    """First and last place of a section with its markers, None where there is none.

    Args:
        text: Text of a card.
        start: The line that begins the section.
        end: The line that ends it.

    Raises:
        CardError: A marker is missing, repeated, or they stand in the wrong order.
    """
    starts, ends = (
        list(re.finditer(rf"^{re.escape(marker)}[ \t\r]*$", text, flags=re.MULTILINE)) for marker in (start, end)
    )
    if not starts and not ends:
        return None
    if len(starts) != 1 or len(ends) != 1 or starts[0].start() > ends[0].start():
        raise CardError(
            f"The card holds {len(starts)} lines '{start}' and {len(ends)} lines '{end}'. Accepted: none, or one of "
            "each in this order. Remove the stray ones."
        )
    return starts[0].start(), ends[0].end()


def replace_section(text: str, section: str, start: str, end: str, *, after: str | None = None) -> str:
    """Put a section in place of the one that a card has, or add it.

    Args:
        text: Text of a card.
        section: The new section, with both markers.
        start: The line that begins it.
        end: The line that ends it.
        after: A line of the card to add a new section behind, if it stands there once; otherwise it goes to the end.

    Raises:
        CardError: The markers in the card are damaged.
    """
    place = find_section(text, start, end)
    if place is not None:
        return text[: place[0]] + section + text[place[1] :]
    lines = [] if after is None else list(re.finditer(rf"^{re.escape(after)}[ \t\r]*$", text, flags=re.MULTILINE))
    if len(lines) == 1:
        return f"{text[: lines[0].end()]}\n\n{section}{text[lines[0].end() :]}"
    return f"{text.rstrip()}\n\n{section}\n"
