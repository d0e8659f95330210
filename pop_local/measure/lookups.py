"""Look-ups: questions about exact strings in a document, answered with and without pruning.

The full model and the pruned model each read every synthetic document once. The documents
(`carriers`) use layouts that are not used for fitting. Questions run through all layers, like the
tail of a prompt. Each question ends with the start of its answer, which base models can complete.

An answer is *correct* if the greedy continuation contains the exact string (see `is_right`).
Teacher forcing yields the *log-probability* of the correct string, which is far less noisy than the
number of correct answers.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pop_base.progress import Progress, counting
from pop_local.engine.model import PopModel
from pop_local.measure.compare import mcnemar
from pop_local.measure.divergence import likelihood, predictions
from pop_local.measure.estimate import Estimate, ratio
from pop_local.measure.forced import FULL, Forced, Pruning, forced
from pop_local.measure.heldout import shipped_part
from pop_local.texts.carrier_values import Use
from pop_local.texts.carriers import LookupQuestion, make_carrier

# Maximum number of tokens that a question and its answer add to a document.
_N_AROUND = 256
# Maximum number of tokens that may precede the right answer in a continuation.
_N_LEEWAY = 12


@dataclass(frozen=True)
class LookupSettings:
    """Settings for `n_documents` documents of about `n_tokens` tokens each.

    `n_per_document`: the maximum number of questions about each document.
    """

    n_documents: int = 10
    n_per_document: int = 20
    n_tokens: int = 1024
    seed: int = 0

    @classmethod
    def of_questions(cls, n_questions: int, seed: int = 0) -> "LookupSettings":
        """Return settings for `n_questions` or more questions, the same number in each document."""
        n_documents = -(-n_questions // cls.n_per_document)
        return cls(n_documents, -(-n_questions // n_documents), seed=seed)

    @property
    def n_ctx(self) -> int:
        return self.n_tokens + _N_AROUND


@dataclass(frozen=True)
class TokenizedQuestion:
    """The tokens of a question and of its correct answer. They follow the document's tokens."""

    question: LookupQuestion
    tokens: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class LookupDocument:
    """A document's tokens, starting with BOS, and the questions about it."""

    tokens: tuple[int, ...]
    questions: tuple[TokenizedQuestion, ...]


@dataclass(frozen=True)
class LookupAnswer:
    """An answer to a look-up.

    `logprob`: the correct string's log-probability in nats. `text`: the greedy continuation.
    """

    is_right: bool
    logprob: float
    text: str


# The answers to each document's questions.
Answers = list[tuple[LookupAnswer, ...]]


@dataclass(frozen=True)
class Lookups:
    """The results of look-ups with pruning, compared with the full model's results.

    `full` and `pruned`: how many of the `n` questions each model answers correctly. `lost`: the
    number of questions that only the full model answers correctly. `gained`: the number of
    questions that only the pruned model answers correctly. `p`: the two-sided p-value of McNemar's
    exact test. `logprob_*`: the correct strings' mean log-probability in nats. `logprob_lost`: the
    decrease in log-probability due to pruning. Standard errors are computed from the spread across
    documents.
    """

    n: int
    full: int
    pruned: int
    lost: int
    gained: int
    n_documents: int
    n_tokens: int
    p: float
    logprob_full: Estimate
    logprob_lost: Estimate


def measure_lookups(
    model: PopModel, settings: LookupSettings, pruning: Pruning, on_progress: Progress
) -> Lookups:
    """Answer the questions about each document, once with pruning and once without.

    `on_progress` is called after each question. Raises PopError if a prompt is too long or was not
    pruned as planned.
    """
    reference = LookupReference.read(model, settings, lambda done, n: on_progress(done, 2 * n))
    answers = reference.ask(model, pruning, lambda done, n: on_progress(n + done, 2 * n))
    return reference.compare(answers)


@dataclass(frozen=True)
class LookupReference:
    """The full model's answers, kept for comparison with several pruned versions of the model."""

    settings: LookupSettings
    documents: tuple[LookupDocument, ...]
    full: Answers

    @classmethod
    def read(
        cls, model: PopModel, settings: LookupSettings, on_progress: Progress
    ) -> "LookupReference":
        """Answer each document's questions without pruning. Raises PopError."""
        reference = cls(settings, make_documents(model, settings), [])
        return replace(reference, full=reference.ask(model, FULL, on_progress))

    def ask(self, model: PopModel, pruning: Pruning, on_progress: Progress) -> Answers:
        """Answer each document's questions. Raises PopError."""
        ran = counting(sum(len(it.questions) for it in self.documents), on_progress)
        answers: Answers = []
        with forced(model) as reader:
            for document in self.documents:
                reader.read(document.tokens, pruning)
                answers.append(answer_questions(reader, document.questions, ran))
        return answers

    def compare(self, answers: Answers) -> Lookups:
        """Compare all answers with the full model's answers."""
        rights = [
            (first.is_right, second.is_right)
            for both in zip(self.full, answers, strict=True)
            for first, second in zip(*both, strict=True)
        ]
        lost, gained = rights.count((True, False)), rights.count((False, True))
        n_each = np.array([len(of_document) for of_document in self.full])
        logs = [
            np.array([sum(answer.logprob for answer in of_document) for of_document in by_document])
            for by_document in (self.full, answers)
        ]
        return Lookups(
            n=len(rights),
            full=sum(is_right for is_right, _ in rights),
            pruned=sum(is_right for _, is_right in rights),
            lost=lost,
            gained=gained,
            n_documents=len(self.full),
            n_tokens=self.settings.n_tokens,
            p=mcnemar(lost, gained),
            logprob_full=ratio(logs[0], n_each),
            logprob_lost=ratio(logs[0] - logs[1], n_each),
        )


def make_documents(model: PopModel, settings: LookupSettings) -> tuple[LookupDocument, ...]:
    """Build documents from held-out layouts, words, and prose.

    Increasing `n_documents` only appends documents to the result. Raises PopError if the documents
    are too short for a look-up.
    """
    rng, prose = np.random.default_rng(settings.seed), shipped_part("prose")
    vocabulary = model.engine.context.vocabulary
    documents = []
    for _ in range(settings.n_documents):
        carrier = make_carrier(
            rng,
            prose,
            lambda text: len(vocabulary.tokenize(text)),
            use=Use.HELD_OUT,
            n_tokens=settings.n_tokens,
            n_questions=settings.n_per_document,
        )
        # The document includes the blank line, which most vocabularies merge with a period.
        tokens = (*vocabulary.bos, *vocabulary.tokenize(carrier.text + "\n\n"))
        questions = tuple(_tokenize_question(model, question) for question in carrier.questions)
        documents.append(LookupDocument(tokens, questions))
    return tuple(documents)


def _tokenize_question(model: PopModel, question: LookupQuestion) -> TokenizedQuestion:
    tokens = model.engine.context.vocabulary.tokenize(question.completion)
    whole = model.engine.context.vocabulary.tokenize(f"{question.completion} {question.answer}")
    answer = whole[len(tokens) :]
    if whole[: len(tokens)] != tokens:  # the vocabulary merges the space with the preceding token
        answer = model.engine.context.vocabulary.tokenize(f" {question.answer}")
    return TokenizedQuestion(question, tuple(tokens), tuple(answer))


def is_right(text: str, answer: str) -> bool:
    """Return True if the first line of a continuation contains the exact answer.

    The answer may be enclosed in quotation marks and surrounded by words, but it must not be part
    of a longer value. A letter or digit next to the answer is not allowed, even if one of the
    characters `.,-/@` is in between.
    """
    line = text.strip().split("\n")[0]
    before, after = r"(?<!\w)(?<!\w[-.,/@])", r"(?!\w|[-.,/@]\w)"
    return re.search(f"{before}{re.escape(answer)}{after}", line) is not None


def answer_questions(
    reader: Forced, questions: Sequence[TokenizedQuestion], ran: Callable[[int], None]
) -> tuple[LookupAnswer, ...]:
    """Answer questions about the context in `reader`, and call `ran(1)` after each answer."""
    answers = []
    for question in questions:
        answers.append(_answer(reader, question))
        ran(1)
    return tuple(answers)


def _answer(reader: Forced, question: TokenizedQuestion) -> LookupAnswer:
    with reader.branch():
        reader.extend(question.tokens)
        # The last token is repeated, but not decoded, to get the row that follows the right answer.
        logits = reader.predict((*question.answer, question.answer[-1]))
        predicted = predictions(logits)
        scores = likelihood(predicted, np.asarray((*question.answer, question.answer[-1])))
        n_right = len(question.answer)
        if not (first := scores.is_top1[:-1]).all():
            n_right = int(first.argmin())
        text = _continue(reader, question, n_right, int(predicted.top1[n_right]))
    logprob = -float(scores.nll[:-1].sum())
    return LookupAnswer(is_right(text, question.question.answer), logprob, text)


def _continue(reader: Forced, question: TokenizedQuestion, n_right: int, token: int) -> str:
    """Return the first line of the greedy answer. The answer's first `n_right` tokens are known.

    After a complete correct answer, generates one more token to check whether the value continues.
    """
    model, tokens = reader.model, list(question.answer[:n_right])
    n_most = len(question.answer) + (_N_LEEWAY if n_right < len(question.answer) else 1)
    n_decoded = 0
    while not model.engine.context.vocabulary.is_end(token):
        tokens.append(token)
        text = model.engine.context.vocabulary.detokenize(tokens)
        if len(tokens) >= n_most or "\n" in text.lstrip():
            return text
        reader.extend(tokens[n_decoded:])
        n_decoded, token = len(tokens), reader.next_token
    return model.engine.context.vocabulary.detokenize(tokens)
