"""Strings from outside as plain Markdown text: no link, image, tag, heading or table border comes out of a name."""

import html
import json
import re
from urllib.parse import quote

# A reader of Markdown takes these for marks; underscores inside a word are none.
_MARK = re.compile(r"[\\`*\[\]<|~$]|&(?=#?\w+;)|(?<!\w)_+|_+(?!\w)")
_ENTITIES = {"\\": "&#92;", "`": "&#96;", "<": "&lt;", "&": "&amp;", "$": "&#36;"}
# What opens a heading, a quote, a list or a line at the start of a block.
_OPENING = re.compile(r"[#>]|[-+=](?![\w.])|\d{1,9}(?=[.)]$)")
# What GitHub's Markdown makes a link of without brackets.
_ADDRESS = re.compile(r"[a-z]://|www\.|@[^@]*\.|mailto:|xmpp:", re.IGNORECASE)
_WRITTEN = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)|\\([!-/:-@\[-`{-~])|&#?\w+;")


class Markdown(str):
    """Text that is Markdown already and goes into a card as it is."""

    __slots__ = ()


def plain(value: object) -> Markdown:
    """One line of plain text, also as a cell of a table, for a value from outside.

    Marks are escaped where they would mean something, addresses become code, and what cannot be printed becomes `�`.
    Markdown stays as it is.
    """
    if isinstance(value, Markdown):
        return value
    words = _words(value)
    written = [_code(word) if _ADDRESS.search(word) else _MARK.sub(_escaped, word) for word in words]
    if words and (opening := _OPENING.match(words[0])) and not _ADDRESS.search(words[0]):
        place = opening.end() if opening[0].isdigit() else 0
        written[0] = f"{written[0][:place]}\\{written[0][place:]}"
    if len(words) > 1 and not words[-1].strip("#"):
        written[-1] = f"\\{words[-1]}"
    return Markdown(" ".join(written))


def code(value: object) -> Markdown:
    """A code span on one line, also as a cell of a table; an empty string shows as two quotes."""
    return Markdown(_code(" ".join(_words(value)) or '""'))


def url(path: str) -> Markdown:
    """A relative path as the target of a link."""
    return Markdown(quote(path, safe="/"))


def literal(value: str) -> Markdown:
    """A string as Python code writes it, for a fenced block."""
    return Markdown(json.dumps(value, ensure_ascii=False))


def unescaped(text: str) -> str:
    """The string that `plain` wrote as this text."""
    return _WRITTEN.sub(_read, text)


def _words(value: object) -> list[str]:
    return ["".join(one if one.isprintable() else "�" for one in word) for word in str(value).split()]


def _code(text: str) -> str:
    # Parsers of tables disagree about a backslash before a border, so that stands outside of the code.
    return "&#92;\\|".join(_span(part) if part else "" for part in text.split("\\|"))


def _span(text: str) -> str:
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    padded = text[0] == "`" or text[-1] == "`" or text[0] == text[-1] == " "
    return fence + (f" {text} " if padded else text).replace("|", "\\|") + fence


def _escaped(mark: re.Match[str]) -> str:
    return _ENTITIES.get(mark[0]) or "".join(f"\\{one}" for one in mark[0])


def _read(written: re.Match[str]) -> str:
    if written[1]:
        inside = written[2].replace("\\|", "|")
        return inside[1:-1] if inside[0] == inside[-1] == " " and inside.strip() else inside
    return written[3] or html.unescape(written[0])
