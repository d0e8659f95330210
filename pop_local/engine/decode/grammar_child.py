"""The process in which grammars are worked on: they may take all memory and never end.

`root ::= "a" root "b" | "a" root "c"` doubles llama.cpp's stacks with each token: no look at a text
tells what it will take.
"""

import base64
import ctypes
import json
from contextlib import suppress
from typing import Any

import numpy as np

from pop_local.base.errors import PopError
from pop_local.engine.limited.child import serve
from pop_local.engine.llama.backend import bindings

CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


class Work:
    """What can be asked for: a method, arguments and results that JSON knows."""

    def __init__(self, model_path: str) -> None:
        self._api = bindings()
        options = self._api.llama_model_default_params()
        options.vocab_only, options.n_gpu_layers = True, 0
        model = self._api.llama_model_load_from_file(model_path.encode(), options)
        if not model:
            raise SystemExit(1)
        self._vocab = self._api.llama_model_get_vocab(model)
        self._candidates = np.zeros(self._api.llama_vocab_n_tokens(self._vocab), CANDIDATE)
        self._grammar: Any = None

    def of_schema(self, schema: str) -> str:
        from pop_local.engine.decode.gbnf import gbnf_of

        try:
            return gbnf_of(json.loads(schema))
        except Exception as error:  # it asserts, indexes and recurses on whatever it is given
            reason = str(error) or type(error).__name__
            raise PopError(f"the JSON schema cannot be turned into a grammar: {reason}") from error

    def start(self, text: str, root: str) -> None:
        if self._grammar is not None:
            self._api.llama_sampler_free(self._grammar)
        self._grammar = None
        with suppress(UnicodeEncodeError):
            grammar, start = text.encode(), root.encode()
            if text.strip() and "\0" not in text:
                self._grammar = self._api.llama_sampler_init_grammar(self._vocab, grammar, start)
        if not self._grammar:
            raise PopError(
                "the grammar is not valid GBNF",
                "each rule is NAME ::= ..., the first one named root",
            )

    def allowed(self, after: int | None) -> str:
        """A bit for each token, in base64: whether it may follow the token `after`."""
        if after is not None:
            self._api.llama_sampler_accept(self._grammar, after)
        n_vocab = len(self._candidates)
        self._candidates["id"], self._candidates["logit"] = np.arange(n_vocab), 0
        data = self._candidates.ctypes.data_as(ctypes.POINTER(self._api.llama_token_data))
        array = self._api.llama_token_data_array(data, n_vocab, -1, False)
        self._api.llama_sampler_apply(self._grammar, ctypes.byref(array))
        bits = np.packbits(self._candidates["logit"] == 0)
        return base64.b64encode(bits.tobytes()).decode()


def main(model_path: str, limit_s: float, limit_bytes: int) -> None:
    """Answer calls of Work until standard input is closed."""
    serve(Work(model_path), limit_s, limit_bytes)
