"""Which edited prompts reuse stale rows, and which rows the prompt cache stores."""

import numpy as np
import pytest

from pop_local.engine.cache.prompt_cache import PromptCache
from pop_local.engine.prefill.edit import MIN_REUSED
from pop_local.engine.prefill.plan import Reuse
from pop_local.engine.prompt.prompt import Prompt
from support.calls import NOISE, first_of, last_logits, prompt, read, set_rule
from support.converted import tiny
from support.edited_prompts import EDITS, NEW, OLD, pruned


@pytest.mark.parametrize(
    ("options", "rule"),
    [({"full": True}, {}), ({}, {"reuse": Reuse.EXACT}), ({}, {"reuse": Reuse.OFF})],
    ids=["full", "exact", "off"],
)
def test_full_mode_and_options_prevent_stale_rows(pop_file, options, rule):
    tokens = EDITS["a changed line"]
    with pruned(pop_file, **options) as model:
        set_rule(model, **rule)
        read(model, OLD)
        reading = model.read(Prompt(tokens))
        assert reading.n_stale == 0
        assert reading.n_cached == (0 if rule.get("reuse") is Reuse.OFF else 70)
        logits = last_logits(model)
        first_of(model).cache.clear()
        np.testing.assert_allclose(logits, read(model, tokens), atol=NOISE)


@pytest.mark.parametrize(
    "tokens",
    [
        OLD[: MIN_REUSED - 40] + NEW[:20],
        NEW + OLD[:250],
        NEW + prompt(300, seed=2) + OLD[:300],
        OLD[:20] + OLD[400:] + OLD[200:400] + OLD[20:200],
        NEW[:20] + OLD[40:400] + NEW[20:280],
    ],
    ids=["a prefix", "few rows", "less than half", "another order", "less than two thirds"],
)
def test_edits_that_save_little_are_read_normally(pop_file, tokens):
    with pruned(pop_file) as model:
        read(model, OLD)
        assert model.read(Prompt(tokens)).n_stale == 0


def test_prompt_with_fixed_rows_stays_in_prompt_cache(tmp_path):
    path = tiny(tmp_path, "qwen2vl")
    with pruned(path, prompt_cache=PromptCache(2**24)) as model:
        read(model, OLD)
        assert model.read(Prompt(EDITS["a longer first line"])).n_cached == 0
        assert model.read(Prompt([*OLD, 5, 6])).n_cached == len(OLD)


@pytest.mark.parametrize("reuse", [Reuse.EXACT, Reuse.EDITED])
def test_new_conversation_keeps_rows_of_previous_one(pop_file, reuse):
    """The new prompts reuse more than half of the rows, but not the other conversation's end."""
    new_line = NEW[:20] if reuse is Reuse.EDITED else OLD[:20]
    first = OLD + prompt(300, seed=2)
    second = new_line + OLD[20:] + prompt(290, seed=3)
    prompts = PromptCache(2**24)
    with pruned(pop_file, prompt_cache=prompts) as model:
        set_rule(model, reuse=reuse)
        read(model, first)
        assert model.read(Prompt(second)).n_cached > len(first) / 2
        assert model.read(Prompt(first)).counters.n_rows <= 16
        assert model.read(Prompt(second)).counters.n_rows <= 16
        assert prompts.size_bytes <= prompts.capacity_bytes


def test_conversation_that_continues_after_an_edit_is_not_stored(pop_file):
    prompts = PromptCache(2**24)
    with pruned(pop_file, prompt_cache=prompts) as model:
        read(model, OLD)
        for name in ("a changed line", "a removed passage", "an inserted passage"):
            read(model, EDITS[name])
        assert len(prompts) == 0
