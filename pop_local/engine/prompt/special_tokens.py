"""Treat special tokens in messages as plain text.

A document that contains `<|im_end|>` could otherwise end a turn and start a system message.
"""

from collections.abc import Iterable, Sequence

from pop_local.engine.llama.backend import bindings
from pop_local.engine.llama.context import Context

_SPACES = " \t\n\v\f\r"  # C's isspace
_FIRST_MARK, _LAST_MARK = 0xF0000, 0xFFFFD  # a private-use plane


class SpecialTokens:
    """A vocabulary's special tokens, which may also occur in ordinary text."""

    def __init__(self, context: Context) -> None:
        self._api, self._context = bindings(), context

    def spelled(self, tokens: Iterable[int], texts: Sequence[str]) -> list[str]:
        """Return the spellings of special tokens that occur both in `tokens` and in `texts`."""
        special = {self._text(token) for token in set(tokens) if self._is_special(token)}
        return sorted(spelling for spelling in special if any(spelling in text for text in texts))

    def tokens(self, text: str, marks: dict[str, str]) -> list[int]:
        """Replace each placeholder in a prompt with its plain text, and tokenize the result.

        As in llama.cpp, text between two special tokens is tokenized as one piece.
        """
        restored = str.maketrans(marks)
        all_tokens: list[int] = []
        at, is_stripped = 0, False

        def add(end: int, until_text: bool) -> None:
            part = text[at:end]
            part = part.lstrip(_SPACES) if is_stripped else part
            part = part.rstrip(_SPACES) if until_text else part
            all_tokens.extend(
                self._context.vocabulary.tokenize(part.translate(restored)) if part else ()
            )

        for token in self._context.vocabulary.tokenize(text, special=True):
            special = self._text(token) if self._is_special(token) else ""
            start = text.find(special, at) if special else -1
            if start < 0:
                continue
            attributes = self._attributes(token)
            add(start, bool(attributes & self._api.LLAMA_TOKEN_ATTR_LSTRIP))
            all_tokens.append(token)
            at = start + len(special)
            is_stripped = bool(attributes & self._api.LLAMA_TOKEN_ATTR_RSTRIP)
        add(len(text), False)
        return all_tokens

    def _attributes(self, token: int) -> int:
        return int(self._api.llama_vocab_get_attr(self._context.vocabulary.pointer, token))

    def _is_special(self, token: int) -> bool:
        special = self._api.LLAMA_TOKEN_ATTR_CONTROL | self._api.LLAMA_TOKEN_ATTR_UNKNOWN
        return bool(self._attributes(token) & special)

    def _text(self, token: int) -> str:
        text: bytes = self._api.llama_vocab_get_text(self._context.vocabulary.pointer, token)
        return text.decode(errors="replace")


def unused_marks(texts: Sequence[str]) -> Iterable[str]:
    """Return the private-use characters that do not occur in any of the strings."""
    marks = (chr(code) for code in range(_FIRST_MARK, _LAST_MARK + 1))
    return (mark for mark in marks if not any(mark in text for text in texts))
