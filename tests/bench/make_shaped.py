"""Write a random model in the shape of a published one, for speed tests. Not a test.

    python tests/bench/make_shaped.py {gemma-4-e2b,llama-3.1-8b} MODEL.gguf [--type q8_0]
    python tests/bench/make_shaped.py {qwen3-30b-a3b,gpt-oss-20b} MODEL.gguf [--layers N]

All layers, heads, windows and widths equal the published model's; the vocabulary has 16,384 tokens
(32,768 for the 8B). The files have 2.1 and 7.7 GB with Q8_0, 1.1 and 4.1 GB with Q4_0. Mixtures of
experts have 4 of 48 layers and 2 of 24, in 1.5 and 1.0 GB. Their types are the usual files' types:
Q4_K_M's, and MXFP4 experts with all other tensors in Q8_0.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from math import log2
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
QWEN3_30B = Recipe(
    arch="qwen3moe",
    n_layer=4,
    n_embd=2048,
    n_head=32,
    n_head_kv=4,
    head_dim=128,
    n_ff=768,
    n_expert=128,
    n_expert_used=8,
    n_vocab=16_384,
    n_ctx_train=40_960,
    rope_base=1e6,
)
GPT_OSS_20B = Recipe(
    arch="gpt-oss",
    n_layer=2,
    n_embd=2880,
    n_head=64,
    n_head_kv=8,
    head_dim=64,
    n_ff=2880,
    n_expert=32,
    n_expert_used=4,
    n_vocab=16_384,
    n_ctx_train=131_072,
    rope_base=150_000.0,
    swa_window=128,
)
RECIPES = {"llama-3.1-8b": LLAMA_8B, "qwen3-30b-a3b": QWEN3_30B, "gpt-oss-20b": GPT_OSS_20B}
TYPES = {"q8_0": Type.Q8_0, "q4_0": Type.Q4_0}
# Standard deviation of values whose codes and scales in a block are random bits, over its scale.
DEVIATIONS = {Type.Q8_0: 73.6, Type.Q4_0: 4.61, Type.Q4_K: 258.0, Type.Q6_K: 1366.0}
MXFP4_DEVIATION, MXFP4_EXPONENT_OF_1 = 5.85, 128
# Where a block keeps its scale, in bytes.
SCALE_AT = {Type.Q6_K: 208}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("shape", choices=["gemma-4-e2b", *RECIPES])
    parser.add_argument("model", type=Path)
    parser.add_argument("--type", choices=TYPES, default="q8_0")
    parser.add_argument("--layers", type=int, help="fewer or more than published")
    options = parser.parse_args()
    kind, rng = TYPES[options.type], np.random.default_rng(0)
    recipe = RECIPES.get(options.shape, GEMMA4_E2B.base)
    recipe = replace(recipe, n_layer=options.layers or recipe.n_layer)
    writer = GGUFWriter(options.model, recipe.arch, use_temp_file=True)
    if options.shape in RECIPES:
        add_header(writer, recipe)
        tensors = own_shapes(recipe)
    else:
        add_keys(writer, GEMMA4_E2B)
        tensors = shapes(GEMMA4_E2B)
    if recipe.arch == "gpt-oss":
        writer.add_sliding_window(recipe.swa_window)
    for name, dims in tensors:
        if len(dims) == 1 or name.endswith(".bias"):
            writer.add_tensor(name, np.ones(dims, np.float32))
        elif "ffn_gate_inp" in name:
            writer.add_tensor(name, rng.standard_normal(dims, np.float32) * dims[-1] ** -0.5)
        else:
            own = expert_type(recipe, name) if recipe.n_expert else kind
            writer.add_tensor(name, blocks(rng, dims, own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def own_shapes(recipe: Recipe) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Return names and dimensions of all tensors; the last dimension is the row's."""
    n_embd = recipe.n_embd
    yield "token_embd.weight", (recipe.n_vocab, n_embd)
    yield "output.weight", (recipe.n_vocab, n_embd)
    yield "output_norm.weight", (n_embd,)
    for layer in range(recipe.n_layer):
        parts = layer_shapes(recipe) | (expert_shapes(recipe) if recipe.n_expert else {})
        for name, dims in parts.items():
            yield f"blk.{layer}.{name}", dims


def layer_shapes(recipe: Recipe) -> dict[str, tuple[int, ...]]:
    """Return a layer's tensors, without experts."""
    n_embd, n_ff = recipe.n_embd, recipe.n_ff
    n_q, n_kv = recipe.n_head * recipe.head_dim, recipe.n_head_kv * recipe.head_dim
    is_oss = recipe.arch == "gpt-oss"
    norm = "post_attention_norm" if is_oss else "ffn_norm"
    parts: dict[str, tuple[int, ...]] = {"attn_norm.weight": (n_embd,), f"{norm}.weight": (n_embd,)}
    rows = {"attn_q": n_q, "attn_k": n_kv, "attn_v": n_kv, "attn_output": n_embd}
    for name, n_rows in rows.items():
        parts[f"{name}.weight"] = (n_rows, n_q if name == "attn_output" else n_embd)
        if is_oss:
            parts[f"{name}.bias"] = (n_rows,)
    if is_oss:
        parts["attn_sinks.weight"] = (recipe.n_head,)
    if recipe.arch == "qwen3moe":
        parts |= {f"attn_{name}_norm.weight": (recipe.head_dim,) for name in ("q", "k")}
    if not recipe.n_expert:
        parts |= {f"ffn_{name}.weight": (n_ff, n_embd) for name in ("gate", "up")}
        parts["ffn_down.weight"] = (n_embd, n_ff)
    return parts


def expert_shapes(recipe: Recipe) -> dict[str, tuple[int, ...]]:
    """Return a layer's experts and their router."""
    n, n_embd, n_ff = recipe.n_expert, recipe.n_embd, recipe.n_ff
    rows = {"ffn_gate_inp": (n,), "ffn_gate_exps": (n, n_ff), "ffn_up_exps": (n, n_ff)}
    parts = {f"{name}.weight": (*dims, n_embd) for name, dims in rows.items()}
    parts["ffn_down_exps.weight"] = (n, n_embd, n_ff)
    if recipe.arch == "gpt-oss":
        parts |= {f"{name}.bias": dims for name, dims in rows.items()}
        parts["ffn_down_exps.bias"] = (n, n_embd)
    return parts


def expert_type(recipe: Recipe, name: str) -> Type:
    """Return a matrix's type in the usual file of a mixture of experts."""
    if recipe.arch == "gpt-oss":
        return Type.MXFP4 if "_exps" in name else Type.Q8_0
    precise = name.startswith(("blk.0.", "blk.2.")) and ("attn_v" in name or "ffn_down" in name)
    return Type.Q6_K if precise or name == "output.weight" else Type.Q4_K


def blocks(rng: np.random.Generator, dims: tuple[int, ...], kind: Type) -> np.ndarray:
    """Return rows of about unit gain in blocks of random codes, uint8 [.., bytes of a row]."""
    block_size, block_bytes = GGML_QUANT_SIZES[kind]
    n_blocks = dims[-1] // block_size
    data = rng.integers(0, 256, (*dims[:-1], n_blocks, block_bytes), np.uint8)
    if kind == Type.MXFP4:
        data[..., 0] = MXFP4_EXPONENT_OF_1 + round(log2(dims[-1] ** -0.5 / MXFP4_DEVIATION))
        return data.reshape(*dims[:-1], -1)
    scales = np.array([dims[-1] ** -0.5 / DEVIATIONS[kind]], np.float64)
    if kind == Type.Q4_K:
        # The mins, which are subtracted, have a separate scale: 7.5 is a code's mean.
        scales = np.append(scales, 7.5 * scales)
    raw = scales.astype("<f2").view(np.uint8)
    start = SCALE_AT.get(kind, 0)
    data[..., start : start + raw.size] = raw
    return data.reshape(*dims[:-1], -1)


if __name__ == "__main__":
    main()
