"""Check when our kernels compute and when upstream's do."""

import functools
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from support.ggml import Op, Rows, compute, in_child
from support.kernels import (
    QUANTISED,
    TYPES,
    attention,
    block,
    geglu,
    mul_mat,
    mul_mat_id,
    rms_norm_mul,
    swiglu_oai,
)

N_ROWS = (1, 8, 64)


@functools.cache
def samples() -> list[Op]:
    """Return operations of each kind and type, with few rows and with many."""
    rng = np.random.default_rng(1)
    ops: list[Op] = [mul_mat(rng, type_, n_rows) for type_ in TYPES for n_rows in N_ROWS]
    ops += [mul_mat_id(rng, type_, (0, 1, 8, 30, 21), n_used=2) for type_ in TYPES]
    ops += [
        attention(rng, n_rows, n_kv=128, type_=type_)
        for type_ in (Type.F16, Type.Q8_0)
        for n_rows in N_ROWS
    ]
    for n_rows in N_ROWS:
        ops += [make(rng, n_rows, 192) for make in (geglu, swiglu_oai, rms_norm_mul)]
    return ops


def assert_same(some: list[np.ndarray], others: list[np.ndarray]) -> None:
    for actual, expected in zip(some, others, strict=True):
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("type_", QUANTISED, ids=lambda type_: type_.name)
def test_our_kernels_compute_products(type_: Type, kernels: str, rng: np.random.Generator) -> None:
    for op in (mul_mat(rng, type_, 64, 256), mul_mat_id(rng, type_, (64, 64), n_out=256)):
        actual = compute(op, Rows.FAST)
        assert not np.array_equal(actual, compute(op, Rows.NONE))
        np.testing.assert_array_equal(actual, compute(op, Rows.ALL))
    if type_ == Type.Q2_K and kernels in ("amx", "avx512vnni"):
        return  # llama.cpp's kernels decode it
    for op in (mul_mat(rng, type_, 1, 256), mul_mat_id(rng, type_, (1, 0, 1), n_out=256)):
        assert not np.array_equal(compute(op, Rows.FAST), compute(op, Rows.NONE))


@pytest.mark.parametrize("type_", [Type.F16, Type.Q8_0], ids=lambda type_: type_.name)
def test_our_kernels_compute_attention(type_: Type, kernels: str, rng: np.random.Generator) -> None:
    op = attention(rng, n_rows=128, n_kv=256, n_heads=6, type_=type_)
    actual = compute(op, Rows.FAST)
    assert not np.array_equal(actual, compute(op, Rows.NONE))
    np.testing.assert_array_equal(actual, compute(op, Rows.ALL))


def test_disabled_row_kernels_equal_upstream(unpatched_lib: Path) -> None:
    theirs = in_child(samples(), lib=unpatched_lib, rows=Rows.NONE)
    assert_same([compute(op, Rows.NONE) for op in samples()], theirs.results)


def test_environment_disables_our_kernels(kernels: str) -> None:
    off = in_child(samples(), env={"GGML_POP_KERNELS": "0"}, rows=Rows.ALL)
    assert off.kernels == "off"
    assert_same([compute(op, Rows.NONE) for op in samples()], off.results)


def kernels_with(word: str) -> str | None:
    return in_child([], env={"GGML_POP_KERNELS": word}).kernels


def test_unknown_name_disables_no_kernels(kernels: str) -> None:
    assert {kernels_with(word) for word in ("", "1", "avx-2")} == {kernels_with("")} != {"off"}
    assert kernels_with("off") == "off"


def test_unsupported_kernel_name_selects_smaller_set(kernels: str) -> None:
    assert kernels_with("avxvnni") in ("avxvnni", "avx2")


def test_reference_implementation_is_unchanged(kernels: str) -> None:
    for op in samples():
        expected = compute(op, Rows.NONE, reference=True)
        np.testing.assert_array_equal(compute(op, Rows.ALL, reference=True), expected)


def test_no_kernel_reads_past_a_tensor(kernels: str) -> None:
    """A model's last tensor may end where the file and the mapped memory end."""
    rng = np.random.default_rng(2)
    ops: list[Op] = []
    for type_ in TYPES:
        for n_in in (256, 3 * max(block(type_), 32)):
            ops += [mul_mat(rng, type_, n_rows, 96, n_in) for n_rows in (1, 5, 24)]
        ops.append(mul_mat_id(rng, type_, (1, 8, 7, 16), n_out=96))
    for type_ in (Type.F16, Type.Q8_0):
        for n_dims in (64, 128):
            ops.append(attention(rng, 40, n_kv=104, n_dims=n_dims, type_=type_))
        ops += [make(rng, 5, n_dims) for make in (geglu, swiglu_oai, rms_norm_mul)]
    for rows in (Rows.ALL, Rows.FAST):
        done = in_child(ops, guarded=True, rows=rows, n_threads=2)
        assert_same([compute(op, rows) for op in ops], done.results)
