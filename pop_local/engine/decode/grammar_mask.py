"""Use llguidance to find the token IDs that a grammar allows next."""

from collections.abc import Container
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from numpy.typing import NDArray

from pop_local.engine.decode.grammar import Grammar, GrammarError, short
from pop_local.engine.decode.grammar_child import LIMITS
from pop_local.engine.llama.vocabulary import Pieces, Vocabulary


class _TokenBytes:
    """An adapter from llama.cpp's vocabulary to llguidance's `TokenizerWrapper` interface.

    Control tokens outside `shown` have no bytes. Grammars reject them, except for end tokens.
    """

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary, ends: list[int], shown: Container[int]) -> None:
        pieces, every = Pieces(vocabulary, shown), range(vocabulary.n_tokens)
        self.tokens = [b"" if token in ends else pieces[token] for token in every]
        self.eos_token_id = ends[0]
        self.special_token_ids = ends

    def __call__(self, text: str) -> list[int]:
        raise NotImplementedError("llguidance does not tokenize text if no_forcing is set")


class TokenTries:
    """A vocabulary's token tries, which are built when first needed."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._tries: dict[frozenset[int], LLTokenizer] = {}

    def get(self, shown: frozenset[int] = frozenset()) -> LLTokenizer:
        """Return the trie for `shown`, the special tokens that appear as text in answers.

        Building a trie takes a second or more. Raises GrammarError if the model has no end token.
        """
        if shown not in self._tries:
            every = range(self._vocabulary.n_tokens)
            ends = [token for token in every if self._vocabulary.is_end(token)]
            if not ends:
                hint = "use a model with an end token"
                raise GrammarError("grammars require an end token, but the model has none", hint)
            wrapper: Any = _TokenBytes(self._vocabulary, ends, shown)
            self._tries[shown] = LLTokenizer(wrapper, eos_token=ends)
        return self._tries[shown]


class Constraint:
    """A grammar's parser state for one answer (not thread-safe).

    Raises GrammarError if the grammar exceeds llguidance's limits.
    """

    def __init__(self, tokenizer: LLTokenizer, grammar: Grammar) -> None:
        self._matcher = LLMatcher(tokenizer, grammar.text, log_level=0, limits=LIMITS)
        self._n_vocab = tokenizer.vocab_size
        self._check()

    def allowed(self) -> NDArray[np.intp]:
        """Return the IDs of the allowed tokens in ascending order.

        End tokens are allowed if the text is complete. Raises GrammarError if no token is allowed.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        tokens = np.flatnonzero(np.unpackbits(bits, count=self._n_vocab, bitorder="little"))
        if not len(tokens):
            raise GrammarError("the grammar allows no token here")
        return tokens

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = short(self._matcher.get_error())
            if reason.startswith("NoExtension"):
                raise GrammarError("the grammar allows no token here")
            raise GrammarError(f"the grammar exceeds the limits: {reason}", "simplify it")
