"""Run single operations of ggml on the CPU backend of the library that llama_cpp loads.

Arrays have ggml's dimensions in reverse order: the last one is contiguous in memory. A child
process computes with another library (LLAMA_CPP_LIB_PATH) or another environment.
"""

import ctypes
import mmap
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Type

from support.ggml_library import (
    AbortCallback,
    InitParams,
    base,
    cpu,
    guarded_pages,
    set_params,
    tensor_at,
    work_size,
)
from support.ggml_ops import (
    OAI,
    Attention,
    Glu,
    MulMat,
    MulMatId,
    MulRows,
    Op,
    RmsNormMul,
    Rows,
    Stored,
)

_ROWS_PARAM = 15  # GGML_POP_OP_PARAM
_ALIGNMENT = 32  # of tensors in a model file, in bytes
_N_DIMS, _N_TENSORS = 4, 64
_GEGLU, _SWIGLU_OAI = 1, 3  # GGML_GLU_OP_*


class Between(Enum):
    """An operation between two operations of a graph, on a result or on their input."""

    ADD = auto()
    ROPE = auto()
    OVERWRITE = auto()


@dataclass(frozen=True)
class Answer:
    """A child's results, and its library's kernels (None if unpatched)."""

    kernels: str | None
    results: list[np.ndarray]


def compute(
    op: Op,
    rows: Rows = Rows.ALL,
    n_threads: int = 1,
    *,
    guarded: bool = False,
    reference: bool = False,
) -> np.ndarray:
    """Compute an operation.

    `guarded`: an access past a tensor's end kills the process; tensor sizes must be multiples of 32
    bytes. `reference`: use upstream's reference implementation. Returns float32: for MulMat
    [..., n_rows, n_out], for MulMatId [n_tokens, n_used, n_out], for Attention [n_streams, n_rows,
    n_heads, n_dims], for others [..., n_rows, n].
    """
    [outputs] = compute_all([op], rows, n_threads, guarded=guarded, reference=reference)
    return outputs


def compute_all(
    ops: Sequence[Op],
    rows: Rows = Rows.ALL,
    n_threads: int = 1,
    *,
    between: Between | None = None,
    guarded: bool = False,
    reference: bool = False,
) -> list[np.ndarray]:
    """Compute operations in one graph, in order; inputs that share an array share a tensor.

    `between` runs after each operation. Other parameters are those of `compute`.
    """
    graph = Graph(guarded)
    try:
        nodes, results = [], []
        for op in ops:
            results.append(graph.build(op, rows))
            nodes += [results[-1], *(graph.build_between(between, results[-1], op))]
        values = graph.compute(nodes, results, n_threads, reference)
        return [_of_dims(values, op) for values, op in zip(values, ops, strict=True)]
    finally:
        graph.close()


def compute_with_rows_lost(ops: Sequence[Op], rows: Rows = Rows.ALL) -> list[np.ndarray]:
    """Compute products in one graph and zero their input rows after the first product."""
    graph = Graph()
    try:
        results = [graph.build(op, rows) for op in ops]
        values = graph.compute(results, results, 1, False, graph.lose_rows)
        return [_of_dims(values, op) for values, op in zip(values, ops, strict=True)]
    finally:
        graph.close()


def _of_dims(values: np.ndarray, op: Op) -> np.ndarray:
    if isinstance(op, Attention):
        return values
    n_dims = max(op.x.ndim, op.weights.data.ndim) if isinstance(op, MulMat) else op.x.ndim
    return values[(0,) * (_N_DIMS - n_dims)]


def is_covered(op: Op, rows: Rows = Rows.ALL) -> bool:
    """Return whether our kernels compute a product or attention."""
    graph = Graph()
    try:
        return bool(work_size()(1, graph.build(op, rows)))
    finally:
        graph.close()


def kernels() -> str:
    """Return the active kernels: "off", "none", or a name. Raises LookupError if unpatched."""
    function = cpu().kernels
    if function is None:
        raise LookupError("the CPU's kernels are unpatched: ggml_pop_kernels is missing")
    name: bytes = function()
    return name.decode()


def in_child(ops: Sequence[Op], lib: Path | None = None, env: Any = None, **how: Any) -> Answer:
    """Run `compute(op, **how)` for each operation in a child process.

    `lib`: folder of another library. `env`: additional environment variables. Raises
    subprocess.CalledProcessError if the child crashed.
    """
    done = subprocess.run(
        [sys.executable, "-c", "from support.ggml import answer; answer()"],
        input=pickle.dumps((ops, how)),
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        | ({"LLAMA_CPP_LIB_PATH": str(lib)} if lib else {})
        | (env or {}),
        stdout=subprocess.PIPE,
        check=True,
    )
    reply: Answer = pickle.loads(done.stdout)
    return reply


def answer() -> None:
    """Serve one `in_child` call over stdin and stdout."""
    stdout = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    ops, how = pickle.load(sys.stdin.buffer)
    try:
        name = kernels()
    except LookupError:
        name = None
    pickle.dump(Answer(name, [compute(op, **how) for op in ops]), stdout)
    stdout.close()


def _set_rows(operation: int, rows: Rows) -> None:
    set_params(operation, _ROWS_PARAM, int(rows).to_bytes(4, "little"))


class Graph:
    """A graph of operations, with one buffer for each tensor.

    `guarded`: see `compute`. `weights_kind`: the type of the weights' buffers (default: the CPU's).
    """

    def __init__(self, guarded: bool = False, weights_kind: int | None = None) -> None:
        self._base = base()
        self._guarded = guarded
        self._weights_kind = weights_kind
        self._buffers: list[int] = []
        self._pages: list[Any] = []
        # Tensors by array and view.
        self._known: dict[tuple[int, int], int] = {}
        size = _N_TENSORS * self._base.ggml_tensor_overhead()
        size += self._base.ggml_graph_overhead_custom(_N_TENSORS, False)
        self._ctx = self._base.ggml_init(InitParams(size, None, True))

    def close(self) -> None:
        self._base.ggml_free(self._ctx)
        for buffer in self._buffers:
            self._base.ggml_backend_buffer_free(buffer)

    def build(self, op: Op, rows: Rows) -> int:
        """Return the result's tensor."""
        if isinstance(op, RmsNormMul):
            norm, result = self._rms_norm_mul(op)
            _set_rows(norm, rows)
            self._place(result)
            return result
        if isinstance(op, MulMat):
            result = self._mul_mat(op)
        elif isinstance(op, MulMatId):
            result = self._mul_mat_id(op)
        elif isinstance(op, Glu):
            result = self._glu(op)
        elif isinstance(op, MulRows):
            x = self._rows(op.x, op.stride)
            result = int(self._base.ggml_mul(self._ctx, x, self._array(op.factors)))
        else:
            result = self._attention(op)
        _set_rows(result, rows)
        self._place(result)
        return result

    def lose_rows(self) -> None:
        for tensor in self._known.values():
            n_bytes = 4 * int(np.prod(tensor_at(tensor).ne))
            self._base.ggml_backend_tensor_memset(tensor, 0, 0, n_bytes)

    def build_between(self, between: Between | None, result: int, op: Op) -> list[int]:
        base, ctx, node = self._base, self._ctx, 0
        if between is Between.ADD:
            node = base.ggml_add(ctx, result, result)
        elif between is Between.ROPE:
            n_values, n_rows = tensor_at(result).ne[:2]
            heads = base.ggml_reshape_4d(ctx, result, n_values // 2, 2, n_rows, 1)
            base.ggml_backend_view_init(heads)
            node = base.ggml_rope(ctx, heads, self._array(np.arange(n_rows, dtype=np.int32)), 16, 0)
        elif between is Between.OVERWRITE:
            assert isinstance(op, MulMat)
            x = self._rows(op.x, op.stride)
            node = base.ggml_add_inplace(ctx, x, x)
        if between is Between.OVERWRITE:
            base.ggml_backend_view_init(node)
        elif node:
            self._place(node)
        return [node] if node else []

    def compute(
        self,
        nodes: Sequence[int],
        outputs: Sequence[int],
        n_threads: int,
        reference: bool,
        after_node: Callable[[], None] | None = None,
    ) -> list[np.ndarray]:
        base, device = self._base, cpu()
        shapes = [tuple(tensor_at(result).ne)[::-1] for result in outputs]
        found = [np.empty(shape, np.float32) for shape in shapes]
        for result, array in zip(outputs, found, strict=True):
            # Elements that no kernel writes stay NaN.
            base.ggml_backend_tensor_memset(result, 255, 0, array.nbytes)
        graph = base.ggml_new_graph_custom(self._ctx, _N_TENSORS, False)
        for node in nodes:
            base.ggml_build_forward_expand(graph, node)
        device.set_n_threads(device.backend, n_threads)
        device.set_use_ref(device.backend, reference)

        def never_abort(_: int) -> bool:
            if after_node is not None:
                after_node()
            return False

        callback = AbortCallback(never_abort)
        device.set_abort_callback(device.backend, callback, None)
        try:
            if status := base.ggml_backend_graph_compute(device.backend, graph):
                raise RuntimeError(f"ggml_backend_graph_compute returned {status}")
        finally:
            device.set_abort_callback(device.backend, AbortCallback(0), None)
        for result, array in zip(outputs, found, strict=True):
            base.ggml_backend_tensor_get(result, array.ctypes.data, 0, array.nbytes)
        return found

    def _mul_mat(self, op: MulMat) -> int:
        weights = self._stored(op.weights)
        inputs = self._rows(op.x, op.stride)
        if op.permuted:
            weights, inputs = self._permuted(weights), self._permuted(inputs)
        return int(self._base.ggml_mul_mat(self._ctx, weights, inputs))

    def _mul_mat_id(self, op: MulMatId) -> int:
        weights = self._stored(op.weights)
        inputs, ids = self._rows(op.x), self._rows(op.ids, n_values=op.n_used)
        return int(self._base.ggml_mul_mat_id(self._ctx, weights, inputs, ids))

    def _attention(self, op: Attention) -> int:
        q = self._permuted(self._array(op.q))
        k, v = (
            self._permuted(self._view(self._stored(cache), n_cells=op.n_kv))
            for cache in (op.k, op.v)
        )
        mask = None if op.mask is None else self._array(op.mask)
        result = self._base.ggml_flash_attn_ext(
            self._ctx, q, k, v, mask, op.scale, op.max_bias, op.softcap
        )
        if op.sinks is not None:
            self._base.ggml_flash_attn_ext_add_sinks(result, self._array(op.sinks))
        return int(result)

    def _glu(self, op: Glu) -> int:
        x, kind = self._rows(op.x, op.stride), _SWIGLU_OAI if op.is_oai else _GEGLU
        if op.y is None:
            result = self._base.ggml_glu(self._ctx, x, kind, op.swapped)
        else:
            result = self._base.ggml_glu_split(self._ctx, x, self._rows(op.y, op.stride), kind)
        set_params(result, 2, np.array(OAI, np.float32).tobytes())
        return int(result)

    def _rms_norm_mul(self, op: RmsNormMul) -> tuple[int, int]:
        """Return the tensors of the norm and of the result."""
        norm = int(self._base.ggml_rms_norm(self._ctx, self._rows(op.x, op.stride), op.eps))
        self._place(norm)
        return norm, int(self._base.ggml_mul(self._ctx, norm, self._array(op.gain)))

    def _rows(self, x: np.ndarray, stride: int = 0, n_values: int = 0) -> int:
        """Return rows of x, or each row's first values; gaps between longer rows are NaN."""
        n_values = n_values or x.shape[-1]
        key = id(x), n_values
        if key not in self._known:
            if stride:
                between = np.full((*x.shape[:-1], stride - n_values), np.nan, np.float32)
                x = np.concatenate([x, between], -1)
            self._known[key] = self._view(self._array(x), n_values=n_values)
        return self._known[key]

    def _array(self, values: np.ndarray) -> int:
        types = {"float32": Type.F32, "float16": Type.F16, "int32": Type.I32}
        return self._new(types[values.dtype.name], values.shape, values)

    def _stored(self, stored: Stored) -> int:
        shape = (*stored.data.shape[:-1], stored.n_values)
        return self._new(stored.type, shape, stored.data, self._weights_kind)

    def _new(
        self, type_: Type, shape: tuple[int, ...], content: np.ndarray, kind: int | None = None
    ) -> int:
        sizes = (ctypes.c_int64 * len(shape))(*shape[::-1])
        tensor = int(self._base.ggml_new_tensor(self._ctx, int(type_), len(shape), sizes))
        self._place(tensor, kind)
        content = np.ascontiguousarray(content)
        self._base.ggml_backend_tensor_set(tensor, content.ctypes.data, 0, content.nbytes)
        return tensor

    def _place(self, tensor: int, kind: int | None = None) -> None:
        base, kind = self._base, kind or cpu().buffer_type
        size = base.ggml_backend_buft_get_alloc_size(kind, tensor)
        if self._guarded:
            buffer, address = self._guarded_buffer(size)
        else:
            buffer = base.ggml_backend_buft_alloc_buffer(kind, size)
            address = base.ggml_backend_buffer_get_base(buffer)
        self._buffers.append(buffer)
        base.ggml_backend_tensor_alloc(buffer, tensor, address)

    def _guarded_buffer(self, size: int) -> tuple[int, int]:
        """Return a buffer that ends at the start of an inaccessible page."""
        assert size % _ALIGNMENT == 0, size
        page = mmap.PAGESIZE
        n_bytes = -(-size // page) * page
        start, pages = guarded_pages(n_bytes)
        self._pages.append(pages)
        address = start + n_bytes - size
        return self._base.ggml_backend_cpu_buffer_from_ptr(address, size), address

    def _view(self, tensor: int, n_values: int = 0, n_cells: int = 0) -> int:
        """Return a view of each row's first values, or each stream's first cells (0: all)."""
        of = tensor_at(tensor)
        sizes = [n_values or of.ne[0], of.ne[1], n_cells or of.ne[2], of.ne[3]]
        view = self._base.ggml_view_4d(self._ctx, tensor, *sizes, *of.nb[1:], 0)
        self._base.ggml_backend_view_init(view)
        return int(view)

    def _permuted(self, tensor: int) -> int:
        """Return a view with the middle two dimensions swapped."""
        view = self._base.ggml_permute(self._ctx, tensor, 0, 2, 1, 3)
        self._base.ggml_backend_view_init(view)
        return int(view)
