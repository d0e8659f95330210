"""Products of the same rows in one graph, which are packed once."""

from dataclasses import replace

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from support.ggml import Between, MulMat, Rows, compute, compute_all, compute_with_rows_lost
from support.kernels import activations, mul_mat_id, weights

pytestmark = pytest.mark.usefixtures("kernels")

# A Q4_K_M model's Q, K and V, and floats, which have another packed form.
KINDS = (Type.Q4_K, Type.Q4_K, Type.Q6_K, Type.F16, Type.Q5_0)


def products(rng: np.random.Generator, x: np.ndarray) -> list[MulMat]:
    sizes = (96, 32, 64, 32, 160)
    return [
        MulMat(weights(rng, kind, n, x.shape[-1]), x) for kind, n in zip(KINDS, sizes, strict=True)
    ]


def assert_alone(ops: list[MulMat], results: list[np.ndarray], rows: Rows = Rows.ALL) -> None:
    for op, result in zip(ops, results, strict=True):
        np.testing.assert_array_equal(result, compute(op, rows))


@pytest.mark.parametrize("rows", [Rows.ALL, Rows.FAST])
@pytest.mark.parametrize("n_rows", [1, 7, 40])
@pytest.mark.parametrize("between", [None, Between.ADD, Between.ROPE])
def test_results_equal_separate_computations(
    between: Between | None, n_rows: int, rows: Rows, rng: np.random.Generator
) -> None:
    ops = products(rng, activations(rng, n_rows, 512))
    for n_threads in (1, 3):
        assert_alone(ops, compute_all(ops, rows, n_threads, between=between), rows)


def test_different_rows_are_packed_again(rng: np.random.Generator) -> None:
    some, others = (products(rng, activations(rng, 40, 512)) for _ in range(2))
    ops = [op for pair in zip(some, others, strict=True) for op in pair]
    assert_alone(ops, compute_all(ops))
    fewer = [replace(op, x=op.x[:9].copy()) for op in some[:2]]
    assert_alone([*some[:2], *fewer], compute_all([*some[:2], *fewer]))


def test_rows_that_change_in_place_are_packed_again(rng: np.random.Generator) -> None:
    ops = products(rng, activations(rng, 40, 512))[:3]
    changed = [replace(op, x=op.x * 2**n) for n, op in enumerate(ops)]
    assert_alone(changed, compute_all(ops, between=Between.OVERWRITE))


def test_rows_overwritten_by_a_wide_rope_are_packed_again(rng: np.random.Generator) -> None:
    """Such a RoPE stores more than 512 floats per thread in the work buffer."""
    x = activations(rng, 40, 256)
    ops = [MulMat(weights(rng, Type.Q4_K, 2048, 256), x) for _ in range(2)]
    assert_alone(ops, compute_all(ops, n_threads=3, between=Between.ROPE))


def test_experts_equal_separate_computations(rng: np.random.Generator) -> None:
    gate, up = (mul_mat_id(rng, Type.Q4_K, (0, 1, 8, 30, 21), n_used=2) for _ in range(2))
    same = replace(up, x=gate.x, ids=gate.ids)
    other_ids = replace(same, ids=gate.ids[::-1].copy())
    ops = [gate, same, other_ids, gate]
    for n_threads in (1, 2):
        for op, result in zip(ops, compute_all(ops, n_threads=n_threads), strict=True):
            np.testing.assert_array_equal(result, compute(op))


@pytest.mark.parametrize(("n_rows", "rows"), [(40, Rows.ALL), (1, Rows.FAST)])
def test_same_rows_are_packed_once(n_rows: int, rows: Rows, rng: np.random.Generator) -> None:
    query, key, _, of_floats, _ = products(rng, activations(rng, n_rows, 512))
    *shared, alone = compute_with_rows_lost([query, key, of_floats], rows)
    assert_alone([query, key], shared, rows)
    assert not alone.any()
