"""Test the kernels of lesser processors, selected by name in GGML_POP_KERNELS."""

from dataclasses import replace

import numpy as np
import pytest

from support.ggml import MulMat, MulMatId, Op, Rows, Stored, in_child
from support.kernels import (
    QUANTISED,
    block,
    check_extreme,
    check_product,
    extremes,
    first_rows,
    mul_mat,
    mul_mat_id,
)

N_ROWS = (1, 2, 3, 5, 17)
LESSER = ("avx512vnni", "avxvnni", "avx2")


@pytest.mark.parametrize("name", LESSER)
def test_older_instruction_sets_have_the_same_errors(
    name: str, kernels: str, rng: np.random.Generator
) -> None:
    if name == kernels:
        pytest.skip("the other tests cover these kernels")
    ops: dict[tuple[object, ...], Op] = {}
    for type_ in QUANTISED:
        many = mul_mat(rng, type_, 40, n_out=77, n_in=768)
        ops |= {(type_, n_rows): first_rows(many, n_rows) for n_rows in (*N_ROWS, 40)}
        x = many.x.copy()
        x[3, 301] = np.nan
        ops[type_, "no number"] = replace(many, x=x)
        ops |= {(type_, "extreme", i): op for i, op in enumerate(extremes(type_))}
        ops[type_, "experts"] = mul_mat_id(rng, type_, (0, 1, 5, 6, 40), n_out=77)
    child = in_child(list(ops.values()), env={"GGML_POP_KERNELS": name})
    if child.kernels != name:
        pytest.skip("these kernels are not in the library")
    results = dict(zip(ops, child.results, strict=True))
    for key, op in ops.items():
        actual = results[key]
        if "extreme" in key:
            assert isinstance(op, MulMat)
            check_extreme(actual, op, name)
        elif isinstance(op, MulMatId):
            for expert in range(len(op.weights.data)):
                rows = op.ids[:, 0] == expert
                if rows.any():
                    stored = Stored(op.weights.type, op.weights.data[expert])
                    check_product(actual[rows], stored, op.x[rows])
        elif key[1] in N_ROWS:
            np.testing.assert_array_equal(actual, results[key[0], 40][: len(actual)])
        elif "no number" in key:
            assert np.isnan(actual[3]).all()
            others = np.arange(40) != 3
            np.testing.assert_array_equal(actual[others], results[key[0], 40][others])
        else:
            assert isinstance(op, MulMat)
            check_product(actual, op.weights, op.x)


@pytest.mark.parametrize("name", LESSER)
def test_older_instruction_sets_compute_few_rows(
    name: str, kernels: str, rng: np.random.Generator
) -> None:
    if name == kernels:
        pytest.skip("the other tests cover these kernels")
    ops: list[Op] = [
        first_rows(mul_mat(rng, type_, 4, n_out=77, n_in=n_in), n_rows)
        for type_ in QUANTISED
        for n_in in (256, 768, *((96, 640, 1056) if block(type_) == 32 else ()))
        for n_rows in (1, 4)
    ]
    ends = [first_rows(op, 2) for type_ in QUANTISED for op in extremes(type_)]
    child = in_child(ops + ends, env={"GGML_POP_KERNELS": name}, rows=Rows.FAST)
    if child.kernels != name:
        pytest.skip("these kernels are not in the library")
    for op, actual in zip(ops + ends, child.results, strict=True):
        assert isinstance(op, MulMat)
        if len(op.x) == 2:
            check_extreme(actual, op, name)
        else:
            check_product(actual, op.weights, op.x)
