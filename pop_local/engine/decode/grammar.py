"""Grammars that keep an answer to a form: GBNF, from a JSON schema too, and a safe sampler."""

import ctypes
import json
from typing import Any

import numpy as np

from converter.errors import PopError
from pop_local.engine.llama.backend import bindings

ROOT = "root"
# llama.cpp parses and expands by recursion: beyond this its stack, and the process, may end.
_MAX_CHARACTERS = 64 * 1024
_MAX_BRACKETS = 2000
_MAX_REPETITIONS = 1000
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems")
_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


class GrammarError(PopError):
    """The grammar or the JSON schema cannot be used, or leaves no token to go on with."""


def schema_grammar(schema: Any) -> str:
    """GBNF for the JSON texts of a JSON schema; numeric ranges and the like are not enforced.

    Raises GrammarError when the schema cannot be expressed.
    """
    from llama_cpp.llama_grammar import json_schema_to_gbnf

    try:
        _refuse_large_counts(schema)
        return str(json_schema_to_gbnf(json.dumps(schema)))
    except GrammarError:
        raise
    except Exception as error:  # it asserts, indexes and recurses on whatever it is given
        reason = str(error) or type(error).__name__
        raise GrammarError(f"the JSON schema cannot be turned into a grammar: {reason}") from error


def _refuse_large_counts(schema: Any) -> None:
    if isinstance(schema, dict):
        for name in _COUNTS:
            count = schema.get(name)
            if isinstance(count, (int, float)) and not 0 <= count <= _MAX_REPETITIONS:
                raise GrammarError(
                    f"the JSON schema's {name} is {count}, the highest possible is"
                    f" {_MAX_REPETITIONS}"
                )
    if isinstance(schema, (dict, list)):
        for part in schema.values() if isinstance(schema, dict) else schema:
            _refuse_large_counts(part)


def check_grammar(vocab: Any, text: str) -> None:
    """Raises GrammarError unless llama.cpp can parse it."""
    bindings().llama_sampler_free(_parsed(vocab, text, ROOT))


def _parsed(vocab: Any, text: str, root: str) -> Any:
    if len(text) > _MAX_CHARACTERS or text.count("(") > _MAX_BRACKETS:
        raise GrammarError(
            f"the grammar is too large: {len(text)} characters, {text.count('(')} brackets",
            f"at most {_MAX_CHARACTERS} and {_MAX_BRACKETS} are allowed",
        )
    sampler = None
    if text.strip() and "\0" not in text:
        sampler = bindings().llama_sampler_init_grammar(vocab, text.encode(), root.encode())
    if not sampler:
        raise GrammarError(
            "the grammar is not valid GBNF", "each rule is NAME ::= ..., the first one named root"
        )
    return sampler


class GrammarSampler:
    """Lets through what the grammar allows, then leaves the choice to a llama_cpp sampler chain.

    In llama.cpp's own chain a grammar that does not parse, or that allows no token, ends the
    process.
    """

    def __init__(self, vocab: Any, n_vocab: int, grammar: Any, chain: Any) -> None:
        self._api = bindings()
        self._chain = chain
        self._grammar = _parsed(vocab, grammar._grammar, grammar._root)
        self._candidates = np.empty(n_vocab, dtype=_CANDIDATE)
        self._ids = np.arange(n_vocab, dtype=np.int32)

    def sample(self, context: Any, row: int = -1) -> int:
        """Raises GrammarError when no token may follow."""
        n_vocab = len(self._ids)
        logits = self._api.llama_get_logits_ith(context.ctx, row)
        self._candidates["id"] = self._ids
        self._candidates["logit"] = np.ctypeslib.as_array(logits, (n_vocab,))
        self._candidates["p"] = 0
        data = self._candidates.ctypes.data_as(ctypes.POINTER(self._api.llama_token_data))
        array = self._api.llama_token_data_array(data, n_vocab, -1, False)
        self._api.llama_sampler_apply(self._grammar, ctypes.byref(array))
        if self._candidates["logit"].max() == -np.inf:
            raise GrammarError("the grammar allows no token here")
        self._api.llama_sampler_apply(self._chain.sampler, ctypes.byref(array))
        token = int(array.data[array.selected].id)
        self._api.llama_sampler_accept(self._grammar, token)
        self._api.llama_sampler_accept(self._chain.sampler, token)
        return token

    def close(self) -> None:
        if self._grammar is not None:
            self._api.llama_sampler_free(self._grammar)
            self._grammar = None

    def __del__(self) -> None:
        # Also after a failed __init__.
        if hasattr(self, "_grammar"):
            self.close()
