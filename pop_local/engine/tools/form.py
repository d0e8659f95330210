"""The form of an answer that may call tools, and the tokens that it allows."""

import codecs
import re
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
    """A grammar for the rest of an answer, from where the first group of the match begins."""

    pattern: re.Pattern[str]
    grammar: Grammar


@dataclass(frozen=True)
class CallForm:
    """How an answer calls tools.

    `grammar` holds from the first token on, the triggers' ones from where they match. `shown`:
    special tokens that are text here. `native`: llama.cpp's format, None for the text form.
    """

    names: tuple[str, ...]
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
        self._constraint: Constraint | None = None
        if form.grammar is not None and not form.triggers:
            self._constraint = Constraint(tokenizer, form.grammar)

    def allowed(self) -> np.ndarray | None:
        """Return the ids of the tokens that may follow, in order; None for all."""
        return None if self._constraint is None else self._constraint.allowed()

    def accept(self, token: int) -> None:
        """Go on after a token."""
        if self._constraint is not None:
            self._constraint.accept(token)
            return
        self._text += self._decoder.decode(self._pieces[token])
        if self._decoder.getstate()[0]:  # half a character
            return
        start = max(0, len(self._text) - _N_TRIGGER)
        for trigger in self._form.triggers:
            match = trigger.pattern.search(self._text, start)
            if match is not None:
                at = next(span[0] for span in match.regs[1:] if span[0] >= 0)
                self._begin(trigger.grammar, self._text[at:])
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
