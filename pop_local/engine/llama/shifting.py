"""Check whether llama.cpp can move a model's rows to other positions."""

import ctypes
from contextlib import closing
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from pop_base.errors import PopError
from pop_local.engine.llama import backend
from pop_local.engine.llama.batch import Outputs, TokenBatch
from pop_local.engine.llama.context import Context

_TOKEN, _SHIFT = 1, 32
# Maximum relative error of 64 adjacent values. In llama.cpp's test models of 100 architectures, F16
# rounding causes errors of up to 0.0007. Other positions or wrong rotations cause 0.2 or more.
_MAX_ERROR = 0.05
_ROPE = (
    *("rope_scaling_type", "rope_freq_base", "rope_freq_scale", "yarn_ext_factor"),
    *("yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow", "yarn_orig_ctx"),
)


# Cached results by model, because each check takes 40 ms or more.
_known: WeakKeyDictionary[Context, bool] = WeakKeyDictionary()


def can_shift(context: Context) -> bool:
    """Return True if a moved row equals a row decoded at the new position, up to rounding.

    Returns False for models with learned position embeddings. llama.cpp rotates the K of moved rows
    in every layer, so the result is also False if a layer has no RoPE or normalizes K after RoPE.
    """
    if context not in _known:
        _known[context] = _is_equal_after_a_shift(context)
    return _known[context]


def _is_equal_after_a_shift(context: Context) -> bool:
    settings = {name: getattr(context.settings, name) for name in _ROPE}
    tokens = np.full(_SHIFT + 1, _TOKEN, np.int32)
    sources = np.append(np.full(_SHIFT, -1, np.int32), np.int32(0))
    try:
        n_windowed = sum(map(bool, context.files.shape.windows))
        has_windows = backend.bindings().llama_model_n_swa(context.model) > 0
        if has_windows and n_windowed in (0, context.files.shape.n_layer):
            return False  # llama.cpp crashes when it rotates the rows of a cache without layers
        with context.extra_context(n_ctx=2 * _SHIFT, n_batch=1, n_ubatch=1, **settings) as ctx:
            memory = backend.bindings().llama_get_memory(ctx)
            decoded = _decoded_at(ctx, _SHIFT)
            backend.bindings().llama_memory_clear(memory, True)
            _decoded_at(ctx, 0)
            backend.move_rows(ctx, 0, 0, sources, tokens)
            backend.bindings().llama_memory_seq_rm(memory, 0, 0, _SHIFT)
            moved = _state(ctx)
    except PopError:
        return False
    errors, sizes = (
        np.sqrt(np.add.reduceat(np.square(each), np.arange(0, each.size, 64)))
        for each in (moved - decoded, decoded)
    )
    return bool((errors <= _MAX_ERROR * sizes).all())


def _decoded_at(ctx: Any, position: int) -> NDArray[np.float32]:
    """Decode a token at `position` in an empty cache and return its state."""
    with closing(TokenBatch(1)) as batch:
        batch.decode(ctx, [_TOKEN], position, Outputs.LAST)
    return _state(ctx)


def _state(ctx: Any) -> NDArray[np.float32]:
    """Return the single row's state as F16 values. The header depends only on the position."""
    api = backend.bindings()
    state = np.zeros(int(api.llama_state_seq_get_size(ctx, 0)) // 2, np.float16)
    pointer = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
    api.llama_state_seq_get_data(ctx, pointer, state.nbytes, 0)
    return np.nan_to_num(state.astype(np.float32))
