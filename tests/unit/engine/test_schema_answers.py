"""Answers to realistic and random JSON schemas are valid by `jsonschema`."""

import os
from contextlib import suppress
from random import Random
from typing import Any

import pytest

from pop_local.engine.decode.grammar import Grammar, GrammarError
from support.calls import opened
from support.schemas import PIECES, REALISTIC, Answers, random_schema, wrong
from support.synthetic import make_gguf

# The whole campaign uses 2,000 and 200.
N_SCHEMAS = int(os.environ.get("POP_TEST_SCHEMAS", "60"))
N_ANSWERS = int(os.environ.get("POP_TEST_ANSWERS", "5"))


def answered(schema: Any, answers: Answers, n: int) -> None:
    grammar = Grammar.of_schema(schema)
    assert grammar.ignored == ()
    found = [wrong(schema, answers.sample(grammar)) for _ in range(n)]
    assert [one for one in found if one] == []


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    path = tmp_path_factory.mktemp("answers") / "tiny.gguf"
    with opened(make_gguf(path, "llama", pieces=PIECES)) as model:
        yield Answers(model.engine.token_tries.get())


@pytest.mark.parametrize("name", REALISTIC)
def test_answers_to_a_realistic_schema_are_valid(answers, name):
    answered(REALISTIC[name], answers, N_ANSWERS)


def test_answers_to_random_schemas_are_valid(answers):
    n_tried = 0
    for seed in range(N_SCHEMAS):
        schema = random_schema(Random(seed))
        with suppress(GrammarError):  # some schemas accept no value
            Grammar.of_schema(schema)
            answered(schema, answers, N_ANSWERS)
            n_tried += 1
    assert n_tried > 0.97 * N_SCHEMAS
