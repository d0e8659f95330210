"""Compare MUL_MAT_ID with MUL_MAT of each expert and its rows."""

from dataclasses import replace

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from support.ggml import MulMat, MulMatId, Rows, Stored, compute, is_covered
from support.kernels import (
    QUANTISED,
    TYPES,
    check_product,
    first_rows,
    is_decoded_upstream,
    mul_mat_id,
    require_covered,
)

pytestmark = pytest.mark.usefixtures("kernels")

each_type = pytest.mark.parametrize("type_", TYPES, ids=lambda type_: type_.name)
# Number of rows of each expert.
UNEVEN = (0, 1, 5, 6, 40, 7, 13)
# The same for tokens with two or three experts.
SHARED = (0, 1, 5, 6, 40, 34, 34)


def check(op: MulMatId, actual: np.ndarray) -> None:
    """Compare each expert's rows with float64, within the limits of MUL_MAT."""
    ids = op.ids[:, : op.n_used]
    x = np.broadcast_to(op.x, (*ids.shape, op.x.shape[-1]))
    assert not np.isnan(actual).any()
    for expert in np.unique(ids):
        rows = ids == expert
        stored = Stored(op.weights.type, op.weights.data[expert])
        if rows.sum() > 4:
            check_product(actual[rows], stored, x[rows])
        else:
            expected = x[rows] @ stored.values.T
            np.testing.assert_allclose(actual[rows], expected, rtol=0, atol=0.1 * expected.std())


@each_type
def test_experts_may_have_any_number_of_rows(type_: Type, rng: np.random.Generator) -> None:
    op = mul_mat_id(rng, type_, UNEVEN, n_out=77)
    if type_ in QUANTISED:
        assert is_covered(op)
    check(op, compute(op))


@pytest.mark.parametrize("type_", [Type.Q4_K, Type.MXFP4, Type.Q8_0], ids=lambda t: t.name)
def test_tokens_may_have_several_experts(type_: Type, rng: np.random.Generator) -> None:
    op = mul_mat_id(rng, type_, SHARED, n_used=3, n_out=40)
    check(op, compute(op))
    # Up projections read one row for all experts of a token.
    shared = replace(op, x=op.x[:, :1])
    actual = compute(shared)
    check(shared, actual)
    for n in range(op.n_used):
        expert = replace(shared, ids=op.ids[:, n:], n_used=1)
        np.testing.assert_array_equal(compute(expert)[:, 0], actual[:, n])


@each_type
def test_result_of_a_row_equals_its_expert_alone(type_: Type, rng: np.random.Generator) -> None:
    op = mul_mat_id(rng, type_, SHARED, n_used=2, n_out=77)
    require_covered(op)
    actual = compute(op)
    for expert in range(len(SHARED)):
        rows = op.ids[:, : op.n_used] == expert
        if rows.any():
            alone = MulMat(Stored(type_, op.weights.data[expert]), op.x[rows])
            np.testing.assert_array_equal(compute(alone), actual[rows])
    for n_tokens in (1, 5, 17):
        part = first_rows(op, n_tokens)
        np.testing.assert_array_equal(compute(part), actual[:n_tokens])
    for n_threads in (2, 3):
        np.testing.assert_array_equal(compute(op, n_threads=n_threads), actual)
    x = op.x.copy()
    x[9, 1, 100] = np.nan
    with_nan = compute(replace(op, x=x))
    assert np.isnan(with_nan[9, 1]).all()
    with_nan[9, 1] = actual[9, 1]
    np.testing.assert_array_equal(with_nan, actual)


@each_type
def test_threads_change_no_result_of_few_rows(type_: Type, rng: np.random.Generator) -> None:
    """Rows.FAST selects kernels for few rows, for many, or upstream's."""
    for per_expert in ((1, 0, 0, 0, 1), (1, 0, 2, 3), (5, 6, 1, 0), UNEVEN):
        op = mul_mat_id(rng, type_, per_expert, n_out=77)
        actual = compute(op, Rows.FAST)
        if not is_decoded_upstream(type_):
            check(op, actual)
        np.testing.assert_array_equal(compute(op, Rows.FAST, n_threads=3), actual)
