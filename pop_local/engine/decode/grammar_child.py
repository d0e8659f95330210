"""Test-compile grammars in a child process so that a malicious grammar cannot crash the parent.

llguidance limits the cost of each compilation step but not the total cost. A chain of 1,000 `$ref`
keywords overflows the stack. Compiling a schema with a six-digit `multipleOf` or 10,000 optional
properties takes half a minute.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from pop_local.engine.decode.gbnf import lark_of

# Messages omit the parser's state. Large lexemes are not precomputed, because compile time must not
# depend on the vocabulary.
LIMITS = LLParserLimits(verbose_errors=False, precompute_large_lexemes=False)
# Stack size of a compiling thread, which is smaller than any server thread's stack.
_STACK_BYTES = 4 << 20


class GrammarCompiler:
    """Methods that the parent process calls in the child process."""

    def __init__(self) -> None:
        self._tokenizer = LLTokenizer("byte")
        threading.stack_size(_STACK_BYTES)

    def lark(self, gbnf: str, instead: dict[str, str]) -> str:
        """Translate GBNF into Lark (see gbnf.lark_of). Raises ValueError for an invalid grammar."""
        return lark_of(gbnf, instead)

    def warnings(self, grammar: str) -> list[str]:
        """Compile a grammar and return its warnings. Raises ValueError for invalid grammars."""
        with ThreadPoolExecutor(1) as thread:  # its stack size is limited
            made = thread.submit(
                LLMatcher, self._tokenizer, grammar, log_level=0, limits=LIMITS
            ).result()
        if made.is_error():
            raise ValueError(made.get_error())
        return made.get_grammar_warnings()
