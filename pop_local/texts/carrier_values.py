"""Draw random values, names and keys for look-up documents, from different words for each use."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path

import numpy as np


class Use(Enum):
    """The purpose of a document: fitting and training, or measurement only."""

    FITTING = "fitting"
    HELD_OUT = "held-out"


@dataclass(frozen=True)
class Words:
    """The word lists for the documents of one use.

    `fields` maps each kind of value to field names. The names of entities and families are joined
    from a start and an end. `phone`, `date` and `amount` are format strings.
    """

    nouns: list[str]
    fields: dict[str, list[str]]
    entity_starts: list[str]
    entity_ends: list[str]
    given: list[str]
    family_starts: list[str]
    family_ends: list[str]
    plain: list[str]
    roots: list[str]
    endings: list[str]
    phone: str
    date: str
    amount: str
    months: list[str]


@cache
def words(use: Use) -> Words:
    """Read the word lists for one use from carrier_words.json."""
    text = Path(__file__).with_name("carrier_words.json").read_text("utf-8")
    return Words(**json.loads(text)[use.value])


def entities(rng: np.random.Generator, use: Use) -> list[str]:
    """Return all entity names in random order."""
    lists = words(use)
    names = [start + end for start in lists.entity_starts for end in lists.entity_ends]
    return [names[i] for i in rng.permutation(len(names))]


def value(rng: np.random.Generator, kind: str, lists: Words) -> str:
    """Draw a random value of the given kind, one of `KINDS`."""
    return _MAKERS[kind](rng, lists)


def _pick(rng: np.random.Generator, items: Sequence[str]) -> str:
    return items[int(rng.integers(len(items)))]


def _hex(rng: np.random.Generator, _lists: Words) -> str:
    return "".join("0123456789abcdef"[i] for i in rng.integers(16, size=16))


def _decimal(rng: np.random.Generator, _lists: Words) -> str:
    return f"{rng.integers(10, 1000)}.{rng.integers(10000):04d}"


def _phone(rng: np.random.Generator, lists: Words) -> str:
    a, b, c, d = (int(rng.integers(10 ** (n - 1), 10**n)) for n in (2, 3, 3, 4))
    return lists.phone.format(a=a, b=b, c=c, d=d)


def _email(rng: np.random.Generator, lists: Words) -> str:
    user = f"{_pick(rng, lists.given)}.{_family(rng, lists)}".lower()
    return f"{user}{rng.integers(100)}@{_pick(rng, lists.plain)}-{_pick(rng, lists.plain)}.example"


def _path(rng: np.random.Generator, lists: Words) -> str:
    folders = "/".join(_pick(rng, lists.plain) for _ in range(2))
    name = f"{_pick(rng, lists.plain)}_{rng.integers(1000):03d}.{_pick(rng, lists.endings)}"
    return f"{_pick(rng, lists.roots)}/{folders}/{name}"


def _identifier(rng: np.random.Generator, _lists: Words) -> str:
    letters = "".join("ABCDEFGHJKLMNPQRSTUVWXYZ"[i] for i in rng.integers(24, size=5))
    return f"{letters[:3]}-{rng.integers(10000):04d}-{letters[3:]}{rng.integers(10)}"


def _date(rng: np.random.Generator, lists: Words) -> str:
    year, month, day = rng.integers(1900, 2060), rng.integers(1, 13), rng.integers(1, 29)
    name = lists.months[month - 1] if lists.months else ""
    return lists.date.format(year=year, month=month, day=day, name=name)


def _amount(rng: np.random.Generator, lists: Words) -> str:
    return lists.amount.format(whole=rng.integers(100, 100000), cents=rng.integers(100))


def _family(rng: np.random.Generator, lists: Words) -> str:
    return _pick(rng, lists.family_starts) + _pick(rng, lists.family_ends)


def _name(rng: np.random.Generator, lists: Words) -> str:
    return f"{_pick(rng, lists.given)} {_family(rng, lists)}"


_MAKERS: dict[str, Callable[[np.random.Generator, Words], str]] = {
    "hex": _hex,
    "decimal": _decimal,
    "phone": _phone,
    "e-mail": _email,
    "path": _path,
    "identifier": _identifier,
    "date": _date,
    "amount": _amount,
    "name": _name,
}
KINDS = tuple(_MAKERS)
