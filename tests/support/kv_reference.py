"""Compute the K/V of skipped layers in float64, and parse those in a saved state.

The reference uses no code of the patches or of the converter's fit. The unpatched library computes
the boundary state; weights and keys are from the file.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize

from pop_converter.fit.least_squares import KvType
from pop_converter.fit.weights import Weights
from pop_converter.gguf.header import read_header
from pop_converter.gguf.source import read_source
from pop_converter.popfile.pruning_plan import make_plan
from pop_converter.popfile.rewrite import convert
from pop_converter.projection import Projection
from support.converted import made_up
from support.oracle import Tokens, Trio
from support.raw import Job, Step, run
from support.shapes import read_shape

OWN, FITTED, WIDE = Projection

# ggml rounds the input of a quantised product to 127 steps on each side, in blocks of 32.
BLOCK, N_STEPS = 32, 127
F32, F16 = 0, 1  # ggml's types of a cache


@dataclass(frozen=True)
class Stored:
    """A layer's K [n_cells, n_k] and V [n_cells, n_v]; `pos` [n_cells]."""

    pos: np.ndarray
    k: np.ndarray
    v: np.ndarray


@dataclass(frozen=True)
class Expected:
    """K and V [n_tokens, n], and their standard deviation due to rounding of the input."""

    k: np.ndarray
    v: np.ndarray
    k_noise: np.ndarray
    v_noise: np.ndarray


def normalised_states(trio: Trio, tokens: Tokens, job: Job) -> np.ndarray:
    """Return h_b / rms(h_b), float64 [n_tokens, n_embd], from the unpatched library.

    Silent deep layers preserve the state, so it is available after the output norm.
    """
    step = Step("embeddings", "states", tokens=tokens, logits="all")
    normed = run(replace(job, model=str(trio.silent), steps=(step,)))["states"]
    gain = Weights(read_source(trio.original))["output_norm.weight"].astype(np.float64)
    return np.asarray(normed / gain)


class Reference:
    """The K/V of context tokens at positions 0, 1, ...: own or fitted projections of any kind.

    `edges`: positions of each ubatch's first row, which has no previous row.
    """

    def __init__(self, pruned: Path, states: np.ndarray, edges: Sequence[int] = (0,)) -> None:
        self._weights = Weights(read_source(pruned))
        self._header = read_header(pruned)
        self._states = states
        self.arch = str(self._header.get("general.architecture"))
        per_head = self._key("embedding_length") // self._key("attention.head_count")
        self._head_dim = int(self._key("attention.key_length", per_head))
        self.wide = self._wide_input(states, edges)

    def layer(self, layer: int, *, swa: bool) -> Expected:
        x = self._states * self._tensor(f"blk.{layer}.attn_norm.weight")
        v, v_noise = self._product(layer, "v", x), self._noise(layer, "v", x)
        k, scale = self._normed(layer, "k", x)
        k_noise = self._noise(layer, "k", x).reshape(k.shape) * np.abs(scale)
        k = self._rope(k, swa)
        return Expected(k.reshape(len(x), -1), v, k_noise.reshape(len(x), -1), v_noise)

    def _normed(self, layer: int, part: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return Q or K by heads, [n_tokens, n_head, head_dim], and its norm's factor."""
        cur = self._product(layer, part, x).reshape(len(x), -1, self._head_dim)
        name = f"blk.{layer}.attn_{part}_norm.weight"
        if name not in self._weights:
            return cur, np.ones(1)
        eps = float(self._key("attention.layer_norm_rms_epsilon"))
        scale = self._tensor(name) / np.sqrt(np.mean(cur**2, axis=-1, keepdims=True) + eps)
        return cur * scale, scale

    def _key(self, name: str, default: float | None = None) -> float:
        value = self._header.get(f"{self.arch}.{name}")
        value = default if value is None else value
        assert isinstance(value, int | float), name
        return value

    def _tensor(self, name: str) -> np.ndarray:
        return self._weights[name].astype(np.float64)

    def _projection(self, layer: int, part: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the weight [n_out, n_embd] and bias [n_out] of `part`, one of q, k and v.

        The projection is fitted, own, or sliced from a combined QKV tensor.
        """
        for name in (f"blk.{layer}.pop_attn_{part}", f"blk.{layer}.attn_{part}"):
            if f"{name}.weight" in self._weights:
                weight = self._tensor(f"{name}.weight")
                has_bias = f"{name}.bias" in self._weights
                return weight, self._tensor(f"{name}.bias") if has_bias else np.zeros(len(weight))
        n = self._head_dim * int(self._key("attention.head_count_kv"))
        weight = self._tensor(f"blk.{layer}.attn_qkv.weight")
        weight = weight[{"q": slice(-2 * n), "k": slice(-2 * n, -n), "v": slice(-n, None)}[part]]
        return weight, np.zeros(len(weight))

    def _wide_input(self, x: np.ndarray, edges: Sequence[int]) -> np.ndarray | None:
        """Return the wide input (reduced previous state, neurons), [n_tokens, n_wide], or None."""
        layer = str(self._header.get("pop.schedule")).find("S")
        prefix = f"blk.{layer}.pop_"
        if f"{prefix}prev.weight" not in self._weights:
            return None
        before = np.arange(len(x)) - 1
        before[list(edges)] = list(edges)
        parts = [x[before] @ self._tensor(f"{prefix}prev.weight").T]
        if f"{prefix}ffn_gate.weight" in self._weights:
            inner = x * self._tensor(f"blk.{layer}.ffn_norm.weight")
            gate = inner @ self._tensor(f"{prefix}ffn_gate.weight").T
            up = inner @ self._tensor(f"{prefix}ffn_up.weight").T
            if self.arch in ("gemma2", "gemma3"):
                cubic = np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)
                acted = gate * (1 + np.tanh(cubic)) / 2
            else:
                acted = gate / (1 + np.exp(-gate))
            parts.append(np.clip(acted * up, -5, 5))
        return np.concatenate(parts, axis=1)

    def _product(self, layer: int, part: str, x: np.ndarray) -> np.ndarray:
        weight, bias = self._projection(layer, part)
        product = x @ weight.T + bias
        name = f"blk.{layer}.pop_attn_{part}_wide.weight"
        if name in self._weights:
            product += self.wide @ self._tensor(name).T
        return np.asarray(product)

    def _noise(self, layer: int, part: str, x: np.ndarray) -> np.ndarray:
        weight, _ = self._projection(layer, part)
        step = np.abs(x).reshape(len(x), -1, BLOCK).max(-1) / N_STEPS
        power = np.square(weight).reshape(len(weight), -1, BLOCK).sum(-1)
        return np.asarray(np.sqrt(step**2 / 12 @ power.T))

    def _rope(self, k: np.ndarray, swa: bool) -> np.ndarray:
        """Rotate k [n_tokens, n_head, head_dim]; gemma3's sliding windows have another base."""
        half = k.shape[-1] // 2
        own_base = swa and self.arch == "gemma3"
        base = 10000.0 if own_base else self._key("rope.freq_base")
        divisor = 1.0 if own_base else self._key("rope.scaling.factor", 1.0)
        turns = base ** (-np.arange(half) / half) / divisor
        for name in ("rope_freqs.weight", "rope_factors_short.weight"):
            if name in self._weights:
                turns = turns / self._tensor(name)
        angle = np.arange(len(k))[:, None, None] * turns
        interleaved = self.arch == "llama"
        pairs = (k[..., ::2], k[..., 1::2]) if interleaved else (k[..., :half], k[..., half:])
        unit = (pairs[0] + 1j * pairs[1]) * np.exp(1j * angle)
        unit *= self._key("rope.scaling.attn_factor", 1.0)
        if interleaved:
            return np.stack([unit.real, unit.imag], -1).reshape(k.shape)
        return np.concatenate([unit.real, unit.imag], -1)


def parse_state(raw: bytes, windows: tuple[int, ...]) -> dict[int, Stored]:
    """Parse a sequence's state, as llama_kv_cache::state_write writes it, by layer.

    `windows`: window sizes by layer (0: none). Layers with a window use the second cache.
    """
    reader = _Reader(raw)
    reader.take("Ii")  # magic number and sequence
    stored: dict[int, Stored] = {}
    for has_window in (False, True):
        layers = [layer for layer, window in enumerate(windows) if bool(window) is has_window]
        if layers or any(windows):
            stored |= _parse_cache(reader, layers)
    assert reader.at == len(raw)
    return stored


class _Reader:
    def __init__(self, raw: bytes) -> None:
        self.raw, self.at = raw, 0

    def take(self, form: str) -> tuple[int, ...]:
        values = struct.unpack_from("<" + form, self.raw, self.at)
        self.at += struct.calcsize("<" + form)
        return values

    def rows(self, kind: int, n_rows: int, row_size: int) -> np.ndarray:
        data = np.frombuffer(self.raw, np.uint8, n_rows * row_size, self.at)
        self.at += n_rows * row_size
        return dequantize(data.reshape(n_rows, row_size), Type(kind)).astype(np.float64)


def _parse_cache(reader: _Reader, layers: list[int]) -> dict[int, Stored]:
    """Parse a cache of multiple streams; only the sequence's stream has cells."""
    [n_streams] = reader.take("I")
    results = [_parse_stream(reader, layers) for _ in range(n_streams)]
    [stored] = [stream for stream in results if stream]
    return stored


def _parse_stream(reader: _Reader, layers: list[int]) -> dict[int, Stored]:
    [n_cells] = reader.take("I")
    if not n_cells:
        return {}
    pos = []
    for _ in range(n_cells):
        position, n_seqs = reader.take("iI")
        reader.take(f"{n_seqs}i")
        pos.append(position)
    transposed, n_layers = reader.take("II")
    assert n_layers == len(layers)
    ks, vs = [], []
    for _ in layers:
        kind, row_size = reader.take("iQ")
        ks.append(reader.rows(kind, n_cells, row_size))
    for _ in layers:
        if transposed:
            kind, size, n_values = reader.take("iII")
            vs.append(reader.rows(kind, n_values, size * n_cells).T)
        else:
            kind, row_size = reader.take("iQ")
            vs.append(reader.rows(kind, n_cells, row_size))
    parts = zip(layers, ks, vs, strict=True)
    return {layer: Stored(np.array(pos), k, v) for layer, k, v in parts}


def prefilled(trio: Trio, tokens: Tokens, folder: Path, job: Job) -> dict[int, Stored]:
    """Return the patched library's state after a prefill whose only full token is the last."""
    state = folder / "state"
    steps = (
        Step("full_from", value=len(tokens) - 1),
        Step("decode", tokens=tokens),
        Step("counters", "counters"),
        Step("save", path=str(state)),
    )
    counters = run(replace(job, model=str(trio.pruned), steps=steps, lib=None))["counters"]
    np.testing.assert_array_equal(counters, [len(tokens) - 1, 1])
    return parse_state(state.read_bytes(), read_shape(trio.original).windows)


def context_rows(stored: Stored, expected: Expected, n_tokens: int) -> tuple[Stored, Expected]:
    """Return the rows of both that are stored and not full, in the cells' order."""
    rows = stored.pos < n_tokens - 1
    pos = stored.pos[rows]
    wanted = Expected(
        expected.k[pos], expected.v[pos], expected.k_noise[pos], expected.v_noise[pos]
    )
    return Stored(pos, stored.k[rows], stored.v[rows]), wanted


def fit_at_random(
    trio: Trio, path: Path, kv_type: KvType, projection: Projection = FITTED, scale: float = 1.0
) -> Path:
    """Return random fitted projections, different for each layer and from the model's own."""
    shape = read_shape(trio.original)
    plan = make_plan(shape, boundary=trio.boundary, sink_tokens=0, projection=projection)
    convert(plan, trio.original, path, fitted=made_up(plan, kind=kv_type, scale=scale))
    return path


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))
