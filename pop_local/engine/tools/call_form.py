"""The format of an answer that may call tools, and the constraint that enforces it."""

import codecs
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from llguidance import LLTokenizer

from pop_local.engine.decode.grammar import Grammar, GrammarError
from pop_local.engine.decode.grammar_mask import Constraint
from pop_local.engine.llama.vocabulary import Pieces
from pop_local.engine.tools.tool import Tool

# Triggers are searched for in this many characters at the end of the text.
_N_TRIGGER = 512


@dataclass(frozen=True)
class Trigger:
    """A pattern that activates a grammar for the rest of an answer.

    `grammars` maps each possible match of the group `name` to a grammar. If the pattern has no such
    group, the key is "". The grammar applies from the start of the `rest` group. If that group does
    not exist, the grammar applies from the start of the first matched group.
    """

    pattern: re.Pattern[str]
    grammars: Mapping[str, Grammar]


@dataclass(frozen=True)
class CallForm:
    """The format of an answer's tool calls.

    `tools`: tools that the model may call. `must_call`: whether the answer must contain a call.
    `triggers`: patterns that activate a grammar when they match the answer. Without triggers,
    `grammar` applies from the first token. `shown`: special tokens that appear as text in the
    format. `native`: llama.cpp's format for the calls, or None if the calls are plain text.
    """

    tools: tuple[Tool, ...]
    must_call: bool = False
    triggers: tuple[Trigger, ...] = ()
    grammar: Grammar | None = None
    shown: frozenset[int] = frozenset()
    native: dict[str, Any] | None = field(default=None, compare=False)

    @property
    def ignored(self) -> tuple[str, ...]:
        """Return the schema keywords that the grammar ignores."""
        return self.grammar.ignored if self.grammar else ()


class CallConstraint:
    """A constraint that allows all tokens until a trigger matches. It is not thread-safe."""

    def __init__(self, tokenizer: LLTokenizer, pieces: Pieces, form: CallForm) -> None:
        self._tokenizer, self._pieces, self._form = tokenizer, pieces, form
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="ignore")
        self._text = ""
        self._call = self._last_call = b""
        self._all_but_ends = np.setdiff1d(np.arange(tokenizer.vocab_size), tokenizer.eos_tokens)
        self._constraint: Constraint | None = None
        if form.grammar is not None and not form.triggers:
            self._constraint = Constraint(tokenizer, form.grammar)

    @property
    def is_calling(self) -> bool:
        return self._constraint is not None

    def allowed(self) -> np.ndarray | None:
        """Return the allowed token IDs in ascending order, or None if all tokens are allowed."""
        must_continue = self._form.must_call and not (self._call.strip() or self._last_call)
        if self._constraint is None:
            return self._all_but_ends if must_continue else None
        ids = self._constraint.allowed()
        if must_continue:
            return np.setdiff1d(ids, self._tokenizer.eos_tokens)
        ends = np.intersect1d(ids, self._tokenizer.eos_tokens)
        if len(ends) and (call := self._call.strip()):
            if call == self._last_call:  # small models would repeat the call forever
                return ends
            self._call, self._last_call = b"", call
        return ids

    def accept(self, token: int) -> None:
        if self._constraint is not None:
            self._constraint.accept(token)
            self._call += self._pieces[token]
            return
        self._text += self._decoder.decode(self._pieces[token])
        if self._decoder.getstate()[0]:  # an incomplete character
            return
        start = max(0, len(self._text) - _N_TRIGGER)
        for trigger in self._form.triggers:
            if match := trigger.pattern.search(self._text, start):
                groups = match.groupdict()
                matched = (at for at, _ in match.regs[1:] if at >= 0)
                rest_from = match.start("rest") if "rest" in groups else next(matched)
                self._begin(trigger.grammars[groups.get("name", "")], self._text[rest_from:])
                return

    def _begin(self, grammar: Grammar, text: str) -> None:
        """If the grammar accepts `text`, apply the grammar to the answer from `text` onward."""
        constraint = Constraint(self._tokenizer, grammar)
        try:
            for token in self._tokenizer.greedy_tokenize(text):
                constraint.accept(token)
        except GrammarError:
            return
        self._constraint = constraint
        self._call = text.encode()
