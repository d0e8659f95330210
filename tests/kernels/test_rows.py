"""Compare GLU, MUL of rows, and RMS_NORM followed by MUL with float64 and with upstream."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from support.ggml import Glu, MulRows, RmsNormMul, Rows, compute
from support.kernels import (
    expected_glu,
    expected_rms_norm_mul,
    first_rows,
    geglu,
    mul_rows,
    rms_norm_mul,
    swiglu_oai,
)

pytestmark = pytest.mark.usefixtures("kernels")

Make = Callable[..., Glu | RmsNormMul]


def halves(rng: np.random.Generator, *shape: int) -> Glu:
    op = geglu(rng, *shape)
    return Glu(np.concatenate([op.x, op.y], -1))


def swapped_halves(rng: np.random.Generator, *shape: int) -> Glu:
    return replace(halves(rng, *shape), swapped=True)


def swapped_oai_halves(rng: np.random.Generator, *shape: int) -> Glu:
    return replace(swapped_halves(rng, *shape), is_oai=True)


def twice_the_same(rng: np.random.Generator, *shape: int) -> Glu:
    x = geglu(rng, *shape).x
    return Glu(x, x)


KINDS: dict[str, Make] = {
    "geglu of halves": halves,
    "geglu of swapped halves": swapped_halves,
    "geglu of two": geglu,
    "geglu of twice the same": twice_the_same,
    "swiglu_oai of two": swiglu_oai,
    "swiglu_oai of swapped halves": swapped_oai_halves,
    "rms_norm": rms_norm_mul,
}
every_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS.keys())


def reference(op: Glu | RmsNormMul) -> np.ndarray:
    return expected_glu(op) if isinstance(op, Glu) else expected_rms_norm_mul(op)


@every_kind
@pytest.mark.parametrize("shape", [(1, 16), (7, 48), (40, 1152), (3, 2, 5, 64)])
def test_errors_match_float32_precision(
    make: Make, shape: tuple[int, ...], rng: np.random.Generator
) -> None:
    op = make(rng, *shape)
    expected = reference(op)
    np.testing.assert_allclose(compute(op, Rows.FAST), expected, rtol=1e-5, atol=1e-20)


@every_kind
@pytest.mark.parametrize("n_values", [1, 15, 20, 100])
def test_rows_with_an_incomplete_vector_are_correct(
    make: Make, n_values: int, rng: np.random.Generator
) -> None:
    """Upstream's gelu uses a table in float16."""
    op = make(rng, 7, n_values)
    np.testing.assert_allclose(compute(op, Rows.FAST), reference(op), rtol=0.01, atol=2e-3)


@every_kind
def test_our_kernels_compute_any_number_of_rows(make: Make, rng: np.random.Generator) -> None:
    for n_rows in (1, 40):
        ops = [make(rng, n_rows, 1152) for _ in range(20)]
        results = [compute(op, Rows.FAST) for op in ops]
        upstreams = [compute(op, Rows.NONE) for op in ops]
        assert not np.array_equal(results, upstreams)
        np.testing.assert_array_equal(results, [compute(op, Rows.ALL) for op in ops])


@every_kind
def test_result_of_a_row_does_not_depend_on_other_rows(
    make: Make, rng: np.random.Generator
) -> None:
    op = make(rng, 41, 208)
    expected = compute(op)
    for n_threads in (2, 3):
        np.testing.assert_array_equal(compute(op, n_threads=n_threads), expected)
    for n_rows in (1, 2, 17):
        part = first_rows(op, n_rows)
        np.testing.assert_array_equal(compute(part, n_threads=2), expected[:n_rows])


@every_kind
def test_rows_may_have_gaps(make: Make, rng: np.random.Generator) -> None:
    for shape in ((9, 64), (2, 3, 9, 64)):
        op = make(rng, *shape)
        apart = replace(op, stride=op.x.shape[-1] + 5)
        np.testing.assert_array_equal(compute(apart, n_threads=2), compute(op))


@every_kind
def test_nan_spreads_only_in_its_row(make: Make, rng: np.random.Generator) -> None:
    op = make(rng, 9, 64)
    x = op.x.copy()
    x[4, 37] = np.nan
    changed = replace(op, x=x, y=x) if isinstance(op, Glu) and op.y is op.x else replace(op, x=x)
    expected, actual = compute(op), compute(changed)
    row = isinstance(op, RmsNormMul)
    hit = np.zeros(expected.shape, bool)
    hit[4, slice(None) if row else 37] = True
    assert np.isnan(actual[hit]).all()
    np.testing.assert_array_equal(actual[~hit], expected[~hit])


@pytest.mark.parametrize("make", [geglu, swiglu_oai])
def test_nan_in_a_glus_second_input_stays_in_place(
    make: Callable[..., Glu], rng: np.random.Generator
) -> None:
    op = make(rng, 9, 64)
    assert op.y is not None
    y = op.y.copy()
    y[4, 37] = np.nan
    np.testing.assert_array_equal(np.isnan(compute(replace(op, y=y))), np.isnan(y))


def test_norms_of_zeros_are_zeros(rng: np.random.Generator) -> None:
    op = rms_norm_mul(rng, 3, 64)
    op.x[1] = 0
    assert not compute(op)[1].any()


def test_epsilon_of_the_norm_is_used(rng: np.random.Generator) -> None:
    for eps in (0, 1e-12, 1.0):
        op = replace(rms_norm_mul(rng, 20, 96), eps=eps)
        np.testing.assert_allclose(compute(op), reference(op), rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, 16), (5, 6, 96), (7, 100), (2, 3, 5, 64)])
def test_rows_times_factors_equal_upstream(
    shape: tuple[int, ...], rng: np.random.Generator
) -> None:
    op = mul_rows(rng, *shape)
    for rows_op in (op, replace(op, stride=shape[-1] + 5)):
        for rows, n_threads in ((Rows.ALL, 1), (Rows.FAST, 3), (Rows.NONE, 1)):
            np.testing.assert_array_equal(compute(rows_op, rows, n_threads), op.x * op.factors)


def test_broadcast_factors_are_left_to_upstream(rng: np.random.Generator) -> None:
    op = mul_rows(rng, 4, 6, 32)
    for factors in (op.factors[:1], op.factors[:, :1], op.factors[:1, :1]):
        shared = MulRows(op.x, np.ascontiguousarray(factors))
        np.testing.assert_array_equal(compute(shared), op.x * factors)
