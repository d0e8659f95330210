"""Draw random values for look-up documents. Fitting and measurement use separate word lists."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path

import numpy as np

KINDS = ("hex", "decimal", "phone", "e-mail", "path", "identifier", "date", "amount", "name")


class Use(Enum):
    """The purpose of a document: fitting and training, or only measurement."""

    FITTING = "fitting"
    HELD_OUT = "held-out"


@dataclass(frozen=True)
class Words:
    """The word lists for documents with one purpose.

    `fields` maps each kind of value to field names. Each entity name and family name is built from
    a random prefix and a random suffix. `phone`, `date` and `amount` are format strings.
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
    """Return the word lists for the given use, from carrier_words.json."""
    text = Path(__file__).with_name("carrier_words.json").read_text("utf-8")
    return Words(**json.loads(text)[use.value])


def value(rng: np.random.Generator, kind: str, lists: Words) -> str:
    """Draw a random value. `kind` is one of `KINDS`."""

    def pick(items: Sequence[str]) -> str:
        return items[int(rng.integers(len(items)))]

    def characters(alphabet: str, n: int) -> str:
        return "".join(alphabet[i] for i in rng.integers(len(alphabet), size=n))

    match kind:
        case "hex":
            return characters("0123456789abcdef", 16)
        case "decimal":
            return f"{rng.integers(10, 1000)}.{rng.integers(10000):04d}"
        case "phone":
            a, b, c, d = (int(rng.integers(10 ** (n - 1), 10**n)) for n in (2, 3, 3, 4))
            return lists.phone.format(a=a, b=b, c=c, d=d)
        case "e-mail":
            user = f"{pick(lists.given)}.{pick(lists.family_starts)}{pick(lists.family_ends)}"
            host = f"{rng.integers(100)}@{pick(lists.plain)}-{pick(lists.plain)}.example"
            return user.lower() + host
        case "path":
            folders = f"{pick(lists.plain)}/{pick(lists.plain)}"
            name = f"{pick(lists.plain)}_{rng.integers(1000):03d}.{pick(lists.endings)}"
            return f"{pick(lists.roots)}/{folders}/{name}"
        case "identifier":
            letters = characters("ABCDEFGHJKLMNPQRSTUVWXYZ", 5)
            return f"{letters[:3]}-{rng.integers(10000):04d}-{letters[3:]}{rng.integers(10)}"
        case "date":
            year, month, day = rng.integers(1900, 2060), rng.integers(1, 13), rng.integers(1, 29)
            name = lists.months[month - 1] if lists.months else ""
            return lists.date.format(year=year, month=month, day=day, name=name)
        case "amount":
            whole, cents = rng.integers(100, 100000), rng.integers(100)
            return lists.amount.format(whole=whole, cents=cents)
    return f"{pick(lists.given)} {pick(lists.family_starts)}{pick(lists.family_ends)}"
