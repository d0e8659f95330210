"""The form of an answer that may call tools, and the tokens that it allows."""

import codecs
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from llguidance import LLTokenizer

from pop_local.engine.decode.constraint import Constraint
from pop_local.engine.decode.grammar import Grammar, GrammarError
from pop_local.engine.decode.text import Pieces

# Characters in which a trigger lies, but for those that are anchored at the beginning.
_N_TRIGGER = 512


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


class Triggered:
    """Which tokens may follow: all, until a trigger matches. See Constraint."""

    def __init__(self, tokenizer: LLTokenizer, pieces: Pieces, form: CallForm) -> None:
        self._tokenizer, self._pieces, self._form = tokenizer, pieces, form
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="ignore")
        self._text = ""
        self._has_begun = False
        self._unless_ended = np.setdiff1d(np.arange(tokenizer.vocab_size), tokenizer.eos_tokens)
        self._constraint: Constraint | None = None
        if form.grammar is not None and not form.triggers:
            self._constraint = Constraint(tokenizer, form.grammar)

    @property
    def is_calling(self) -> bool:
        """Whether a call has begun."""
        return self._constraint is not None

    def allowed(self) -> np.ndarray | None:
        """Return the ids of the tokens that may follow, in order; None for all."""
        must_go_on = self._form.must_call and not self._has_begun
        if self._constraint is None:
            return self._unless_ended if must_go_on else None
        ids = self._constraint.allowed()
        return np.setdiff1d(ids, self._tokenizer.eos_tokens) if must_go_on else ids

    def accept(self, token: int) -> None:
        """Go on after a token."""
        if self._constraint is not None:
            self._constraint.accept(token)
            self._has_begun |= bool(self._pieces[token].strip())
            return
        self._text += self._decoder.decode(self._pieces[token])
        if self._decoder.getstate()[0]:  # half a character
            return
        start = max(0, len(self._text) - _N_TRIGGER)
        for trigger in self._form.triggers:
            if match := trigger.pattern.search(self._text, start):
                self._begin(trigger.grammar(match), self._text[trigger.rest_from(match) :])
                return

    def _begin(self, grammar: Grammar, text: str) -> None:
        """A text that the grammar does not take is no call."""
        constraint = Constraint(self._tokenizer, grammar)
        try:
            for token in self._tokenizer.greedy_tokenize(text):
                constraint.accept(token)
        except GrammarError:
            return
        self._constraint = constraint
        self._has_begun = bool(text.strip())
