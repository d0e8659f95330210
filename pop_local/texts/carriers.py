"""Carriers: synthetic documents with prose, random values, and questions about the values.

A model cannot guess a value, so it must copy the answer from the document. Half of the layouts and
words are used only for fitting and training (`Use.FITTING`). The other layouts and words are used
only for measurement (`Use.HELD_OUT`). The random number generator, the prose, and the token counter
fully determine a document.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from pop_base.errors import PopError
from pop_local.texts.carrier_layouts import LAYOUTS, Block
from pop_local.texts.carrier_values import KINDS, Use, value, words

_T = TypeVar("_T")
CountTokens = Callable[[str], int]
# The (start, end) of a part of a text, in characters.
Span = tuple[int, int]

# Numbers of records and fields per block, enough to surround each answer with similar values.
_N_RECORDS = 4
_N_FIELDS = 2
_PROSE_SHARE = 0.5


@dataclass(frozen=True)
class LookupQuestion:
    """A question whose answer is an exact string from the document.

    `stem` is the start of the answer sentence. A space separates `stem` from `answer`. `kind` is
    one of `KINDS`, and `layout` is the name of the block's layout.
    """

    question: str
    answer: str
    kind: str
    layout: str
    stem: str

    @property
    def completion(self) -> str:
        """The question and the start of the answer. A blank line must precede the question."""
        return f"Question: {self.question}\nAnswer: {self.stem}"


@dataclass(frozen=True)
class Carrier:
    """A document with questions about its values."""

    text: str
    questions: tuple[LookupQuestion, ...]


def make_carrier(
    rng: np.random.Generator,
    prose: str,
    count: CountTokens,
    *,
    use: Use,
    n_tokens: int,
    n_questions: int,
) -> Carrier:
    """Build a document of about `n_tokens` tokens from prose and blocks of values.

    `use` determines the layouts. The prose around the blocks starts at a random sentence in
    `prose`. `count` returns a string's length in tokens. The document has one question for each
    value, up to `n_questions`. Raises PopError if the blocks leave no room for prose.
    """
    # The seed includes the use, so that the two uses get different values.
    rng = np.random.default_rng([*use.value.encode(), int(rng.integers(1 << 62))])
    writer = _Writer(rng, use)
    sentences = _sentences(prose)
    blocks, questions, n_left = [], [], n_tokens * (1 - _PROSE_SHARE)
    while n_left > 0:
        text, about = writer.block(n_left, count)
        blocks.append(text)
        questions += about
        n_left -= count(text)
    n_prose = n_tokens - sum(map(count, blocks))
    if n_prose <= 0:
        raise PopError(
            f"a document of {n_tokens} tokens is too short for a look-up",
            "use longer documents",
            cause="documents-too-short",
        )
    between = _paragraphs(rng, sentences, len(blocks) + 1, n_prose, count)
    pieces = [between[0]]
    for block, paragraph in zip(blocks, between[1:], strict=True):
        pieces += [block, paragraph]
    selection = _even_over_kinds(rng, questions)[:n_questions]
    return Carrier("\n\n".join(filter(None, pieces)), tuple(selection))


def with_answers(carrier: Carrier) -> tuple[str, list[Span]]:
    """Return the document with its questions and answers, and the position of each answer."""
    text, spans = carrier.text, []
    for question in carrier.questions:
        text += f"\n\n{question.completion} "
        spans.append((len(text), len(text) + len(question.answer)))
        text += question.answer + "."
    return text, spans


def _even_over_kinds(
    rng: np.random.Generator, questions: Sequence[LookupQuestion]
) -> list[LookupQuestion]:
    """Shuffle the questions so that each kind occurs once before any kind occurs twice."""
    rounds: Counter[str] = Counter()
    ranked = []
    for i in rng.permutation(len(questions)):
        ranked.append((rounds[questions[i].kind], questions[i]))
        rounds[questions[i].kind] += 1
    return [question for _, question in sorted(ranked, key=lambda pair: pair[0])]


def _sentences(prose: str) -> list[str]:
    parts = [part.strip(" *") + "." for part in " ".join(prose.split()).split(". ")]
    sentences = [part for part in parts if 20 < len(part) < 400]
    if not sentences:
        raise PopError("the prose for look-up documents contains no sentences", "pass longer prose")
    return sentences


def _paragraphs(
    rng: np.random.Generator, sentences: Sequence[str], n: int, n_tokens: int, count: CountTokens
) -> list[str]:
    """Return `n` paragraphs with about `n_tokens` tokens in total."""
    first = int(rng.integers(len(sentences)))
    paragraphs: list[list[str]] = [[] for _ in range(n)]
    used = 0
    for i in range(10 * len(sentences)):
        sentence = sentences[(first + i) % len(sentences)]
        if used + count(" " + sentence) > n_tokens:
            break
        used += count(" " + sentence)
        paragraphs[min(n * used // max(1, n_tokens), n - 1)].append(sentence)
    return [" ".join(paragraph) for paragraph in paragraphs]


class _Writer:
    """A writer that creates one document's blocks without repeating any entity or value."""

    def __init__(self, rng: np.random.Generator, use: Use) -> None:
        self._rng, self._words = rng, words(use)
        lists = self._words
        names = [start + end for start in lists.entity_starts for end in lists.entity_ends]
        self._entities = iter([names[i] for i in rng.permutation(len(names))])
        self._layouts = _cycle(rng, [*LAYOUTS[use].items()])
        self._kinds = _cycle(rng, KINDS)
        self._seen: list[str] = []

    def block(self, n_tokens: float, count: CountTokens) -> tuple[str, list[LookupQuestion]]:
        """Return a block's text and questions about it.

        The block has up to `n_tokens` tokens, or more if it contains only one record.
        """
        name, layout = next(self._layouts)
        kinds: list[str] = []
        while len(kinds) < _N_FIELDS:
            kind = next(self._kinds)
            if kind not in kinds:
                kinds.append(kind)
        fields = tuple(str(self._rng.choice(self._words.fields[kind])) for kind in kinds)
        noun = str(self._rng.choice(self._words.nouns))
        records = tuple(self._record(kinds) for _ in range(_N_RECORDS))
        block = Block(noun, fields, records)
        while len(block.records) > 1 and count(layout.write(block)) > n_tokens:
            block = replace(block, records=block.records[:-1])
        questions = []
        for entity, values in block.records:
            for field, kind, answer in zip(fields, kinds, values, strict=True):
                what = layout.describe(noun, field, entity)
                stem = f"{what[0].upper()}{what[1:]} is"
                questions.append(LookupQuestion(f"What is {what}?", answer, kind, name, stem))
        return layout.write(block), questions

    def _record(self, kinds: Sequence[str]) -> tuple[str, tuple[str, ...]]:
        entity = next(self._entities, None)
        if entity is None:
            raise PopError(
                "the word list has too few names for this document", "shorten the document"
            )
        return entity, tuple(map(self._new_value, kinds))

    def _new_value(self, kind: str) -> str:
        while True:
            candidate = value(self._rng, kind, self._words)
            if not any(candidate in other or other in candidate for other in self._seen):
                self._seen.append(candidate)
                return candidate


def _cycle(rng: np.random.Generator, items: Sequence[_T]) -> Iterator[_T]:
    """Yield all items repeatedly, in a new random order each time."""
    while True:
        for i in rng.permutation(len(items)):
            yield items[i]
