"""Edited prompts with pictures: rows are reused after an edit only if it follows all pictures."""

import random
import string

import pytest

from pop_local.engine.chat_messages import Message
from pop_local.engine.images.pictures import picture_of
from pop_local.engine.model import PopModel
from pop_local.engine.prefill.edit import MIN_REUSED
from pop_local.engine.prompt.prompt import Prompt
from support.calls import first_of, kv_bytes
from support.vision_models import VisionModel, answered, image_start, png


def words(n: int, seed: int = 0) -> str:
    return " ".join(random.Random(seed).choices(string.ascii_lowercase, k=n))


BEFORE, AFTER = words(100), words(400, seed=1)
MROPE = ("qwen2vl", "qwen3vl")


def opened(vision_model: VisionModel) -> PopModel:
    return vision_model.opened(n_ctx=2048, keep_states=True)


def prompt_of(model: PopModel, before: str, after: str, *seeds: int) -> Prompt:
    """Return a prompt that shows noise images between two texts."""
    pictures = tuple((len(before), picture_of(png(seed), f"{seed}.png")) for seed in seeds)
    return model.engine.prompter.conversation([Message("user", before + after, pictures)])


def first_change(old: Prompt, new: Prompt) -> int:
    pairs = zip(old.tokens, new.tokens, strict=False)
    return next(row for row, (before, after) in enumerate(pairs) if before != after)


def test_edit_after_a_picture_reuses_rows(vision_model):
    edited = AFTER[:40] + words(30, seed=2) + AFTER[60:]
    with opened(vision_model) as model, opened(vision_model) as full:
        model.read(prompt_of(model, BEFORE, AFTER, 3))
        tokens = prompt_of(model, BEFORE, edited, 3)
        reading = model.read(tokens)
        cache, refiller = first_of(model).cache, first_of(model).refiller
        assert (reading.n_stale > MIN_REUSED) == (vision_model.arch not in MROPE)
        assert len(cache.images) == len(tokens.images)
        # A deep pass is causal, but the rows of Gemma's images attend to each other.
        if vision_model.arch == "llama":
            refiller.refill()
            assert cache.n_exact == len(tokens)
            full.pruning = False
            full.read(prompt_of(full, BEFORE, edited, 3))
            assert kv_bytes(model) == kv_bytes(full)


@pytest.mark.parametrize("seed", [3, 4], ids=["before the picture", "another picture"])
def test_rereads_edited_image_from_first_change(vision_model, seed):
    before = words(5, seed=2) + BEFORE[9:] if seed == 3 else BEFORE
    with opened(vision_model) as model, opened(vision_model) as fresh:
        old = prompt_of(model, BEFORE, AFTER, 3)
        model.read(old)
        tokens = prompt_of(model, before, AFTER, seed)
        start = image_start(tokens) if seed == 4 else first_change(old, tokens)
        answer, n_read = answered(model, tokens)
        assert n_read == len(tokens) - start
        assert answer == answered(fresh, prompt_of(fresh, before, AFTER, seed))[0]


def test_rows_after_a_removed_picture_are_reused(smol):
    with opened(smol) as model, opened(smol) as full:
        model.read(prompt_of(model, BEFORE, AFTER, 3))
        tokens = prompt_of(model, BEFORE, AFTER)
        reading = model.read(tokens)
        assert reading.n_stale > MIN_REUSED
        assert not first_of(model).cache.images
        first_of(model).refiller.refill()
        full.pruning = False
        full.read(prompt_of(full, BEFORE, AFTER))
        assert kv_bytes(model) == kv_bytes(full)
