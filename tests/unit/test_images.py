"""Pictures in prompts, on tiny models of each kind: read, reused, stopped, saved, refused."""

import json
import os
import random
import signal
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from converter.errors import PopError, StoppedError
from pop_local.engine.images import mmproj, pictures
from pop_local.engine.images.pictures import Picture, picture_of, read_picture
from pop_local.engine.llama import backend, logs
from pop_local.engine.llama.backend import Mode
from pop_local.engine.llama.batch import Outputs, TokenBatch, decode_rows
from pop_local.engine.llama.upstream import api, chat_format
from pop_local.engine.model import PopModel
from pop_local.engine.prefill.plan import RowRule, images_in, plan_prefill
from pop_local.engine.sessions import session_file
from pop_local.engine.sessions.session_file import Sessions
from pop_local.engine.turn import ContextFullError, Message
from pop_local.models.mmproj import mmproj_beside
from support.mutants import mutated_bytes
from support.seeing import EYES, PARTS_TEMPLATE, encoded, make_mmproj, make_seeing, png

ARCHS = ("llama", "gemma3", "qwen2vl", "qwen3vl")
LONG = "a b c d e f g h " * 8


@dataclass(frozen=True)
class Seeing:
    arch: str
    path: Path

    def opened(self, **options: Any) -> PopModel:
        chosen: dict[str, Any] = {"n_ctx": 1024, "mmproj": self.path.parent / "mmproj.gguf"}
        return PopModel(self.path, n_threads=1, **chosen | options)


@pytest.fixture(scope="module", params=ARCHS)
def seeing(request, tmp_path_factory) -> Seeing:
    return Seeing(request.param, make_seeing(tmp_path_factory.mktemp("seeing"), request.param))


@pytest.fixture(scope="module")
def smol(tmp_path_factory) -> Seeing:
    return Seeing("llama", make_seeing(tmp_path_factory.mktemp("smol"), "llama"))


def prompt(model: PopModel, question: str, *seeds: int) -> list[int]:
    """Its tokens, whose pictures are kept as long as the model."""
    shown = tuple((0, picture_of(png(seed), f"{seed}.png")) for seed in seeds)
    made = model.chat_prompt([Message("user", question, shown)])
    vars(model).setdefault("prompts", []).append(made)
    return made.tokens


def answered(model: PopModel, tokens: list[int], n: int = 4) -> tuple[list[int], int]:
    """The likeliest tokens after a prompt, and how many rows were read for the first."""
    backend.reset_counters(model.ctx)
    said: list[int] = []
    for token in model.generate(tokens, temp=0.0):
        if not said:
            n_read = backend.get_counters(model.ctx).n_rows
        said.append(token)
        if len(said) == n:
            break
    return said, n_read


def image_start(tokens: list[int]) -> int:
    return next(row for row, token in enumerate(tokens) if token < 0)


def image_end(tokens: list[int]) -> int:
    return 1 + max(row for row, token in enumerate(tokens) if token < 0)


def test_a_picture_is_read_once_and_another_one_anew(seeing):
    with seeing.opened() as model, seeing.opened() as fresh:
        # More than follows the picture in the last prompt.
        model.rule = fresh.rule = replace(model.rule, tail_tokens=32)
        first = prompt(model, LONG, 3)
        said, n_read = answered(model, first)
        assert n_read == len(first)
        assert answered(model, first) == (said, 1)

        other = prompt(model, LONG, 4)
        start = image_start(first)
        assert other[:start] == first[:start] and other[start] != first[start]
        said_of_other, n_read = answered(model, other)
        assert n_read == len(other) - start
        assert said_of_other == answered(fresh, prompt(fresh, LONG, 4))[0]
        assert answered(model, first)[0] == said

        # The tail is what is left of the text: no row of the picture is read again.
        short = prompt(model, "a b", 3)
        said_shortly, n_read = answered(model, short)
        assert n_read <= len(short) - image_end(short)
        fresh.clear()
        assert said_shortly == answered(fresh, prompt(fresh, "a b", 3))[0]


def test_two_pictures_in_a_conversation(seeing):
    with seeing.opened() as model:
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
        assert model.rows.positions[model.n_tokens] <= model.n_tokens
        assert (model.rows.positions[model.n_tokens] < model.n_tokens) == model.is_mrope


def test_mtmd_reads_as_a_batch_of_embeddings_does(seeing):
    with seeing.opened() as model:
        tokens = prompt(model, "a b c d", 3)
        model.eval(tokens)
        want = logits(model)
        ((start, end), *more) = images_in(tokens, lambda rest: model.eye.image_at(rest).n_rows)
        read_raw(model, tokens, [(start, end), *more])
        np.testing.assert_array_equal(logits(model), want)


def logits(model: PopModel) -> np.ndarray:
    row = api.llama_get_logits_ith(model.ctx, -1)
    return np.ctypeslib.as_array(row, (model.n_vocab(),)).copy()


def read_raw(model: PopModel, tokens: list[int], images: list[tuple[int, int]]) -> None:
    """Decode a prompt as the engine does, but the images as batches made here."""
    plan = plan_prefill(0, len(tokens), model.rule, model.n_batch, images)
    api.llama_memory_clear(model._ctx.memory, True)
    batch = TokenBatch(model.n_batch)
    pos = 0
    for start, end in plan.chunks:
        if (start, end) in images:
            pos += decode_raw(model, tokens[start:], pos)
            continue
        outputs = Outputs.LAST if end == len(tokens) else Outputs.NONE
        assert batch.decode(model.ctx, tokens[start:end], pos, outputs) == 0
        pos += end - start
    batch.close()


def decode_raw(model: PopModel, tokens: list[int], pos: int) -> int:
    eye, image = model.eye, model.eye.image_at(tokens)
    rows, positions = eye.embedded(image), eye.positions(image, pos)
    assert decode_rows(model.ctx, rows, positions, is_mutual=image.is_mutual) == 0
    return image.n_pos


def test_reading_a_picture_can_be_stopped(seeing):
    """While it is encoded, and while its rows are decoded; then all is as if nothing had been."""
    with seeing.opened() as model:
        tokens = prompt(model, LONG, 3)
        want = answered(model, tokens)
        start = image_start(tokens)
        for n_asked in (1, 3, 6, 12):
            model.clear()
            left = iter([False] * n_asked)
            with (
                model.watching_prefill(None, lambda left=left: next(left, True)),
                pytest.raises(StoppedError),
            ):
                model.eval(tokens)
            at = model.n_tokens
            assert at <= start or tokens[at] >= 0 or tokens[at - 1] >= 0, "half an image"
            assert answered(model, tokens)[0] == want[0]


@pytest.mark.parametrize("how", ["a signal", "an exception"])
def test_ctrl_c_while_a_picture_is_encoded(smol, how):
    with smol.opened() as model:
        tokens = prompt(model, LONG, 3)
        want = answered(model, tokens)[0]
        model.clear()

        def pressed() -> bool:
            if model.n_tokens > 0:
                if how == "an exception":
                    raise KeyboardInterrupt
                signal.raise_signal(signal.SIGINT)
            return False

        with model.watching_prefill(None, pressed), pytest.raises(KeyboardInterrupt):
            model.eval(tokens)
        assert model.n_tokens == image_start(tokens)
        assert answered(model, tokens)[0] == want


def test_a_wish_to_stop_need_not_be_repeated(smol):
    with smol.opened() as model:
        tokens = prompt(model, "a b", 3)
        want = answered(model, tokens)[0]
        n_nodes = model.eye._n_nodes
        n_stopped = 0
        for when in range(20):
            model.clear()
            left, before = iter([False] * when + [True]), model.eye._n_nodes

            def once(left: Iterator[bool] = left) -> bool:
                return model.n_tokens > 0 and next(left, False)

            try:
                with model.watching_prefill(None, once):
                    model.eval(tokens)
            except StoppedError:
                n_stopped += 0 < model.eye._n_nodes - before < n_nodes
            assert answered(model, tokens)[0] == want
        assert n_stopped > 1, "encoding was ended in its midst"


def test_half_an_encoding_is_none(smol):
    with smol.opened() as model:
        tokens = prompt(model, "a b", 3)
        image = model.eye.image_at(tokens[image_start(tokens) :])
        left = iter([False, True])
        model.interrupt.should_stop = lambda: next(left, False)
        with pytest.raises(StoppedError):
            model.eye.embedded(image)


def test_what_a_picture_that_was_stopped_left_is_not_saved(smol):
    with smol.opened(n_ubatch=8) as model:
        tokens = prompt(model, LONG, 3)
        n_left = 0
        for when in range(0, 400, 10):
            model.clear()
            left = iter([False] * when)
            with (
                model.watching_prefill(None, lambda left=left: next(left, True)),
                pytest.raises(StoppedError),
            ):
                model.eval(tokens)
            n_left += model._end > model.rows.positions[model.n_tokens]
            model.load_state(model.save_state())
        assert n_left, "it was stopped between two ubatches"


def test_a_session_goes_round(seeing, tmp_path):
    options = {"temperature": 0.0, "max_tokens": 4}
    with seeing.opened() as model:
        session = model.session()
        session.chat(LONG, images=[png(3)], **options)
        path = session.save(tmp_path / "talk")
        want = session.chat("and now", **options)
    with seeing.opened() as model:
        session = model.load_session(path)
        assert not session.reread
        got = session.chat("and now", **options)
        assert (got.text, got.stats.n_cached) == (want.text, want.stats.n_cached)
        assert got.stats.encode_s == 0
        (turn, _) = session.conversation.turns
        assert turn.pictures[0].content == png(3)
    (tmp_path / "other").mkdir()
    eye = replace(EYES[seeing.arch], seed=2)
    with seeing.opened(mmproj=make_mmproj(tmp_path / "other" / "mmproj.gguf", eye)) as model:
        session = model.load_session(path)
        assert "another mmproj" in session.reread
        assert session.chat("and now", **options).stats.n_cached < image_start(
            prompt(model, LONG, 3)
        )
    with seeing.opened(mmproj=None) as model:
        session = model.load_session(path)
        with pytest.raises(PopError, match="without its mmproj"):
            session.chat("and now", **options)


def test_sessions_are_listed_without_their_pictures(smol, tmp_path, monkeypatch):
    with smol.opened() as model:
        session = model.session()
        session.chat("a", images=[png(3)], temperature=0.0, max_tokens=1)
        session.save(tmp_path / "talk")
    monkeypatch.setattr(session_file, "picture_of", None)
    [stored] = Sessions(tmp_path).listed()
    assert stored.session is not None and len(stored.session.conversation.turns) == 1


def test_what_was_shown_and_taken_back_is_not_saved(seeing, tmp_path):
    options = {"temperature": 0.0, "max_tokens": 4}
    with seeing.opened() as model:
        session = model.session()
        session.chat(LONG, **options)
        session.chat("what?", images=[png(3)], **options)
        session.undo()
        n_own = session.n_cached
        assert 0 < n_own < model.n_tokens
        path = session.save(tmp_path / "talk")
        assert model.n_tokens == n_own
        model.clear()
        assert not model.load_session(path).reread and model.n_tokens == n_own


def test_pictures_are_kept_while_somebody_may_want_them(smol, monkeypatch):
    monkeypatch.setattr(mmproj, "_KNOWN_ROWS", 100)
    with smol.opened() as model:
        first = model.chat_prompt([Message("user", "a", ((0, picture_of(png(3), "a")),))])
        for seed in (4, 5):
            prompt(model, "a", seed)
        assert len(model.eye._known) == 1
        assert answered(model, first.tokens)[1] == len(first.tokens)
        tokens = first.tokens
        del first
        model.clear()
        with pytest.raises(PopError, match="was not given"):
            model.eval(tokens)


def test_cut_up_pictures_are_freed(smol):
    """They take megabytes each: no more than one is held, whoever holds its ids."""
    n_held = 0

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

    with smol.opened() as model:
        real = model.eye._mtmd
        model.eye._mtmd = Counting()
        tokens = prompt(model, "a b", 3, 4, 5)
        assert n_held == 1
        want = answered(model, tokens)[0]
        model.clear()
        assert answered(model, tokens)[0] == want and n_held == 1
    assert n_held == 0


def test_a_model_that_is_closed_sees_nothing(smol):
    model = smol.opened()
    eye = model.eye
    prompt(model, "a", 3)
    model.close()
    for picture in (picture_of(png(3), "known"), picture_of(png(4), "other")):
        with pytest.raises(PopError, match="is closed"):
            model.count_picture(picture)
        with pytest.raises(PopError, match="is closed"):
            eye.see(picture)


def test_ids_are_of_one_mmproj(smol, tmp_path):
    other = make_mmproj(tmp_path / "mmproj.gguf", replace(EYES["llama"], seed=2))
    with smol.opened() as model, smol.opened(mmproj=other) as another:
        ids = {token for token in prompt(model, "a", 3) if token < 0}
        assert not ids & set(prompt(another, "a", 3))


def test_sessions_of_the_first_format_load(smol, tmp_path):
    with smol.opened() as model:
        session = model.session()
        session.chat(LONG, temperature=0.0, max_tokens=4)
        path = session.save(tmp_path / "talk")
        n_cached = model.n_tokens
        old = tmp_path / "old.popsession"
        with zipfile.ZipFile(path) as given, zipfile.ZipFile(old, "w") as made:
            for name in given.namelist():
                if name == "positions.npy":
                    continue
                content = given.read(name)
                if name == "session.json":
                    fields = json.loads(content) | {"format": 1}
                    del fields["fingerprint"]["mmproj"]
                    for turn in fields["conversation"]["turns"]:
                        del turn["pictures"]
                    content = json.dumps(fields).encode()
                made.writestr(name, content)
        model.clear()
        restored = model.load_session(old)
        assert not restored.reread and model.n_tokens == n_cached
        assert restored.conversation == session.conversation


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("positions.npy", lambda content: content[:-4] + b"\7\0\0\0"),
        ("pictures/", lambda _: png(4)),
    ],
)
def test_a_session_of_impossible_rows_or_other_pictures_is_damaged(smol, tmp_path, name, changed):
    with smol.opened() as model:
        session = model.session()
        session.chat(LONG, images=[png(3)], temperature=0.0, max_tokens=4)
        path = session.save(tmp_path / "talk")
        bad = tmp_path / "bad.popsession"
        with zipfile.ZipFile(path) as given, zipfile.ZipFile(bad, "w") as made:
            for each in given.namelist():
                content = given.read(each)
                made.writestr(each, changed(content) if each.startswith(name) else content)
        with pytest.raises(PopError, match="damaged"):
            model.load_session(bad)


def test_prompt_caches_know_pictures(smol):
    from pop_local.engine.prefill.kv_state import PromptCache

    options = {"temperature": 0.0, "max_tokens": 2}
    with smol.opened() as model:
        model.set_cache(PromptCache(1 << 28))
        want = model.chat(LONG, images=[png(3)], **options)
        model.chat("q r s " * 90, **options)
        again = model.chat(LONG, images=[png(3)], **options)
        assert again.text == want.text
        assert again.stats.n_cached > image_start(prompt(model, LONG, 3)) + want.stats.n_image


def test_a_context_that_a_picture_does_not_fit(seeing):
    with seeing.opened(n_ctx=256) as model:
        with pytest.raises(ContextFullError, match="too many"):
            model.chat(LONG, images=[png(seed) for seed in range(6)], max_tokens=4)
        assert model.chat("a", max_tokens=1, temperature=0.0).stats.n_decoded == 1


def test_pruning_off_reads_pictures_in_full(seeing):
    with seeing.opened() as model:
        tokens = prompt(model, LONG, 3)
        model.eval(tokens)
        pruned = logits(model)
        model.set_pop(Mode.OFF)
        backend.reset_counters(model.ctx)
        model.eval(tokens)
        assert backend.get_counters(model.ctx).n_context == 0
        assert model.n_exact == len(tokens)
        assert not np.array_equal(logits(model), pruned)


def test_depth_with_pictures(seeing):
    """Redone rows are the full model's; those that see later ones, or have many positions, stay."""
    if seeing.arch.startswith("qwen"):
        with pytest.raises(PopError, match="M-RoPE"):
            seeing.opened(select=0.5)
        with seeing.opened(keep_states=True) as model:
            model.refill_answers(4)
            assert model.chat(LONG, images=[png(3)], max_tokens=4).stats.n_refilled == 0
    with seeing.opened(keep_states=True, flash_attn=False) as model:
        tokens = prompt(model, LONG, 3)
        model.eval(tokens)
        if seeing.arch != "llama":
            assert model.n_refillable == 0
            return
        assert model.refill() == len(tokens)
        refilled = answered(model, tokens)[0]
        model.set_pop(Mode.OFF)
        model.clear()
        assert answered(model, tokens)[0] == refilled


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_a_selection_beside_a_picture(arch, tmp_path):
    seeing = Seeing(arch, make_seeing(tmp_path, arch))
    with seeing.opened(select=0.25) as model:
        for question in (LONG, "a b"):  # of which the question itself would reach into the picture
            model.clear()
            stats = model.chat(question, images=[png(3)], max_tokens=2, temperature=0.0).stats
        assert stats.n_selected > 0
        rows = np.flatnonzero(model.input_ids[: stats.n_prompt] < 0)
        assert (arch == "llama") == model.rows.has_state[rows].any()


def test_a_prompt_with_a_picture_is_not_short(smol):
    with smol.opened() as model:
        model.rule = replace(model.rule, tail_tokens=256)
        stats = model.chat("a b", images=[png(3)], max_tokens=1).stats
        assert stats.n_pruned > 0 and not stats.is_short
        assert model.chat("a b", max_tokens=1).stats.is_short


def test_an_image_larger_than_a_ubatch_whose_rows_see_each_other(tmp_path):
    seeing = Seeing("gemma3", make_seeing(tmp_path, "gemma3"))
    with seeing.opened(n_ubatch=32) as model:
        with pytest.raises(PopError, match="64 tokens, which see each other"):
            model.chat("a", images=[png(3)], max_tokens=1)
        assert model.n_tokens == 0, "what precedes it was read for nothing"
        assert model.chat("a", max_tokens=1).stats.n_decoded == 1


def test_llama_cpps_own_handlers_are_refused(smol):
    handler = object.__new__(chat_format.Qwen25VLChatHandler)
    with pytest.raises(PopError, match="would read past the pruning"):
        smol.opened(chat_handler=handler)
    with smol.opened() as model, pytest.raises(PopError, match="Qwen25VLChatHandler"):
        model.chat_handler = handler


# Templates, and what messages spell out


def test_templates_that_take_parts_or_strings(smol, tmp_path):
    parts = Seeing("llama", make_seeing(tmp_path, "llama", template=PARTS_TEMPLATE))
    with smol.opened() as one, parts.opened() as other:
        assert prompt(one, "a b", 3, 4) == prompt(other, "a b", 3, 4)
        assert prompt(one, "a b") == prompt(other, "a b")


@pytest.mark.parametrize("text", ["<__media__>", "\U000f0000", "<|vision_start|>", "<|im_end|>"])
def test_what_a_message_spells_out_is_text(smol, text):
    with smol.opened() as model:
        tokens = prompt(model, f"a {text} b", 3)
        plain = prompt(model, "a b", 3)
        assert [token for token in tokens if token < 0] == [token for token in plain if token < 0]
        special = [token for token in range(model.n_vocab()) if model._special._is_special(token)]
        assert [tokens.count(one) for one in special] == [plain.count(one) for one in special]
        said = model.detokenize([token for token in tokens if token >= 0])
        assert text.encode() in said


def test_pictures_stand_where_the_message_has_them(smol):
    with smol.opened() as model:
        picture = picture_of(png(3), "3.png")
        tokens = model.chat_prompt([Message("user", "abcd", ((2, picture),))]).tokens
        before, after = tokens[: image_start(tokens)], tokens[image_end(tokens) :]
        assert b"ab" in model.detokenize(before) and b"cd" in model.detokenize(after)
        assert b"cd" not in model.detokenize(before)


def test_a_template_that_drops_a_picture(tmp_path):
    template = "{{ messages[-1]['content'] }}"
    seeing = Seeing("llama", make_seeing(tmp_path, "llama", template=template))
    with seeing.opened() as model:
        shown = ((0, picture_of(png(3), "a")),)
        with pytest.raises(PopError, match="leaves out pictures"):
            model.chat_prompt([Message("user", "a", shown), Message("user", "b")])


# Plans


def test_a_tail_does_not_reach_into_an_image():
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


# Files


def test_pictures_of_all_formats():
    image = Image.new("RGB", (40, 30), (200, 100, 50))
    for kind in pictures.FORMATS:
        picture = picture_of(encoded(image, kind), "a")
        assert (picture.width, picture.height) == (40, 30)
        _, _, rgb = picture.rgb()
        middle = rgb[3 * (15 * 40 + 20) :][:3]
        assert np.abs(np.frombuffer(middle, np.uint8).astype(int) - [200, 100, 50]).max() < 9


def test_photographs_are_turned_upright_and_transparency_is_white():
    image = Image.new("RGB", (40, 30))
    image.paste((255, 0, 0), (0, 0, 40, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    picture = picture_of(encoded(image, "JPEG", exif=exif), "a")
    assert (picture.width, picture.height) == (30, 40)
    pixels = np.frombuffer(picture.rgb()[2], np.uint8).reshape(40, 30, 3)
    assert pixels[20, 28, 0] > 200 and pixels[20, 2, 0] < 50
    for number in (0, 9, 255):  # which mean nothing
        exif[0x0112] = number
        picture = picture_of(encoded(image, "JPEG", exif=exif), "a")
        assert picture.rgb()[:2] == (picture.width, picture.height) == (40, 30)
    clear = picture_of(encoded(Image.new("RGBA", (4, 4), (9, 9, 9, 0)), "PNG"), "a")
    assert set(clear.rgb()[2]) == {255}


@pytest.mark.parametrize("mode", ["1", "P", "L", "RGB", "RGBA"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_large_pictures_are_scaled_down_before_all_else(monkeypatch, mode, kind):
    if kind == "JPEG" and mode not in ("L", "RGB"):
        pytest.skip("no such JPEG files")
    monkeypatch.setattr(pictures, "_MAX_SHOWN", 1200)
    image = Image.new("L", (160, 120), 0)
    image.paste(255, (0, 0, 160, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = picture_of(encoded(image.convert(mode), kind, exif=exif), "a")
    assert (picture.width, picture.height) == (120, 160)
    width, height, rgb = picture.rgb()
    assert (width, height) == (30, 40)
    pixels = np.frombuffer(rgb, np.uint8).reshape(40, 30, 3)
    assert (pixels[:, 22:] > 200).all() and (pixels[:, :18] < 50).all()


def test_heads_are_looked_at_alone(monkeypatch):
    contents = [encoded(Image.new("RGB", (40, 30)), kind) for kind in pictures.FORMATS]
    monkeypatch.setattr(Image.Image, "load", None)
    for content in contents:
        assert picture_of(content, "a").width == 40


def test_jpegs_of_many_passes(monkeypatch):
    image = Image.effect_noise((64, 64), 80)
    usual = encoded(image, "JPEG", progressive=True)
    last = usual[usual.rindex(b"\xff\xda") : -2]
    monkeypatch.setattr(pictures, "MAX_SCANNED", 64 * 64 * 20)
    picture_of(usual + b"\xff\xda\0" * 1000, "with a film behind it").rgb()
    with pytest.raises(PopError, match="too many passes"):
        picture_of(usual[:-2] + last * 20 + usual[-2:], "a")


def test_what_is_no_picture(tmp_path, monkeypatch):
    for content in (b"", b"no picture", png(3)[:20], b"GIF89a" + bytes(90)):
        with pytest.raises(PopError, match="is no picture that can be read"):
            picture_of(content, "x.png").rgb()
    with pytest.raises(PopError, match="is no picture"):
        picture_of(png(3)[:3000], "x.png").rgb()
    with pytest.raises(PopError, match="is a strip"):
        picture_of(encoded(Image.new("1", (5000, 1)), "PNG"), "x.png")
    bomb = encoded(Image.new("1", (12_000, 12_000)), "PNG")
    assert len(bomb) < 100_000
    with pytest.raises(PopError, match="more than 50 million pixels"):
        picture_of(bomb, "x.png")
    with pytest.raises(PopError, match="more than 50 million pixels"):
        picture_of(encoded(Image.new("1", (20_000, 20_000)), "PNG"), "x.png")
    monkeypatch.setattr(pictures, "MAX_BYTES", 1000)
    path = tmp_path / "large.png"
    path.write_bytes(png(3))
    with pytest.raises(PopError, match="is larger than"):
        read_picture(path)


@pytest.mark.parametrize("kind", pictures.FORMATS)
def test_damaged_files_are_errors_or_pictures(kind):
    rng = random.Random(kind)
    whole = encoded(Image.effect_noise((48, 32), 80).convert("RGB"), kind)
    for _ in range(100):
        content = mutated_bytes(rng, whole, 0, len(whole))
        try:
            picture = picture_of(content, "a")
            width, height, rgb = picture.rgb()
            assert len(rgb) == 3 * width * height
        except PopError:
            continue


def test_images_of_a_question(smol, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png(3))
    with smol.opened() as model:
        for images in ([path], [str(path)], [png(3)], [read_picture(path)]):
            assert model.chat("a", images=images, max_tokens=1).stats.n_image > 0
        with pytest.raises(PopError, match="not a list"):
            model.chat("a", images=path)
        with pytest.raises(PopError, match="cannot read"):
            model.chat("a", images=[tmp_path / "none.png"])
    with smol.opened(mmproj=None) as model, pytest.raises(PopError, match="without its mmproj"):
        model.chat("a", images=[path])


def test_what_is_no_mmproj(smol, tmp_path):
    with pytest.raises(PopError, match="no mmproj"):
        smol.opened(mmproj=smol.path)
    with pytest.raises(PopError, match="there is no mmproj"):
        smol.opened(mmproj=tmp_path / "none.gguf")
    wide = make_mmproj(tmp_path / "wide.gguf", replace(EYES["llama"], n_text=256))
    with smol.opened(mmproj=wide) as model:
        assert model.chat("a", max_tokens=1).stats.n_decoded == 1
        with pytest.raises(PopError, match="does not fit this model"):
            model.chat("a", images=[png(3)], max_tokens=1)
    assert mmproj_beside(smol.path) == smol.path.parent / "mmproj.gguf"
    make_mmproj(smol.path.parent / "mmproj-2.gguf", EYES["llama"])
    assert mmproj_beside(smol.path) is None
    (smol.path.parent / "mmproj-2.gguf").unlink()


@pytest.mark.parametrize(
    ("name", "models", "seeing"),
    [
        ("mmproj.gguf", ("Text-7B.gguf", "Vision-8B-Q8_0.gguf"), (0, 1)),
        ("mmproj-model-f16.gguf", ("Text-7B.gguf", "Vision-8B.gguf"), (0, 1)),
        ("mmproj-Vision-8B-Q4_K_M.gguf", ("Text-7B.gguf", "Vision-8B-Q8_0.gguf"), (1,)),
        ("mmproj-Qwen2-VL-2B-f16.gguf", ("Qwen2-7B.gguf", "Qwen2-VL-2B-Q4_0.gguf"), (1,)),
        ("mmproj-Gone-8B.gguf", ("Text-7B.gguf", "Other-8B.gguf"), ()),
        ("mmproj-of-mine.gguf", ("a-Q4_0.gguf", "a-Q8_0.gguf", "a-Q8_0.pop.gguf"), (0, 1, 2)),
    ],
)
def test_whose_mmproj_the_only_one_of_a_folder_is(smol, tmp_path, name, models, seeing):
    (tmp_path / name).write_bytes((smol.path.parent / "mmproj.gguf").read_bytes())
    for model in models:
        (tmp_path / model).touch()
    found = [mmproj_beside(tmp_path / model) is not None for model in models]
    assert found == [number in seeing for number in range(len(models))]


def test_fewer_tokens_an_image(tmp_path):
    seeing = Seeing("qwen2vl", make_seeing(tmp_path, "qwen2vl"))
    with seeing.opened() as model, seeing.opened(image_tokens=16) as small:
        n_image = sum(token < 0 for token in prompt(model, "a", 3))
        assert 0 < sum(token < 0 for token in prompt(small, "a", 3)) <= 16 < n_image
        assert not set(prompt(model, "a", 3)) & {t for t in prompt(small, "a", 3) if t < 0}
    with seeing.opened(image_tokens=1) as none, pytest.raises(PopError, match="no picture fits 1"):
        prompt(none, "a", 3)


def test_pictures_of_odd_sizes(seeing):
    with seeing.opened() as model:
        for size in ((1, 1), (100, 1), (1, 100), (31, 333)):
            picture = picture_of(png(3, *size), "odd")
            assert model.chat("a", images=[picture], max_tokens=1).stats.n_image > 0


def test_the_library_starts_no_programs(smol):
    """Videos would start ffmpeg on whatever a client sends."""
    with smol.opened() as model:
        assert not model.eye._mtmd.mtmd_helper_support_video(model.eye._ctx)


def test_a_path_that_is_no_utf8(smol, tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/mm\xff.gguf"))
    path.write_bytes((smol.path.parent / "mmproj.gguf").read_bytes())
    with smol.opened(mmproj=path) as model:
        assert model.count_picture(picture_of(png(3), "a")) > 0


def test_the_library_is_not_loaded_for_text(smol):
    with smol.opened() as model:
        model.chat("a b", max_tokens=1)
        assert model._mmproj._ctx is None


def test_equal_pictures_are_equal(tmp_path):
    one = picture_of(png(3), "a")
    assert one == picture_of(png(3), "b") and one.sha256 == Picture("b", png(3), 1, 1).sha256
    assert Image.open(BytesIO(one.content)).size == (one.width, one.height)


def test_what_fails_elsewhere_is_no_reason_here(smol, tmp_path):
    with smol.opened():  # llama.cpp's log is taken over
        logs.forget_errors()
        logs._on_log(4, b"f: a reason", None)
        other = threading.Thread(target=logs.forget_errors)
        other.start()
        other.join()
        assert logs.first_error() == "a reason"
        logs.forget_errors()
