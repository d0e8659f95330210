"""The process in which grammars are compiled first: what is hostile ends it instead of ours.

llguidance bounds each step by its limits, but not all of its compiler: a chain of 1,000 `$ref` ends
the stack, a `multipleOf` of six digits or 10,000 optional properties take half a minute.
"""

import threading

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

# Messages without the state of its parser. Large expressions are not tried on all tokens at once,
# so that a vocabulary does not change what compiling takes.
LIMITS = LLParserLimits(verbose_errors=False, precompute_large_lexemes=False)
# Less than any thread of a server has.
_STACK_BYTES = 4 << 20


class GrammarCompiler:
    """The calls that are answered, with arguments and results of JSON."""

    def __init__(self) -> None:
        self._tokenizer = LLTokenizer("byte")
        threading.stack_size(_STACK_BYTES)

    def warnings(self, grammar: str) -> list[str]:
        """Compile a grammar; returns what of it is ignored. Raises ValueError for a wrong one."""
        made: list[LLMatcher] = []
        thread = threading.Thread(target=lambda: made.append(self._compiled(grammar)))
        thread.start()
        thread.join()
        if made[0].is_error():
            raise ValueError(made[0].get_error())
        return made[0].get_grammar_warnings()

    def _compiled(self, grammar: str) -> LLMatcher:
        return LLMatcher(self._tokenizer, grammar, log_level=0, limits=LIMITS)
