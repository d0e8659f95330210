"""A dense decoder's hyperparameters, read from the model file's keys.

Key names and defaults follow llama.cpp (llama-model.cpp, models/ARCH.cpp).
"""

from dataclasses import dataclass
from math import sqrt

from pop_base.errors import FormatError, UnsupportedArchitectureError
from pop_converter.architecture.shape import ModelShape, source_shape
from pop_converter.gguf.header import Header
from pop_converter.gguf.source import Source

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")
# The 27B model of Gemma 3, identified by its number of layers, scales attention scores by n_embd /
# n_head instead of the head's width.
_N_LAYER_WIDE = 62
_SCALINGS = ("none", "linear")
_MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
_NORMS = (
    "attn_norm",
    "attn_q_norm",
    "attn_k_norm",
    "ffn_norm",
    "post_attention_norm",
    "post_ffw_norm",
)
_KNOWN = {f"{name}.{part}" for name in (*_MATRICES, *_NORMS) for part in ("weight", "bias")}
_OUTSIDE = {f"{name}.weight" for name in ("token_embd", "output", "output_norm", "rope_freqs")}


@dataclass(frozen=True)
class Rope:
    """A layer's RoPE parameters. The angles are base ** (-2 i / n_rot) * scale * position."""

    base: float
    scale: float


@dataclass(frozen=True)
class Hyper:
    """A decoder's hyperparameters.

    `interleaved`: True if RoPE rotates pairs of adjacent elements (llama), False if each pair
    consists of one element from each half. `ropes` and `windows` have one entry per layer. A window
    is the number of visible positions (0: all positions).
    """

    n_layer: int
    dim_k: int
    dim_v: int
    n_rot: int
    eps: float
    embedding_scale: float
    attention_scale: float
    interleaved: bool
    gelu: bool
    ropes: tuple[Rope, ...]
    windows: tuple[int, ...]


def read_hyper(source: Source) -> Hyper:
    """Read a model's hyperparameters.

    Raises UnsupportedArchitectureError or, if the file is invalid, FormatError.
    """
    header, shape = source.first, source_shape(source)
    arch = shape.arch
    if arch not in ARCHITECTURES:
        raise _unsupported(header, f"the architecture {arch!r} is not supported")
    unknown = _unknown_tensor(source)
    if unknown:
        raise _unsupported(header, f"the tensor {unknown} is not supported")
    if _number(header, "final_logit_softcapping", 0):
        raise _unsupported(header, "capped logits are not supported")
    n_head = int(_number(header, "attention.head_count", 1))
    dim = shape.n_embd // max(n_head, 1)
    dim_k = int(_number(header, "attention.key_length", dim))
    dim_v = int(_number(header, "attention.value_length", dim))
    if min(n_head, dim_k, dim_v) < 1:
        raise FormatError(
            f"{header.path} has {n_head} heads, each with {dim_k} K values and {dim_v} V values",
            "download the model again",
        )
    gemma = arch == "gemma3"
    wide = gemma and shape.n_layer == _N_LAYER_WIDE
    return Hyper(
        n_layer=shape.n_layer,
        dim_k=dim_k,
        dim_v=dim_v,
        n_rot=int(_number(header, "rope.dimension_count", dim_k)),
        eps=_number(header, "attention.layer_norm_rms_epsilon"),
        embedding_scale=sqrt(shape.n_embd) if gemma else 1.0,
        attention_scale=(dim if wide else dim_k) ** -0.5,
        interleaved=arch == "llama",
        gelu=gemma,
        ropes=_ropes(header, shape),
        windows=shape.windows,
    )


def _unsupported(header: Header, reason: str) -> UnsupportedArchitectureError:
    return UnsupportedArchitectureError(
        f"pop-local cannot compute gradients for {header.path}: {reason}",
        f"use a dense model with one of these architectures: {', '.join(ARCHITECTURES)}",
    )


def _unknown_tensor(source: Source) -> str | None:
    """Return the name of the first tensor that the decoder does not use, or None."""
    for tensor in source.tensors:
        prefix, _, rest = tensor.name.partition(".")
        name = rest.partition(".")[2]
        is_known = name in _KNOWN or name.startswith("pop_")
        if not (is_known if prefix == "blk" else tensor.name in _OUTSIDE):
            return tensor.name
    return None


def _ropes(header: Header, shape: ModelShape) -> tuple[Rope, ...]:
    scaling = header.get(f"{shape.arch}.rope.scaling.type")
    if scaling is not None and scaling not in _SCALINGS:
        raise _unsupported(header, f"the RoPE scaling {scaling!r} is not supported")
    factor = _number(header, "rope.scaling.factor", _number(header, "rope.scale_linear", 1))
    scale = 1.0 if factor == 0 or scaling == "none" else 1 / factor
    whole = Rope(_number(header, "rope.freq_base", 10_000), scale)
    if shape.arch == "gemma3":
        windowed = Rope(_number(header, "rope.freq_base_swa", 10_000), 1.0)
    else:
        windowed = Rope(_number(header, "rope.freq_base_swa", whole.base), whole.scale)
    return tuple(windowed if window else whole for window in shape.windows)


def _number(header: Header, name: str, default: float | None = None) -> float:
    """Return a key's value or, if the key has one value per layer, the first layer's value."""
    value = header.of_arch(name)
    if value is None and default is not None:
        return default
    if isinstance(value, tuple) and value:
        value = value[0]
    if isinstance(value, int | float):
        return value
    raise FormatError(f"{header.path} has no numeric value for the key {name}")
