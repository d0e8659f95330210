"""Grammars that keep an answer to a form: GBNF, from a JSON schema too, and a safe sampler."""

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from pop_local.base.errors import PopError
from pop_local.engine.decode import grammar_child
from pop_local.engine.limited.process import BeyondLimitsError, LimitedProcess, RefusedError

ROOT = "root"
# A stopping server waits for a call to end, but not long.
LIMIT_S = 3
LIMIT_BYTES = 512 * 2**20
# llama.cpp parses and expands by recursion: beyond this its stack, and the process, may end.
_MAX_CHARACTERS = 64 * 1024
_MAX_BRACKETS = 2000
_MAX_REPETITIONS = 1000
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems")
_REPEATED = re.compile(r"[{,]\s*0*(\d+)\s*(?=[,}])")
_MAX_IDLE = 2


class GrammarError(PopError):
    """The grammar or the JSON schema cannot be used, or leaves no token to go on with."""


class Grammars:
    """The grammars of one model, worked on in child processes with limits on time and memory.

    A child begins with the first grammar and loads the vocabulary, which takes about a second; it
    serves one grammar at a time, and the next one after it. May be used from several threads.
    """

    def __init__(
        self, model_path: str, limit_s: float = LIMIT_S, limit_bytes: int = LIMIT_BYTES
    ) -> None:
        """The limits are those of one call; only Linux keeps to that on memory."""
        self._model_path = model_path
        self._limit_s, self._limit_bytes = limit_s, limit_bytes
        self._idle: list[_Child] = []
        self._lock = threading.Lock()

    def of_schema(self, schema: Any) -> str:
        """GBNF for the JSON texts of a JSON schema.

        Of bounds of numbers only short ranges of integers are kept to; multipleOf, uniqueItems, not
        and the like are not. An object has the properties that are named, in that order.

        Raises GrammarError when the schema cannot be expressed.
        """
        try:
            _refuse_large_counts(schema)
            written = json.dumps(schema)
        except (RecursionError, TypeError, ValueError) as error:
            raise GrammarError(
                f"the JSON schema is not JSON, or nested too deeply: {error}"
            ) from error
        with self._borrowed() as child:
            text: str = child.call("of_schema", written)
            return text

    def check(self, text: str) -> None:
        """Raises GrammarError unless llama.cpp can parse it, and tell which tokens may begin."""
        _refuse_large(text)
        with self._borrowed() as child:
            child.call("start", text, ROOT)
            child.call("allowed", None)

    @contextmanager
    def _borrowed(self) -> Iterator["_Child"]:
        child = self.take()
        try:
            yield child
        finally:
            self.give_back(child)

    def take(self) -> "_Child":
        """A process for one grammar, to be given back."""
        with self._lock:
            while self._idle:
                child = self._idle.pop()
                if child.is_alive:
                    return child
                child.close()
        return _Child(
            grammar_child.__name__,
            self._model_path,
            limit_s=self._limit_s,
            limit_bytes=self._limit_bytes,
        )

    def give_back(self, child: "_Child") -> None:
        with self._lock:
            if child.is_alive and len(self._idle) < _MAX_IDLE:
                self._idle.append(child)
                return
        child.close()

    def close(self) -> None:
        """End the processes that nobody uses; one in use ends when it is given back, or with us."""
        with self._lock:
            idle, self._idle = self._idle, []
        for child in idle:
            child.close()


class _Child(LimitedProcess):
    """A process of grammar_child; what it says becomes GrammarErrors."""

    def call(self, name: str, *arguments: Any) -> Any:
        try:
            return super().call(name, *arguments)
        except RefusedError as error:
            raise GrammarError(error.message, error.hint) from error
        except BeyondLimitsError as error:
            raise GrammarError(
                f"the grammar takes {self.limits}",
                "parts that may be empty, or that begin alike, multiply: write fewer of them",
            ) from error


def _refuse_large_counts(schema: Any) -> None:
    if isinstance(schema, dict):
        counts = [(name, schema.get(name)) for name in _COUNTS]
        pattern = schema.get("pattern")
        if isinstance(pattern, str):
            counts += [("pattern", int(count[:9])) for count in _REPEATED.findall(pattern)]
        for name, count in counts:
            if isinstance(count, (int, float)) and not 0 <= count <= _MAX_REPETITIONS:
                raise GrammarError(
                    f"the JSON schema's {name} asks for {count} repetitions, the highest possible"
                    f" is {_MAX_REPETITIONS}"
                )
    if isinstance(schema, (dict, list)):
        for part in schema.values() if isinstance(schema, dict) else schema:
            _refuse_large_counts(part)


def _refuse_large(text: str) -> None:
    if len(text) > _MAX_CHARACTERS or text.count("(") > _MAX_BRACKETS:
        raise GrammarError(
            f"the grammar is too large: {len(text)} characters, {text.count('(')} brackets",
            f"at most {_MAX_CHARACTERS} and {_MAX_BRACKETS} are allowed",
        )


class GrammarConstraint:
    """Which tokens a GBNF grammar allows, by llama.cpp's own code in a child process.

    In llama.cpp's own chain a grammar that does not parse, or that allows no token, ends the
    process.
    """

    def __init__(self, grammars: Grammars, n_vocab: int, grammar: str) -> None:
        _refuse_large(grammar)
        self._n_vocab = n_vocab
        self._last: int | None = None
        self._grammars = grammars
        self._child: _Child | None = grammars.take()
        self._child.call("start", grammar, ROOT)

    def allowed(self) -> np.ndarray:
        """Return bool [n_vocab]. Raises GrammarError when no token may follow."""
        assert self._child is not None
        bits = np.frombuffer(base64.b64decode(self._child.call("allowed", self._last)), np.uint8)
        is_allowed = np.unpackbits(bits, count=self._n_vocab).astype(bool)
        if not is_allowed.any():
            raise GrammarError("the grammar allows no token here")
        return is_allowed

    def accept(self, token: int) -> None:
        """Go on after a token."""
        self._last = token

    def close(self) -> None:
        """Give the process back."""
        if self._child is not None:
            self._grammars.give_back(self._child)
            self._child = None
