"""Test documents for look-ups: answers occur once, and the two uses share no words."""

from collections import Counter
from dataclasses import fields

import numpy as np
import pytest

from pop_base.errors import PopError
from pop_local.measure.heldout import shipped_part
from pop_local.texts.carrier_layouts import LAYOUTS
from pop_local.texts.carrier_values import KINDS, Use, words
from pop_local.texts.carriers import Carrier, make_carrier, with_answers


def _n_tokens(text: str) -> int:
    return len(text) // 3


def _carriers(use: Use, n: int = 5, n_tokens: int = 1024) -> list[Carrier]:
    rng = np.random.default_rng(7)
    prose = shipped_part("prose")
    return [
        make_carrier(rng, prose, _n_tokens, use=use, n_tokens=n_tokens, n_questions=20)
        for _ in range(n)
    ]


@pytest.mark.parametrize("use", Use)
def test_answers_and_subjects_are_unique(use: Use) -> None:
    for carrier in _carriers(use):
        assert len({question.question for question in carrier.questions}) == 20
        assert all(carrier.text.count(question.answer) == 1 for question in carrier.questions)


@pytest.mark.parametrize("use", Use)
def test_documents_have_the_requested_size_and_half_prose(use: Use) -> None:
    for carrier in _carriers(use):
        assert 0.9 * 1024 < _n_tokens(carrier.text) < 1.1 * 1024
        prose = sum(
            len(part)
            for part in carrier.text.split("\n\n")
            if " ".join(part.split())[:60] in " ".join(shipped_part("prose").split())
        )
        assert 0.35 < prose / len(carrier.text) < 0.65


@pytest.mark.parametrize("use", Use)
def test_questions_cover_all_kinds_and_layouts(use: Use) -> None:
    questions = [question for carrier in _carriers(use, 10) for question in carrier.questions]
    kinds = Counter(question.kind for question in questions)
    assert set(kinds) == set(KINDS)
    assert min(kinds.values()) > 8
    assert {question.layout for question in questions} == set(LAYOUTS[use])


def test_fitting_and_measuring_share_no_layout_word_or_value() -> None:
    assert not set(LAYOUTS[Use.FITTING]) & set(LAYOUTS[Use.HELD_OUT])
    fitting, held_out = words(Use.FITTING), words(Use.HELD_OUT)
    for field in fields(fitting):
        first, second = getattr(fitting, field.name), getattr(held_out, field.name)
        if isinstance(first, dict):
            first = [each for key in first for each in first[key]]
            second = [each for key in second for each in second[key]]
        assert not set(first) & set(second) if isinstance(first, tuple | list) else first != second
    answers = [
        {question.answer for carrier in _carriers(use) for question in carrier.questions}
        for use in Use
    ]
    assert not answers[0] & answers[1]


def test_documents_depend_on_the_seed_alone() -> None:
    assert _carriers(Use.HELD_OUT) == _carriers(Use.HELD_OUT)
    assert len({carrier.text for carrier in _carriers(Use.HELD_OUT)}) == 5


def test_answers_for_training_are_located_by_character() -> None:
    carrier = _carriers(Use.FITTING, 1)[0]
    text, spans = with_answers(carrier)
    assert text.startswith(carrier.text)
    texts = [text[start:end] for start, end in spans]
    assert texts == [question.answer for question in carrier.questions]
    assert all(text[start - 1] == " " for start, _ in spans)


def test_short_documents_have_fewer_questions() -> None:
    assert 0 < len(_carriers(Use.HELD_OUT, 1, 300)[0].questions) < 20
    with pytest.raises(PopError, match="too short for a look-up") as caught:
        _carriers(Use.HELD_OUT, 1, 20)
    assert caught.value.hint
