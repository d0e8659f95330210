"""Pictures in saved sessions and in the prompt cache."""

import pytest

from pop_base.errors import PopError
from support.calls import first_of
from support.vision_models import LONG, image_start, png, prompt


def test_session_with_pictures_round_trips(vision_model, tmp_path):
    options = {"temperature": 0.0, "max_tokens": 4}
    with vision_model.opened() as model:
        session = model.session()
        session.chat(LONG, images=[png(3)], **options)
        path = session.save(tmp_path / "talk")
        want = session.chat("and now", **options)
        assert want.stats.encode_s == 0
        resumed = model.load_session(path)
        assert resumed.conversation.turns[0].pictures[0].content == png(3)
        assert resumed.chat("and now", **options).text == want.text
    with vision_model.opened(mmproj=None) as model:
        session = model.load_session(path)
        with pytest.raises(PopError, match="without an mmproj"):
            session.chat("and now", **options)


def test_prompt_caches_distinguish_pictures(smol):
    from pop_local.engine.cache.prompt_cache import PromptCache

    options = {"temperature": 0.0, "max_tokens": 2}
    with smol.opened() as model:
        first_of(model).states.prompts = PromptCache(1 << 28)
        want = model.chat(LONG, images=[png(3)], **options)
        model.chat("q r s " * 90, **options)
        again = model.chat(LONG, images=[png(3)], **options)
        assert again.text == want.text
        assert again.stats.n_cached > image_start(prompt(model, LONG, 3)) + want.stats.n_image
