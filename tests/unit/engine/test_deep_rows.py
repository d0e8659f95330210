"""Deep rows depend on tokens only, not on batches, sequences or the cache."""

import numpy as np
import pytest

from pop_converter.popfile.format import DeepRows
from pop_local.engine.llama.backend import Mode
from pop_local.engine.prefill.deep_rows import find_deep_rows
from pop_local.engine.prefill.read import append as read_after
from pop_local.engine.prompt.prompt import Prompt
from support.calls import append, first_of, opened, set_rule

TEXT = (
    "The parcel for Selby left at noon; its tracking number is 9f3a77c1, so the driver rang twice. "
    'See parseHeader in src/io_utils and {"port":8080,"host":"alpha"} for the rest of it. '
)


@pytest.fixture
def model(pop_file):
    model = opened(pop_file)
    set_rule(model, deep_rows=DeepRows.SPELLING, min_prompt=0)
    return model


def words(model, text, criterion=DeepRows.SPELLING):
    """Return the words that the deep rows spell."""
    tokens = np.array(model.engine.context.vocabulary.tokenize(text))
    deep = find_deep_rows(model.engine.context, tokens, criterion)
    blank = model.engine.context.vocabulary.tokenize(" ")[0]
    spelled = model.engine.context.vocabulary.detokenize(np.where(deep, tokens, blank).tolist())
    return spelled.split()


def deep_rows(model):
    return full_rows(first_of(model).cache)


def full_rows(cache):
    return np.flatnonzero(cache.is_full[: cache.n_tokens])


def test_identifiers_and_numbers_are_deep(model):
    assert words(model, TEXT) == ["9f3a77c1", "parseHeader", "src/io_utils", ":8080"]


def test_names_are_capitalised_words_within_a_sentence(model):
    text = 'The boat left Selby. "It rang," said Ann Lee, and I saw (Oslo)!\nMoor End: Rome'
    assert words(model, text, DeepRows.NAMES) == ["Selby", "Ann", "Lee", "Oslo", "End", "Rome"]
    assert words(model, text) == []


def test_long_word_takes_linear_time(model):
    assert words(model, "a" * 200_000) == []


@pytest.mark.parametrize("n_batch", [16, 64, 1024])
def test_selection_does_not_depend_on_the_batch(pop_file, model, n_batch):
    tokens = model.engine.context.vocabulary.tokenize(3 * TEXT)
    append(model, tokens)
    other = opened(pop_file, n_batch=n_batch, n_ubatch=n_batch)
    set_rule(other, **vars(first_of(model).rule))
    append(other, tokens)
    np.testing.assert_array_equal(deep_rows(other), deep_rows(model))
    assert (
        first_of(model).cache.slot.counters.n_deep
        == first_of(other).cache.slot.counters.n_deep
        > 10
    )


def test_continued_prompt_keeps_deep_rows(pop_file, model):
    tokens = model.engine.context.vocabulary.tokenize(3 * TEXT)
    append(model, tokens)
    whole = deep_rows(model)
    for cut in (20, 61, 100):  # 61 is within a deep word
        other = opened(pop_file)
        set_rule(other, **vars(first_of(model).rule) | {"tail_tokens": 0})
        other.read(Prompt(tokens[:cut]))
        other.read(Prompt(tokens))
        assert set(whole) - set(deep_rows(other)) <= set(range(len(tokens) - 32, len(tokens)))


def test_each_sequence_has_its_own_deep_rows(pop_file, model):
    tokens = model.engine.context.vocabulary.tokenize(3 * TEXT)
    append(model, tokens)
    several = opened(pop_file, n_parallel=2)
    for cache in [sequence.cache for sequence in several.engine.sequences]:
        read_after(cache, Prompt(tokens), first_of(model).rule)
        np.testing.assert_array_equal(full_rows(cache), deep_rows(model))


def test_restored_cache_is_reused_with_its_deep_rows(pop_file, model):
    tokens = model.engine.context.vocabulary.tokenize(3 * TEXT)
    model.read(Prompt(tokens))
    other = opened(pop_file)
    set_rule(other, **vars(first_of(model).rule))
    first_of(other).states.restore(first_of(model).states.save())
    assert other.read(Prompt([*tokens, *tokens[:40]])).n_cached == len(tokens)


def test_new_rule_rereads_pruned_rows(model):
    tokens = model.engine.context.vocabulary.tokenize(3 * TEXT)
    set_rule(model, deep_rows=DeepRows.NONE)
    model.read(Prompt(tokens))
    set_rule(model, deep_rows=DeepRows.SPELLING)
    deep = find_deep_rows(model.engine.context, np.array(tokens), DeepRows.SPELLING)
    first = int(np.flatnonzero(deep)[0])
    assert model.read(Prompt([*tokens, *tokens])).n_cached == first


def test_full_mode_counts_no_deep_rows(model):
    model.engine.set_mode(Mode.OFF)
    append(model, model.engine.context.vocabulary.tokenize(TEXT))
    assert first_of(model).cache.slot.counters.n_deep == 0
