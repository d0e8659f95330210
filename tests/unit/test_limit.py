"""The analytical limit, against a count that goes through all rows and positions."""

import pytest

from converter.macs import prefill_macs, speedup_limit
from converter.shape import ModelShape


def shape(n_layer: int = 4, swa_window: tuple[int, ...] = (0, 0, 0, 0)) -> ModelShape:
    """Numbers that differ between layers, so that none can stand in for another."""
    layers = range(n_layer)
    return ModelShape(
        arch="llama",
        n_layer=n_layer,
        n_vocab=100,
        n_embd=8,
        attn_proj_macs=tuple(1_000 + i for i in layers),
        kv_macs=tuple(100 + i for i in layers),
        ffn_macs=tuple(5_000 + i for i in layers),
        attn_dim=tuple(16 + i for i in layers),
        swa_window=swa_window,
        head_macs=800,
    )


def counted(model: ModelShape, n_prompt: int, boundary: int | None, n_full: int) -> int:
    """Row by row, position by position."""
    total = model.head_macs
    full_rows = set(range(max(0, n_prompt - n_full), n_prompt))
    for layer in range(model.n_layer):
        skipped = boundary is not None and layer >= boundary
        for row in range(n_prompt):
            if skipped:
                total += model.kv_macs[layer]
                if row not in full_rows:
                    continue
            window = model.swa_window[layer] or n_prompt
            seen = [p for p in range(row + 1) if row - p < window]
            total += model.attn_proj_macs[layer] + model.kv_macs[layer]
            total += len(seen) * model.attn_dim[layer]
            if layer < model.n_layer - 1 or row == n_prompt - 1:
                total += model.ffn_macs[layer]
    return total


@pytest.mark.parametrize("n_prompt", [1, 2, 9, 40])
@pytest.mark.parametrize("boundary", [None, 1, 2, 3])
@pytest.mark.parametrize("n_full", [1, 3, 17])
@pytest.mark.parametrize("windows", [(0, 0, 0, 0), (5, 0, 5, 0), (100, 3, 3, 1)])
def test_macs_are_those_of_a_row_by_row_count(n_prompt, boundary, n_full, windows):
    model = shape(swa_window=windows)
    assert prefill_macs(model, n_prompt, boundary, n_full) == counted(
        model, n_prompt, boundary, n_full
    )


def test_limit_is_the_quotient_and_at_least_one():
    model = shape()
    full, pruned = prefill_macs(model, 400, None, 1), prefill_macs(model, 400, 2, 5)
    assert speedup_limit(model, 400, 2, 5) == full / pruned > 1


def test_more_full_rows_and_fewer_skipped_layers_lower_the_limit():
    model = shape()
    limits = [speedup_limit(model, 400, boundary, 17) for boundary in (1, 2, 3)]
    assert limits == sorted(limits, reverse=True)
    assert speedup_limit(model, 400, 2, 17) > speedup_limit(model, 400, 2, 100)
