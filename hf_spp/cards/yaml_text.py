"""YAML from outside, read with bounds, and plain values written as YAML."""

from collections import Counter
from typing import Any

import yaml

from ..errors import CardError

# The largest headers are model-indexes of benchmark suites, some hundred kilobytes.
_LARGEST = 1 << 20
_DEEPEST = 50
_MOST_NODES = 1 << 17
_LONGEST_NUMBER = 400
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """A loader of plain types that refuses what is too deep, grows by its aliases, or names a key twice."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._nodes = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if id(node) not in self._sizes:
                raise yaml.YAMLError("an alias stands inside of what it names")
            self._nodes += self._sizes[id(node)]
        else:
            before = self._nodes
            self._nodes, self._depth = before + 1, self._depth + 1
            if self._depth > _DEEPEST:
                raise yaml.YAMLError(f"it is nested more than {_DEEPEST} levels deep")
            node = super().compose_node(parent, index)
            self._depth -= 1
            self._sizes[id(node)] = self._nodes - before
        if self._nodes > _MOST_NODES:
            raise yaml.YAMLError(f"it holds more than {_MOST_NODES:,} values")
        if node.tag in _NUMBERS and len(node.value) > _LONGEST_NUMBER:
            raise yaml.YAMLError(f"a number has {len(node.value):,} characters")
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        names = Counter((key.tag, key.value) for key, _ in node.value if isinstance(key.value, str))
        for (tag, name), count in names.items():
            if count > 1 and tag != "tag:yaml.org,2002:merge":
                raise yaml.YAMLError(f"the key {name!r} stands there {count} times")
        return super().construct_mapping(node, deep)


def read_yaml(text: str) -> Any:
    """The value of one YAML document, in plain types.

    Raises:
        CardError: It is no YAML, or larger, deeper or of more aliases than a card needs.
    """
    if len(text) > _LARGEST:
        raise CardError(f"it has {len(text):,} characters, more than {_LARGEST:,}")
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # All but the first are what PyYAML raises where a tag such as `!!int` stands before something else.
        raise CardError(" ".join(str(error).split()) or type(error).__name__) from error


def write_yaml(value: Any) -> str:
    """Plain types as YAML, in the order that they have."""
    return str(yaml.dump(value, Dumper=yaml.SafeDumper, sort_keys=False, allow_unicode=True)).strip()
