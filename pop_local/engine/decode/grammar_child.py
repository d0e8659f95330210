"""Child process that compiles grammars first, so that a hostile grammar cannot crash the parent.

llguidance limits each step of its compiler, but not their total. A chain of 1,000 `$ref` overflows
the stack. A `multipleOf` of six digits takes half a minute, and so do 10,000 optional properties.
"""

import threading

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

# Messages omit the parser's state. Large lexemes are not precomputed, because compile time must not
# depend on the vocabulary.
LIMITS = LLParserLimits(verbose_errors=False, precompute_large_lexemes=False)
# Smaller than the stack of any server thread.
_STACK_BYTES = 4 << 20


class GrammarCompiler:
    """The methods that the parent process calls."""

    def __init__(self) -> None:
        self._tokenizer = LLTokenizer("byte")
        threading.stack_size(_STACK_BYTES)

    def warnings(self, grammar: str) -> list[str]:
        """Compile a grammar and return its warnings. Raises ValueError for an invalid grammar."""
        made: list[LLMatcher] = []

        def compile_() -> None:
            made.append(LLMatcher(self._tokenizer, grammar, log_level=0, limits=LIMITS))

        thread = threading.Thread(target=compile_)
        thread.start()
        thread.join()
        if made[0].is_error():
            raise ValueError(made[0].get_error())
        return made[0].get_grammar_warnings()
