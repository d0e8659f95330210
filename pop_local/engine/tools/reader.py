"""Parse tool calls in an answer while the model generates it."""

import secrets
import string
from collections.abc import Iterable
from dataclasses import dataclass, replace

from pop_base.errors import PopError
from pop_local.engine.chat_messages import ToolCall
from pop_local.engine.tools import native, text_form
from pop_local.engine.tools.call_form import CallForm
from pop_local.engine.tools.fenced_calls import last_calls
from pop_local.engine.tools.native import Parsed

_LETTERS = string.ascii_letters + string.digits


@dataclass(frozen=True)
class Piece:
    """A part of an answer: content, reasoning, or part of call number `index`.

    A call's first part contains its ID and name, and later parts contain only arguments.
    """

    content: str = ""
    reasoning: str = ""
    call: ToolCall | None = None
    index: int = 0


class CallReader:
    """A parser for a single answer that arrives in parts.

    If the answer names a tool but calls none, `end` stores the reason in `no_call`.
    """

    def __init__(self, form: CallForm) -> None:
        self._form, self._native = form, form.native
        self.no_call = ""
        self._text = ""
        self._last = Parsed()
        self.n_calls = 0

    def push(self, text: str) -> list[Piece]:
        self._text += text
        if not self._text or text_form.may_open(self._text):
            return []
        return self._added(self._parsed(partial=True))

    def end(self) -> list[Piece]:
        return self._added(self._parsed(partial=False))

    def _parsed(self, *, partial: bool) -> Parsed:
        """Parse the text so far. If llama.cpp finds no calls, search for plain-text calls."""
        parsed: Parsed | None = None
        if self._native is not None:
            try:
                parsed = native.parse(self._native, self._text, partial=partial)
            except ValueError:
                parsed = self._last if partial else None
            except PopError:  # beyond the limits, for example with thousands of brackets
                self._native = None
        if parsed is None or not parsed.calls:
            names = [tool.name for tool in self._form.tools]
            as_text = text_form.parse(self._text, names, partial=partial)
            parsed = as_text if parsed is None or as_text.calls else parsed
        is_lost = not (partial or parsed.calls or parsed.reasoning)
        if is_lost and self._text.startswith(parsed.content):  # llama.cpp dropped an incomplete tag
            parsed = Parsed(self._text)
        if not (partial or parsed.calls):
            calls, self.no_call = last_calls(parsed.content, self._form.tools)
            parsed = replace(parsed, calls=calls)
        return parsed

    def _added(self, now: Parsed) -> list[Piece]:
        last, self._last = self._last, now
        pieces = [
            Piece(reasoning=_more(last.reasoning, now.reasoning)),
            Piece(content=_more(last.content, now.content)),
        ]
        for index, (name, arguments) in enumerate(now.calls):
            if index >= self.n_calls:
                self.n_calls += 1
                call = ToolCall("".join(secrets.choice(_LETTERS) for _ in range(9)), name, "")
                pieces.append(Piece(call=call, index=index))
            before = last.calls[index][1] if index < len(last.calls) else ""
            if more := _more(before, arguments):
                pieces.append(Piece(call=ToolCall("", "", more), index=index))
        return [piece for piece in pieces if piece != Piece()]


def calls_of(pieces: Iterable[Piece]) -> list[ToolCall]:
    """Join the parts of each call in an answer and return the calls."""
    calls: dict[int, ToolCall] = {}
    for piece in pieces:
        if piece.call is not None:
            call = calls.setdefault(piece.index, replace(piece.call, arguments=""))
            arguments = call.arguments + piece.call.arguments
            calls[piece.index] = replace(call, arguments=arguments)
    return [*calls.values()]


def _more(before: str, now: str) -> str:
    return now[len(before) :] if now.startswith(before) else ""
