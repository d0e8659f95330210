"""Grammars: constraints hold, errors are refused, and no input ends the process."""

import json
import time
from contextlib import suppress
from functools import partial

import pytest

from pop_local.engine.decode.gbnf import lark_of
from pop_local.engine.decode.grammar import Grammar, GrammarError
from pop_local.engine.decode.grammar_mask import Constraint
from pop_local.engine.llama.vocabulary import Pieces
from support.calls import N_VOCAB, continued, first_of, opened, read
from support.grammars import accepts, require_cheap
from support.server_requests import BOMB

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
EOS = 2
DEAD_END = 'root ::= "ab" x\nx ::= x "c"'


@pytest.fixture(scope="module")
def model(pop_file):
    with opened(pop_file) as model:
        yield model


@pytest.fixture(scope="module")
def trie(model):
    return model.engine.token_tries.get()


def answer(model, **options) -> str:
    return "".join(chunk.text for chunk in continued(model, "Once upon a time", **options))


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_schema_is_enforced(model, temperature):
    grammar = Grammar.of_schema(SCHEMA)
    for seed in range(3):
        value = json.loads(answer(model, grammar=grammar, temperature=temperature, seed=seed))
        assert sorted(value) == ["colour", "name", "ripe"]
        assert value["colour"] in ("red", "green")
        assert len(value["name"]) <= 5


def test_seed_affects_answers_with_a_grammar(model):
    options = {"grammar": "root ::= [a-z]{30}", "temperature": 1.5}
    text = answer(model, seed=1, **options)
    assert text.isalpha() and len(text) == 30
    first_of(model).cache.clear()
    assert answer(model, seed=1, **options) == text
    assert answer(model, seed=2, **options) != text


def test_greedy_sampling_takes_the_most_likely_allowed_token(model, trie):
    first_of(model).cache.clear()
    text = answer(model, grammar="root ::= [b-y]", temperature=0.0)
    first_of(model).cache.clear()
    logits = read(model, model.engine.context.vocabulary.tokenize("Once upon a time", add_bos=True))
    allowed = Constraint(trie, Grammar.of_gbnf("root ::= [b-y]")).allowed()
    best = int(allowed[logits[allowed].argmax()])
    assert text.encode() == trie.decode_bytes([best])


# --- GBNF semantics


@pytest.mark.parametrize(
    ("gbnf", "right", "wrong"),
    [
        ('root ::= "a" "b" | "ab" "c"', ["ab", "abc"], ["a", "c"]),
        ('root ::= word "b"\nword ::= [a-z]+', ["ab", "abb"], ["b", "a"]),
        ('root ::= ("a" | b){2,3} # two\nb ::= "b"\n', ["ab", "aba"], ["a", "abab"]),
        ('root ::=\n  "a"? |\n  ("b" "c")*', ["", "a", "bcbc"], ["b", "aa"]),
        ('root ::= "\\u00e9" [\\x41-C] [^\\]\\n] .', ["éAa\n", "éC[é"], ["éDaa", "éA]a"]),
        (r'root ::= [a&&b] [-z] "\\\"\t/é"', ['&-\\"\t/é', 'az\\"\t/é'], ["ab"]),
        ('root ::= "(" root ")" | "x"', ["x", "((x))"], ["(x", "()"]),
        ('root ::= [a-z] root | ""', ["", "abc"], ["1"]),
        ('root ::= root "a" | "b"', ["b", "baa"], ["ab"]),
        ('root ::= a\na ::= "x" b | "y"\nb ::= a a', ["y", "xyy", "xxyyy"], ["x", "xy"]),
        ('start ::= "a"\nroot ::= start if\nif ::= | "b"', ["a", "ab"], ["b"]),
        ("root ::= a{2}\na ::= [ab]{1,}", ["ab", "aaaa"], ["a"]),
    ],
)
def test_gbnf_has_llama_cpps_semantics(trie, gbnf, right, wrong):
    grammar = Grammar.of_gbnf(gbnf)
    assert [text for text in right if not accepts(trie, grammar, text)] == []
    assert [text for text in wrong if accepts(trie, grammar, text)] == []


@pytest.mark.parametrize(
    "text",
    [
        *("", "root", "root ::= nowhere", "other ::= [a]", 'root ::= "a"\0', 'root ::= "\\d"'),
        *("root ::= *", 'root ::= "a', "root ::= (", "root ::= []", 'root ::= a ::= "a"'),
        *('root ::= "a"\nroot ::= "b"', 'root ::= "\ud800"', "root ::= " + "(" * 9000),
    ],
)
def test_invalid_grammar_is_refused(model, text):
    with pytest.raises(GrammarError, match="not valid"):
        Grammar.of_gbnf(text)
    with pytest.raises(GrammarError, match="not valid"):
        answer(model, grammar=text)


def chained(n_rules: int) -> str:
    rules = [f"r{number} ::= r{number + 1}" for number in range(n_rules)]
    return "\n".join(["root ::= r0", *rules, f'r{n_rules} ::= "a"'])


@pytest.mark.parametrize("n_rules", [4_000, 20_000])
def test_long_chain_of_rules_is_translated_quickly(n_rules):
    """Translation took 6 s for 4,000 rules, and 91 s for 20,000."""
    started_s = time.process_time()
    with suppress(GrammarError):
        Grammar.of_gbnf(chained(n_rules))
    assert time.process_time() - started_s < 1


def test_translation_takes_linear_time():
    started_s = time.process_time()
    assert lark_of(chained(9_000), {}).count("R") > 9_000
    assert time.process_time() - started_s < 3


def test_number_of_rules_and_size_are_limited():
    with pytest.raises(GrammarError, match="there are 10,003 rules, but the limit is 10,000"):
        Grammar.of_gbnf(chained(10_001))
    with pytest.raises(GrammarError, match="the grammar is too large: 2,000,011 characters"):
        Grammar.of_gbnf(f'root ::= "{"a" * 2_000_000}"')


@pytest.mark.parametrize(
    "text",
    [
        f'root ::= a0 "z"\n{BOMB}',
        f'root ::= [ -~] a0 "z"\n{BOMB[:-2]}"a"',
        'root ::= "a" root "b" | "a" root "c"',
        'root ::= x\nx ::= x x | "a" | ""',
        'root ::= ("a"? "b"?){0,60000}',
        'root ::= (("a"{0,1000}){0,1000}){0,1000} | "(" root ")"',
        'root ::= "a"{400000000}',
        f'root ::= "{"a" * 70_000}" | "(" root ")"',
        f'root ::= "{"a" * 2_000_000}"',
    ],
    ids=range(9),
)
def test_large_grammar_is_compiled_in_seconds(model, trie, text):
    require_cheap(trie, partial(Grammar.of_gbnf, text))
    assert answer(model, grammar='root ::= "ab"') == "ab"


def test_grammar_dead_end_leaves_model_usable(model):
    with pytest.raises(GrammarError, match="no token"):
        answer(model, grammar=DEAD_END)
    assert answer(model, grammar='root ::= "ab"') == "ab"


# --- the vocabulary


def test_trie_tokens_equal_their_bytes(model, trie):
    pieces = Pieces(model.engine.context.vocabulary)
    ends = {token for token in range(N_VOCAB) if not pieces[token]}
    # UTF-8 never contains the byte FF.
    ordinary = [token for token in range(N_VOCAB) if pieces[token] not in (b"", b"\xff")]
    assert [trie.decode_bytes([token]) for token in ordinary] == [
        pieces[token] for token in ordinary
    ]
    assert trie.eos_tokens == [EOS]
    anything = Constraint(trie, Grammar.of_gbnf("root ::= .*"))
    assert not {*anything.allowed()} & (ends - {EOS})


def test_characters_of_several_tokens_are_accepted_whole(trie):
    constraint = Constraint(trie, Grammar.of_gbnf('root ::= [é-ê] "x"'))
    for byte in "é".encode():
        pieces = [trie.decode_bytes([token]) for token in constraint.allowed()]
        assert bytes([byte]) in pieces and b"x" not in pieces
        constraint.accept(int(constraint.allowed()[pieces.index(bytes([byte]))]))
    assert {trie.decode_bytes([token]) for token in constraint.allowed()} == {b"x"}


def test_vocabulary_is_cached_after_closing_the_model(pop_file):
    with opened(pop_file) as model:
        trie = model.engine.token_tries.get()
        assert model.engine.token_tries.get() is trie
    constraint = Constraint(trie, Grammar.of_gbnf('root ::= "ab"'))
    assert len(constraint.allowed()) >= 1
