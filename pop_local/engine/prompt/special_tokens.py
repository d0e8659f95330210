"""Control tokens in a prompt: those that a template writes, not those that a message spells out.

With `<|im_end|>` and the like in it, a document could end its turn and begin one of the system's.
"""

from collections.abc import Iterable, Sequence

from pop_local.engine.llama.backend import bindings
from pop_local.engine.llama.context import Context

_SPACES = " \t\n\v\f\r"  # of C's isspace
_FIRST_MARK, _LAST_MARK = 0xF0000, 0xFFFFD  # a plane for private use


class SpecialTokens:
    """Those of a vocabulary that llama.cpp looks for in a text only when it is told to."""

    def __init__(self, context: Context) -> None:
        self._api, self._context = bindings(), context

    def spelled(self, tokens: Iterable[int], texts: Sequence[str]) -> list[str]:
        """The special tokens among `tokens` that one of the texts spells out."""
        special = {self._text(token) for token in set(tokens) if self._is_special(token)}
        return sorted(one for one in special if any(one in text for text in texts))

    def tokens(self, text: str, marks: dict[str, str]) -> list[int]:
        """Tokenise a prompt in which a mark stands for each of these texts, which are just text.

        Text between two special tokens is tokenised in one piece, as llama.cpp does it.
        """
        restored = str.maketrans(marks)
        found: list[int] = []
        at, is_stripped = 0, False

        def add(end: int, until_text: bool) -> None:
            part = text[at:end]
            part = part.lstrip(_SPACES) if is_stripped else part
            part = part.rstrip(_SPACES) if until_text else part
            found.extend(self._context.tokenize(part.translate(restored)) if part else ())

        for token in self._context.tokenize(text, special=True):
            special = self._text(token) if self._is_special(token) else ""
            start = text.find(special, at) if special else -1
            if start < 0:
                continue
            attributes = self._attributes(token)
            add(start, bool(attributes & self._api.LLAMA_TOKEN_ATTR_LSTRIP))
            found.append(token)
            at = start + len(special)
            is_stripped = bool(attributes & self._api.LLAMA_TOKEN_ATTR_RSTRIP)
        add(len(text), False)
        return found

    def _attributes(self, token: int) -> int:
        return int(self._api.llama_vocab_get_attr(self._context.vocab, token))

    def _is_special(self, token: int) -> bool:
        wanted = self._api.LLAMA_TOKEN_ATTR_CONTROL | self._api.LLAMA_TOKEN_ATTR_UNKNOWN
        return bool(self._attributes(token) & wanted)

    def _text(self, token: int) -> str:
        text: bytes = self._api.llama_vocab_get_text(self._context.vocab, token)
        return text.decode(errors="replace")


def unused_marks(texts: Sequence[str]) -> Iterable[str]:
    """Characters that occur in none of the texts; no template looks for them, or cuts one."""
    marks = (chr(code) for code in range(_FIRST_MARK, _LAST_MARK + 1))
    return (mark for mark in marks if not any(mark in text for text in texts))
