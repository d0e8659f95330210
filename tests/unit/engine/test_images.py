"""Pictures in prompts on tiny models of each kind: prefill, reuse, stops, errors."""

import ctypes
import gc
import signal
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from pop_base.errors import PopError, StoppedError
from pop_local.engine.answer import ContextFullError
from pop_local.engine.chat_messages import Message
from pop_local.engine.images.mmproj import ImageChunk
from pop_local.engine.images.pictures import picture_of
from pop_local.engine.llama import backend
from pop_local.engine.llama.backend import Mode
from pop_local.engine.llama.batch import Outputs, TokenBatch
from pop_local.engine.llama.interrupt import stopped_by
from pop_local.engine.model import PopModel
from pop_local.engine.prefill.plan import RowRule, plan_prefill
from pop_local.engine.prompt.prompt import Prompt
from support.calls import first_of, set_rule
from support.vision_models import (
    LONG,
    MMPROJS,
    PARTS_TEMPLATE,
    VisionModel,
    answered,
    append,
    image_end,
    image_start,
    make_mmproj,
    make_vision_model,
    png,
    prompt,
)


def test_reuses_cached_image_and_reads_new_one(vision_model):
    with vision_model.opened() as model, vision_model.opened() as fresh:
        # A longer tail than the text after the picture.
        set_rule(model, tail_tokens=32)
        set_rule(fresh, tail_tokens=32)
        first = prompt(model, LONG, 3)
        answer, n_read = answered(model, first)
        assert n_read == len(first)
        assert answered(model, first) == (answer, 1)

        other = prompt(model, LONG, 4)
        start = image_start(first)
        assert other.tokens[:start] == first.tokens[:start]
        other_answer, n_read = answered(model, other)
        assert n_read == len(other) - start
        assert other_answer == answered(fresh, prompt(fresh, LONG, 4))[0]
        assert answered(model, first)[0] == answer

        # Only text is in the tail, so no row of the picture is read again.
        short = prompt(model, "a b", 3)
        short_answer, n_read = answered(model, short)
        assert n_read <= len(short) - image_end(short)
        first_of(fresh).cache.clear()
        assert short_answer == answered(fresh, prompt(fresh, "a b", 3))[0]


def test_conversation_reuses_pictures(vision_model):
    with vision_model.opened() as model:
        session = model.session()
        options = {"temperature": 0.0, "max_tokens": 3}
        first = session.chat("a b c", images=[png(3)], **options).stats
        second = session.chat("d e f", images=[png(4), png(5)], **options).stats
        assert second.n_image == 3 * first.n_image > 0
        assert second.n_cached >= first.n_prompt - 1
        assert first.encode_s > 0 and second.encode_s > 0
        assert second.n_pruned >= 2 * first.n_image
        assert second.n_prompt == second.n_cached + second.n_pruned + second.n_full
        third = session.chat("g", **options).stats
        assert third.n_image == second.n_image and third.encode_s == 0


def test_image_has_libmtmds_rows(vision_model):
    with vision_model.opened() as model:
        tokens = prompt(model, "a b c d", 3)
        append(model, tokens)
        expected = logits(model)
        read_raw(model, tokens)
        np.testing.assert_array_equal(logits(model), expected)


def logits(model: PopModel) -> np.ndarray:
    return model.engine.context.logits().copy()


def read_raw(model: PopModel, tokens: Prompt) -> None:
    """Decode a prompt like the engine, but its images like libmtmd."""
    context = model.engine.context
    plan = plan_prefill(0, len(tokens), first_of(model).rule, context.n_batch, tokens.spans)
    first_of(model).cache.slot.clear()
    batch = TokenBatch(context.n_batch)
    pos = 0
    backend.set_reading(context.ctx, backend.Reading.SOME)
    for start, end in plan.chunks:
        if start in tokens.images:
            pos += decode_raw(model, tokens.images[start], pos)
            continue
        outputs = Outputs.LAST if end == len(tokens) else Outputs.NONE
        assert batch.decode(context.ctx, tokens.tokens[start:end], pos, outputs) == 0
        pos += end - start
    batch.close()


def decode_raw(model: PopModel, image: ImageChunk, pos: int) -> int:
    """Decode an image like libmtmd."""
    vision, context = model.engine.vision, model.engine.context
    assert vision is not None
    vision.embedded(image)
    mtmd, after = vision._mtmd, ctypes.c_int32()
    code = mtmd.mtmd_helper_decode_image_chunk(
        *(vision._ctx, context.ctx, vision._cut_up(image.picture)[image.number]),
        *(mtmd.mtmd_get_output_embd(vision._ctx), pos, 0, context.n_batch, ctypes.byref(after)),
        *(mtmd.mtmd_helper_post_decode_callback(0), None),
    )
    assert code == 0 and after.value == pos + image.n_pos
    return image.n_pos


def test_reading_a_picture_can_be_stopped(vision_model):
    """A stop during encoding or decoding leaves the model unchanged."""
    with vision_model.opened() as model:
        tokens = prompt(model, LONG, 3)
        expected = answered(model, tokens)
        for n_calls in (1, 3, 6, 12):
            first_of(model).cache.clear()
            left = iter([False] * n_calls)
            with stopped_by(partial(next, left, True)), pytest.raises(StoppedError):
                append(model, tokens)
            at = first_of(model).cache.n_tokens
            assert not any(begin < at < end for begin, end in tokens.spans), "half an image"
            assert answered(model, tokens)[0] == expected[0]


@pytest.mark.parametrize("how", ["a signal", "an exception"])
def test_ctrl_c_stops_encoding(smol, how):
    with smol.opened() as model:
        tokens = prompt(model, LONG, 3)
        expected = answered(model, tokens)[0]
        first_of(model).cache.clear()

        def pressed() -> bool:
            if first_of(model).cache.n_tokens > 0:
                if how == "an exception":
                    raise KeyboardInterrupt
                signal.raise_signal(signal.SIGINT)
            return False

        with stopped_by(pressed), pytest.raises(KeyboardInterrupt):
            append(model, tokens)
        assert first_of(model).cache.n_tokens == image_start(tokens)
        assert answered(model, tokens)[0] == expected


def test_incomplete_encoding_is_not_reused(smol):
    with smol.opened() as model:
        tokens = prompt(model, "a b", 3)
        image = next(iter(tokens.images.values()))
        left = iter([False, True])
        with stopped_by(partial(next, left, False)), pytest.raises(StoppedError):
            model.engine.vision.embedded(image)


def test_rows_of_a_stopped_picture_are_not_saved(smol):
    with smol.opened(n_ubatch=8) as model:
        tokens = prompt(model, LONG, 3)
        n_left = 0
        for when in range(0, 400, 10):
            first_of(model).cache.clear()
            left = iter([False] * when)
            with stopped_by(partial(next, left, True)), pytest.raises(StoppedError):
                append(model, tokens)
            cache = first_of(model).cache
            n_left += cache.slot.end_position > cache.positions[cache.n_tokens]
            first_of(model).states.restore(first_of(model).states.save())
        assert n_left, "the stop came between two ubatches"


def test_frees_image_chunks_and_mmproj(smol):
    """Chunks take megabytes each, so the model keeps only one, despite prompts with its ids."""
    n_held, n_freed = 0, 0

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        def mtmd_input_chunks_init(self) -> Any:
            nonlocal n_held
            n_held += 1
            return real.mtmd_input_chunks_init()

        def mtmd_input_chunks_free(self, chunks: Any) -> None:
            nonlocal n_held
            n_held -= 1
            real.mtmd_input_chunks_free(chunks)

        def mtmd_free(self, ctx: Any) -> None:
            nonlocal n_freed
            n_freed += 1
            real.mtmd_free(ctx)

    model = smol.opened()
    real = model.engine.prompter.open_vision()._mtmd
    model.engine.vision._mtmd = Counting()
    tokens = prompt(model, "a b", 3, 4, 5)
    assert n_held == 1
    answer = answered(model, tokens)[0]
    first_of(model).cache.clear()
    assert answered(model, tokens)[0] == answer and n_held == 1
    del model
    gc.collect()
    assert (n_held, n_freed) == (0, 1)


def test_closed_model_refuses_pictures(smol):
    model = smol.opened()
    vision = model.engine.vision
    prompt(model, "a", 3)
    model.close()
    for picture in (picture_of(png(3), "known"), picture_of(png(4), "other")):
        with pytest.raises(PopError, match="is closed"):
            model.engine.prompter.count_picture(picture)
        with pytest.raises(PopError, match="is closed"):
            vision.see(picture)


def test_rows_of_another_mmproj_are_not_reused(smol, tmp_path):
    other = make_mmproj(tmp_path / "mmproj.gguf", replace(MMPROJS["llama"], seed=2))
    with smol.opened() as model, smol.opened(mmproj=other) as another:
        first, same = prompt(model, "a", 3), prompt(another, "a", 3)
        assert first.tokens == same.tokens
        keys = [{image.key for image in tokens.images.values()} for tokens in (first, same)]
        assert not keys[0] & keys[1]


def test_picture_that_exceeds_the_context_is_refused(vision_model):
    with vision_model.opened(n_ctx=256) as model:
        with pytest.raises(ContextFullError, match="too many"):
            model.chat(LONG, images=[png(seed) for seed in range(6)], max_tokens=4)
        assert model.chat("a", max_tokens=1, temperature=0.0).stats.n_decoded == 1


def test_refills_causal_pictures(vision_model):
    """Refilled rows equal the full model's. Non-causal and multi-position rows are not refilled."""
    if vision_model.arch.startswith("qwen"):
        with vision_model.opened(keep_states=True) as model:
            assert model.chat(LONG, images=[png(3)], max_tokens=4).stats.n_refilled == 0
    with vision_model.opened(keep_states=True, flash_attn=False) as model:
        tokens = prompt(model, LONG, 3)
        append(model, tokens)
        if vision_model.arch != "llama":
            assert first_of(model).refiller.n_refillable == 0
            return
        assert first_of(model).refiller.refill() == len(tokens)
        refilled = answered(model, tokens)[0]
        model.engine.set_mode(Mode.OFF)
        first_of(model).cache.clear()
        assert append(model, tokens).counters.n_context == 0
        assert answered(model, tokens)[0] == refilled


def test_picture_is_never_split(smol):
    """Rereading only the last token of a prompt would split a picture at its end."""
    with smol.opened() as model:
        tokens = prompt(model, LONG, 3)
        expected = answered(model, tokens)[0]
        with pytest.raises(PopError, match="ends with an image"):
            answered(model, replace(tokens, tokens=tokens.tokens[: image_end(tokens)]))
        assert first_of(model).cache.n_tokens in tokens.images
        assert answered(model, tokens)[0] == expected


def test_prompt_with_a_picture_is_not_short(smol):
    with smol.opened() as model:
        set_rule(model, tail_tokens=256)
        stats = model.chat("a b", images=[png(3)], max_tokens=1).stats
        assert stats.n_pruned > 0 and not stats.is_short
        assert model.chat("a b", max_tokens=1).stats.is_short


def test_rejects_non_causal_image_larger_than_ubatch(tmp_path):
    vision_model = VisionModel("gemma3", make_vision_model(tmp_path, "gemma3"))
    with vision_model.opened(n_ubatch=32) as model:
        with pytest.raises(PopError, match="64 tokens must fit in one ubatch"):
            model.chat("a", images=[png(3)], max_tokens=1)
        assert first_of(model).cache.n_tokens == 0, "the text before the image was not read"
        assert model.chat("a", max_tokens=1).stats.n_decoded == 1


# Templates and image markers in messages


def test_templates_accept_parts_or_strings(smol, tmp_path):
    parts = VisionModel("llama", make_vision_model(tmp_path, "llama", template=PARTS_TEMPLATE))
    with smol.opened() as model, parts.opened() as other:
        assert prompt(model, "a b", 3, 4) == prompt(other, "a b", 3, 4)
        assert prompt(model, "a b") == prompt(other, "a b")


@pytest.mark.parametrize("text", ["<__media__>", "\U000f0000", "<|vision_start|>", "<|im_end|>"])
def test_special_token_in_message_is_text(smol, text):
    with smol.opened() as model:
        tokens, plain = prompt(model, f"a {text} b", 3), prompt(model, "a b", 3)
        assert [*tokens.images.values()] == [*plain.images.values()]
        vocabulary = model.engine.context.vocabulary
        is_special = model.engine.prompter._special._is_special
        special = filter(is_special, range(vocabulary.n_tokens))
        assert all(tokens.tokens.count(token) == plain.tokens.count(token) for token in special)
        assert text in vocabulary.detokenize([token for token in tokens.tokens if token >= 0])


def test_pictures_keep_their_positions_in_the_message(smol):
    with smol.opened() as model:
        picture = picture_of(png(3), "3.png")
        tokens = model.engine.prompter.conversation([Message("user", "abcd", ((2, picture),))])
        text_of = model.engine.context.vocabulary.detokenize
        before = text_of(tokens.tokens[: image_start(tokens)])
        after = text_of(tokens.tokens[image_end(tokens) :])
        assert "ab" in before and "cd" in after and "cd" not in before


def test_rejects_template_that_drops_pictures(tmp_path):
    template = "{{ messages[-1]['content'] }}"
    vision_model = VisionModel("llama", make_vision_model(tmp_path, "llama", template=template))
    with vision_model.opened() as model:
        messages = [Message("user", "a", ((0, picture_of(png(3), "a")),)), Message("user", "b")]
        with pytest.raises(PopError, match="omits images"):
            model.engine.prompter.conversation(messages)


# Plans


def test_tail_never_splits_an_image():
    rule = RowRule(sink_tokens=1, tail_tokens=16)
    plan = plan_prefill(0, 100, rule, 64, [(10, 95)])
    assert plan.chunks == ((0, 10), (10, 95), (95, 100))
    assert (plan.full_from, plan.n_pruned) == (95, 94)
    plan = plan_prefill(0, 200, rule, 64, [(0, 20), (25, 40)])
    assert plan.chunks == ((0, 20), (20, 25), (25, 40), (40, 104), (104, 168), (168, 200))
    assert plan.full_from == 184
    plan = plan_prefill(0, 200, rule, 64, [(0, 60)])
    assert plan.chunks == ((0, 60), (60, 124), (124, 184), (184, 200))
    short = plan_prefill(0, 50, replace(rule, min_prompt=64), 64, [(10, 45)])
    assert (short.full_from, short.n_pruned) == (0, 0)
