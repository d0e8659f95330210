"""Build inputs of kernels, and check the errors of their results.

Weights are random bytes, so that every code occurs, with plausible scales. The ideal of a product
has activations in int8 with one scale per 32 values, and is then computed in float64.
"""

from dataclasses import replace

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from support.ggml import (
    OAI,
    Attention,
    Glu,
    MulMat,
    MulMatId,
    MulRows,
    Op,
    RmsNormMul,
    Stored,
    is_covered,
    kernels,
)

# Offsets of a block's float16 values: its scale, and the scale of its minimum.
SCALES: dict[Type, tuple[int, ...]] = {
    Type.Q4_0: (0,),
    Type.Q4_1: (0, 2),
    Type.Q5_0: (0,),
    Type.Q5_1: (0, 2),
    Type.Q8_0: (0,),
    Type.Q2_K: (80, 82),
    Type.Q3_K: (108,),
    Type.Q4_K: (0, 2),
    Type.Q5_K: (0, 2),
    Type.Q6_K: (208,),
    Type.IQ4_NL: (0,),
    Type.IQ4_XS: (0,),
    Type.MXFP4: (),
}
QUANTISED = list(SCALES)
FLOATS = [Type.F16, Type.BF16]
TYPES = QUANTISED + FLOATS
_MXFP4_SCALE = 127  # of its byte: 1

# Maximum error of a product, relative to the ideal's.
WORSE = 1.05
# Maximum error of a sum in float32, relative to the product of the two norms.
ROUNDING = 2e-6


def block(type_: Type) -> int:
    """Return the number of values in a block."""
    return gguf.GGML_QUANT_SIZES[type_][0]


def weights(rng: np.random.Generator, type_: Type, *shape: int) -> Stored:
    """Return random weights [..., n_out, n_in] with scales of both signs, up to 16 times apart."""
    if type_ in FLOATS:
        return narrowed(rng.standard_normal(shape).astype(np.float32), type_)
    n_block, n_bytes = gguf.GGML_QUANT_SIZES[type_]
    n_blocks = shape[-1] // n_block
    data = rng.integers(0, 256, (*shape[:-1], n_blocks, n_bytes), np.uint8)
    for at in SCALES[type_]:
        size = 2 ** rng.uniform(-7, -3, data.shape[:-1])
        put_scale(data, at, np.where(rng.random(size.shape) < 0.5, -size, size))
    if type_ == Type.MXFP4:
        data[..., 0] = rng.integers(_MXFP4_SCALE - 5, _MXFP4_SCALE, data.shape[:-1])
    return Stored(type_, data.reshape(*shape[:-1], -1))


def filled(type_: Type, byte: int, *shape: int, scale: float = 0.03) -> Stored:
    """Return weights [..., n_in] whose bytes are all the same, except for the scales."""
    n_block, n_bytes = gguf.GGML_QUANT_SIZES[type_]
    data = np.full((*shape[:-1], shape[-1] // n_block, n_bytes), byte, np.uint8)
    for at in SCALES[type_]:
        put_scale(data, at, np.full(data.shape[:-1], scale))
    if type_ == Type.MXFP4:
        data[..., 0] = _MXFP4_SCALE
    return Stored(type_, data.reshape(*shape[:-1], -1))


def put_scale(data: np.ndarray, at: int, values: np.ndarray) -> None:
    """Write float16 values at one offset in each block, uint8 [..., bytes of a row]."""
    data[..., at : at + 2] = values.astype("<f2")[..., None].view(np.uint8)


def narrowed(values: np.ndarray, type_: Type) -> Stored:
    """Round to the nearest values of a type that the gguf package can write."""
    if type_ == Type.F16:
        return Stored(type_, values.astype("<f2").view(np.uint8))
    return Stored(type_, gguf.quantize(values, type_).view(np.uint8))


def activations(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Return normal float32 values with outliers that are eight times as large."""
    x = rng.standard_normal(shape)
    return np.where(rng.random(shape) < 0.02, 8 * x, x).astype(np.float32)


def in_int8(x: np.ndarray) -> np.ndarray:
    """Round activations to 8 bits with one scale per 32 values; return float64."""
    blocks = x.astype(np.float64).reshape(*x.shape[:-1], -1, 32)
    scale = np.abs(blocks).max(-1, keepdims=True) / 127
    return (np.rint(blocks / np.where(scale, scale, 1)) * scale).reshape(x.shape)


def in_bf16(x: np.ndarray) -> np.ndarray:
    """Round to bfloat16; return float64."""
    bits = x.astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)).astype(np.uint32) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32).astype(np.float64)


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def is_decoded_upstream(type_: Type) -> bool:
    """Return whether llama.cpp's kernels decode the type (see FAST_FOR_EACH_TYPE_BUT_Q2_K)."""
    return type_ is Type.Q2_K and kernels() in ("amx", "avx512vnni")


def check_product(got: np.ndarray, stored: Stored, x: np.ndarray) -> None:
    """Compare a product with float64, and its error with the ideal's.

    `got`: float32 [..., n_rows, n_out]; `stored`: [..., n_out, n_in]; `x`: [..., n_rows, n_in]. The
    limit for BF16 and F16 assumes activations in bfloat16.
    """
    w, x64 = np.swapaxes(stored.values, -1, -2), x.astype(np.float64)
    want = x64 @ w
    ideal = in_bf16(x) @ in_bf16(w) if stored.type in FLOATS else in_int8(x) @ w
    norms = np.linalg.norm(x64, axis=-1)[..., None] * np.linalg.norm(w, axis=-2)[..., None, :]
    limit = WORSE * rms(ideal - want) + ROUNDING * rms(norms)
    assert rms(got - want) <= limit, f"{rms(got - want) / rms(ideal - want)} of the ideal's error"


def extremes(type_: Type, n_in: int = 768) -> list[MulMat]:
    """Return products of the largest codes and of activations that int8 holds exactly."""
    sizes = np.array([1, -1, 3e4, -1e-4, 0.5, -2, 7] * 3)[:, None]
    same, turns = np.ones(n_in), np.tile([1, -1], n_in // 2)
    return [
        MulMat(filled(type_, byte, 33, n_in), (sizes * signs).astype(np.float32))
        for byte in (0, 255, 127, 128, 15, 240)
        for signs in (same, turns)
    ]


def check_extreme(got: np.ndarray, op: MulMat, kernels: str) -> None:
    """Compare a result of `extremes` with float64; an overflowing integer sum differs by far.

    AMX rounds weights and activations to bfloat16.
    """
    x, w = op.x.astype(np.float64), op.weights.values
    reach = max(np.abs(filled(op.weights.type, byte, 256).values).max() for byte in (0, 255, 127))
    limit = (2**-8 if kernels == "amx" else 3e-4) * reach * np.abs(x).sum(-1, keepdims=True)
    assert (np.abs(got - x @ w.T) <= limit).all()


def mul_mat(
    rng: np.random.Generator, type_: Type, n_rows: int, n_out: int = 64, n_in: int = 256
) -> MulMat:
    return MulMat(weights(rng, type_, n_out, n_in), activations(rng, n_rows, n_in))


def mul_mat_id(
    rng: np.random.Generator,
    type_: Type,
    per_expert: tuple[int, ...],
    n_used: int = 1,
    n_out: int = 64,
    n_in: int = 256,
) -> MulMatId:
    """Return a product whose experts have the given numbers of rows; a token's are distinct."""
    n_experts, n_tokens = len(per_expert), sum(per_expert) // n_used
    ids = np.empty((n_tokens, n_experts), np.int32)
    left = np.array(per_expert)
    for token in rng.permutation(n_tokens):
        order = rng.permutation(n_experts)
        ids[token] = order[np.argsort(-left[order], kind="stable")]
        left[ids[token, :n_used]] -= 1
        rng.shuffle(ids[token, :n_used])
    assert not left.any(), "no such choice of distinct experts"
    return MulMatId(
        weights(rng, type_, n_experts, n_out, n_in),
        activations(rng, n_tokens, n_used, n_in),
        ids,
        n_used,
    )


def geglu(rng: np.random.Generator, *shape: int) -> Glu:
    """Return a GEGLU of two tensors [..., n_rows, n] with the range of a feed-forward."""
    x = 3 * rng.standard_normal(shape)
    large = rng.choice([-1e4, -87, -20, -9.99, 0, 1e-30, 10.01, 20, 1e4], shape)
    x = np.where(rng.random(shape) < 0.1, large, x).astype(np.float32)
    return Glu(x, activations(rng, *shape))


def swiglu_oai(rng: np.random.Generator, *shape: int) -> Glu:
    """Return gpt-oss's GLU of the same tensors, with some values beyond its limit."""
    op = geglu(rng, *shape)
    assert op.y is not None
    return replace(op, y=6 * op.y, is_oai=True)


def expected_glu(op: Glu) -> np.ndarray:
    """Return the GLU in float64."""
    x, y = op.x.astype(np.float64), op.y
    if y is None:
        x, y = np.split(x, 2, -1)
        if op.swapped:
            x, y = y, x
    if op.is_oai:
        alpha, limit = OAI
        x, y = np.minimum(x, limit), np.clip(y.astype(np.float64), -limit, limit)
        return x / (1 + np.exp(-np.maximum(alpha * x, -700))) * (y + 1)
    twice = np.sqrt(8 / np.pi) * (x + 0.044715 * x**3)
    return x / (1 + np.exp(-np.maximum(twice, -700))) * y


def mul_rows(rng: np.random.Generator, *shape: int) -> MulRows:
    """Return a product of rows [..., n_rows, n] and one factor for each."""
    return MulRows(activations(rng, *shape), activations(rng, *shape[:-1], 1))


def rms_norm_mul(rng: np.random.Generator, *shape: int) -> RmsNormMul:
    """Return a norm of rows [..., n_rows, n] whose sizes differ by up to 1e12."""
    sizes = 10 ** rng.uniform(-6, 6, (*shape[:-1], 1))
    x = (sizes * activations(rng, *shape)).astype(np.float32)
    return RmsNormMul(x, rng.standard_normal(shape[-1]).astype(np.float32))


def expected_rms_norm_mul(op: RmsNormMul) -> np.ndarray:
    x = op.x.astype(np.float64)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + op.eps) * op.gain


def attention(
    rng: np.random.Generator,
    n_rows: int = 40,
    n_kv: int = 100,
    n_dims: int = 64,
    n_heads: int = 4,
    n_kv_heads: int = 2,
    n_streams: int = 1,
    n_dims_v: int = 0,
    type_: Type = Type.F16,
    mask: np.ndarray | None = None,
) -> Attention:
    """Return attention on random rows and a cache whose unused cells are NaN.

    `mask`: the causal one by default.
    """
    n_cells = n_kv + 8

    def cache(n_values: int) -> Stored:
        values = rng.standard_normal((n_streams, n_cells, n_kv_heads, n_values))
        stored = narrowed(values.astype(np.float32), type_)
        stored.data[:, n_kv:] = 0xFF
        return stored

    q = rng.standard_normal((n_streams, n_rows, n_heads, n_dims)).astype(np.float32)
    return Attention(
        q,
        cache(n_dims),
        cache(n_dims_v or n_dims),
        n_kv,
        scale=n_dims**-0.5,
        mask=causal(n_rows, n_kv) if mask is None else mask,
    )


def causal(n_rows: int, n_kv: int, window: int = 0) -> np.ndarray:
    """Return the mask of a prompt's last rows, each of which sees `window` cells (0: all)."""
    distance = np.arange(n_kv - n_rows, n_kv)[:, None] - np.arange(n_kv)
    return visible_mask((distance >= 0) & ((distance < window) | (window == 0)))


def visible_mask(cells: np.ndarray) -> np.ndarray:
    """Return the mask, float16 [1, 1, n_rows, n_kv], of the visible cells."""
    return np.where(cells, 0.0, -np.inf).astype(np.float16)[None, None]


def require_covered(op: Op) -> None:
    """Skip the test if upstream's kernels compute the operation."""
    if not is_covered(op):
        pytest.skip("these kernels leave it to upstream's")


def first_rows(op: Op, n_rows: int) -> Op:
    """Return the operation with fewer rows (for MulMatId: tokens)."""
    if isinstance(op, Attention):
        mask = None if op.mask is None else np.ascontiguousarray(op.mask[:, :, :n_rows])
        return replace(op, q=op.q[:, :n_rows], mask=mask)
    if isinstance(op, MulMatId):
        return replace(op, x=op.x[:n_rows], ids=op.ids[:n_rows])
    if isinstance(op, Glu) and op.y is not None:
        return replace(op, x=op.x[..., :n_rows, :], y=op.y[..., :n_rows, :])
    if isinstance(op, MulRows):
        return replace(op, x=op.x[..., :n_rows, :], factors=op.factors[..., :n_rows, :])
    return replace(op, x=op.x[..., :n_rows, :])


def expected_attention(op: Attention, *, ideal: bool = False) -> np.ndarray:
    """Return attention in float64 [n_streams, n_rows, n_heads, n_dims].

    `ideal`: with Q of 14 bits and one scale a row, K of 13 bits and one scale per 32 values, and
    probabilities and V in float16.
    """
    n_heads = op.q.shape[2]
    q = np.moveaxis(op.q.astype(np.float64), 2, 1)
    k, v = (np.moveaxis(cache.values[:, : op.n_kv], 2, 1) for cache in (op.k, op.v))
    if ideal:
        q = _in_bits(q, 8191, q.shape[-1])
        k = _in_bits(k, 4095, 32 if k.shape[-1] % 32 == 0 else k.shape[-1])
        v = v.astype(np.float16).astype(np.float64)
    k, v = (np.repeat(cache, n_heads // cache.shape[1], 1) for cache in (k, v))
    scores = op.scale * (q @ np.swapaxes(k, -1, -2))
    if op.softcap:
        scores = op.softcap * np.tanh(scores / op.softcap)
    if op.mask is not None:
        scores = scores + slopes(n_heads, op.max_bias)[:, None, None] * op.mask.astype(np.float64)
    top = scores.max(-1, keepdims=True)
    if op.sinks is not None:
        top = np.maximum(top, op.sinks[:, None, None])
    top = np.where(np.isfinite(top), top, 0)
    p = np.exp(scores - top)
    total = p.sum(-1, keepdims=True)
    if op.sinks is not None:
        total = total + np.exp(op.sinks[:, None, None] - top)
    out = (p.astype(np.float16) if ideal else p) @ v / np.where(total, total, 1)
    return np.moveaxis(out, 1, 2)


def slopes(n_heads: int, max_bias: float) -> np.ndarray:
    """Return ALiBi's slope of each head."""
    if not max_bias:
        return np.ones(n_heads)
    head, power = np.arange(n_heads), 2 ** int(np.log2(n_heads))
    low = 2.0 ** (-max_bias / power * (head + 1))
    high = 2.0 ** (-max_bias / 2 / power * (2 * (head - power) + 1))
    return np.where(head < power, low, high)


def _in_bits(values: np.ndarray, largest: int, n: int) -> np.ndarray:
    blocks = values.reshape(*values.shape[:-1], -1, n)
    scale = np.abs(blocks).max(-1, keepdims=True) / largest
    return (np.rint(blocks / np.where(scale, scale, 1)) * scale).reshape(values.shape)
