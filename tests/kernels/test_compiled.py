"""Test the AVX-512 kernel for few columns without the instructions that only some processors have.

A build for the local processor omits the code for processors without VBMI or GFNI, which the
wheels' variant for Cascade Lake contains.
"""

import ctypes
import shutil
import sys

import pytest

from support.gemv_512 import compiled, multiply
from support.ggml import MulMat
from support.kernels import QUANTISED, block, check_extreme, check_product, extremes, mul_mat

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def kernel(kernels: str, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if sys.platform == "win32" or shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler with GCC's options")
    if kernels not in ("amx", "avx512vnni"):
        pytest.skip("needs a processor with AVX512_VNNI")
    return compiled(tmp_path_factory.mktemp("gemv"))


@pytest.mark.parametrize("type_", QUANTISED, ids=lambda type_: type_.name)
def test_products_without_vbmi_and_gfni(type_, kernel, rng):
    for n_in in (256, 768, *((32, 96, 160, 1056) if block(type_) == 32 else ())):
        op = mul_mat(rng, type_, 7, n_out=77, n_in=n_in)
        for n_rows in (1, 2, 5, 7):
            few = MulMat(op.weights, op.x[:n_rows])
            check_product(multiply(kernel, few), few.weights, few.x)
    for op in extremes(type_):
        check_extreme(multiply(kernel, op), op, "avx512vnni")
