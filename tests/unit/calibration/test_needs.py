"""Test that the sums of a large model's fits fit in a laptop's memory."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

from pop_local.calibration import needs
from pop_local.measure.budget import BALANCED
from pop_local.workflows.conversion.conversion_plan import ConvertOptions, Within, plan_conversion
from support.synthetic import Recipe, add_header

pytestmark = pytest.mark.slow
Q8_0 = GGMLQuantizationType.Q8_0
# Free memory of a laptop with 16 GB.
FREE_BYTES = 12 * 10**9
LLAMA_8B = Recipe(
    n_layer=32,
    n_embd=4096,
    n_head=32,
    n_head_kv=8,
    head_dim=128,
    n_ff=14_336,
    n_vocab=32_768,
    n_ctx_train=131_072,
    rope_base=500_000.0,
)


def llama_shapes(recipe: Recipe) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Return names and dimensions of a llama model's tensors; the last dimension is the row's."""
    n_embd, n_ff = recipe.n_embd, recipe.n_ff
    n_q, n_kv = recipe.n_head * recipe.head_dim, recipe.n_head_kv * recipe.head_dim
    yield "token_embd.weight", (recipe.n_vocab, n_embd)
    yield "output.weight", (recipe.n_vocab, n_embd)
    yield "output_norm.weight", (n_embd,)
    layer_shapes: dict[str, tuple[int, ...]] = {
        "attn_norm": (n_embd,),
        "ffn_norm": (n_embd,),
        "attn_q": (n_q, n_embd),
        "attn_k": (n_kv, n_embd),
        "attn_v": (n_kv, n_embd),
        "attn_output": (n_embd, n_q),
        "ffn_gate": (n_ff, n_embd),
        "ffn_up": (n_ff, n_embd),
        "ffn_down": (n_embd, n_ff),
    }
    for layer in range(recipe.n_layer):
        for name, shape in layer_shapes.items():
            yield f"blk.{layer}.{name}.weight", shape


@pytest.fixture(scope="module")
def llama_8b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the header of an 8B model, followed by a hole instead of weights."""
    path = tmp_path_factory.mktemp("large") / "8b.gguf"
    writer = GGUFWriter(path, LLAMA_8B.arch)
    add_header(writer, LLAMA_8B)
    n_all = 0
    for name, dims in llama_shapes(LLAMA_8B):
        kind = GGMLQuantizationType.F32 if len(dims) == 1 else Q8_0
        n_block, n_bytes = GGML_QUANT_SIZES[kind]
        row = dims[-1] // n_block * n_bytes
        n_data = row * (dims[0] if len(dims) > 1 else 1)
        writer.add_tensor_info(name, dims, np.dtype(np.float32), n_data, raw_dtype=kind)
        n_all += -(-n_data // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.truncate(-(-path.stat().st_size // 32) * 32 + n_all)
    return path


def test_default_fit_of_8b_model_fits_laptop_memory(llama_8b, monkeypatch):
    monkeypatch.setattr(needs, "free_bytes", lambda: FREE_BYTES)
    planned = plan_conversion(llama_8b, None, ConvertOptions(Within(BALANCED)))
    assert planned.needs is not None
    assert len(planned.plans) == 22
    assert len(planned.needs.groups) == 1
    assert planned.needs.sums_bytes < FREE_BYTES // 2
    fitted = {pair.boundary for pair in planned.needs.groups[0]}
    assert fitted == {plan.boundary for plan in planned.tried[1:]} and len(fitted) == 4
    assert min(fitted) <= 32 // 2 - 2
