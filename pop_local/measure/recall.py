"""Cued recall: documents that state several facts, and the answer to a question about one.

Prose KL does not see whether a fact of the prompt can still be found (docs/depth.md). The answer is
teacher-forced, so that a digit that is wrong does not decide the next one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pop_converter.base.errors import PopError
from pop_converter.base.progress import Progress, counting
from pop_local.engine.model import PopModel
from pop_local.measure.divergence import likelihood, predictions
from pop_local.measure.estimate import Estimate, mean
from pop_local.measure.forced import FULL, Forced, Pruning, forced
from pop_local.measure.heldout import shipped_part

N_FACTS = 6
N_DIGITS = 5
# NLL of each document's answer, and whether every token came first.
Answers = list[tuple[float, bool]]
# Tokens that question and answer add to a document, at the most.
N_AROUND = 64

# Any two may come together: facts of one document share words, so that a word alone is no cue.
_ADJECTIVES = ("green", "old", "northern", "stone", "upper", "quiet")
_PLACES = ("depot", "harbour", "library", "mill", "station", "tower")
_FACT = "The access code of the {place} is {code}."
_ASKED = "\n\nQuestion: What is the access code of the {place}?\nAnswer: "
_QUESTION = _ASKED + "The access code of the {place} is"


@dataclass(frozen=True)
class RecallSettings:
    """`n_tokens` of each document, without the question; `n_documents` of them."""

    n_documents: int = 24
    n_tokens: int = 512
    seed: int = 0


@dataclass(frozen=True)
class Recall:
    """NLL of the answers' tokens in nats; share of answers whose every token came first.

    `exact_lost` is the difference of the shares, whose error is that of the pairs.
    """

    n_documents: int
    n_tokens: int
    nll_full: Estimate
    nll_pruned: Estimate
    exact_full: Estimate
    exact_pruned: Estimate
    exact_lost: Estimate


@dataclass(frozen=True)
class Asked:
    """A document with the question, and the answer, in tokens."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


def measure_recall(
    model: PopModel,
    settings: RecallSettings,
    prunings: Sequence[Pruning],
    on_progress: Progress,
) -> tuple[Recall, ...]:
    """Ask about each document, in full once and under each pruning.

    `on_progress` gets (done_prompts, total_prompts). Raises PopError when a prompt does not fit the
    context or was not pruned as planned.
    """
    n_each = settings.n_documents
    total, n_before = n_each * (1 + len(prunings)), 0

    def advance(done: int, _total: int) -> None:
        on_progress(n_before + done, total)

    reference = RecallReference.read(model, settings, advance)
    found = []
    for pruning in prunings:
        n_before += n_each
        found.append(reference.measure(model, pruning, advance))
    return tuple(found)


@dataclass(frozen=True)
class RecallReference:
    """The full model's answers, to compare several files of the same model with."""

    settings: RecallSettings
    asked: tuple[Asked, ...]
    full: Answers

    @classmethod
    def read(
        cls,
        model: PopModel,
        settings: RecallSettings,
        on_progress: Progress,
        known: Answers | None = None,
    ) -> "RecallReference":
        """Ask in full, about documents past those of `known`. Raises PopError as `measure_recall`.

        Each answer is added to `known`, so that a stop keeps those before it.
        """
        full = [] if known is None else known
        found = cls(settings, tuple(make_documents(model, settings)), full)
        found.ask(model, FULL, on_progress, full)
        return replace(found, full=full[: settings.n_documents])

    def ask(self, model: PopModel, pruning: Pruning, on_progress: Progress, known: Answers) -> None:
        """Ask a file of the same model under a pruning, likewise."""
        new = self.asked[len(known) :]
        ran = counting(len(new), on_progress)
        with forced(model) as reader:
            for each in new:
                known.append(_score(reader, each, pruning))
                ran(1)

    def compared(self, answers: Answers) -> Recall:
        """Compare all answers with the full model's."""
        full, pruned = np.array(self.full, float), np.array(answers, float)
        return Recall(
            n_documents=len(full),
            n_tokens=self.settings.n_tokens,
            nll_full=mean(full[:, 0]),
            nll_pruned=mean(pruned[:, 0]),
            exact_full=mean(full[:, 1]),
            exact_pruned=mean(pruned[:, 1]),
            exact_lost=mean(full[:, 1] - pruned[:, 1]),
        )

    def measure(self, model: PopModel, pruning: Pruning, on_progress: Progress) -> Recall:
        """Ask a file of the same model under a pruning about all documents, and compare."""
        answers: Answers = []
        self.ask(model, pruning, on_progress, answers)
        return self.compared(answers)


def _score(reader: Forced, asked: Asked, pruning: Pruning) -> tuple[float, bool]:
    reader.read(asked.prompt, pruning)
    predicted = predictions(reader.predict(asked.answer))
    found = likelihood(predicted, np.asarray(asked.answer))
    return float(found.nll.mean()), bool(found.is_top1.all())


def make_documents(model: PopModel, settings: RecallSettings) -> list[Asked]:
    """Make documents of held-out sentences with facts at random places between them.

    Raises PopError where there is no room for the facts.
    """
    rng = np.random.default_rng(settings.seed)
    sentences = _sentences(model)
    return [
        _document(model, sentences, settings.n_tokens, rng) for _ in range(settings.n_documents)
    ]


def _sentences(model: PopModel) -> list[list[int]]:
    text = " ".join(shipped_part("prose").split())
    parts = [part.strip() + "." for part in text.split(". ")]
    return [model.tokenize(" " + part) for part in parts if 20 < len(part) < 400]


def _document(
    model: PopModel, sentences: Sequence[list[int]], n_tokens: int, rng: np.random.Generator
) -> Asked:
    pairs = [f"{adjective} {place}" for adjective in _ADJECTIVES for place in _PLACES]
    places = [str(place) for place in rng.choice(pairs, N_FACTS, replace=False)]
    codes = [str(rng.integers(10 ** (N_DIGITS - 1), 10**N_DIGITS)) for _ in places]
    facts = [
        model.tokenize(" " + _FACT.format(place=place, code=code))
        for place, code in zip(places, codes, strict=True)
    ]
    room = n_tokens - sum(map(len, facts)) - len(model.context.bos)
    if room < n_tokens // 4:
        raise PopError(
            f"{N_FACTS} facts leave no room in a document of {n_tokens} tokens",
            "give longer documents",
            cause="documents-too-short",
        )
    pieces: list[list[int]] = []
    first = int(rng.integers(len(sentences)))
    while room > 0:
        sentence = sentences[(first + len(pieces)) % len(sentences)][:room]
        pieces.append(sentence)
        room -= len(sentence)
    for fact in facts:
        pieces.insert(int(rng.integers(len(pieces) + 1)), fact)
    which = int(rng.integers(N_FACTS))
    question = model.tokenize(_QUESTION.format(place=places[which]))
    document = [token for piece in pieces for token in piece]
    answer = model.tokenize(" " + codes[which])
    return Asked((*model.context.bos, *document, *question), tuple(answer))
