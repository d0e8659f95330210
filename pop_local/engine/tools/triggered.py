"""The tokens allowed next in an answer that may call tools."""

import codecs

import numpy as np
from llguidance import LLTokenizer

from pop_local.engine.decode.constraint import Constraint
from pop_local.engine.decode.grammar import Grammar, GrammarError
from pop_local.engine.llama.pieces import Pieces
from pop_local.engine.tools.form import CallForm

# Triggers are searched for in this many last characters.
_N_TRIGGER = 512


class Triggered:
    """A constraint that allows all tokens until a trigger matches. See Constraint."""

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
        """Return the allowed token ids in order, None for all."""
        must_continue = self._form.must_call and not (self._call.strip() or self._last_call)
        if self._constraint is None:
            return self._all_but_ends if must_continue else None
        ids = self._constraint.allowed()
        if must_continue:
            return np.setdiff1d(ids, self._tokenizer.eos_tokens)
        ends = np.intersect1d(ids, self._tokenizer.eos_tokens)
        if len(ends) and (call := self._call.strip()):
            if call == self._last_call:  # small models would repeat it without end
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
                self._begin(trigger.grammar(match), self._text[trigger.rest_from(match) :])
                return

    def _begin(self, grammar: Grammar, text: str) -> None:
        """Start the grammar after `text`, unless the grammar rejects that text."""
        constraint = Constraint(self._tokenizer, grammar)
        try:
            for token in self._tokenizer.greedy_tokenize(text):
                constraint.accept(token)
        except GrammarError:
            return
        self._constraint = constraint
        self._call = text.encode()
