"""Writes a random model in the shape of a published one, to measure the speed of. Not a test.

    python tests/bench/make_shaped.py {gemma-4-e2b,llama-3.1-8b} MODEL.gguf [--type q8_0]

All layers, heads, windows and widths are those of the published model; the vocabulary has 16,384
tokens (32,768 of the 8B). The files have 2.1 and 7.7 GB with Q8_0, 1.1 and 4.1 GB with Q4_0.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUFWriter
from gguf import GGMLQuantizationType as Type

from shared import GEMMA4_E2B, Recipe, add_header, add_keys, shapes

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
TYPES = {"q8_0": Type.Q8_0, "q4_0": Type.Q4_0}
# Standard deviation of evenly drawn whole numbers: -127 to 127, and -8 to 7.
DEVIATIONS = {Type.Q8_0: 73.6, Type.Q4_0: 4.61}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("shape", choices=["gemma-4-e2b", "llama-3.1-8b"])
    parser.add_argument("model", type=Path)
    parser.add_argument("--type", choices=TYPES, default="q8_0")
    options = parser.parse_args()
    kind, rng = TYPES[options.type], np.random.default_rng(0)
    is_gemma = options.shape == "gemma-4-e2b"
    arch = GEMMA4_E2B.base.arch if is_gemma else LLAMA_8B.arch
    writer = GGUFWriter(options.model, arch, use_temp_file=True)
    if is_gemma:
        add_keys(writer, GEMMA4_E2B)
    else:
        add_header(writer, LLAMA_8B)
    for name, dims in shapes(GEMMA4_E2B) if is_gemma else llama_shapes(LLAMA_8B):
        if len(dims) == 1:
            writer.add_tensor(name, np.ones(dims, np.float32))
        else:
            writer.add_tensor(name, blocks(rng, dims, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_shapes(recipe: Recipe) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and dimensions of all tensors, the last dimension that of the rows."""
    n_embd, n_ff = recipe.n_embd, recipe.n_ff
    n_q, n_kv = recipe.n_head * recipe.head_dim, recipe.n_head_kv * recipe.head_dim
    yield "token_embd.weight", (recipe.n_vocab, n_embd)
    yield "output.weight", (recipe.n_vocab, n_embd)
    yield "output_norm.weight", (n_embd,)
    for layer in range(recipe.n_layer):
        for name, dims in {
            "attn_norm": (n_embd,),
            "ffn_norm": (n_embd,),
            "attn_q": (n_q, n_embd),
            "attn_k": (n_kv, n_embd),
            "attn_v": (n_kv, n_embd),
            "attn_output": (n_embd, n_q),
            "ffn_gate": (n_ff, n_embd),
            "ffn_up": (n_ff, n_embd),
            "ffn_down": (n_embd, n_ff),
        }.items():
            yield f"blk.{layer}.{name}.weight", dims


def blocks(rng: np.random.Generator, dims: tuple[int, ...], kind: Type) -> np.ndarray:
    """Rows of unit gain in quantised blocks, uint8 [.., bytes of a row]: a scale, then values."""
    block_size, block_bytes = GGML_QUANT_SIZES[kind]
    n_blocks = dims[-1] // block_size
    data = rng.integers(0, 256, (*dims[:-1], n_blocks, block_bytes), np.uint8)
    scale = np.array([dims[-1] ** -0.5 / DEVIATIONS[kind]], "<f2")
    data[..., :2] = scale.view(np.uint8)
    return data.reshape(*dims[:-1], -1)


if __name__ == "__main__":
    main()
