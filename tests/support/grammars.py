"""Check which texts a grammar accepts, and what its compilation costs."""

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psutil

from pop_local.engine.decode.grammar import Grammar, GrammarError
from pop_local.engine.decode.grammar_mask import Constraint


def accepts(trie: Any, grammar: Grammar, text: str) -> bool:
    """Return whether the grammar accepts the whole text, one token per byte."""
    tokens = {trie.decode_bytes([token]): token for token in range(trie.vocab_size)}
    constraint = Constraint(trie, grammar)
    for byte in text.encode():
        token = tokens[bytes([byte])]
        if token not in constraint.allowed():
            return False
        constraint.accept(token)
    return trie.eos_tokens[0] in constraint.allowed()


def require_cheap(trie: Any, compile_grammar: Callable[[], Grammar]) -> None:
    """Fail if compiling and 50 tokens take over 10 s or 200 MiB. A GrammarError is acceptable."""
    memory = psutil.Process().memory_info().rss
    started_s = time.perf_counter()
    with suppress(GrammarError):
        constraint = Constraint(trie, compile_grammar())
        for _ in range(50):
            constraint.accept(int(constraint.allowed()[-1]))
    assert time.perf_counter() - started_s < 10
    assert psutil.Process().memory_info().rss - memory < 200 * 2**20
