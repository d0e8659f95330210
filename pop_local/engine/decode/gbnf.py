"""Translate llama.cpp's GBNF grammars into llguidance's Lark format.

llguidance's own converter turns strings and character classes into lexemes, and its lexer matches
the longest lexeme. The lexer therefore wrongly rejects "ab" for `"a" "b" | "ab" "c"`. This module
makes every character a lexeme and turns non-recursive grammars into regular expressions.
"""

import re
from collections.abc import Mapping
from contextlib import suppress
from graphlib import CycleError, TopologicalSorter
from itertools import chain

MAX_RULES = 10_000
_TOKEN = re.compile(
    r"(?P<rule>[\w-]+)\s*::="
    r"|(?P<name>[\w-]+)"
    r'|"(?P<text>(?:[^"\\]|\\.)*)"'
    r"|\[(?P<negated>\^?)(?P<members>(?:[^\]\\]|\\.)+)\]"
    r"|(?P<dot>\.)"
    r"|(?P<mark>[(|)])"
    r"|(?P<times>[*+?]|\{\s*\d+\s*(?:,\s*(?:\d+\s*)?)?\})"
    r"|(?P<space>(?:\s|#[^\n]*)+)",
    re.DOTALL,
)
_CHARACTER = r"\\x[0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\U[0-9a-fA-F]{8}|\\[tnr\\\"\[\]]|[^\\]"
_LETTER = re.compile(_CHARACTER, re.DOTALL)
_MEMBER = re.compile(f"({_CHARACTER})(?:-({_CHARACTER}))?", re.DOTALL)
_CONTROL = {"t": 9, "n": 10, "r": 13}


def lark_of(text: str, instead: Mapping[str, str]) -> str:
    """Translate a GBNF grammar into Lark in linear time.

    `instead` maps rule names to replacement bodies in Lark. Rules used only by replaced rules are
    dropped. Raises ValueError if the grammar is invalid or has more than MAX_RULES rules.
    """
    rules: dict[str, list[re.Match[str]]] = {}
    body: list[re.Match[str]] | None = None
    at = depth = 0
    while at < len(text):
        token = _TOKEN.match(text, at)
        if token is None:
            raise ValueError(f"invalid syntax at {text[at : at + 20]!r}")
        at = token.end()
        depth += {"(": 1, ")": -1}.get(token["mark"] or "", 0)
        if token["rule"]:
            if token["rule"] in rules or body is not None:
                raise ValueError(f"rule {token['rule']} is defined twice or nested in another rule")
            body = rules[token["rule"]] = []
        elif token["space"]:
            # A line break ends a complete rule.
            if "\n" in token["space"] and body and not depth and body[-1]["mark"] != "|":
                body = None
        elif body is None:
            raise ValueError(f"{token[0]} is not part of any rule")
        else:
            body.append(token)
    rules = {name: _looped(name, body) for name, body in rules.items()}
    named = {name: {each["name"] for each in body} - {None} for name, body in rules.items()}
    if instead:
        named |= {name: set() for name in instead.keys() & rules.keys()}
        used, more = {"root"}, {"root"}
        while more := {each for name in more for each in named.get(name, ())} - used:
            used |= more
        named = {name: named[name] for name in used if name in named}
        rules = {name: rules[name] for name in named}
    if missing := {"root"}.union(*named.values()) - rules.keys():
        raise ValueError(f"rule {min(missing)} is not defined")
    if len(rules) > MAX_RULES:
        raise ValueError(f"there are {len(rules):,} rules, but the limit is {MAX_RULES:,}")
    # Lark compiles names in capitals to regular expressions, which cannot be recursive.
    # The sorter returns a rule only after all rules that the rule refers to.
    sorter = TopologicalSorter(named | {name: {name} for name in instead.keys() & rules.keys()})
    with suppress(CycleError):
        sorter.prepare()
    flat: set[str] = set()
    while ready := sorter.get_ready():
        flat.update(ready)
        sorter.done(*ready)
    letter = "R" if flat == rules.keys() else "r"
    names = {name: f"{letter}{number}" for number, name in enumerate(rules)}
    lines = [
        f"{names[name]}: {instead.get(name) or _written(body, names)}"
        for name, body in rules.items()
    ]
    return "\n".join([f"start: {names['root']}", *lines])


def _looped(name: str, body: list[re.Match[str]]) -> list[re.Match[str]]:
    """Rewrite `r ::= a r | b` as `(a)* (b)`, because recursion slows down decoding."""
    options: list[list[re.Match[str]]] = [[]]
    depth = 0
    for token in body:
        depth += {"(": 1, ")": -1}.get(token["mark"] or "", 0)
        if token["mark"] == "|" and not depth:
            options.append([])
        else:
            options[-1].append(token)
    again = [option[:-1] for option in options if option and option[-1]["name"] == name]
    last = [option for option in options if not option or option[-1]["name"] != name]
    if not again or not last or any(t["name"] == name for t in chain(*again, *last)):
        return body
    return [*_either(again), *_TOKEN.finditer("*"), *_either(last)]


def _either(options: list[list[re.Match[str]]]) -> list[re.Match[str]]:
    opened, bar, closed = _TOKEN.finditer("(|)")
    _, *rest = chain.from_iterable([bar, *option] for option in options)
    return [opened, *rest, closed]


def _written(body: list[re.Match[str]], names: dict[str, str]) -> str:
    terms: list[str] = []
    is_empty = True
    for token in body:
        if token["mark"] and token["mark"] != "(" and is_empty:
            terms.append('""')
        if token["times"] and is_empty:
            raise ValueError(f"{token[0]} follows nothing")
        if token["name"]:
            terms.append(names[token["name"]])
        elif token["text"] is not None:
            terms.append(_literal(token["text"]))
        elif token["members"]:
            terms.append(f"/[{token['negated']}{_class(token['members'])}]/")
        else:
            terms.append(r"/(?s:.)/" if token["dot"] else re.sub(r"\s", "", token[0]))
        is_empty = token["mark"] in ("(", "|")
    return " ".join([*terms, '""'] if is_empty else terms)


def _literal(text: str) -> str:
    letters = " ".join(f"/{_code(letter)}/" for letter in _whole(_LETTER, text))
    return f"({letters})" if letters else '""'


def _class(members: str) -> str:
    pairs = (_MEMBER.fullmatch(member) for member in _whole(_MEMBER, members))
    return "".join("-".join(map(_code, filter(None, pair.groups()))) for pair in pairs if pair)


def _whole(pattern: re.Pattern[str], text: str) -> list[str]:
    """Split text into matches of `pattern`. Raises ValueError for an undefined GBNF escape."""
    matches = [match[0] for match in pattern.finditer(text)]
    if "".join(matches) != text:
        raise ValueError(f"{text!r} contains an escape that GBNF does not define")
    return matches


def _code(letter: str) -> str:
    if len(letter) > 2:
        number = int(letter[2:], 16)
    elif len(letter) == 2:
        number = _CONTROL.get(letter[1], ord(letter[1]))
    else:
        number = ord(letter)
    return f"\\x{{{number:x}}}"
