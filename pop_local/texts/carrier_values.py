"""Random values, names and keys of look-up documents; the two uses share none."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import numpy as np


class Use(Enum):
    """Purpose of a document: fitting and training, or measuring only."""

    FITTING = "fitting"
    HELD_OUT = "held-out"


@dataclass(frozen=True)
class Words:
    """Word lists of one use. `fields` holds the keys for each kind of value.

    Names of entities and families join a start to an end; `phone`, `date`, `amount` are formats.
    """

    nouns: tuple[str, ...]
    fields: dict[str, tuple[str, ...]]
    entity_starts: tuple[str, ...]
    entity_ends: tuple[str, ...]
    given: tuple[str, ...]
    family_starts: tuple[str, ...]
    family_ends: tuple[str, ...]
    plain: tuple[str, ...]
    roots: tuple[str, ...]
    endings: tuple[str, ...]
    phone: str
    date: str
    amount: str
    months: tuple[str, ...]


def _list(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_FITTING = Words(
    nouns=("shop", "sensor", "branch", "vessel", "account", "job"),
    fields={
        "hex": ("checksum", "session key", "commit"),
        "decimal": ("weight", "voltage", "ratio"),
        "phone": ("phone number", "hotline"),
        "e-mail": ("e-mail address", "mailbox"),
        "path": ("log file", "backup folder"),
        "identifier": ("order code", "device id"),
        "date": ("start date", "renewal date"),
        "amount": ("price", "monthly fee"),
        "name": ("owner", "manager"),
    },
    entity_starts=_list(
        "Arl Bex Cor Dal Els Far Gim Hul Ips Jar Kes Lam Mor Nor Ost Pel Rus Sal Tev Ulm"
    ),
    entity_ends=("ham", "worth", "stead", "bury", "ford", "gate", "wold", "mere"),
    given=("Anna", "Boris", "Clara", "David", "Elena", "Felix", "Greta", "Hugo", "Irene", "Jonas"),
    family_starts=("Bran", "Carl", "Dorn", "Fisch", "Gran", "Hart", "Kram", "Lind", "Mont", "Rott"),
    family_ends=("ner", "sson", "berg", "mann", "elli", "ova", "quist", "aard"),
    plain=_list(
        "amber basin cedar delta ember fable grove hazel ivory jolly kayak lemon maple nylon"
        " ocean piano quilt raven sugar tiger"
    ),
    roots=("/srv", "/home/data", "/opt/app", "C:/work"),
    endings=("csv", "bak", "json", "dat"),
    phone="+{a:02d} {b:03d} {c:03d} {d:04d}",
    date="{year:04d}-{month:02d}-{day:02d}",
    amount="EUR {whole}.{cents:02d}",
    months=(),
)
_HELD_OUT = Words(
    nouns=("station", "customer", "printer", "valley", "project", "server"),
    fields={
        "hex": ("digest", "licence token", "serial hash"),
        "decimal": ("reading", "density", "score"),
        "phone": ("telephone", "emergency line"),
        "e-mail": ("contact address", "sender"),
        "path": ("working directory", "archive"),
        "identifier": ("reference", "part number"),
        "date": ("last inspection", "deadline"),
        "amount": ("balance", "deposit"),
        "name": ("supervisor", "founder"),
    },
    entity_starts=_list(
        "Ash Bram Cob Drey Eck Fen Gor Hesk Ing Jul Kirk Los Mal Nev Ock Pry Quar Rav Sten Thir"
    ),
    entity_ends=("ley", "moor", "thwaite", "combe", "den", "wick", "brook", "hurst"),
    given=("Agnes", "Bruno", "Celia", "Dario", "Edith", "Frank", "Gwen", "Henry", "Isla", "Karl"),
    family_starts=("Ald", "Bau", "Cre", "Dev", "Ems", "Fal", "Hol", "Jen", "Kov", "Var"),
    family_ends=("ington", "ic", "strom", "aux", "etti", "wicz", "horn", "ander"),
    plain=_list(
        "arrow birch cloud dune eagle flint glass heron island jungle kettle lunar marble north"
        " orbit pearl quartz river stone tulip"
    ),
    roots=("/var/lib", "/mnt/share", "/usr/local", "D:/archive"),
    endings=("log", "xml", "tar.gz", "ini"),
    phone="({b:03d}) {c:03d}-{d:04d}",
    date="{day} {name} {year:04d}",
    amount="${whole}.{cents:02d}",
    months=_list(
        "January February March April May June July August September October November December"
    ),
)


def words(use: Use) -> Words:
    """Return the word lists of a use."""
    return {Use.FITTING: _FITTING, Use.HELD_OUT: _HELD_OUT}[use]


def entities(rng: np.random.Generator, use: Use) -> list[str]:
    """Return all names of entities, in random order."""
    lists = words(use)
    names = [start + end for start in lists.entity_starts for end in lists.entity_ends]
    return [names[i] for i in rng.permutation(len(names))]


def value(rng: np.random.Generator, kind: str, lists: Words) -> str:
    """Draw a value of a kind of `KINDS`."""
    return _MAKERS[kind](rng, lists)


def _pick(rng: np.random.Generator, items: tuple[str, ...]) -> str:
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
