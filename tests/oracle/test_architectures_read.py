"""Read models of several architectures with the engine: learned positions, restored states."""

import numpy as np
import pytest

from pop_base.errors import PopError
from pop_local.engine.engine_options import EngineOptions
from pop_local.engine.model import PopModel
from pop_local.measure.forced import FULL, forced
from support import recipes
from support.architectures import MORE_KEYS
from support.calls import append, first_of

pytestmark = pytest.mark.slow
NAMES = {str(name): name for name in recipes.names()}


def made(name: str, path):
    recipe = NAMES[name]
    try:
        return recipes.make(recipe, path / "model.gguf", MORE_KEYS.get(recipe.arch, ()))
    except recipes.NoModelError:
        pytest.skip("its recipe makes no model")


@pytest.mark.skipif("gpt2" not in NAMES, reason="the recipes are not built")
def test_prompts_longer_than_the_learned_positions_are_refused(tmp_path):
    with PopModel(EngineOptions.of(made("gpt2", tmp_path), n_ctx=512, n_threads=1)) as model:
        append(model, [1] * 256)
        first_of(model).cache.clear()
        with pytest.raises(PopError, match="the model supports only 256 tokens"):
            append(model, [1] * 257)


@pytest.mark.parametrize(
    "name", sorted(NAMES.keys() & {"qwen35", "lfm2", "mamba2", "rwkv7", "deepseek4+experts"})
)
def test_recurrent_layers_forget_scored_texts(name, tmp_path):
    """A text after a context is scored, removed, and gets the same score again."""
    with (
        PopModel(EngineOptions.of(made(name, tmp_path), n_ctx=256, n_threads=1)) as model,
        forced(model) as reader,
    ):
        context, text, another = (range(1, 1 + n) for n in (100, 20, 21))
        reader.read(context, FULL)
        first, other = reader.predict(text), reader.predict(another[1:])
        again = reader.predict(text)
    # With other cells of the cache, the order of sums differs.
    noise, change = np.abs(again - first)[1:].max(), np.abs(other - first)[1:].max()
    assert noise < 1e-3 * change
