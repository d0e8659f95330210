"""The kernels that a processor of less would have, which GGML_POP_KERNELS chooses by their name."""

import contextlib
from dataclasses import replace

import numpy as np
import pytest

from support.ggml import MulMat, MulMatId, Op, Stored, compute, in_child
from support.kernels import (
    INTERLEAVED,
    QUANTISED,
    REPACKED,
    check_extreme,
    check_product,
    extremes,
    first_rows,
    mul_mat,
    mul_mat_id,
    reads,
)

N_ROWS = (1, 2, 3, 5, 17)


@pytest.mark.parametrize("name", ["avx512vnni", "avxvnni", "avx2"])
def test_products_of_lesser_kernels(name: str, kernels: str, rng: np.random.Generator) -> None:
    if name == kernels:
        pytest.skip("all tests are about these")
    ops: dict[tuple[object, ...], Op] = {}
    for type_ in QUANTISED:
        many = mul_mat(rng, type_, 40, n_out=77, n_in=768)
        ops |= {(type_, n_rows): first_rows(many, n_rows) for n_rows in (*N_ROWS, 40)}
        x = many.x.copy()
        x[3, 301] = np.nan
        ops[type_, "no number"] = replace(many, x=x)
        ops |= {(type_, "extreme", i): each for i, each in enumerate(extremes(type_))}
        ops[type_, "experts"] = mul_mat_id(rng, type_, (0, 1, 5, 6, 40), n_out=77)
    for buffer, type_ in REPACKED:
        if not reads(name, buffer):
            continue
        plain = mul_mat(rng, type_, 17, n_out=9 * INTERLEAVED[buffer], n_in=768)
        repacked = replace(plain, buffer=buffer)
        with contextlib.suppress(LookupError):  # Q2_K has a layout where there is AVX-512.
            compute(repacked)
            ops |= {(type_, buffer, "plain"): plain, (type_, buffer, "repacked"): repacked}
    child = in_child(list(ops.values()), env={"GGML_POP_KERNELS": name})
    if child.kernels != name:
        pytest.skip("these kernels are not in the library")
    results = dict(zip(ops, child.results, strict=True))
    for key, op in ops.items():
        got = results[key]
        if "extreme" in key:
            assert isinstance(op, MulMat)
            check_extreme(got, op, name)
        elif isinstance(op, MulMatId):
            for expert in range(len(op.weights.data)):
                rows = op.ids[:, 0] == expert
                if rows.any():
                    stored = Stored(op.weights.type, op.weights.data[expert])
                    check_product(got[rows], stored, op.x[rows])
        elif key[1] in N_ROWS:
            np.testing.assert_array_equal(got, results[key[0], 40][: len(got)])
        elif "no number" in key:
            assert np.isnan(got[3]).all()
            others = np.arange(40) != 3
            np.testing.assert_array_equal(got[others], results[key[0], 40][others])
        elif "repacked" in key:
            np.testing.assert_array_equal(got, results[(*key[:2], "plain")])
        else:
            assert isinstance(op, MulMat)
            check_product(got, op.weights, op.x)
