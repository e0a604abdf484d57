"""Ways to damage a file: its bytes, or the values of the JSON in it."""

import json
import math
import random
from collections.abc import Callable
from typing import Any

DEEP = "[" * 100_000
# What stands in a file in place of a value; raw JSON, as some of it is what Python itself would not write.
# fmt: off
VALUES = [
    "null", "true", "false", "0", "-1", "1", "2", "0.5", "-0.0", "1e-400", "1e308", "1e400", "-1e400", "NaN",
    "Infinity", "-Infinity", "9" * 30, "9" * 5000, str(2**31), str(2**60), str(2**63), str(-(2**63)), "1" + "0" * 400,
    '""', '"x"', '"0"', '"\\u0000"', '"\\ud800"', '"a\\nb"', '"../../outside"', '"/outside"', '"C:\\\\outside"',
    '"<b>|`x`"', '"é模"', '"[/red]"', '"' + "y" * 10_000 + '"', "[]", "{}", "[[]]", '{"a": 1}', "[1, 2]", "[null]",
    '["a"]', "tru", "'x'", "1 2", "", "[" * 70 + "]" * 70, DEEP, '{"a":' * 5000, '{"a": 1, "a": 2}',
    "[" + "0," * 1000 + "0]",
]
# fmt: on
_MARK = "__damaged__"


def damaged_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bytes with one to three accidents: flipped, cut off, doubled, inserted, moved, or overwritten."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(data) + 1)
        # The start of a file says what the rest is.
        place = rng.randrange(min(len(data), 400) + 1) if rng.random() < 0.5 else place
        end = min(len(data), place + rng.choice([1, 2, 8, 50, 1000]))
        kind = rng.randrange(7)
        if kind == 0:
            data[place:end] = bytes(one ^ (1 << rng.randrange(8)) for one in data[place:end])
        elif kind == 1:
            del data[place:]
        elif kind == 2:
            data[place:place] = data[place:end]
        elif kind == 3:
            data[place:place] = rng.randbytes(rng.choice([1, 3, 100]))
        elif kind == 4:
            del data[place:end]
        elif kind == 5:
            data[place:end] = bytes([rng.choice([0, 0x20, 0x22, 0x2D, 0x30, 0x5B, 0x7B, 0xFF])]) * (end - place)
        else:
            data[place:place] = rng.choice(VALUES).encode()[:2000]
    return bytes(data)


def places_in(value: Any, path: tuple = ()) -> list[tuple]:
    """The path of every value in a JSON value."""
    found = [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in items:
        found += places_in(one, (*path, key))
    return found


def replaced(value: Any, path: tuple, raw: str) -> str:
    """JSON with raw text in place of one of its values."""
    return json.dumps(_with(value, path, lambda _: _MARK)).replace(f'"{_MARK}"', raw)


def damaged_json(value: Any, rng: random.Random) -> str:
    """JSON with one to two values replaced, left out, renamed, doubled, or of a neighbour."""
    for _ in range(rng.randint(1, 2)):
        places = places_in(value)
        # Places near the top decide more than one of a thousand leaves.
        path = rng.choice(sorted(places, key=len)[: rng.choice([4, 30, len(places)])])
        kind = rng.randrange(6)
        if kind == 0 and path:
            value = _with(value, path[:-1], lambda home, path=path: _without(home, path[-1]))
        elif kind == 1 and path and isinstance(path[-1], str):
            name = rng.choice(["", "x", path[-1].upper(), path[-1] + "\n", "../" + path[-1], "\x00"])
            value = _with(
                value, path[:-1], lambda home, old=path[-1], new=name: {**_without(home, old), new: home[old]}
            )
        elif kind == 2:
            other = _at(value, rng.choice(places))
            value = _with(value, path, lambda _, other=other: other)
        elif kind == 3:
            value = _with(value, path, lambda one: _nudged(one, rng))
        else:
            return replaced(value, path, rng.choice(VALUES))
    return json.dumps(value)


def _nudged(value: Any, rng: random.Random) -> Any:
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int):
        return rng.choice([value + 1, value - 1, -value, value * 2**40, float(value), str(value)])
    if isinstance(value, float):
        return rng.choice([-value, value * 1e300 if math.isfinite(value * 1e300) else 0, int(value), str(value)])
    if isinstance(value, str):
        return rng.choice([value[:-1], value + "x", value.upper(), [value], value * 3, "\t" + value])
    if isinstance(value, list):
        return rng.choice([value[1:], value[::-1], value * 2, [value], dict.fromkeys(map(str, range(len(value))), 1)])
    return rng.choice([[value], list(value.values()), {**value, "more": 1}, {}])


def _at(value: Any, path: tuple) -> Any:
    for step in path:
        value = value[step]
    return value


def _without(home: Any, step: Any) -> Any:
    if isinstance(home, dict):
        return {key: one for key, one in home.items() if key != step}
    return home[:step] + home[step + 1 :]


def _with(value: Any, path: tuple, change: Callable[[Any], Any]) -> Any:
    if not path:
        return change(value)
    step, rest = path[0], path[1:]
    if isinstance(value, dict):
        return {key: _with(one, rest, change) if key == step else one for key, one in value.items()}
    return [_with(one, rest, change) if index == step else one for index, one in enumerate(value)]


def split_tensors(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and its data."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined_tensors(header: str, data: bytes) -> bytes:
    """A safetensors file with a raw header."""
    text = header.encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def damaged_tensors(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with damaged bytes, or with a header that says something else."""
    kind = rng.randrange(4)
    if kind == 0:
        return damaged_bytes(data, rng)
    header, rest = split_tensors(data)
    if kind == 1:
        return rng.choice([2**60, 2**63, 0, 1, 100_000_001, len(data), len(data) - 8]).to_bytes(8, "little") + data[8:]
    if kind == 2:
        return joined_tensors(damaged_json(header, rng), rest)
    name = rng.choice([one for one in header if one != "__metadata__"])
    entry, (start, end) = header[name], header[name]["data_offsets"]
    size = max(end - start, 1)
    changes = [
        {"shape": [2**60]},
        {"shape": [2**31, 2**31, 4]},
        {"shape": [-1]},
        {"shape": []},
        {"shape": [*entry["shape"], 0]},
        {"shape": [0], "data_offsets": [start, start]},
        {"shape": [2**62, 0], "data_offsets": [start, start]},
        {"shape": entry["shape"][::-1]},
        {"shape": [1, *entry["shape"]]},
        {"dtype": rng.choice(["F64", "I64", "BOOL", "F4", "F8_E8M0", "F8_E4M3", "C64", "U8", "X", "f32"])},
        {"dtype": "U8", "shape": [size]},
        {"dtype": "F8_E4M3", "shape": [size]},
        {"dtype": "F4", "shape": [2 * size]},
        {"dtype": "F8_E8M0", "shape": [size]},
        {"data_offsets": [0, size]},
        {"data_offsets": [end, start]},
        {"data_offsets": [-size, 0]},
        {"data_offsets": [start, 2**63]},
        {"data_offsets": [start + 1, end + 1]},
    ]
    header[name] = {**entry, **rng.choice(changes)}
    return joined_tensors(json.dumps(header), rest)
