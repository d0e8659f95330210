"""Edited prompts of random models with each kind of attention, against fresh readings."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pop_local.engine.llama.backend import Mode
from pop_local.engine.model import PopModel
from pop_local.engine.prefill.edit import MIN_REUSED
from pop_local.engine.prompt.prompt import Prompt
from support import recipes
from support.architectures import MORE_KEYS
from support.calls import first_of, kv_bytes, opened

# Partial RoPE, MLA, ALiBi, soft caps, and low-rank queries and keys.
MOVABLE = ("gptneox", "deepseek2+experts", "bloom", "gemma2", "minicpm3")
# Learned positions (up to 1,024), layers without RoPE, and K that is normalized after RoPE.
FIXED = ("gpt2", "starcoder", "smollm3", "cohere2", "hunyuan-dense")
LEARNED_POSITIONS = ("gpt2", "starcoder")
NAMES = {str(name): name for name in recipes.names()}
Q4_0, Q8_0 = 2, 8

pytestmark = pytest.mark.slow


def prompt(n_tokens: int, seed: int = 0) -> list[int]:
    """Return tokens of the recipes' vocabulary, which has 128."""
    tokens: list[int] = np.random.default_rng(seed).integers(1, 127, n_tokens).tolist()
    return tokens


OLD, NEW = prompt(450), prompt(300, seed=1)
MOVED = NEW[:30] + OLD[10:]
IN_PLACE = OLD[:70] + NEW[:10] + OLD[80:]


@pytest.fixture(scope="module")
def path_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    paths: dict[str, Path] = {}

    def path(name: str) -> Path:
        if name not in NAMES:
            pytest.skip("the recipes are not built")
        if name not in paths:
            more = MORE_KEYS.get(NAMES[name].arch, ())
            if name in LEARNED_POSITIONS:
                more = (*more, "context_length=1024")
            folder = tmp_path_factory.mktemp("edited")
            paths[name] = recipes.make(NAMES[name], folder / "model.gguf", more)
        return paths[name]

    return path


def open_model(path: Path, mode: Mode, **options: Any) -> PopModel:
    """Open a model of 4 layers that prunes the last two in mode CONTEXT."""
    model = opened(path, **options)
    [sequence] = model.engine.sequences
    sequence.set_boundary(2)
    sequence.set_mode(mode)
    sequence.keep_states(mode is Mode.CONTEXT)
    return model


def n_reused_after_an_edit(path: Path, tokens: list[int], **options: Any) -> int:
    """Return the number of stale rows, and compare the repaired cache with a fresh full reading."""
    with (
        open_model(path, Mode.CONTEXT, **options) as model,
        open_model(path, Mode.OFF, **options) as full,
    ):
        model.read(Prompt(OLD))
        reading = model.read(Prompt(tokens))
        first_of(model).refiller.refill()
        assert first_of(model).cache.n_exact == len(tokens)
        full.read(Prompt(tokens))
        assert kv_bytes(model) == kv_bytes(full)
        return reading.n_stale


@pytest.mark.parametrize("name", MOVABLE)
def test_moved_rows_are_reused_and_repaired(name, path_of):
    assert n_reused_after_an_edit(path_of(name), MOVED) > MIN_REUSED


@pytest.mark.parametrize("name", FIXED)
def test_rows_without_rope_stay_in_place(name, path_of):
    assert n_reused_after_an_edit(path_of(name), MOVED) == 0
    assert n_reused_after_an_edit(path_of(name), IN_PLACE) > MIN_REUSED


@pytest.mark.parametrize("kind", [Q4_0, Q8_0])
@pytest.mark.parametrize(("name", "moves"), [("gemma2", True), ("deepseek2+experts", False)])
def test_quantized_rows_move_if_llama_cpp_can_shift_them(name, moves, kind, path_of):
    """The K of MLA is not shifted if it is quantized (patches/llama.cpp, find_obstacle)."""
    options = {"flash_attn": True, "type_k": kind, "type_v": kind}
    assert (n_reused_after_an_edit(path_of(name), MOVED, **options) > MIN_REUSED) == moves
    assert n_reused_after_an_edit(path_of(name), IN_PLACE, **options) > MIN_REUSED
