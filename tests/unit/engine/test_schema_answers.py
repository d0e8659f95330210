"""Answers to realistic JSON schemas are valid by `jsonschema`."""

import pytest

from pop_local.engine.decode.grammar import Grammar
from support.calls import opened
from support.schemas import PIECES, REALISTIC, Answers, wrong
from support.synthetic import make_gguf

N_ANSWERS = 5


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    path = tmp_path_factory.mktemp("answers") / "tiny.gguf"
    with opened(make_gguf(path, "llama", pieces=PIECES)) as model:
        yield Answers(model.engine.token_tries.get())


@pytest.mark.parametrize("name", REALISTIC)
def test_answers_to_a_realistic_schema_are_valid(answers, name):
    schema = REALISTIC[name]
    grammar = Grammar.of_schema(schema)
    assert grammar.ignored == ()
    errors = [wrong(schema, answers.sample(grammar)) for _ in range(N_ANSWERS)]
    assert not any(errors), errors
