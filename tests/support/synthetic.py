"""Build tiny random models that llama.cpp loads and decodes, one for each architecture.

Keys and tensors are those that models/ARCH.cpp and llama-model.cpp of llama.cpp read. None of the
supported architectures has head counts that differ between layers.
"""

import shutil
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from numpy.typing import NDArray

from pop_converter.gguf.content import NewTensor, copy_data, read_content, with_tensors
from pop_converter.gguf.header import read_header
from pop_converter.gguf.source import read_source

Weights = NDArray[np.float32]

FILE_TYPES = {
    GGMLQuantizationType.F32: LlamaFileType.ALL_F32,
    GGMLQuantizationType.F16: LlamaFileType.MOSTLY_F16,
    GGMLQuantizationType.Q8_0: LlamaFileType.MOSTLY_Q8_0,
    GGMLQuantizationType.Q4_0: LlamaFileType.MOSTLY_Q4_0,
}
GEMMAS = ("gemma2", "gemma3")
# For tests of conversations.
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
# A layer adds nothing to the residual stream if these tensors are zero.
DEEP_OUTPUTS = ("attn_output", "ffn_down", "ffn_down_exps", "ffn_down_shexp")


@dataclass(frozen=True)
class Recipe:
    """The model to build; `make_gguf` accepts every field as a keyword.

    `type`: type of the weight matrices. `zero_deep`: first layer with zero attn_output and ffn_down
    (None: no such layer). `rope_factors`: write rope_freqs (llama) or the long/short pair (phi3).
    `rope_divisor`: divisor of the positions, by `rope_scaling` (0: none). `head_arrays`: write head
    counts as one number per layer. `swa_period`: 0 for the architecture's default; `swa_pattern`: a
    flag for each layer instead. `n_expert`: 0 for a dense FFN. `caps`: gemma2's soft caps of scores
    and logits. `control`: additional control tokens, out of n_vocab; `pieces`: additional ordinary
    ones. `rope_sections`: pairs of head dimensions that rotate by an image's time, height, width.
    `n_deepstack`: number of first layers that add image features.
    """

    arch: str = "llama"
    n_layer: int = 8
    n_embd: int = 128
    n_head: int = 4
    n_head_kv: int = 2
    head_dim: int = 32
    n_ff: int = 192
    n_expert: int = 0
    n_expert_used: int = 2
    n_ctx_train: int = 4096
    n_vocab: int = 384
    swa_window: int = 16
    swa_period: int = 0
    swa_pattern: Sequence[bool] = ()
    type: GGMLQuantizationType = GGMLQuantizationType.F16
    qkv_bias: bool = False
    fused_qkv: bool = False
    caps: tuple[float, float] | None = None
    rope_scaling: gguf.RopeScalingType = gguf.RopeScalingType.LINEAR
    tied_output: bool = False
    rope_factors: bool = False
    rope_base: float = 10000.0
    rope_divisor: float = 0.0
    head_arrays: bool = False
    zero_deep: int | None = None
    alignment: int = gguf.GGUF_DEFAULT_ALIGNMENT
    chat_template: str = ""
    control: Sequence[str] = ()
    pieces: Sequence[str] = ()
    rope_sections: Sequence[int] = ()
    n_deepstack: int = 0
    seed: int = 0


# Models of this process, by recipe: most tests use one of a few, and writing one takes 40 ms.
MAX_WRITTEN = 64
_WRITTEN: dict[str, bytes] = {}

# Head dimensions differ from n_embd / n_head if the architecture allows it.
DEFAULTS = {
    "llama": Recipe(),
    "qwen2": Recipe(arch="qwen2", qkv_bias=True, tied_output=True),
    "qwen3": Recipe(arch="qwen3", head_dim=64),
    "qwen3moe": Recipe(arch="qwen3moe", head_dim=64, n_expert=8, n_ff=64),
    "qwen2vl": Recipe(arch="qwen2vl", qkv_bias=True, tied_output=True, rope_sections=(4, 6, 6, 0)),
    "qwen3vl": Recipe(arch="qwen3vl", head_dim=64, rope_sections=(12, 10, 10, 0), n_deepstack=3),
    "qwen3vlmoe": Recipe(
        arch="qwen3vlmoe",
        head_dim=64,
        rope_sections=(12, 10, 10, 0),
        n_deepstack=3,
        n_expert=8,
        n_ff=64,
    ),
    "gemma2": Recipe(arch="gemma2", head_dim=64, tied_output=True, caps=(50.0, 30.0)),
    "gemma3": Recipe(arch="gemma3", head_dim=64, n_head_kv=1, tied_output=True, rope_base=1e6),
    "phi3": Recipe(arch="phi3", fused_qkv=True),
    "olmo2": Recipe(arch="olmo2"),
}


def make_gguf(path: Path, arch: str, **overrides: object) -> Path:
    """Write a random model of `arch` to `path` and return it; `overrides` are Recipe's fields."""
    recipe = replace(DEFAULTS[arch], **overrides)  # type: ignore[arg-type]
    key = repr(recipe)
    if key in _WRITTEN:
        path.write_bytes(_WRITTEN[key])
        return path
    _write(GGUFWriter(path, arch), recipe)
    if recipe.zero_deep is not None:
        _zero_deep(path, recipe.zero_deep)
    if len(_WRITTEN) < MAX_WRITTEN:
        _WRITTEN[key] = path.read_bytes()
    return path


def make_split(path: Path, arch: str, *, max_tensors: int, empty_first: bool = False) -> list[Path]:
    """Write the model of `make_gguf(path, arch)` as several parts and return them in order.

    `empty_first`: the first part has no tensors.
    """
    writer = GGUFWriter(path, arch, split_max_tensors=max_tensors, small_first_shard=empty_first)
    _write(writer, DEFAULTS[arch])
    return sorted(path.parent.glob(f"{path.stem}-*-of-*.gguf"))


def add_keys(src: Path, dst: Path, **keys: int | float | str) -> Path:
    """Copy a model with further unchecked keys (u32, f64 or string); `__` stands for a dot."""
    content = read_content(read_source(src), without="\0")
    raw = tuple(_encode_key(name.replace("__", "."), value) for name, value in keys.items())
    with dst.open("wb") as file:
        file.write(content.with_keys(raw).header)
        copy_data(content, b"", file.write, lambda n_bytes: None)
    return dst


def renamed(src: Path, folder: Path, arch: str) -> Path:
    """Copy a model into a folder under another architecture's name, with the same tensors."""
    header = read_header(src)
    old, raw = str(header.get("general.architecture")), src.read_bytes()
    keys = b"".join(
        _renamed(name, raw[key.start : key.end], old, arch) for name, key in header.keys.items()
    )
    table = raw[header.keys_end : header.tensors_end]
    head = raw[:24] + keys + table
    path = folder / f"{arch}.gguf"
    path.write_bytes(head + bytes(-len(head) % header.alignment) + raw[header.data_start :])
    return path


def _renamed(name: str, raw: bytes, old: str, arch: str) -> bytes:
    if name == "general.architecture":
        return _encode_key(name, arch)
    if not name.startswith(f"{old}."):
        return raw
    new = name.replace(old, arch, 1).encode()
    return len(new).to_bytes(8, "little") + new + raw[8 + len(name.encode()) :]


def add_tensor(src: Path, dst: Path, name: str, values: NDArray[Any]) -> Path:
    """Copy a model with an additional float32 tensor."""
    data = values.astype(np.float32).tobytes()
    new = NewTensor(name, values.shape[::-1], GGMLQuantizationType.F32, data)
    content = with_tensors(read_content(read_source(src), without="\0"), [new])
    with dst.open("wb") as file:
        file.write(content.header)
        copy_data(content, b"", file.write, lambda n_bytes: None)
        file.writelines(content.added)
    return dst


def _encode_key(name: str, value: int | float | str) -> bytes:
    raw_name = len(name).to_bytes(8, "little") + name.encode()
    if isinstance(value, int):
        return raw_name + struct.pack("<II", gguf.GGUFValueType.UINT32, value)
    if isinstance(value, float):
        return raw_name + struct.pack("<Id", gguf.GGUFValueType.FLOAT64, value)
    raw_value = value.encode()
    return raw_name + struct.pack("<IQ", gguf.GGUFValueType.STRING, len(raw_value)) + raw_value


def _write(writer: GGUFWriter, recipe: Recipe) -> None:
    add_header(writer, recipe)
    rng = np.random.default_rng(recipe.seed)
    for name, weights in _tensors(recipe, rng):
        # Like llama.cpp's converters, leave vectors and the router in F32.
        precise = weights.ndim == 1 or "ffn_gate_inp" in name
        kind = GGMLQuantizationType.F32 if precise else recipe.type
        writer.add_tensor(name, gguf.quants.quantize(weights, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def zero_deep_copy(src: Path, dst: Path, boundary: int) -> Path:
    """Copy a model so that layers from `boundary` preserve the residual stream.

    An all-zero block is zero in every ggml type, because its scale is zero. A zero vector stays
    zero under gemma's post-norms.
    """
    shutil.copyfile(src, dst)
    _zero_deep(dst, boundary)
    return dst


def _zero_deep(path: Path, boundary: int) -> None:
    header = read_header(path)
    with path.open("r+b") as file:
        for tensor in header.tensors:
            prefix, *rest = tensor.name.split(".")
            if prefix == "blk" and int(rest[0]) >= boundary and rest[1] in DEEP_OUTPUTS:
                file.seek(header.data_start + tensor.offset)
                file.write(bytes(tensor.size_bytes))


def add_header(writer: GGUFWriter, recipe: Recipe) -> None:
    """Add all keys and the tokenizer."""
    _add_keys(writer, recipe)
    add_tokenizer(writer, recipe)


def _add_keys(writer: GGUFWriter, recipe: Recipe) -> None:
    if recipe.alignment != gguf.GGUF_DEFAULT_ALIGNMENT:
        writer.add_custom_alignment(recipe.alignment)
    # llama.cpp expects phi-3's special tokens if the name contains phi3.
    writer.add_name("tiny random model")
    writer.add_file_type(FILE_TYPES[recipe.type])
    writer.add_context_length(recipe.n_ctx_train)
    writer.add_embedding_length(recipe.n_embd)
    writer.add_block_count(recipe.n_layer)
    writer.add_feed_forward_length(recipe.n_ff)
    layers = recipe.n_layer
    writer.add_head_count([recipe.n_head] * layers if recipe.head_arrays else recipe.n_head)
    writer.add_head_count_kv(
        [recipe.n_head_kv] * layers if recipe.head_arrays else recipe.n_head_kv
    )
    writer.add_key_length(recipe.head_dim)
    writer.add_value_length(recipe.head_dim)
    writer.add_rope_dimension_count(recipe.head_dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(recipe.rope_base)
    if recipe.rope_divisor:
        writer.add_rope_scaling_type(recipe.rope_scaling)
        writer.add_rope_scaling_factor(recipe.rope_divisor)
    if recipe.n_expert:
        writer.add_expert_count(recipe.n_expert)
        writer.add_expert_used_count(recipe.n_expert_used)
        writer.add_expert_feed_forward_length(recipe.n_ff)
    if recipe.arch in GEMMAS:
        writer.add_sliding_window(recipe.swa_window)
        if recipe.swa_pattern or recipe.swa_period:
            writer.add_sliding_window_pattern(recipe.swa_pattern or recipe.swa_period)
    if recipe.caps is not None:
        writer.add_attn_logit_softcapping(recipe.caps[0])
        writer.add_final_logit_softcapping(recipe.caps[1])
    if recipe.arch == "phi3" and recipe.rope_factors:
        writer.add_rope_scaling_orig_ctx_len(recipe.n_ctx_train)
        writer.add_rope_scaling_attn_factors(1.1)
    if recipe.rope_sections:
        writer.add_rope_dimension_sections(recipe.rope_sections)
    if recipe.n_deepstack:
        writer.add_num_deepstack_layers(recipe.n_deepstack)
    if recipe.chat_template:
        writer.add_chat_template(recipe.chat_template)


def add_tokenizer(writer: GGUFWriter, recipe: Recipe) -> None:
    """Add a SentencePiece vocabulary: three specials, all bytes, letters, invented words."""
    special = [("<unk>", gguf.TokenType.UNKNOWN), ("<s>", gguf.TokenType.CONTROL)]
    special.append(("</s>", gguf.TokenType.CONTROL))
    added = [(text, gguf.TokenType.CONTROL) for text in recipe.control]
    pieces = special + [(f"<0x{byte:02X}>", gguf.TokenType.BYTE) for byte in range(256)]
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    normal = [*recipe.pieces, "\u2581", *letters, *("\u2581" + letter for letter in letters)]
    count = recipe.n_vocab - len(pieces) - len(added)
    normal += [f"\u2581w{number}" for number in range(max(0, count - len(normal)))]
    pieces += [(piece, gguf.TokenType.NORMAL) for piece in normal[:count]]
    pieces += added
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([piece for piece, _ in pieces])
    writer.add_token_scores([-float(rank) for rank in range(len(pieces))])
    writer.add_token_types([kind for _, kind in pieces])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)


def _tensors(recipe: Recipe, rng: np.random.Generator) -> Iterator[tuple[str, Weights]]:
    yield "token_embd.weight", _matrix(rng, recipe.n_vocab, recipe.n_embd)
    yield "output_norm.weight", _gain(rng, recipe.n_embd)
    if not recipe.tied_output:
        yield "output.weight", _matrix(rng, recipe.n_vocab, recipe.n_embd)
    if recipe.rope_factors:
        factors = np.linspace(1.0, 8.0, recipe.head_dim // 2, dtype=np.float32)
        names = ("long", "short") if recipe.arch == "phi3" else ("freqs",)
        for number, name in enumerate(names, start=1):
            prefix = "rope_factors_" if recipe.arch == "phi3" else "rope_"
            yield f"{prefix}{name}.weight", factors / np.float32(number)
    for layer in range(recipe.n_layer):
        for parts in (_norms, _attention, _experts if recipe.n_expert else _dense_ffn):
            for name, weights in parts(recipe, rng):
                yield f"blk.{layer}.{name}", weights


def _norms(recipe: Recipe, rng: np.random.Generator) -> Iterator[tuple[str, Weights]]:
    names = [] if recipe.arch == "olmo2" else ["attn_norm", "ffn_norm"]
    if recipe.arch in (*GEMMAS, "olmo2"):
        names += ["post_attention_norm", "post_ffw_norm"]
    for name in names:
        yield f"{name}.weight", _gain(rng, recipe.n_embd)
    if recipe.arch in ("qwen3", "qwen3moe", "qwen3vl", "qwen3vlmoe", "gemma3"):
        for name in ("attn_q_norm", "attn_k_norm"):
            yield f"{name}.weight", _gain(rng, recipe.head_dim)
    if recipe.arch == "olmo2":
        yield "attn_q_norm.weight", _gain(rng, recipe.n_head * recipe.head_dim)
        yield "attn_k_norm.weight", _gain(rng, recipe.n_head_kv * recipe.head_dim)


def _attention(recipe: Recipe, rng: np.random.Generator) -> Iterator[tuple[str, Weights]]:
    n_q, n_kv = recipe.n_head * recipe.head_dim, recipe.n_head_kv * recipe.head_dim
    sizes = {"q": n_q, "k": n_kv, "v": n_kv}
    if recipe.fused_qkv:
        sizes = {"qkv": n_q + 2 * n_kv}
    for name, size in sizes.items():
        yield f"attn_{name}.weight", _matrix(rng, size, recipe.n_embd)
        if recipe.qkv_bias:
            yield f"attn_{name}.bias", rng.standard_normal(size, dtype=np.float32)
    yield "attn_output.weight", _matrix(rng, recipe.n_embd, n_q)


def _dense_ffn(recipe: Recipe, rng: np.random.Generator) -> Iterator[tuple[str, Weights]]:
    if recipe.arch == "phi3":
        yield "ffn_up.weight", _matrix(rng, 2 * recipe.n_ff, recipe.n_embd)
    else:
        yield "ffn_gate.weight", _matrix(rng, recipe.n_ff, recipe.n_embd)
        yield "ffn_up.weight", _matrix(rng, recipe.n_ff, recipe.n_embd)
    yield "ffn_down.weight", _matrix(rng, recipe.n_embd, recipe.n_ff)


def _experts(recipe: Recipe, rng: np.random.Generator) -> Iterator[tuple[str, Weights]]:
    n = recipe.n_expert
    yield "ffn_gate_inp.weight", _matrix(rng, n, recipe.n_embd)
    yield "ffn_gate_exps.weight", _matrix(rng, n, recipe.n_ff, recipe.n_embd)
    yield "ffn_up_exps.weight", _matrix(rng, n, recipe.n_ff, recipe.n_embd)
    yield "ffn_down_exps.weight", _matrix(rng, n, recipe.n_embd, recipe.n_ff)


def _matrix(rng: np.random.Generator, *dims: int) -> Weights:
    """Return rows of unit gain, so that the state keeps its size through the layers."""
    weights: Weights = rng.standard_normal(dims, dtype=np.float32) * np.float32(dims[-1] ** -0.5)
    return weights


def _gain(rng: np.random.Generator, size: int) -> Weights:
    weights: Weights = 1 + np.float32(0.1) * rng.standard_normal(size, dtype=np.float32)
    return weights
