"""Look-ups: strict verdicts, shared documents, counts against the full model."""

from dataclasses import replace

import numpy as np
import pytest

from pop_local.engine.engine_options import EngineOptions
from pop_local.engine.model import PopModel
from pop_local.measure import lookups
from pop_local.measure.divergence import likelihood, predictions
from pop_local.measure.forced import FULL, Pruning, forced
from pop_local.measure.lookups import (
    LookupAnswer,
    LookupDocument,
    LookupReference,
    LookupSettings,
    TokenizedQuestion,
    is_right,
    make_documents,
    measure_lookups,
)
from support.converted import tiny

SETTINGS = LookupSettings(n_documents=2, n_per_document=2, n_tokens=500)


def ignored(*_: object) -> None:
    pass


@pytest.fixture(scope="module")
def model(pop_file):
    with PopModel(EngineOptions.of(pop_file, n_ctx=1200, n_threads=1)) as opened:
        yield opened


@pytest.fixture(scope="module")
def documents(model) -> tuple[LookupDocument, ...]:
    return make_documents(model, SETTINGS)


def ask(model: PopModel, documents, pruning: Pruning) -> lookups.Answers:
    return LookupReference(SETTINGS, tuple(documents), []).ask(model, pruning, ignored)


@pytest.mark.parametrize(
    ("n", "n_documents", "n_each"),
    [(1, 1, 1), (20, 1, 20), (30, 2, 15), (100, 5, 20), (200, 10, 20)],
)
def test_questions_are_spread_evenly(n: int, n_documents: int, n_each: int) -> None:
    settings = LookupSettings.of_questions(n)
    assert (settings.n_documents, settings.n_per_document) == (n_documents, n_each)


# --- the verdict on an answer


@pytest.mark.parametrize(
    "text",
    [" 12.50", ' "12.50".', " `12.50`\n99", " the value 12.50, as stated", " 12.50."],
)
def test_exact_string_among_other_words_is_right(text: str) -> None:
    assert is_right(text, "12.50")


@pytest.mark.parametrize(
    "text",
    [
        "",
        " 12.5",
        " 112.50",
        " 12.505",
        " 12.50.3",
        " 3-12.50",
        " 12.50/7",
        " none\n12.50",
        " 12 .50",
    ],
)
def test_parts_later_lines_and_longer_values_are_wrong(text: str) -> None:
    assert not is_right(text, "12.50")


# --- reading


def test_more_documents_follow_the_same_first_ones(model, documents) -> None:
    assert [len(document.questions) for document in documents] == [2, 2]
    assert make_documents(model, replace(SETTINGS, n_documents=3))[:2] == documents
    assert all(
        document.tokens[0] == model.engine.context.vocabulary.bos[0] for document in documents
    )


def test_log_probabilities_equal_those_of_one_full_prompt(model, documents) -> None:
    answers = ask(model, documents, FULL)
    for document, of_document in zip(documents, answers, strict=True):
        for question, answer in zip(document.questions, of_document, strict=True):
            with forced(model) as reader:
                reader.read([*document.tokens, *question.tokens], FULL)
                predicted = predictions(reader.predict(question.answer))
            nll = likelihood(predicted, np.asarray(question.answer)).nll
            assert answer.logprob == pytest.approx(-nll.sum(), rel=1e-3)


def test_skipping_layers_that_add_nothing_loses_no_look_up(tmp_path) -> None:
    with PopModel(EngineOptions.of(tiny(tmp_path, zero_deep=4), n_ctx=1200, n_threads=1)) as idle:
        comparison = measure_lookups(idle, SETTINGS, Pruning(4), ignored)
    assert (comparison.n, comparison.lost, comparison.gained) == (4, 0, 0)
    assert comparison.logprob_lost.value == pytest.approx(0, abs=1e-3)


def test_text_is_greedy_if_the_right_answer_differs(model, documents) -> None:
    document = documents[0]
    question = document.questions[0]
    with forced(model) as reader:
        reader.read([*document.tokens, *question.tokens], FULL)
        greedy = []
        for _ in range(8):
            greedy.append(reader.next_token)
            reader.extend(greedy[-1:])
    text = model.engine.context.vocabulary.detokenize(greedy)
    greedy_question = TokenizedQuestion(
        replace(question.question, answer=text), question.tokens, tuple(greedy)
    )
    [[again]] = ask(model, [replace(document, questions=(greedy_question,))], FULL)
    assert again.text.startswith(text)
    other = replace(greedy_question, answer=(*greedy[:3], (greedy[3] + 1) % 300, *greedy[4:]))
    [[changed]] = ask(model, [replace(document, questions=(other,))], FULL)
    assert changed.text.startswith(text)


def test_reference_gives_the_same_figures_as_one_measurement(model) -> None:
    reference = LookupReference.read(model, SETTINGS, ignored)
    pruned = reference.ask(model, Pruning(5), ignored)
    at_once = measure_lookups(model, SETTINGS, Pruning(5), ignored)
    assert reference.compare(pruned) == at_once
    assert at_once.logprob_lost.value != 0


# --- the comparison


def answers(*rights: bool, logprob: float = -1.0) -> tuple[LookupAnswer, ...]:
    return tuple(LookupAnswer(right, logprob, "") for right in rights)


def test_lost_and_gained_answers_are_counted() -> None:
    full = [answers(True, True), answers(True, False)]
    pruned = [answers(False, True, logprob=-2), answers(True, True, logprob=-4)]
    comparison = LookupReference(SETTINGS, (), full).compare(pruned)
    assert (
        comparison.n,
        comparison.full,
        comparison.pruned,
        comparison.lost,
        comparison.gained,
    ) == (4, 3, 3, 1, 1)
    assert comparison.p == 1.0
    assert comparison.logprob_lost.value == pytest.approx(2)
    assert comparison.logprob_lost.se == pytest.approx(1)


def test_model_without_right_answers_loses_none() -> None:
    comparison = LookupReference(SETTINGS, (), [answers(False)]).compare([answers(False)])
    assert (comparison.lost, comparison.p, comparison.logprob_lost.se) == (0, 1.0, None)
