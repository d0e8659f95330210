"""Carriers: synthetic documents of prose and random values, with questions about the values.

A model cannot guess a value, so it must copy a correct answer from the document. Half of the
layouts and words are for fitting and training (`Use.FITTING`), the other half only for measuring
(`Use.HELD_OUT`). The random generator, the prose and the token counter determine each document.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from pop_converter.base.errors import PopError
from pop_local.texts.carrier_layouts import LAYOUTS, Block, Layout, Record
from pop_local.texts.carrier_values import KINDS, Use, Words, entities, value, words

_T = TypeVar("_T")
CountTokens = Callable[[str], int]

# Records and fields per block, so that several similar values compete for every answer.
_N_RECORDS = 4
_N_FIELDS = 2
_PROSE_SHARE = 0.5


@dataclass(frozen=True)
class LookupQuestion:
    """A question whose answer is a value of the document, as an exact string.

    `stem` is the start of the answering sentence, and `answer` follows after a space. `kind` is the
    value's kind (one of `KINDS`), and `layout` is the layout of the value's block.
    """

    question: str
    answer: str
    kind: str
    layout: str
    stem: str

    @property
    def completion(self) -> str:
        """The text that follows the document after a blank line, and that the answer completes."""
        return f"Question: {self.question}\nAnswer: {self.stem}"


@dataclass(frozen=True)
class Carrier:
    """A document and questions about its values."""

    text: str
    questions: tuple[LookupQuestion, ...]


@dataclass(frozen=True)
class AnsweredCarrier:
    """A text for training: a document, followed by its questions and answers.

    `answers` holds the answers' (start, end) positions in `text`, without the preceding space.
    """

    text: str
    answers: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class CarrierSettings:
    """Requirements for a document: use, approximate length, and maximum number of questions."""

    n_tokens: int
    n_questions: int
    use: Use


def make_carrier(
    rng: np.random.Generator, settings: CarrierSettings, prose: str, count: CountTokens
) -> Carrier:
    """Build a document of blocks in the use's layouts, with prose before, between and after them.

    The document's prose starts at a random sentence of `prose`. `count` returns a text's length in
    tokens. The document has one question for each value, but no more than `n_questions`. Raises
    PopError if the blocks leave no room for prose.
    """
    # Seed with the use, so that one seed yields different values for both uses.
    rng = np.random.default_rng([*settings.use.value.encode(), int(rng.integers(1 << 62))])
    writer = _Writer(rng, settings.use)
    sentences = _sentences(prose)
    blocks, questions, n_left = [], [], settings.n_tokens * (1 - _PROSE_SHARE)
    while n_left > 0:
        text, about = writer.block(n_left, count)
        blocks.append(text)
        questions += about
        n_left -= count(text)
    n_prose = settings.n_tokens - sum(map(count, blocks))
    if n_prose <= 0:
        raise PopError(
            f"a document of {settings.n_tokens} tokens has no room for a look-up",
            "increase the documents' length",
            cause="documents-too-short",
        )
    between = _paragraphs(rng, sentences, len(blocks) + 1, n_prose, count)
    pieces = [between[0]]
    for block, paragraph in zip(blocks, between[1:], strict=True):
        pieces += [block, paragraph]
    chosen = _even_over_kinds(rng, questions)[: settings.n_questions]
    return Carrier("\n\n".join(filter(None, pieces)), tuple(chosen))


def with_answers(carrier: Carrier) -> AnsweredCarrier:
    """Return a text for training: the document, followed by its questions and answers."""
    text, spans = carrier.text, []
    for question in carrier.questions:
        text += f"\n\n{question.completion} "
        spans.append((len(text), len(text) + len(question.answer)))
        text += question.answer + "."
    return AnsweredCarrier(text, tuple(spans))


def _even_over_kinds(
    rng: np.random.Generator, questions: Sequence[LookupQuestion]
) -> list[LookupQuestion]:
    """Shuffle the questions, with one question of every kind before any kind's second question."""
    rounds: Counter[str] = Counter()
    ranked = []
    for i in rng.permutation(len(questions)):
        ranked.append((rounds[questions[i].kind], questions[i]))
        rounds[questions[i].kind] += 1
    return [question for _, question in sorted(ranked, key=lambda pair: pair[0])]


def _sentences(prose: str) -> list[str]:
    parts = [part.strip(" *") + "." for part in " ".join(prose.split()).split(". ")]
    found = [part for part in parts if 20 < len(part) < 400]
    if not found:
        raise PopError("the prose for look-up documents has no sentences", "pass a longer text")
    return found


def _paragraphs(
    rng: np.random.Generator, sentences: Sequence[str], n: int, n_tokens: int, count: CountTokens
) -> list[str]:
    """Return `n` paragraphs, with about `n_tokens` tokens in total."""
    first = int(rng.integers(len(sentences)))
    paragraphs: list[list[str]] = [[] for _ in range(n)]
    used = 0
    for i in range(10 * len(sentences)):
        sentence = sentences[(first + i) % len(sentences)]
        if used + count(" " + sentence) > n_tokens:
            break
        used += count(" " + sentence)
        paragraphs[min(n * used // max(1, n_tokens), n - 1)].append(sentence)
    return [" ".join(each) for each in paragraphs]


class _Writer:
    """A writer of one document's blocks, which never repeats an entity or a value."""

    def __init__(self, rng: np.random.Generator, use: Use) -> None:
        self._rng = rng
        self._use = use
        self._words: Words = words(use)
        self._entities = iter(entities(rng, use))
        self._layouts = _cycle(rng, LAYOUTS[use])
        self._kinds = _cycle(rng, KINDS)
        self._seen: list[str] = []

    def block(self, n_tokens: float, count: CountTokens) -> tuple[str, list[LookupQuestion]]:
        """Return a block of up to `n_tokens` tokens, or a single record, and its questions."""
        layout = next(self._layouts)
        kinds = self._distinct_kinds()
        fields = tuple(str(self._rng.choice(self._words.fields[kind])) for kind in kinds)
        noun = str(self._rng.choice(self._words.nouns))
        records = tuple(self._record(kinds) for _ in range(_N_RECORDS))
        block = Block(noun, fields, kinds, records)
        while len(block.records) > 1 and count(layout.write(block)) > n_tokens:
            block = replace(block, records=block.records[:-1])
        return layout.write(block), list(_questions(layout, block))

    def _distinct_kinds(self) -> tuple[str, ...]:
        kinds: list[str] = []
        while len(kinds) < _N_FIELDS:
            kind = next(self._kinds)
            if kind not in kinds:
                kinds.append(kind)
        return tuple(kinds)

    def _record(self, kinds: Sequence[str]) -> Record:
        entity = next(self._entities, None)
        if entity is None:
            raise PopError(
                "a look-up document needs more names than the word list has", "shorten the document"
            )
        return Record(entity, tuple(self._new_value(kind) for kind in kinds))

    def _new_value(self, kind: str) -> str:
        while True:
            found = value(self._rng, kind, self._words)
            if not any(found in other or other in found for other in self._seen):
                self._seen.append(found)
                return found


def _questions(layout: Layout, block: Block) -> Iterator[LookupQuestion]:
    for record in block.records:
        for field, kind, answer in zip(block.fields, block.kinds, record.values, strict=True):
            subject = layout.subject(block.noun, field, record.entity)
            stem = f"{subject[0].upper()}{subject[1:]} is"
            yield LookupQuestion(f"What is {subject}?", answer, kind, layout.name, stem)


def _cycle(rng: np.random.Generator, items: Sequence[_T]) -> Iterator[_T]:
    """Yield all items in random order, then all items in another random order, and so on."""
    while True:
        for i in rng.permutation(len(items)):
            yield items[i]
