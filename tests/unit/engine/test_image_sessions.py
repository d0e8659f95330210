"""Pictures in saved sessions and in the prompt cache."""

import json
import zipfile
from dataclasses import replace

import pytest

from pop_converter.base.errors import PopError
from pop_local.engine.sessions import session_file
from pop_local.engine.sessions.session_file import Sessions
from support.vision_models import (
    LONG,
    MMPROJS,
    image_start,
    make_mmproj,
    png,
    prompt,
)


def test_a_session_with_pictures_round_trips(vision_model, tmp_path):
    options = {"temperature": 0.0, "max_tokens": 4}
    with vision_model.opened() as model:
        session = model.session()
        session.chat(LONG, images=[png(3)], **options)
        path = session.save(tmp_path / "talk")
        want = session.chat("and now", **options)
    with vision_model.opened() as model:
        session = model.load_session(path)
        assert not session.reread
        got = session.chat("and now", **options)
        assert (got.text, got.stats.n_cached) == (want.text, want.stats.n_cached)
        assert got.stats.encode_s == 0
        (turn, _) = session.conversation.turns
        assert turn.pictures[0].content == png(3)
    (tmp_path / "other").mkdir()
    vision = replace(MMPROJS[vision_model.arch], seed=2)
    with vision_model.opened(
        mmproj=make_mmproj(tmp_path / "other" / "mmproj.gguf", vision)
    ) as model:
        session = model.load_session(path)
        assert "a different mmproj" in session.reread
        assert session.chat("and now", **options).stats.n_cached < image_start(
            prompt(model, LONG, 3)
        )
    with vision_model.opened(mmproj=None) as model:
        session = model.load_session(path)
        with pytest.raises(PopError, match="without an mmproj"):
            session.chat("and now", **options)


def test_sessions_are_listed_without_their_pictures(smol, tmp_path, monkeypatch):
    with smol.opened() as model:
        session = model.session()
        session.chat("a", images=[png(3)], temperature=0.0, max_tokens=1)
        session.save(tmp_path / "talk")
    monkeypatch.setattr(session_file, "picture_of", None)
    [stored] = Sessions(tmp_path).listed()
    assert stored.session is not None and len(stored.session.conversation.turns) == 1


def test_undone_pictures_are_not_saved(vision_model, tmp_path):
    options = {"temperature": 0.0, "max_tokens": 4}
    with vision_model.opened() as model:
        session = model.session()
        session.chat(LONG, **options)
        session.chat("what?", images=[png(3)], **options)
        session.undo()
        n_own = session.n_cached
        assert 0 < n_own < model.engine.cache.n_tokens
        path = session.save(tmp_path / "talk")
        assert model.engine.cache.n_tokens == n_own
        model.engine.cache.clear()
        assert not model.load_session(path).reread and model.engine.cache.n_tokens == n_own


def test_a_session_of_another_format_is_reported(smol, tmp_path):
    with smol.opened() as model:
        session = model.session()
        session.chat(LONG, temperature=0.0, max_tokens=4)
        path = session.save(tmp_path / "talk")
        old = tmp_path / "old.popsession"
        with zipfile.ZipFile(path) as given, zipfile.ZipFile(old, "w") as made:
            content = json.loads(given.read("session.json")) | {"format": 1}
            made.writestr("session.json", json.dumps(content))
        with pytest.raises(PopError, match="uses format 1, but this version reads only format 3"):
            model.load_session(old)


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


def test_prompt_caches_distinguish_pictures(smol):
    from pop_local.engine.cache.prompt_cache import PromptCache

    options = {"temperature": 0.0, "max_tokens": 2}
    with smol.opened() as model:
        model.engine.states.prompts = PromptCache(1 << 28)
        want = model.chat(LONG, images=[png(3)], **options)
        model.chat("q r s " * 90, **options)
        again = model.chat(LONG, images=[png(3)], **options)
        assert again.text == want.text
        assert again.stats.n_cached > image_start(prompt(model, LONG, 3)) + want.stats.n_image
