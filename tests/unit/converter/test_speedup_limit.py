"""Compare multiply-accumulates on the graph with a count over all rows and positions."""

from dataclasses import replace
from pathlib import Path

import pytest

from pop_base.errors import PopError
from pop_converter.architecture.work import speedup_limit
from pop_converter.popfile.pruning_plan import make_plan
from pop_local.engine.llama import graph_macs as module
from pop_local.engine.llama.graph_macs import GraphMacs
from support.shapes import read_shape
from support.shared_kv import make_shared
from support.synthetic import DEFAULTS, make_gguf

# Fused tensors, as in phi3, also compute Q.
ARCHS = ("llama", "qwen3moe", "gemma2", "gemma3")


def counted(path: Path, n_prompt: int, boundary: int | None, n_full: int) -> int:
    """Count the work row by row and position by position."""
    shape, windows = read_shape(path), read_shape(path).windows
    recipe = DEFAULTS[shape.arch]
    n_embd, n_layer = shape.n_embd, shape.n_layer
    n_ffn = 3 * n_embd * recipe.n_ff * (recipe.n_expert_used if recipe.n_expert else 1)
    n_ffn += n_embd * recipe.n_expert
    first_full = n_prompt - n_full
    total = shape.n_vocab * n_embd
    for layer in range(n_layer):
        skipped = boundary is not None and layer >= boundary
        for row in range(n_prompt):
            if skipped:
                total += n_embd * shape.n_kv(layer)
                if row < first_full:
                    continue
            seen = [p for p in range(row + 1) if row - p < (windows[layer] or n_prompt)]
            n_out = shape.n_heads_out[layer]
            total += n_embd * (shape.n_q[layer] + shape.n_kv(layer) + n_out)
            total += len(seen) * (shape.n_q[layer] + n_out)
            if layer < n_layer - 1 or row == n_prompt - 1:
                total += n_ffn
    return total


@pytest.mark.parametrize("arch", ARCHS)
def test_macs_equal_a_row_by_row_count(arch, tmp_path):
    path = make_gguf(tmp_path / "model.gguf", arch)
    macs = GraphMacs(path)
    for n_prompt in (1, 2, 40):
        assert macs(n_prompt, None, 1) == counted(path, n_prompt, None, 1)
        for boundary in (1, 4, 7):
            for n_full in {1, 3, 17} & set(range(1, n_prompt)):
                n_macs = macs(n_prompt, boundary, n_full)
                assert n_macs == counted(path, n_prompt, boundary, n_full)


def test_exact_skipping_saves_later_layers(tmp_path):
    path = make_shared(tmp_path / "model.gguf", "gemma4")
    shape, macs, n = read_shape(path), GraphMacs(path), 40
    saved = 0
    for layer in range(shape.exact - 1, shape.n_layer):
        window = shape.windows[layer] or n
        seen = sum(min(row + 1, window) for row in range(n - 1))
        saved += (n - 1) * (shape.n_weights[layer] - shape.n_embd * shape.n_kv(layer))
        saved += seen * (shape.n_q[layer] + shape.n_heads_out[layer])
    assert macs(n, 2, 1) < macs(n, shape.exact, 1)
    n_saved = macs(n, None, 1) - macs(n, shape.exact, 1)
    assert n_saved == pytest.approx(saved, rel=0.01)


def test_more_full_rows_and_fewer_skipped_layers_lower_the_limit(tmp_path):
    macs = GraphMacs(make_gguf(tmp_path / "model.gguf", "llama"))
    limits = [speedup_limit(macs, 400, boundary, 17) for boundary in (1, 4, 7)]
    assert limits == sorted(limits, reverse=True) and limits[-1] > 1
    assert speedup_limit(macs, 400, 4, 17) > speedup_limit(macs, 400, 4, 100)
    assert speedup_limit(macs, 400, 4, 0) == speedup_limit(macs, 400, 4, 1)
    assert speedup_limit(macs, 400, 4, 17, more=10**6) < speedup_limit(macs, 400, 4, 17)


def test_long_prompts_are_extrapolated_from_cached_counts(tmp_path, monkeypatch):
    path = make_gguf(tmp_path / "model.gguf", "gemma3")
    requests = [(400, boundary, 3) for boundary in (None, 4)]
    counted = [GraphMacs(path)(*count) for count in requests]
    monkeypatch.setattr(module, "_N_CTX", 64)
    macs = GraphMacs(path)
    assert [macs(*count) for count in requests] == counted
    # 60 full rows exceed the first context, so a larger context is counted.
    assert macs(400, 4, 60) > counted[1]
    first = macs(40, 4, 1)
    monkeypatch.setattr(module.backend, "count_macs", None)
    assert macs(40, 4, 1) == first


def test_uncountable_work_is_an_error(tmp_path):
    path = make_gguf(tmp_path / "model.gguf", "llama")
    with pytest.raises(PopError):
        GraphMacs(path)(40, 9, 1)
    plan = make_plan(read_shape(path))
    with pytest.raises(PopError):
        _ = plan.speedup_limit
    assert replace(plan, macs=GraphMacs(path)).speedup_limit > 1.3
