"""Answer the user's prompts greedily, with and without pruning, and compare the answers."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from math import comb
from pathlib import Path
from typing import Any

from pop_base.errors import PopError
from pop_local.engine.answer import ContextFullError
from pop_local.engine.chat_messages import Message
from pop_local.engine.images.pictures import read_picture
from pop_local.engine.model import PopModel
from pop_local.engine.sessions.conversation import Turn
from pop_local.texts.document_readers import Document, read_document, read_text

_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class ComparedPrompt:
    """A conversation for the model to answer. `line`: the line number in the file, starting at 1.

    `expected`: the pattern that correct answers match (None if the line specifies no answer).
    """

    line: int
    messages: tuple[Message, ...]
    expected: re.Pattern[str] | None = None

    def is_right(self, answer: str) -> bool | None:
        return None if self.expected is None else self.expected.search(answer) is not None


@dataclass(frozen=True)
class PromptFile:
    """A file's name and the prompts read from it."""

    name: str
    prompts: tuple[ComparedPrompt, ...]


@dataclass(frozen=True)
class Answered:
    """An answer and its statistics. The fields have the same meaning as in TurnStats."""

    text: str
    n_prompt: int
    n_cached: int
    n_pruned: int
    ttft_s: float
    decode_s: float
    finish_reason: str


@dataclass(frozen=True)
class Compared:
    """The full model's answer and the pruned model's answer to a prompt.

    `is_full_right` and `is_pruned_right` are None if no answer is expected. `first_difference`: the
    number of leading tokens that the answers share (None if they are identical).
    """

    line: int
    full: Answered
    pruned: Answered
    is_full_right: bool | None
    is_pruned_right: bool | None
    first_difference: int | None


@dataclass(frozen=True)
class Comparison:
    """The full model's and the pruned model's answers to all prompts in a file."""

    prompts: PromptFile
    answers: tuple[Compared, ...] = field(repr=False)

    @property
    def different(self) -> tuple[Compared, ...]:
        return tuple(pair for pair in self.answers if pair.first_difference is not None)

    @property
    def n_judged(self) -> int:
        return sum(pair.is_full_right is not None for pair in self.answers)

    @property
    def full_hits(self) -> int:
        return sum(pair.is_full_right is True for pair in self.answers)

    @property
    def pruned_hits(self) -> int:
        return sum(pair.is_pruned_right is True for pair in self.answers)

    @property
    def n_only_full(self) -> int:
        return sum(a.is_full_right is True and not a.is_pruned_right for a in self.answers)

    @property
    def n_only_pruned(self) -> int:
        return sum(a.is_pruned_right is True and not a.is_full_right for a in self.answers)

    @property
    def p_value(self) -> float:
        """Return the p-value of McNemar's exact test for a change in correct answers."""
        return mcnemar(self.n_only_full, self.n_only_pruned)

    @property
    def full_ttft_s(self) -> float:
        return sum(pair.full.ttft_s for pair in self.answers)

    @property
    def pruned_ttft_s(self) -> float:
        return sum(pair.pruned.ttft_s for pair in self.answers)

    @property
    def n_unpruned(self) -> int:
        """Return the number of prompts that were left unpruned (too short or already cached)."""
        return sum(pair.pruned.n_pruned == 0 for pair in self.answers)


def mcnemar(n_first: int, n_second: int) -> float:
    """Return the two-sided p-value of McNemar's exact test for two counts of discordant pairs."""
    n = n_first + n_second
    n_tail: int = sum(comb(n, k) for k in range(min(n_first, n_second) + 1))
    of_both: float = 2 * n_tail / 2**n  # dividing integers avoids a float overflow
    return min(1.0, of_both)


def read_prompts(path: Path) -> PromptFile:
    """Read a JSONL file in which each object has a `prompt` or `messages` key. Raises PopError.

    An object with a `prompt` key may also list `documents` (strings or {"file": PATH} objects) and
    `images` (paths). Documents and images precede the prompt's text. Paths are relative to the
    JSONL file. `answer` is a string that correct answers contain, or {"regex": PATTERN}.
    """
    # str.splitlines would also split at characters that JSON strings may contain.
    lines = re.split(r"\r\n?|\n", read_text(path))
    prompts = tuple(
        _prompt(path, number, line) for number, line in enumerate(lines, 1) if line.strip()
    )
    return PromptFile(path.name, prompts)


def _prompt(path: Path, number: int, line: str) -> ComparedPrompt:
    def wrong(what: str) -> PopError:
        return PopError(
            f"{path}, line {number}: {what}",
            'each line must be {"prompt": TEXT} or {"messages": [{"role": ..., "content": TEXT}]},'
            ' optionally with "answer": TEXT or {"regex": PATTERN} (a prompt may also have'
            ' "documents" and "images")',
        )

    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise wrong("the line is not valid JSON") from error
    if not isinstance(entry, dict):
        raise wrong("the line is not a JSON object")
    if unknown := sorted(entry.keys() - {"prompt", "messages", "documents", "images", "answer"}):
        raise wrong(f"the key {unknown[0]!r} is unknown")
    if ("prompt" in entry) == ("messages" in entry):
        raise wrong("the object must contain either prompt or messages")
    if "messages" in entry and entry.keys() & {"documents", "images"}:
        raise wrong('"documents" and "images" are allowed only with "prompt", not with "messages"')
    try:
        messages = _messages(entry, path.parent)
        expected = entry.get("answer")
        if expected is not None:
            pattern = re.escape(expected) if isinstance(expected, str) else expected["regex"]
            expected = re.compile(pattern)
    except OSError as error:
        raise wrong(f"cannot read {error.filename}: {error.strerror}") from error
    except (re.error, OverflowError, RecursionError) as error:
        raise wrong(f"the regular expression is invalid: {error}") from error
    except (TypeError, KeyError, ValueError) as error:
        raise wrong("a value has the wrong type") from error
    return ComparedPrompt(number, messages, expected)


def _messages(entry: dict[str, Any], folder: Path) -> tuple[Message, ...]:
    if "prompt" in entry:
        documents = tuple(_document(item, folder) for item in entry.get("documents", ()))
        pictures = tuple(read_picture(folder / _text(item)) for item in entry.get("images", ()))
        messages = Turn(_text(entry["prompt"]), documents, pictures=pictures).messages
    else:
        messages = [Message(item["role"], _text(item["content"])) for item in entry["messages"]]
    if not messages or any(message.role not in _ROLES for message in messages):
        raise ValueError
    return tuple(messages)


def _document(value: Any, folder: Path) -> Document:
    if isinstance(value, str):
        return Document("", value)
    return read_document(folder / _text(value["file"]))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def answer_prompt(model: PopModel, prompt: ComparedPrompt, max_tokens: int) -> Answered:
    """Answer a prompt greedily with the model's current pruning settings.

    Any prefix shared with the previous prompt stays cached. Raises PopError if the prompt does not
    fit in the context, or StoppedError if the caller stops the answer.
    """
    try:
        chunks = list(model.ask(prompt.messages, temperature=0.0, max_tokens=max_tokens))
    except ContextFullError as error:
        error.message = f"line {prompt.line}: {error.message}"
        raise
    stats = chunks[-1].stats
    assert stats is not None
    shared = {it.name: getattr(stats, it.name) for it in fields(Answered)[1:]}
    return Answered("".join(chunk.text for chunk in chunks), **shared)


def compare_pair(
    model: PopModel, prompt: ComparedPrompt, full: Answered, pruned: Answered
) -> Compared:
    """Compare the full and pruned answers with each other and with the expected answer."""
    tokenize = model.engine.context.vocabulary.tokenize
    return Compared(
        line=prompt.line,
        full=full,
        pruned=pruned,
        is_full_right=prompt.is_right(full.text),
        is_pruned_right=prompt.is_right(pruned.text),
        first_difference=_first_difference(tokenize(full.text), tokenize(pruned.text)),
    )


def _first_difference(first: Sequence[int], second: Sequence[int]) -> int | None:
    if first == second:
        return None
    pairs = enumerate(zip(first, second, strict=False))
    shorter = min(len(first), len(second))
    return next((index for index, (token, other) in pairs if token != other), shorter)
