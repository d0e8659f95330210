"""The form of an answer that may call tools."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pop_local.engine.decode.grammar import Grammar


@dataclass(frozen=True)
class Trigger:
    """A pattern that starts a grammar for the rest of an answer.

    `grammars`: by the match's group `name`, "" without one. The rest starts at the group `rest`,
    or else at the first group that matched.
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
    """The form of an answer's tool calls.

    `must_call`: the answer must not end before a call. `grammar` applies from the first token if
    there are no `triggers`. Otherwise a trigger's grammar applies from its match. `shown`: special
    tokens that are text in this form. `native`: llama.cpp's format, None for the text form.
    """

    names: tuple[str, ...]
    must_call: bool = False
    triggers: tuple[Trigger, ...] = ()
    grammar: Grammar | None = None
    shown: frozenset[int] = frozenset()
    native: dict[str, Any] | None = field(default=None, compare=False)

    @property
    def ignored(self) -> tuple[str, ...]:
        """Return keywords of the tools' schemas that are not enforced."""
        return self.grammar.ignored if self.grammar else ()
