"""Check the real models' header keys, and the number of tokens in shipped texts."""

import pytest

from pop_local.engine.engine_options import EngineOptions
from pop_local.engine.llama.graph_macs import GraphMacs
from pop_local.engine.model import PopModel
from pop_local.measure.heldout import shipped_text, spread_windows, tokenize
from support.shapes import read_shape

pytestmark = pytest.mark.slow


def test_reads_shapes_of_real_models(smollm2, gemma):
    shape = read_shape(smollm2)
    assert (shape.arch, shape.n_layer, shape.n_embd, shape.n_vocab) == ("llama", 30, 576, 49152)
    assert (shape.n_q[0], shape.n_k[0], shape.n_v[0]) == (9 * 64, 3 * 64, 3 * 64)
    shape = read_shape(gemma)
    assert (shape.arch, shape.n_layer, shape.n_vocab) == ("gemma3", 18, 262144)
    windows = read_shape(gemma).windows
    assert [layer for layer, window in enumerate(windows) if window == 0] == [5, 11, 17]
    assert max(windows) == 512


@pytest.mark.parametrize(
    ("name", "n_macs"),
    [
        ("smollm2", {(None, 1): 284_540_829_696, (20, 33): 199_710_683_136}),
        ("gemma", {(None, 1): 238_556_545_024, (12, 33): 169_773_727_744}),
    ],
)
def test_macs_of_real_models_equal_manual_count(request, name, n_macs):
    """The count covers projections, FFN, windows, and the last row's LM head and last FFN."""
    macs = GraphMacs(request.getfixturevalue(name))
    assert {key: macs(2048, *key) for key in n_macs} == n_macs


def test_shipped_text_is_long_enough_and_does_not_repeat_itself(smollm2):
    shipped = shipped_text()
    tokens = tokenize(PopModel(EngineOptions.of(smollm2, n_ctx=64, n_threads=1)), shipped)
    assert len(tokens) == 4
    assert sum(len(part) for part in tokens) >= 25_000
    assert len(spread_windows(tokens, 32, 640)) == 32
    for part in tokens:
        grams = [tuple(part[i : i + 8]) for i in range(len(part) - 8)]
        # Separator lines of tables repeat.
        assert len(set(grams)) > 0.9 * len(grams)
