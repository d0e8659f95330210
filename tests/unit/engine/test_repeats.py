"""Detection of answers that repeat themselves."""

import re

import pytest

from pop_local.engine.decode.repeats import Repeats
from pop_local.engine.decode.sampler import Sampler
from support.conversations import opened
from support.program import called

SENTENCE = "The ferry leaves the pier at half past six in the morning. "
CODE = (
    "    if value is None and other is not None:\n        raise ValueError('no value is given!')\n"
)


def n_before(text: str) -> int | None:
    """Return the number of words and marks before the end, or None."""
    guard, pieces = Repeats(), re.findall(r"\s*\w+|\s*[^\w\s]|\s+", text)
    ended = (n for n, piece in enumerate(pieces, 1) if guard.push(hash(piece), piece.encode()))
    return next(ended, None)


@pytest.mark.parametrize(
    ("begun", "sentence"),
    [
        ("", SENTENCE),
        ("Well: ", SENTENCE),
        ("", 'The cat is named "Otter". '),
        ("", "The offer was 1,840 euros. "),
        ("", "I do not know. " * 2 + SENTENCE),
        ("", SENTENCE * 4),
    ],
)
def test_repeating_sentence_ends_the_answer(begun, sentence):
    n_tokens = n_before(begun + sentence * 60)
    assert n_tokens is not None and 128 < n_tokens < 300


@pytest.mark.parametrize(
    "text",
    [
        "id,name,price\n" + "7,apple,1.25\n" * 40,
        "7, " * 100,
        "7\n" * 100,
        "7. 8. 9. " * 60,
        "hello " * 50,
        "| a | b | c |\n|---|---|---|\n" + "| the same row | of a table | 1.0 |\n" * 40,
        CODE * 20,
        SENTENCE * 8,
        "".join(f"{n}. {SENTENCE}\n" for n in range(60)),
        "=" * 200,
    ],
)
def test_legitimate_repetition_continues(text):
    assert n_before(text) is None


def test_any_repetition_ends_eventually():
    n_tokens = n_before("7, " * 1000)
    assert n_tokens is not None and n_tokens < 600


@pytest.mark.parametrize(("command", "text"), [("run", "Go on"), ("chat", "Go on\n")])
def test_command_reports_repeating_answer(smollm2_pop, monkeypatch, command, text):
    with opened(smollm2_pop) as model:
        tokens = iter(model.engine.context.vocabulary.tokenize(SENTENCE * 40))
    monkeypatch.setattr(Sampler, "sample", lambda self, logits: next(tokens))
    done = called(command, smollm2_pop, "--threads", 1, "--ctx", 1024, text=text)
    assert done.returncode == 0
    assert 8 < done.stdout.count("half past six") < 14
    assert "tokens/s · the answer repeated itself" in done.stderr
