"""What a model's layers cost: multiply-accumulates per token, from keys and tensor shapes.

Key names and defaults as llama.cpp reads them (llama-model.cpp, models/ARCH.cpp).
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from converter.errors import FormatError, UnsupportedArchitectureError
from converter.format import ATTENTION, WIDE_KINDS
from converter.header import Array, Header, Scalar, TensorInfo
from converter.source import Source, read_source


@dataclass(frozen=True)
class _Window:
    """The sliding window of an architecture; the last layer of each period attends to all."""

    period: int
    default_tokens: int


# Architectures whose graphs have the pruning hook, and their sliding windows if they have any.
ARCHITECTURES: dict[str, _Window | None] = {
    "llama": None,
    "qwen2": None,
    "qwen2vl": None,
    "qwen3": None,
    "qwen3moe": None,
    "qwen3vl": None,
    "qwen3vlmoe": None,
    "gemma2": _Window(period=2, default_tokens=4096),
    "gemma3": _Window(period=6, default_tokens=0),
    # llama.cpp reads phi3's window and switches it off.
    "phi3": None,
}

# Architectures whose last layers read the K/V of earlier ones: rows leave them exactly, and nothing
# is converted.
SHARED_KV: dict[str, _Window] = {
    "gemma3n": _Window(period=5, default_tokens=0),
    "gemma4": _Window(period=0, default_tokens=0),
}
_GEMMA3N_KV_LAYERS = 20

# Whose rows have several positions each, for which deep passes are not made.
MROPE = ("qwen2vl", "qwen3vl", "qwen3vlmoe")
# Gemma 4 calls the gate of the per-layer inputs and their projection so; the rest is Gemma 3n's.
_PER_ROW = ("inp_gate", "proj", "laurel_l", "laurel_r", "altup_router", "altup_predict_coef")
_BEFORE_THE_LAYERS = ("per_layer_model_proj", "altup_proj")

MAX_LAYERS = 512  # LLAMA_MAX_LAYERS

# Of any dimension or count: llama.cpp has them as 32 bits.
MAX_NUMBER = 2**31 - 1
# llama_cpp makes room for as many tokens whenever it tokenises.
MAX_CTX = 1 << 27

# Of ggml's quantised types that are used for what is added.
_BLOCK_SIZE = 32
_BLOCK = re.compile(r"blk\.([0-9]{1,4})\.(.+)\.weight")


@dataclass(frozen=True)
class ModelShape:
    """The multiply-accumulates of a model per token; tuples have one entry for each layer.

    `attn_proj_macs`: attention's projections but K and V. `kv_macs`: K and V. `ffn_macs`: experts
    count as often as they are used, and what the per-layer inputs of Gemma 3n and 4 cost in the
    layer is among them. `attn_dim`: multiply-accumulates per token and visible position, n_head *
    (head_dim_k + head_dim_v). `swa_window`: visible positions, 0 for all. `head_macs`: the LM head.

    `exact`: the first of the layers that read the K/V of an earlier one, 0 where each has its own.
    `input_macs`, `output_macs`: before the first layer and after the last one. `n_deepstack`: the
    first layers, which add features of images to the state, and so cannot be skipped.
    `n_neurons`: those of a dense, gated FFN, 0 of any other. `n_heads_out`: what the heads of
    attention give, n_head * head_dim_v.
    """

    arch: str
    n_layer: int
    n_vocab: int
    n_embd: int
    attn_proj_macs: tuple[int, ...]
    kv_macs: tuple[int, ...]
    ffn_macs: tuple[int, ...]
    attn_dim: tuple[int, ...]
    swa_window: tuple[int, ...]
    head_macs: int
    exact: int = 0
    input_macs: int = 0
    output_macs: int = 0
    n_deepstack: int = 0
    n_neurons: tuple[int, ...] = ()
    n_heads_out: tuple[int, ...] = ()

    @property
    def is_mrope(self) -> bool:
        """Whether a row has several positions (M-RoPE), so that none is selected or refilled."""
        return self.arch in MROPE

    def wide_inputs(self, boundary: int) -> tuple[int, int]:
        """Return the sizes of the wider input (converter.wide): previous state, neurons.

        A quarter and a half of the state, in blocks of quantised rows.
        """
        n_prev = max(self.n_embd // 4 // _BLOCK_SIZE, 1) * _BLOCK_SIZE
        n_most = self.n_neurons[boundary] if self.n_neurons else 0
        return n_prev, min(self.n_embd // 2, n_most) // _BLOCK_SIZE * _BLOCK_SIZE

    def n_wide(self, boundary: int, projection: str) -> int:
        """Return how many inputs a fit has beside the state, 0 if it is not wide."""
        if projection not in WIDE_KINDS:
            return 0
        n_heads = self.n_heads_out[boundary] if projection == ATTENTION else 0
        return sum(self.wide_inputs(boundary)) + n_heads


def read_shape(path: Path) -> ModelShape:
    """Read the shape of a model, split or not. Raises FormatError, UnsupportedArchitectureError."""
    return source_shape(read_source(path))


def source_shape(source: Source) -> ModelShape:
    """Return the shape of a model. Raises FormatError, UnsupportedArchitectureError."""
    keys = _ArchKeys(source.first)
    n_layer = keys.number("block_count") - keys.number("nextn_predict_layers", 0)
    if not 0 < n_layer <= MAX_LAYERS:
        raise FormatError(f"{source.first.path} says it has {n_layer} layers", "download it again")
    if not source.tensors:
        raise FormatError(f"{source.first.path} has a vocabulary and no layers", "give the model")
    blocks = _blocks(source.tensors, n_layer, source.first.path)
    n_embd = keys.number("embedding_length")
    if n_embd < 1:
        raise FormatError(f"{source.first.path} has states of {n_embd} values", "download it again")
    if keys.arch in SHARED_KV:
        return _shared_kv_shape(source, keys, blocks)
    heads = keys.per_layer("attention.head_count", n_layer)
    kv_heads = keys.per_layer("attention.head_count_kv", n_layer, heads)
    dim_k = keys.number("attention.key_length", n_embd // max(heads[0], 1))
    dim_v = keys.number("attention.value_length", n_embd // max(heads[0], 1))
    kv_macs = tuple(n_embd * n * (dim_k + dim_v) for n in kv_heads)
    n_vocab, head_macs = _head(source)
    return ModelShape(
        arch=keys.arch,
        n_layer=n_layer,
        n_vocab=n_vocab,
        n_embd=n_embd,
        attn_proj_macs=tuple(
            _elements(block, lambda name: name.startswith("attn_")) - kv
            for block, kv in zip(blocks, kv_macs, strict=True)
        ),
        kv_macs=kv_macs,
        ffn_macs=_ffn_macs(blocks, keys, n_layer),
        attn_dim=tuple(n * (dim_k + dim_v) for n in heads),
        swa_window=_windows(keys, n_layer),
        head_macs=head_macs,
        n_deepstack=keys.number("n_deepstack_layers", 0),
        n_neurons=tuple(_n_neurons(block) for block in blocks),
        n_heads_out=tuple(n * dim_v for n in heads),
    )


def trained_ctx(header: Header) -> int | None:
    """Return the context in tokens that a model was trained with, None if its file is silent.

    Raises FormatError for what no context can be.
    """
    value = header.of_arch("context_length")
    if value is None:
        return None
    if type(value) is not int or not 0 <= value <= MAX_CTX:
        raise FormatError(f"{header.path} has a context of {value} tokens", "download it again")
    return value


class _ArchKeys:
    """The keys `ARCH.*` of a supported architecture."""

    def __init__(self, header: Header) -> None:
        self.header = header
        if header.get("general.type") == "adapter":
            raise FormatError(
                f"{header.path} is a LoRA adapter, not a model", "give the model that it belongs to"
            )
        if "general.architecture" not in header.keys:
            raise FormatError(f"{header.path} names no architecture", "give a language model")
        self.arch = str(header.get("general.architecture"))
        if self.arch not in ARCHITECTURES and self.arch not in SHARED_KV:
            raise UnsupportedArchitectureError(
                f"{header.path}: the architecture {self.arch!r} cannot be pruned",
                f"supported are {', '.join(sorted(ARCHITECTURES))}",
            )

    def number(self, name: str, default: int | None = None) -> int:
        value = self.header.of_arch(name)
        if value is None and default is not None:
            return default
        if type(value) is int:
            return self._checked(name, value)
        raise FormatError(f"{self.header.path} has no number {self.arch}.{name}")

    def per_layer(
        self, name: str, n_layer: int, default: tuple[int, ...] | None = None
    ) -> tuple[int, ...]:
        """Return a number for each layer, whether the file has one for all or one for each."""
        value = self.header.of_arch(name)
        if isinstance(value, Array):
            items = tuple(self._checked(name, item) for item in value.items or ())
            if len(items) < n_layer:
                raise FormatError(f"{self.header.path}: {self.arch}.{name} is too short")
            return items[:n_layer]
        if value is None and default is not None:
            return default
        return (self.number(name),) * n_layer

    def _checked(self, name: str, value: Scalar) -> int:
        """The number as it is; flags are 0 and 1."""
        if not isinstance(value, int) or not 0 <= value <= MAX_NUMBER:
            raise FormatError(f"{self.header.path}: {self.arch}.{name} is {value}")
        return int(value)


_Block = dict[str, TensorInfo]


def _blocks(tensors: Iterable[TensorInfo], n_layer: int, path: Path) -> list[_Block]:
    """Return the weights of each layer by their name within it."""
    blocks: list[_Block] = [{} for _ in range(n_layer)]
    for tensor in tensors:
        match = _BLOCK.fullmatch(tensor.name)
        if match and int(match[1]) < n_layer:
            blocks[int(match[1])][match[2]] = tensor
    empty = [number for number, block in enumerate(blocks) if not block]
    if empty:
        raise FormatError(f"{path} has no tensors for layer {empty[0]}", "download it again")
    return blocks


def _elements(block: _Block, wanted: Callable[[str], bool]) -> int:
    # A vector (norm gain) multiplies nothing but itself.
    return sum(t.n_elements for name, t in block.items() if wanted(name) and len(t.dims) > 1)


def _ffn_macs(blocks: list[_Block], keys: _ArchKeys, n_layer: int) -> tuple[int, ...]:
    n_expert = keys.number("expert_count", 0)
    used = keys.per_layer("expert_used_count", n_layer, (0,) * n_layer)
    return tuple(
        _elements(block, lambda name: name.startswith("ffn_") and not name.endswith("_exps"))
        + _elements(block, lambda name: name.endswith("_exps")) * n_used // max(n_expert, 1)
        for block, n_used in zip(blocks, used, strict=True)
    )


def _n_neurons(block: _Block) -> int:
    """Count the neurons of a dense FFN with a gate; phi3 has both in one tensor."""
    up = block.get("ffn_up")
    if up is None or len(up.dims) != 2:
        return 0
    return up.dims[1] if "ffn_gate" in block else up.dims[1] // 2


def _head(source: Source) -> tuple[int, int]:
    """Return the size of the vocabulary, and the LM head's multiply-accumulates (tied or not)."""
    by_name = {tensor.name: tensor for tensor in source.tensors}
    embeddings = by_name.get("token_embd.weight")
    if embeddings is None or len(embeddings.dims) != 2:
        raise FormatError(f"{source.first.path} has no token embeddings", "give a language model")
    return embeddings.dims[1], by_name.get("output.weight", embeddings).n_elements


def _windows(keys: _ArchKeys, n_layer: int) -> tuple[int, ...]:
    rule = SHARED_KV.get(keys.arch) or ARCHITECTURES[keys.arch]
    if rule is None:
        return (0,) * n_layer
    tokens = keys.number("attention.sliding_window", rule.default_tokens)
    pattern = keys.header.of_arch("attention.sliding_window_pattern")
    if isinstance(pattern, Array):
        flags = keys.per_layer("attention.sliding_window_pattern", n_layer)
    else:
        period = keys.number("attention.sliding_window_pattern", rule.period)
        flags = tuple(period == 0 or layer % period < period - 1 for layer in range(n_layer))
    return tuple(tokens if flag else 0 for flag in flags)


def _shared_kv_shape(source: Source, keys: _ArchKeys, blocks: list[_Block]) -> ModelShape:
    """The shape of a Gemma 3n or 4, whose head dimensions depend on the window."""
    n_layer = len(blocks)
    n_shared = keys.number("attention.shared_kv_layers", 0)
    n_kv = min(_GEMMA3N_KV_LAYERS if keys.arch == "gemma3n" else n_layer - n_shared, n_layer)
    heads = keys.per_layer("attention.head_count", n_layer)
    kv_heads = keys.per_layer("attention.head_count_kv", n_layer, heads)
    windows = _windows(keys, n_layer)
    n_embd = keys.number("embedding_length")
    dim = keys.number("attention.key_length", n_embd // max(heads[0], 1))
    dim_swa = keys.number("attention.key_length_swa", dim)
    dims = [dim_swa if window else dim for window in windows]
    fused = [2 * n_embd * n * d for n, d in zip(kv_heads, dims, strict=True)]
    kv_macs = [
        _kv_macs(*pair) if i < n_kv else 0 for i, pair in enumerate(zip(blocks, fused, strict=True))
    ]
    # A layer that shares its K/V has no use for projections of its own, if the file has them.
    attn = [
        _elements(b, lambda name: name.startswith("attn_")) - _elements(b, _is_kv) for b in blocks
    ]
    per_layer = [_elements(block, lambda name: name in _PER_ROW) for block in blocks]
    outside = {tensor.name: tensor.n_elements for tensor in source.tensors}
    n_vocab, head_macs = _head(source)
    return ModelShape(
        arch=keys.arch,
        n_layer=n_layer,
        n_vocab=n_vocab,
        n_embd=n_embd,
        attn_proj_macs=tuple(
            n - (kv if "attn_qkv" in block else 0)
            for n, kv, block in zip(attn, kv_macs, blocks, strict=True)
        ),
        kv_macs=tuple(kv_macs),
        ffn_macs=tuple(
            a + b for a, b in zip(_ffn_macs(blocks, keys, n_layer), per_layer, strict=True)
        ),
        attn_dim=tuple(2 * n * d for n, d in zip(heads, dims, strict=True)),
        swa_window=windows,
        head_macs=head_macs,
        exact=n_kv if n_kv < n_layer else 0,
        input_macs=sum(outside.get(f"{name}.weight", 0) for name in _BEFORE_THE_LAYERS),
        output_macs=outside.get("altup_unembd_proj.weight", 0),
    )


def _is_kv(name: str) -> bool:
    return name in ("attn_k", "attn_v")


def _kv_macs(block: _Block, fused: int) -> int:
    return fused if "attn_qkv" in block else _elements(block, _is_kv)
