"""Damage copies of valid data, reproducibly by seed."""

import json
import random
import struct
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

_INTERESTING = (0, 1, 127, 128, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)
_JSON_VALUES: tuple[Any, ...] = (
    *(None, True, -1, 2**31, 2**63, 10**400, 1e308, float("nan"), float("inf")),
    *("", "x" * 5000, "\ud800", "\0", "../../x", [], {}, [[]], {"": None}),
)


_KINDS = range(6)
# Kinds that do not move the bytes after them.
IN_PLACE = (0, 1, 2, 5)


def mutated_bytes(
    rng: random.Random, content: bytes, start: int, end: int, kinds: Sequence[int] = _KINDS
) -> bytes:
    """Change, insert or remove some bytes between `start` and `end`."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        at = rng.randrange(start, max(start + 1, min(end, len(changed))))
        kind = rng.choice(kinds)
        if kind == 0:
            changed[at : at + 1] = rng.randbytes(1)
        elif kind == 1:
            changed[at : at + 4] = struct.pack("<I", rng.choice(_INTERESTING) % 2**32)
        elif kind == 2:
            changed[at : at + 8] = struct.pack("<Q", rng.choice(_INTERESTING))
        elif kind == 3:
            del changed[at : at + rng.choice((1, 4, 8, 100))]
        elif kind == 4:
            changed[at:at] = changed[at : at + rng.choice((1, 4, 8, 100))]
        else:
            changed[at : at + 8] = struct.pack("<d", rng.choice((float("nan"), float("inf"), -1.0)))
    return bytes(changed)


def mutated_json(rng: random.Random, value: Any) -> Any:
    """Change or remove some nested values."""
    copied = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = copied
        while True:
            places = list(at) if isinstance(at, dict) else range(len(at))
            if not places:
                break
            place = rng.choice(places)
            if isinstance(at[place], dict | list) and at[place] and rng.random() < 0.8:
                at = at[place]
                continue
            if rng.random() < 0.2:
                del at[place]
            else:
                at[place] = deepcopy(rng.choice(_JSON_VALUES))
            break
    return copied
