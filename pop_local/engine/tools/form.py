"""The form of an answer that may call tools."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pop_local.engine.decode.grammar import Grammar


@dataclass(frozen=True)
class Trigger:
    """Grammars for the rest of an answer: by the group `name` of a match, "" without one.

    The rest begins where the group `rest` does, or else the first group that matched.
    """

    pattern: re.Pattern[str]
    grammars: Mapping[str, Grammar]

    def grammar(self, match: re.Match[str]) -> Grammar:
        return self.grammars[match["name"] if "name" in self.pattern.groupindex else ""]

    def rest_from(self, match: re.Match[str]) -> int:
        if "rest" in self.pattern.groupindex:
            return match.start("rest")
        return next(start for start, _ in match.regs[1:] if start >= 0)


@dataclass(frozen=True)
class CallForm:
    """How an answer calls tools.

    `must_call`: an answer does not end before its call. `grammar` holds from the first token on if
    there are no triggers, else theirs from where they match. `shown`: special tokens that are text
    here. `native`: llama.cpp's format, None for the text form.
    """

    names: tuple[str, ...]
    must_call: bool = False
    triggers: tuple[Trigger, ...] = ()
    grammar: Grammar | None = None
    shown: frozenset[int] = frozenset()
    native: dict[str, Any] | None = field(default=None, compare=False)

    @property
    def ignored(self) -> tuple[str, ...]:
        """Keywords of the tools' schemas that are not enforced."""
        return self.grammar.ignored if self.grammar else ()
