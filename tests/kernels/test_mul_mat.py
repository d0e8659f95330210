"""MUL_MAT: errors by type, shapes, extreme codes, and what a row's result depends on."""

from dataclasses import replace

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from support.ggml import MulMat, Rows, Stored, compute, is_covered
from support.kernels import (
    FLOATS,
    QUANTISED,
    SCALES,
    TYPES,
    activations,
    block,
    check_extreme,
    check_product,
    extremes,
    first_rows,
    is_decoded_upstream,
    mul_mat,
    put_scale,
    require_covered,
    rms,
    weights,
)

pytestmark = pytest.mark.usefixtures("kernels")

each_type = pytest.mark.parametrize("type_", TYPES, ids=lambda type_: type_.name)
each_quantised = pytest.mark.parametrize("type_", QUANTISED, ids=lambda type_: type_.name)


def widths(type_: Type) -> tuple[int, ...]:
    """Return numbers of inputs with an incomplete last group of each unpacking size."""
    if type_ in FLOATS:
        return 32, 50, 96, 768
    return (32, 64, 128, 192, 224, 640, 1056) if block(type_) == 32 else (256, 768, 1280)


@each_type
def test_errors_match_int8_activations(type_: Type, rng: np.random.Generator) -> None:
    for n_in in widths(type_):
        for n_out in (1, 31, 77):
            op = mul_mat(rng, type_, 40, n_out, n_in)
            if type_ in QUANTISED:
                assert all(is_covered(first_rows(op, n_rows)) for n_rows in (1, 2, 40))
            check_product(compute(op), op.weights, op.x)


@each_type
def test_result_of_a_row_does_not_depend_on_other_rows(
    type_: Type, rng: np.random.Generator
) -> None:
    op = mul_mat(rng, type_, 40, n_out=77, n_in=768)
    require_covered(op)
    expected = compute(op)
    check_product(expected, op.weights, op.x)
    for n_rows in range(1, 40):
        np.testing.assert_array_equal(compute(first_rows(op, n_rows)), expected[:n_rows])
    np.testing.assert_array_equal(compute(replace(op, x=op.x[7:20])), expected[7:20])
    x, others = op.x.copy(), ~np.isin(np.arange(40), (3, 9, 39))
    x[[3, 9, 39], [0, 301, 767]] = np.nan
    actual = compute(replace(op, x=x))
    assert np.isnan(actual[~others]).all()
    np.testing.assert_array_equal(actual[others], expected[others])


@each_type
def test_number_of_threads_changes_no_result(type_: Type, rng: np.random.Generator) -> None:
    for n_out in (40, 300):
        op = mul_mat(rng, type_, 70, n_out)
        require_covered(op)
        for n_rows in (1, 7, 70):
            part = first_rows(op, n_rows)
            expected = compute(part)
            for n_threads in (2, 3):
                np.testing.assert_array_equal(compute(part, n_threads=n_threads), expected)


@each_quantised
def test_few_rows_have_the_same_errors(type_: Type, rng: np.random.Generator) -> None:
    for n_in in widths(type_):
        op = mul_mat(rng, type_, 24, 77, n_in)
        for n_rows in (1, 2, 3, 5, 8, 17, 24):
            part = replace(op, x=op.x[:n_rows])
            actual = compute(part, Rows.FAST)
            if not is_decoded_upstream(type_):
                check_product(actual, op.weights, part.x)
            np.testing.assert_array_equal(compute(part, Rows.FAST, n_threads=3), actual)


@each_quantised
def test_result_of_a_row_does_not_depend_on_few_other_rows(
    type_: Type, rng: np.random.Generator
) -> None:
    """On all processors, four rows are computed by a kernel for few rows."""
    op = mul_mat(rng, type_, 4, n_out=300, n_in=max(widths(type_)))
    expected = compute(op, Rows.FAST)
    if is_decoded_upstream(type_):
        np.testing.assert_array_equal(expected, compute(op, Rows.NONE))
        return
    assert not np.array_equal(expected, compute(op, Rows.NONE))
    for n_rows in (1, 2, 3):
        np.testing.assert_array_equal(compute(first_rows(op, n_rows), Rows.FAST), expected[:n_rows])
    x, others = op.x.copy(), np.arange(4) != 2
    x[2, 301] = np.nan
    actual = compute(replace(op, x=x), Rows.FAST)
    assert np.isnan(actual[2]).all()
    np.testing.assert_array_equal(actual[others], expected[others])


@pytest.mark.parametrize("type_", FLOATS, ids=lambda type_: type_.name)
def test_few_float_rows_equal_one_of_two_results(type_: Type, rng: np.random.Generator) -> None:
    op = mul_mat(rng, type_, 40, n_out=77, n_in=768)
    for n_rows in (1, 5, 8, 24, 40):
        part = first_rows(op, n_rows)
        actual = compute(part, Rows.FAST)
        both = compute(part), compute(part, Rows.NONE)
        assert any(np.array_equal(actual, result) for result in both)


@each_quantised
def test_extreme_codes_do_not_overflow(type_: Type, kernels: str) -> None:
    for op in extremes(type_):
        check_extreme(compute(op), op, kernels)
        few = first_rows(op, 2)
        assert isinstance(few, MulMat)
        check_extreme(compute(few, Rows.FAST), few, "of 8 bits")


@each_quantised
def test_blocks_of_zeros_give_zeros(type_: Type, rng: np.random.Generator) -> None:
    op = mul_mat(rng, type_, 16, n_out=40, n_in=768)
    data = op.weights.data.reshape(40, 768 // block(type_), -1)
    for at in SCALES[type_]:
        put_scale(data[::3], at, np.zeros(data[::3].shape[:-1]))
        put_scale(data[:, 1:2], at, np.zeros((40, 1)))
    if type_ == Type.MXFP4:
        data[::3] = 0
    x = op.x.copy()
    x[2:5] = 0
    x[:, 32:64] = 0
    op = replace(op, weights=Stored(type_, data.reshape(40, -1)), x=x)
    actual = compute(op)
    check_product(actual, op.weights, x)
    assert not actual[2:5].any() and np.abs(actual[:, ::3]).max() < 1e-30


@each_quantised
def test_supports_tiny_scales_and_large_activations(
    type_: Type, kernels: str, rng: np.random.Generator
) -> None:
    stored = weights(rng, type_, 40, 256)
    data = stored.data.reshape(40, 256 // block(type_), -1)
    for at in SCALES[type_]:  # the smallest float16 values
        put_scale(data, at, rng.integers(-3, 4, data.shape[:-1]) * 2.0**-24)
    if type_ == Type.MXFP4:  # AMX flushes subnormal numbers to zero
        data[..., 0] = rng.integers(0, 4, data.shape[:-1]) + (8 if kernels == "amx" else 0)
    x = activations(rng, 32, 256)
    x[::2] *= 1e5
    x[1::2] *= 1e2
    check_product(compute(MulMat(stored, x[::2])), stored, x[::2])
    check_product(compute(MulMat(stored, x[1::2])), stored, x[1::2])


@each_type
def test_rows_may_have_gaps(type_: Type, rng: np.random.Generator) -> None:
    op = mul_mat(rng, type_, 16)
    np.testing.assert_array_equal(compute(replace(op, stride=300)), compute(op))


@each_quantised
def test_nan_weights_change_no_other_output(type_: Type, rng: np.random.Generator) -> None:
    """For few rows, the kernel reads groups of blocks that may belong to two outputs."""
    if not SCALES[type_]:
        pytest.skip("this type's scales cannot be NaN")
    n_in = 640 if block(type_) == 32 else 768
    op = mul_mat(rng, type_, 3, n_out=77, n_in=n_in)
    expected, others = compute(op, Rows.FAST), ~np.isin(np.arange(77), (1, 40, 76))
    data = op.weights.data.reshape(77, n_in // block(type_), -1).copy()
    for row in np.flatnonzero(~others):
        for at in SCALES[type_]:
            put_scale(data[row], at, np.full(data.shape[1], np.nan))
    actual = compute(replace(op, weights=Stored(type_, data.reshape(77, -1))), Rows.FAST)
    assert np.isnan(actual[:, ~others]).all()
    np.testing.assert_array_equal(actual[:, others], expected[:, others])


@pytest.mark.parametrize("type_", [Type.Q4_K, Type.Q5_0, Type.Q8_0, *FLOATS], ids=lambda t: t.name)
@pytest.mark.parametrize("permuted", [False, True], ids=["contiguous", "permuted"])
def test_each_head_has_its_own_matrix(
    type_: Type, permuted: bool, rng: np.random.Generator
) -> None:
    """Weights have one or two heads, and rows six heads in two streams, as in plain attention."""
    for n_weights in (1, 2):
        stored = weights(rng, type_, 1, n_weights, 33, 256)
        x = activations(rng, 2, 6, 17, 256)
        of_each_head = Stored(type_, np.repeat(stored.data, 6 // n_weights, 1))
        op = MulMat(stored, x)
        if permuted:
            stored = Stored(type_, np.ascontiguousarray(np.swapaxes(stored.data, 1, 2)))
            op = MulMat(stored, np.ascontiguousarray(np.swapaxes(x, 1, 2)), permuted=True)
        if is_covered(op):
            check_product(compute(op, n_threads=2), of_each_head, x)
        # Upstream's activations have one scale per 256 values.
        actual, expected = compute(op), np.einsum("nhrk,mhok->nhro", x, of_each_head.values)
        assert rms(actual - expected) <= 0.05 * rms(expected)
