"""Test the AVX-512 kernel for few columns, compiled separately from the library.

A build for the local processor omits the code for processors without VBMI or GFNI, which the
wheels' variant for Cascade Lake contains.
"""

import ctypes
import shutil
import sys

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from support.gemv_512 import compiled, multiply
from support.ggml import MulMat, Stored
from support.kernels import QUANTISED, block, check_extreme, check_product, extremes, mul_mat

pytestmark = pytest.mark.slow
DECODED = [type_ for type_ in QUANTISED if type_ != Type.Q2_K]  # llama.cpp decodes Q2_K


@pytest.fixture(scope="module")
def requirements(kernels: str) -> None:
    """Skip the test if the machine has no suitable compiler or no AVX-512 VNNI."""
    if sys.platform == "win32" or shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler with GCC's options")
    if kernels not in ("amx", "avx512vnni"):
        pytest.skip("needs a processor with AVX512_VNNI")


@pytest.fixture(scope="module")
def portable(requirements, tmp_path_factory) -> ctypes.CDLL:
    return compiled(tmp_path_factory.mktemp("portable"))


@pytest.fixture(scope="module")
def native(requirements, tmp_path_factory) -> ctypes.CDLL:
    return compiled(tmp_path_factory.mktemp("native"), "-march=native")


@pytest.mark.parametrize("type_", DECODED, ids=lambda type_: type_.name)
def test_products_need_neither_vbmi_nor_gfni(type_, portable, rng):
    for n_in in (256, 768, *((32, 96, 128, 192, 640, 1056) if block(type_) == 32 else ())):
        op = mul_mat(rng, type_, 7, n_out=77, n_in=n_in)
        for n_rows in (1, 2, 5, 7):
            few = MulMat(op.weights, op.x[:n_rows])
            check_product(multiply(portable, few), few.weights, few.x)
    for op in extremes(type_):
        check_extreme(multiply(portable, op), op, "avx512vnni")


@pytest.mark.parametrize("type_", DECODED, ids=lambda type_: type_.name)
def test_rows_of_weights_may_have_gaps(type_, native, rng):
    op = mul_mat(rng, type_, 3, n_out=77, n_in=640 if block(type_) == 32 else 768)
    apart = np.pad(op.weights.data, ((0, 0), (0, 64)), constant_values=255)
    actual = multiply(native, MulMat(Stored(type_, apart), op.x))
    check_product(actual, op.weights, op.x)
