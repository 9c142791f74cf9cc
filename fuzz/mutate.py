"""Mutations of JSON trees, of bytes and of files, drawn by a seed."""

import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

DEEP = 3000
TEXTS = (
    "", " ", "x", "\x1b[31mred\x1b[0m", "a\nb", "\x00", "\ud800", "\u202eabc", "../../etc/passwd", "/dev/zero", "llama",
    "{layer}", "auto", "float32", "int4", "None", "a" * 300, "n" * 5000, "-1", "1e9", "é" * 80, "cuda:0",
)  # fmt: skip
NUMBERS = (
    0, 1, -1, 2, 3, 7, 64, 255, 1000, 10**5, 10**6, 10**8, 10**9, 2**31 - 1, 2**31, 2**32, 2**47, 2**63 - 1, 2**64,
    10**30, -(2**63), 0.0, 0.5, -0.5, 1e-9, 1e300, math.inf, -math.inf, math.nan,
)  # fmt: skip


def any_value(random: Random) -> Any:
    """A value that a reader may not expect."""
    kind = random.randrange(10)
    if kind < 4:
        return random.choice(NUMBERS)
    if kind < 6:
        return random.choice(TEXTS)
    if kind < 8:
        return copy.deepcopy(
            random.choice((None, True, False, [], {}, [[]], {"": None}, [1, 2], ["x"], {"x": 1}, [{}]))
        )
    if kind == 8:
        return [random.choice(NUMBERS) for _ in range(random.randrange(1, 40))]
    return {random.choice(TEXTS[:8]): any_value(random) for _ in range(random.randrange(4))}


def places(data: Any) -> list[tuple[Any, Any]]:
    """Every place of a tree where a value stands: its container and its key."""
    found: list[tuple[Any, Any]] = []
    left = [data]
    while left:
        one = left.pop()
        pairs = list(one.items()) if isinstance(one, dict) else list(enumerate(one)) if isinstance(one, list) else []
        found += [(one, key) for key, _ in pairs]
        left += [value for _, value in pairs]
    return found


def mutate_json(random: Random, data: Any, extra: Sequence[tuple[str, Sequence[Any]]] = ()) -> Any:
    """A copy of a tree with one to four changes. `extra` are keys, with values, that may be set at its top."""
    data = copy.deepcopy(data)
    for _ in range(random.choice((1, 1, 1, 2, 2, 4))):
        there = places(data)
        kind = random.randrange(12)
        if extra and kind < 4 and isinstance(data, dict):
            key, values = random.choice(extra)
            data[key] = copy.deepcopy(random.choice(values)) if values and random.random() < 0.6 else any_value(random)
        elif not there:
            data = any_value(random)
        else:
            _change(random, kind, there)
    return data if random.random() > 0.01 else any_value(random)


def _change(random: Random, kind: int, there: list[tuple[Any, Any]]) -> None:
    container, key = random.choice(there)
    if kind < 8:
        container[key] = any_value(random)
    elif kind == 8:
        del container[key]
    elif kind == 9:  # another place's value
        other, other_key = random.choice(there)
        container[key] = copy.deepcopy(other[other_key])
    elif kind == 10 and isinstance(container, list):
        container *= random.choice((2, 3, 50))
    elif kind == 10:
        container[random.choice(TEXTS)] = copy.deepcopy(container[key])
    else:  # near to what it was
        value = container[key]
        if isinstance(value, bool) or not isinstance(value, int | float):
            container[key] = [value] if random.random() < 0.5 else str(value)
        else:
            container[key] = random.choice((value + 1, value - 1, -value, value * 2, value * 1000, float(value)))


def as_json(data: Any) -> bytes:
    """The tree as JSON, with lone surrogates as escapes and with NaN as Python writes it."""
    return json.dumps(data).encode()


def mutate_bytes(random: Random, data: bytes, words: Sequence[bytes] = ()) -> bytes:
    """A copy of a file's bytes with one to four changes; `words` may be put in."""
    for _ in range(random.choice((1, 1, 2, 4))):
        at = random.randrange(len(data) + 1)
        size = random.choice((1, 1, 2, 5, 30, 300))
        kind = random.randrange(9 if words else 7)
        if kind == 0:
            data = data[:at]
        elif kind == 1:
            data = data[:at] + data[at + size :]
        elif kind == 2:
            data = data[:at] + _noise(random, min(size, 8)) + data[at + min(size, 8) :]
        elif kind == 3:
            data = data[:at] + data[at : at + size] * random.choice((2, 10, 1000)) + data[at + size :]
        elif kind == 4:
            data = data or b" "
            at = min(at, len(data) - 1)
            data = data[:at] + bytes([data[at] ^ 1 << random.randrange(7)]) + data[at + 1 :]
        elif kind == 5:
            data = data[:at] + random.choice((b"[", b"{", b'{"a":', b"(")) * DEEP + data[at:]
        elif kind == 6:
            data = data[:at] + random.choice(TEXTS).encode("utf-8", "surrogatepass") + data[at:]
        else:
            data = data[:at] + random.choice(list(words)) + data[at:]
    return data


def rewrite(path: Path, data: bytes) -> None:
    """Replace a file, which may be a link to one of the good folder's."""
    path.unlink()
    path.write_bytes(data)


def _noise(random: Random, size: int) -> bytes:
    """Bytes of any kind, or, more often, characters of ASCII: most readers refuse what is no UTF-8."""
    return random.randbytes(size) if random.random() < 0.2 else bytes(random.choices(range(32, 127), k=size))
