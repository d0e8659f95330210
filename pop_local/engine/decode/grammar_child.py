"""Child process that compiles grammars first, so that a hostile one cannot end the parent.

llguidance limits each step, but not its whole compiler. A chain of 1,000 `$ref` overflows the
stack. A `multipleOf` of six digits or 10,000 optional properties take half a minute.
"""

import threading

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

# Messages omit the parser's state. Compile time must not depend on the vocabulary, so large
# lexemes are not matched with all tokens in advance.
LIMITS = LLParserLimits(verbose_errors=False, precompute_large_lexemes=False)
# Smaller than the stack of any server thread.
_STACK_BYTES = 4 << 20


class GrammarCompiler:
    """Methods that the parent calls, with JSON arguments and results."""

    def __init__(self) -> None:
        self._tokenizer = LLTokenizer("byte")
        threading.stack_size(_STACK_BYTES)

    def warnings(self, grammar: str) -> list[str]:
        """Compile a grammar and return its warnings. Raises ValueError if it is invalid."""
        made: list[LLMatcher] = []
        thread = threading.Thread(target=lambda: made.append(self._compiled(grammar)))
        thread.start()
        thread.join()
        if made[0].is_error():
            raise ValueError(made[0].get_error())
        return made[0].get_grammar_warnings()

    def _compiled(self, grammar: str) -> LLMatcher:
        return LLMatcher(self._tokenizer, grammar, log_level=0, limits=LIMITS)
