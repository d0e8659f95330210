"""Taps for the calibration: the arrays of a model while it reads a window in full.

The scheduler's evaluation callback (ggml_backend_sched_eval_callback) names each tensor of the
graph before it is computed and shows those that were asked for right after; see
ggml_backend_sched_compute_splits. Nothing is kept: the observer gets each array once.
"""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pop_local.base.errors import PopError
from pop_local.calibration.loaded import LoadedModel
from pop_local.engine.llama import logs
from pop_local.engine.llama.backend import bindings
from pop_local.engine.llama.batch import Outputs, TokenBatch, decode_rows
from pop_local.engine.llama.devices import GgmlLibrary
from pop_local.engine.llama.interrupt import Interrupt

Rows = NDArray[np.float32]

_F32 = 0  # GGML_TYPE_F32
_FLASH_ATTN_OFF = 0  # LLAMA_FLASH_ATTN_TYPE_DISABLED
# Before norm and RoPE K and V are shaped into heads, fused or not; later tensors reuse their names.
_SHAPED = (b"RESHAPE", b"VIEW")
# Where they are shaped under another name, they are the product, or its sum with a bias.
_FLAT = (b"MUL_MAT", b"ADD")


class Observer(Protocol):
    """Who gets the arrays of each window, its states first; they are valid during the call only."""

    def state(self, boundary: int, rows: Rows) -> None:
        """Take the output [n_tokens, n_embd] of layer `boundary` - 1."""

    def heads(self, layer: int, rows: Rows) -> None:
        """Take what the heads of a layer give, [n_tokens, n_head * head_dim_v]."""

    def layer(self, layer: int, k: Rows, v: Rows, mass: Rows) -> None:
        """Take what layer `layer` computes.

        `k` (before norm and RoPE) is [n_tokens, n_k], `v` [n_tokens, n_v]. `mass` [n_tokens] is the
        attention that each token receives from later ones, summed over heads and queries.
        """


class Tensor(ctypes.Structure):
    """struct ggml_tensor of ggml.h, but for its padding."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
        ("extra", ctypes.c_void_p),
    )


class _Reader:
    """A reader of tensors as numpy arrays: in place if the host sees them, else by one buffer."""

    def __init__(self) -> None:
        self._ggml = GgmlLibrary()
        self._buffer = np.empty(0, np.uint8)

    def op(self, tensor: Tensor) -> bytes:
        name: bytes = self._ggml("ggml_op_name", ctypes.c_char_p, tensor.op)
        return name

    def read(self, address: int, tensor: Tensor) -> Rows:
        """Return the values, ggml's dimensions in numpy's order. Raises PopError if not float32."""
        if tensor.type != _F32:
            raise PopError(f"the backend computes {tensor.name.decode()} in another type than F32")
        shape, strides = tuple(tensor.ne)[::-1], tuple(tensor.nb)[::-1]
        n_bytes = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + strides[-1]
        raw = self._bytes(address, tensor, n_bytes)
        values: Rows = np.ndarray(shape, np.float32, raw, strides=strides)
        return values

    def _bytes(self, address: int, tensor: Tensor, n_bytes: int) -> Any:
        buffer = ctypes.c_void_p(tensor.buffer)
        if self._ggml("ggml_backend_buffer_is_host", ctypes.c_bool, buffer):
            return (ctypes.c_uint8 * n_bytes).from_address(tensor.data)
        if self._buffer.size < n_bytes:
            self._buffer = np.empty(n_bytes, np.uint8)
        self._ggml(
            "ggml_backend_tensor_get",
            None,
            ctypes.c_void_p(address),
            ctypes.c_void_p(self._buffer.ctypes.data),
            ctypes.c_size_t(0),
            ctypes.c_size_t(n_bytes),
        )
        return self._buffer[:n_bytes].data


class _Taps:
    """The evaluation callback; it collects a layer's three tensors, then hands them on."""

    def __init__(
        self,
        observer: Observer,
        boundaries: Sequence[int],
        layers: Sequence[int],
        heads: Sequence[int],
    ) -> None:
        self._observer = observer
        self._wanted: dict[bytes, tuple[str, int]] = {}
        for boundary in boundaries:
            self._wanted[b"l_out-%d" % (boundary - 1)] = ("state", boundary)
            # Step 3.5 gives the state a second name in the place of the first.
            self._wanted[b"attn_norm_in-%d" % boundary] = ("state", boundary)
        for layer in heads:
            self._wanted[b"kqv_out-%d" % layer] = ("heads", layer)
        for layer in layers:
            for kind, name in (("k", b"Kcur"), ("v", b"Vcur"), ("mass", b"kq_soft_max")):
                self._wanted[b"%s-%d" % (name, layer)] = (kind, layer)
        self._reader = _Reader()
        self._layers: dict[int, dict[str, Rows]] = {}
        self._shaped: set[tuple[int, str]] = set()
        self.n_seen = 0
        self.n_expected = len(boundaries) + len(heads) + len(layers)
        self.raised: BaseException | None = None

    def start_window(self) -> None:
        self._layers.clear()
        self._shaped.clear()
        self.n_seen = 0

    def __call__(self, address: int, ask: bool, _data: object) -> bool:
        # ctypes prints and drops what a callback raises.
        try:
            if self.raised is None:
                return self._call(address, ask)
        except BaseException as error:
            self.raised = error
        return not ask

    def _call(self, address: int, ask: bool) -> bool:
        tensor = Tensor.from_address(address)
        found = self._wanted.get(tensor.name)
        if found is None:
            return not ask
        kind, number = found
        if kind in "kv":
            is_flat = (op := self._reader.op(tensor)) in _FLAT
            if not (is_flat or op in _SHAPED) or (is_flat and (number, kind) in self._shaped):
                return not ask
            if not is_flat and not ask:
                self._shaped.add((number, kind))
        if not ask:
            self._show(kind, number, self._reader.read(address, tensor))
        return True

    def _show(self, kind: str, number: int, values: Rows) -> None:
        if kind in ("state", "heads"):
            take = self._observer.state if kind == "state" else self._observer.heads
            take(number, values[0, 0])
            self.n_seen += 1
            return
        parts = self._layers.setdefault(number, {})
        heads = values[0]
        if kind == "mass":
            parts[kind] = _received(heads)
        else:
            heads = heads[0] if len(heads) == 1 else heads
            parts[kind] = heads.reshape(len(heads), -1).copy()
        if len(parts) == 3:
            self._observer.layer(number, **self._layers.pop(number))
            self.n_seen += 1


def _received(attention: Rows) -> Rows:
    """Sum attention [n_head, n_tokens, n_kv] over heads and later queries: [n_tokens]."""
    n_head, n_tokens, n_kv = attention.shape
    # A product is several times as fast as a sum over the outer axis.
    total = np.ones(n_head * n_tokens, np.float32) @ attention.reshape(-1, n_kv)
    to_itself = np.einsum("hii->i", attention[:, :, :n_tokens])
    received: Rows = total[:n_tokens] - to_itself
    return received


class Reading:
    """A context that reads windows one by one; each begins with an empty KV cache."""

    def __init__(self, ctx: Any, taps: _Taps, batch: TokenBatch) -> None:
        self._api = bindings()
        self._ctx, self._taps, self._batch = ctx, taps, batch
        self._interrupt = Interrupt()

    def window(self, tokens: Sequence[int]) -> None:
        """Read one window.

        Raises PopError when llama.cpp fails, and whatever the observer or Ctrl-C raises.
        """
        self._read(lambda: self._batch.decode(self._ctx, tokens, 0, Outputs.NONE))

    def image(self, rows: Rows, positions: NDArray[np.int32], *, is_mutual: bool) -> None:
        """Read an image as a window, see `decode_rows`. Raises as `window` does."""
        self._read(lambda: decode_rows(self._ctx, rows, positions, is_mutual=is_mutual))

    def _read(self, decode: Callable[[], int]) -> None:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._ctx), False)
        self._taps.start_window()
        logs.forget_errors()
        with self._interrupt.watching(self._ctx):
            code = decode()
            if self._taps.raised is not None:
                raise self._taps.raised
            self._interrupt.check()
        if code != 0:
            raise logs.not_decoded(code)
        if self._taps.n_seen != self._taps.n_expected:
            raise PopError(
                f"the backend showed {self._taps.n_seen} of {self._taps.n_expected} activations",
                "reinstall the backend, or convert with the model's own projections",
                cause="activations-not-shown",
            )


@contextmanager
def reading(
    model: LoadedModel,
    observer: Observer,
    *,
    boundaries: Sequence[int],
    layers: Sequence[int],
    n_window: int,
    heads: Sequence[int] = (),
) -> Iterator[Reading]:
    """Open a context whose windows of up to `n_window` tokens show what they compute.

    That is the states at `boundaries`, and of `layers` and `heads` what the observer takes of each.
    """
    taps = _Taps(observer, boundaries, layers, heads)
    callback = bindings().ggml_backend_sched_eval_callback(taps)
    opened = model.context(
        n_ctx=n_window,
        n_batch=n_window,
        n_ubatch=n_window,
        flash_attn_type=_FLASH_ATTN_OFF,
        cb_eval=callback,
    )
    with opened as ctx, closing(TokenBatch(n_window)) as batch:
        yield Reading(ctx, taps, batch)
