"""Tasks whose answers need exact strings of a document, for measure_dropping.py."""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import partial
from pathlib import Path
from typing import Any

from pop_local.engine.chat_messages import Message
from pop_local.engine.model import PopModel
from pop_local.measure.lookups import LookupSettings, is_right, make_documents
from tasks import humaneval, passes

N_LINES, N_FILE = 20, 6000  # lines to quote, characters of a file
N_SHOTS = 3  # solved problems that precede a HumanEval problem
_WHOLE = "Write the last function in whole, in a code block."
_QUOTING = "```\n{piece}\n```\n\nSome lines of this file again, unchanged:\n\n```\n"
_CALLING = (
    "You have these tools:\n\n{tools}\n\nAnswer each request with one JSON object only:"
    ' {{"name": TOOL, "arguments": {{...}}}}'
)


@dataclass(frozen=True)
class Question:
    """Tokens that follow a document, and the score of an answer from 0 to 1.

    `max_lines`: number of lines after which the answer ends.
    """

    tokens: tuple[int, ...]
    max_tokens: int
    max_lines: int
    score: Callable[[str], float]


@dataclass(frozen=True)
class TaskDocument:
    """A document's tokens and the questions about it."""

    tokens: tuple[int, ...]
    questions: tuple[Question, ...]


def lookups(model: PopModel, n_questions: int) -> Iterator[TaskDocument]:
    """Yield the documents and questions of `eval --lookups`."""
    for document in make_documents(model, LookupSettings.of_questions(n_questions)):
        questions = tuple(
            Question(
                asked.tokens,
                len(asked.answer) + 12,
                1,
                partial(found, asked.question.answer),
            )
            for asked in document.questions
        )
        yield TaskDocument(document.tokens, questions)


def found(answer: str, text: str) -> float:
    """Return 1 if a continuation contains the exact answer, otherwise 0."""
    return float(is_right(text, answer))


def quoting(model: PopModel, code: Path, n_questions: int) -> Iterator[TaskDocument]:
    """Yield pieces of a file of code, and the task to continue a copy from the middle of each."""
    text, rng = code.read_text(encoding="utf-8"), random.Random(5)
    for number in range(n_questions):
        start = text.index("\n", (len(text) - N_FILE - 500) * number // n_questions) + 1
        piece = text[start : text.index("\n", start + N_FILE)]
        lines = piece.split("\n")
        firsts = [
            first
            for first in range(len(lines) // 4, len(lines) - N_LINES)
            if lines.count(lines[first]) == 1 and len(lines[first].strip()) > 15
        ]
        first = rng.choice(firsts)
        tokenize = model.engine.context.vocabulary.tokenize
        question = Question(
            tuple(tokenize(f"{lines[first]}\n")),
            max_tokens=45 * N_LINES,
            max_lines=N_LINES,
            score=quoted(lines[first + 1 : first + 1 + N_LINES]),
        )
        yield TaskDocument(tuple(tokenize(_QUOTING.format(piece=piece))), (question,))


def quoted(wanted: Sequence[str]) -> Callable[[str], float]:
    """Return the score of an answer: the share of the wanted lines that it has, in order."""

    def score(text: str) -> float:
        lines = [line for line in text.split("\n") if not line.startswith("```")]
        blocks = SequenceMatcher(None, wanted, lines, autojunk=False).get_matching_blocks()
        return sum(block.size for block in blocks) / len(wanted)

    return score


def calling(model: PopModel, n_requests: int) -> Iterator[TaskDocument]:
    """Yield twenty tools in the form of OpenAI's API, and a request for each of the first."""
    tools = json.loads((Path(__file__).parent / "twenty_tools.json").read_text("utf-8"))
    shown = "\n".join(json.dumps(_schema(tool)) for tool in tools)
    asked = [(tool["request"], called(tool)) for tool in tools[:n_requests]]
    yield _chat(model, _CALLING.format(tools=shown), asked, max_tokens=120, max_lines=40)


def programming(model: PopModel, path: Path, n_problems: int) -> Iterator[TaskDocument]:
    """Yield HumanEval problems, each after the same N_SHOTS solved problems."""
    every = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
    shots = [humaneval(entry) for entry in every[:N_SHOTS]]
    solved = "\n\n".join(f"{shot.question}\n\n{shot.shown}" for shot in shots)
    for entry in every[N_SHOTS : N_SHOTS + n_problems]:
        document = f"{solved}\n\n{humaneval(entry).question}"
        yield _chat(model, document, [(_WHOLE, solves(entry))], max_tokens=400, max_lines=60)


def solves(entry: dict[str, Any]) -> Callable[[str], float]:
    """Return the score of an answer: 1 if its program passes the problem's tests."""
    return lambda text: float(passes(entry, text))


def _schema(tool: dict[str, Any]) -> dict[str, Any]:
    properties = {
        name: {
            "type": "integer" if isinstance(tool["arguments"][name], int) else "string",
            "description": description,
        }
        for name, description in tool["parameters"].items()
    }
    parameters = {"type": "object", "properties": properties, "required": [*properties]}
    function = {key: tool[key] for key in ("name", "description")} | {"parameters": parameters}
    return {"type": "function", "function": function}


def called(tool: dict[str, Any]) -> Callable[[str], float]:
    """Return the score of an answer: 1 for the right tool with exactly the right arguments."""
    right = {"name": tool["name"], "arguments": tool["arguments"]}

    def score(text: str) -> float:
        start, end = text.find("{"), text.rfind("}")
        try:
            return float(json.loads(text[start : end + 1]) == right)
        except ValueError:
            return 0.0

    return score


def _chat(
    model: PopModel,
    document: str,
    asked: Sequence[tuple[str, Callable[[str], float]]],
    *,
    max_tokens: int,
    max_lines: int,
) -> TaskDocument:
    """Put a document before each question in the model's chat template, and split the tokens."""

    def tokens(question: str) -> Sequence[int]:
        message = Message("user", f"{document}\n\n{question}")
        return model.engine.prompter.conversation([message]).tokens

    # Two questions share the tokens up to the end of the document.
    first, second = tokens("A"), tokens("1")
    pairs = enumerate(zip(first, second, strict=False))
    n_document = next(number for number, (one, other) in pairs if one != other)
    questions = []
    for question, score in asked:
        whole = tokens(question)
        assert list(whole[:n_document]) == list(first[:n_document])
        questions.append(Question(tuple(whole[n_document:]), max_tokens, max_lines, score))
    return TaskDocument(tuple(first[:n_document]), tuple(questions))
