"""Grammars in the engine: what is refused, what holds, and that nothing ends the process."""

import json
from itertools import product

import psutil
import pytest

from pop_local.base.errors import PopError
from pop_local.engine.decode.grammar import GrammarError, Grammars
from support.asked import BOMB
from support.calls import opened
from support.converted import tiny

SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green"]},
        "name": {"type": "string", "maxLength": 5},
        "ripe": {"type": ["boolean", "null"]},
    },
    "required": ["colour", "name", "ripe"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("grammar"))


@pytest.fixture(scope="module")
def model(path):
    with opened(path) as model:
        yield model


def answer(model, **options) -> str:
    return "".join(chunk.text for chunk in model.continue_text("Once upon a time", **options))


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_schema_holds(model, temperature):
    grammar = model.grammars.of_schema(SCHEMA)
    for seed in range(3):
        found = json.loads(answer(model, grammar=grammar, temperature=temperature, seed=seed))
        assert sorted(found) == ["colour", "name", "ripe"]
        assert found["colour"] in ("red", "green")
        assert len(found["name"]) <= 5


def test_the_seed_counts_under_a_grammar(model):
    options = {"grammar": "root ::= [a-z]{30}", "temperature": 1.5}
    text = answer(model, seed=1, **options)
    assert text.isalpha() and len(text) == 30
    model.cache.clear()
    assert answer(model, seed=1, **options) == text
    assert answer(model, seed=2, **options) != text


@pytest.mark.parametrize(
    "text",
    ["", "root", "root ::= nowhere", "other ::= [a]", "root ::= root [a]", 'root ::= "a"\0'],
)
def test_what_is_no_grammar_is_refused(model, text):
    with pytest.raises(GrammarError, match="not valid"):
        model.grammars.check(text)
    with pytest.raises(GrammarError, match="not valid"):
        answer(model, grammar=text)


@pytest.mark.parametrize("text", ["root ::= " + "(" * 9000, f'root ::= "{"a" * 70_000}"'])
def test_a_grammar_beyond_the_parsers_stack_is_refused(model, text):
    with pytest.raises(GrammarError, match="too large"):
        model.grammars.check(text)


@pytest.mark.parametrize("begins", ["", "[ -~]"])
def test_a_grammar_that_takes_too_much_is_refused_and_the_next_one_is_not(path, begins):
    grammars = Grammars(str(path), limit_bytes=32 * 2**20)
    with pytest.raises(GrammarError, match="32 MiB"):
        grammars.check(f'root ::= {begins} a0 "z"\n{BOMB}')
    grammars.check("root ::= [a-z]")
    grammars.close()


def test_a_grammar_that_takes_too_long_is_refused(path):
    grammars = Grammars(str(path), limit_s=1)
    with pytest.raises(GrammarError, match="more than 1 s"):
        grammars.check(f'root ::= a0 "z"\n{BOMB}')
    grammars.close()


def test_what_grows_with_the_answer_ends_it_and_the_model_goes_on(path):
    with opened(path) as model:
        model.grammars = Grammars(str(path), limit_s=1)
        with pytest.raises(GrammarError, match="more than 1 s"):
            answer(model, grammar='root ::= "a" root "b" | "a" root "c"', max_tokens=60)
        assert answer(model, grammar='root ::= "ab"') == "ab"


def test_a_process_that_was_ended_is_replaced(path):
    grammars = Grammars(str(path))
    grammars.check("root ::= [a]")
    child = grammars.take()
    grammars.give_back(child)
    child.close()
    grammars.check("root ::= [a]")
    grammars.close()


def test_a_dead_end_is_an_error_and_the_model_goes_on(model):
    with pytest.raises(GrammarError, match="no token"):
        answer(model, grammar='root ::= "ab" [\\x00]')
    assert answer(model, grammar='root ::= "ab"') == "ab"


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "date"},
        {"type": "string", "minLength": 10**9},
        {"type": "array", "items": {"type": "string", "maxLength": 10**9}},
        {"$ref": "#/nowhere"},
        {"$ref": "https://example.org/schema.json"},
        {"type": "object", "properties": 5},
        {"type": "string", "pattern": "^a{400000000}$"},
        {"items": {"pattern": "^(a{2}){0, 400000000}$"}},
    ],
)
def test_a_schema_that_cannot_be_kept_to_is_refused(model, schema):
    with pytest.raises(PopError, match="JSON schema"):
        model.grammars.of_schema(schema)


def test_what_json_escapes_is_escaped(model):
    for text in ("C:\\dir", "a\nb", 'b"c', "\U0001f600", "tab\t"):
        grammar = model.grammars.of_schema({"const": text})
        assert json.loads(answer(model, grammar=grammar)) == text


def test_no_line_ends_within_a_string(model):
    schemas = (
        {"type": "string", "minLength": 40, "maxLength": 40},
        {"type": "string", "pattern": "^.{40}$"},
    )
    for seed, schema in product(range(3), schemas):
        grammar = model.grammars.of_schema(schema)
        assert json.loads(answer(model, grammar=grammar, temperature=10.0, seed=seed))


def test_a_model_that_is_closed_leaves_no_process(path):
    before = {*psutil.Process().children()}
    with opened(path) as model:
        assert answer(model, grammar='root ::= "ab"') == "ab"
        [child] = {*psutil.Process().children()} - before
        assert answer(model, grammar='root ::= "cd"') == "cd"
        assert {*psutil.Process().children()} - before == {child}, "the first serves the second"
    child.wait(10)
