"""Build tiny random models whose last layers share the K/V of earlier ones: Gemma 3n, Gemma 4.

Keys and tensors are those that models/gemma3n.cpp and models/gemma4.cpp of llama.cpp read. Gemma
3n's sizes of altup, laurel and per-layer inputs, and its 20 layers with K/V, match llama.cpp.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter

from support.synthetic import Recipe, Weights, add_header

N_ALTUP, N_ALTUP_EMBD, LAUREL_RANK = 4, 256, 64
GEMMA3N_KV_LAYERS = 20


@dataclass(frozen=True)
class SharedKv:
    """The model to build; `make_shared` accepts every field as a keyword.

    `base`: the properties shared with other architectures; its head_dim applies to layers without a
    window, `head_dim_swa` to the others. `n_ff`: width by layer, if widths differ. `n_shared`:
    number of last layers without K/V. `period`: the last layer of each period has no window.
    `n_per_layer`: width of the per-layer inputs (0: none). `k_as_v`: layers without a window have
    no separate V.
    """

    base: Recipe
    n_shared: int
    period: int
    head_dim_swa: int
    n_per_layer: int = 32
    n_ff: tuple[int, ...] = ()
    fused_experts: bool = False
    k_as_v: bool = False

    @property
    def windows(self) -> list[bool]:
        return [layer % self.period < self.period - 1 for layer in range(self.base.n_layer)]

    @property
    def n_kv_layers(self) -> int:
        return self.base.n_layer - self.n_shared

    def head_dim(self, layer: int) -> int:
        return self.head_dim_swa if self.windows[layer] else self.base.head_dim


# llama.cpp rotates K and V of quantised caches if all head sizes are multiples of 64.
_TIED = Recipe(tied_output=True, swa_window=16, type=Type.Q8_0, n_head_kv=1)
DEFAULTS = {
    "gemma3n": SharedKv(
        replace(_TIED, arch="gemma3n", n_layer=25, head_dim=64),
        n_shared=25 - GEMMA3N_KV_LAYERS,
        period=5,
        head_dim_swa=64,
        n_per_layer=N_ALTUP_EMBD,
    ),
    "gemma4": SharedKv(
        replace(_TIED, arch="gemma4", head_dim=128, rope_base=1e6),
        n_shared=4,
        period=4,
        head_dim_swa=64,
    ),
}


def make_shared(path: Path, arch: str, **overrides: object) -> Path:
    """Write a random model to `path` and return it; `overrides` are fields of SharedKv or Recipe.

    Weight matrices are Q8_0 by default (`type`); small ones and vectors are F32.
    """
    own = {name: value for name, value in overrides.items() if hasattr(DEFAULTS[arch], name)}
    common = {name: value for name, value in overrides.items() if name not in own}
    base = replace(DEFAULTS[arch].base, **common)  # type: ignore[arg-type]
    write_shared(path, replace(DEFAULTS[arch], base=base, **own))  # type: ignore[arg-type]
    return path


def write_shared(path: Path, recipe: SharedKv) -> None:
    writer = GGUFWriter(path, recipe.base.arch)
    add_keys(writer, recipe)
    rng = np.random.default_rng(recipe.base.seed)
    for name, dims in shapes(recipe):
        weights = _random(rng, name, dims)
        precise = len(dims) == 1 or "ffn_gate_inp" in name or dims[-1] % 32 != 0
        kind = Type.F32 if precise else recipe.base.type
        writer.add_tensor(name, gguf.quants.quantize(weights, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_keys(writer: GGUFWriter, recipe: SharedKv) -> None:
    """Add all keys and the tokenizer."""
    add_header(writer, replace(recipe.base, n_ff=recipe.n_ff or recipe.base.n_ff))  # type: ignore[arg-type]
    writer.add_sliding_window(recipe.base.swa_window)
    writer.add_sliding_window_pattern(recipe.windows)
    if recipe.base.arch == "gemma4":
        writer.add_shared_kv_layers(recipe.n_shared)
        writer.add_embedding_length_per_layer_input(recipe.n_per_layer)
        writer.add_key_length_swa(recipe.head_dim_swa)
        writer.add_value_length_swa(recipe.head_dim_swa)
        writer.add_rope_dimension_count_swa(recipe.head_dim_swa)
        writer.add_final_logit_softcapping(30.0)


def _random(rng: np.random.Generator, name: str, dims: tuple[int, ...]) -> Weights:
    noise: Weights = rng.standard_normal(dims, dtype=np.float32)
    if name == "rope_freqs.weight":
        return np.linspace(1.0, 8.0, dims[0], dtype=np.float32)
    if len(dims) == 1:
        return 1 + np.float32(0.1) * noise
    # With rows of unit gain, the state keeps its size through the layers.
    return noise * np.float32(dims[-1] ** -0.5)


Shapes = Iterator[tuple[str, tuple[int, ...]]]


def shapes(recipe: SharedKv) -> Shapes:
    """Return the names and dimensions of all tensors; the last dimension is contiguous."""
    base, n_embd = recipe.base, recipe.base.n_embd
    n_per_layer = recipe.n_per_layer * base.n_layer
    yield "token_embd.weight", (base.n_vocab, n_embd)
    yield "output_norm.weight", (n_embd,)
    if n_per_layer:
        yield "per_layer_token_embd.weight", (base.n_vocab, n_per_layer)
        yield "per_layer_model_proj.weight", (n_per_layer, n_embd)
        yield "per_layer_proj_norm.weight", (recipe.n_per_layer,)
    if base.arch == "gemma3n":
        yield "altup_proj.weight", (N_ALTUP - 1, n_embd, n_embd)
        yield "altup_unembd_proj.weight", (N_ALTUP - 1, n_embd, n_embd)
    else:
        yield "rope_freqs.weight", (base.head_dim // 2,)
    for layer in range(base.n_layer):
        for part in (_attention, _ffn, _altup if base.arch == "gemma3n" else _experts):
            for name, dims in part(recipe, layer):
                yield f"blk.{layer}.{name}", dims


def _attention(recipe: SharedKv, layer: int) -> Shapes:
    base, n_embd, head_dim = recipe.base, recipe.base.n_embd, recipe.head_dim(layer)
    n_q, n_kv = base.n_head * head_dim, base.n_head_kv * head_dim
    has_kv = layer < recipe.n_kv_layers or base.arch == "gemma3n"
    for name in ("attn_norm", "post_attention_norm"):
        yield f"{name}.weight", (n_embd,)
    yield "attn_q_norm.weight", (head_dim,)
    if base.fused_qkv:
        yield "attn_qkv.weight", (n_q + 2 * n_kv, n_embd)
    else:
        yield "attn_q.weight", (n_q, n_embd)
    if has_kv:
        yield "attn_k_norm.weight", (head_dim,)
    if has_kv and not base.fused_qkv:
        yield "attn_k.weight", (n_kv, n_embd)
        if recipe.windows[layer] or not recipe.k_as_v:
            yield "attn_v.weight", (n_kv, n_embd)
    yield "attn_output.weight", (n_embd, n_q)


def _ffn(recipe: SharedKv, layer: int) -> Shapes:
    n_embd = recipe.base.n_embd
    n_ff = recipe.n_ff[layer] if recipe.n_ff else recipe.base.n_ff
    for name in ("ffn_norm", "post_ffw_norm"):
        yield f"{name}.weight", (n_embd,)
    yield "ffn_gate.weight", (n_ff, n_embd)
    yield "ffn_up.weight", (n_ff, n_embd)
    yield "ffn_down.weight", (n_embd, n_ff)
    if recipe.n_per_layer:
        yield "inp_gate.weight", (recipe.n_per_layer, n_embd)
        yield "proj.weight", (n_embd, recipe.n_per_layer)
        yield "post_norm.weight", (n_embd,)


def _altup(recipe: SharedKv, layer: int) -> Shapes:
    n_embd = recipe.base.n_embd
    yield "altup_correct_coef.weight", (N_ALTUP, N_ALTUP)
    yield "altup_correct_scale.weight", (n_embd,)
    yield "altup_predict_coef.weight", (N_ALTUP * N_ALTUP, N_ALTUP)
    yield "altup_router.weight", (N_ALTUP, n_embd)
    yield "altup_router_norm.weight", (n_embd,)
    yield "laurel_l.weight", (LAUREL_RANK, n_embd)
    yield "laurel_r.weight", (n_embd, LAUREL_RANK)
    yield "laurel_post_norm.weight", (n_embd,)


def _experts(recipe: SharedKv, layer: int) -> Shapes:
    base, n_embd, n = recipe.base, recipe.base.n_embd, recipe.base.n_expert
    yield "layer_output_scale.weight", (1,)
    if not n:
        return
    yield "ffn_gate_inp.weight", (n, n_embd)
    yield "ffn_gate_inp.scale", (n_embd,)
    for name in ("pre_ffw_norm_2", "post_ffw_norm_1", "post_ffw_norm_2"):
        yield f"{name}.weight", (n_embd,)
    if recipe.fused_experts:
        yield "ffn_gate_up_exps.weight", (n, 2 * base.n_ff, n_embd)
    else:
        yield "ffn_gate_exps.weight", (n, base.n_ff, n_embd)
        yield "ffn_up_exps.weight", (n, base.n_ff, n_embd)
    yield "ffn_down_exps.weight", (n, n_embd, base.n_ff)
