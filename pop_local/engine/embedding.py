"""Compute embeddings by pooling the last layer's states, as specified in the model's metadata."""

from collections.abc import Sequence

import gguf
import numpy as np
from numpy.typing import NDArray

from pop_base.errors import PopError
from pop_local.engine.cache.kv_cache import KvCache
from pop_local.engine.llama import backend
from pop_local.engine.llama.context import require_finite
from pop_local.engine.prefill.read import append_all

_MAX_ROWS = 512


def require_pooling(cache: KvCache) -> gguf.PoolingType:
    """Return the file's pooling type (default: mean).

    Raises PopError if the pooling type is neither mean nor last.
    """
    kind = cache.context.files.header.of_arch("pooling_type")
    if kind in (None, gguf.PoolingType.NONE, gguf.PoolingType.MEAN):
        return gguf.PoolingType.MEAN
    if kind == gguf.PoolingType.LAST:
        return gguf.PoolingType.LAST
    raise PopError(
        "the model's pooling type is not supported", "use a model with mean or last-token pooling"
    )


def embedding(cache: KvCache, tokens: Sequence[int]) -> NDArray[np.float32]:
    """Return the normalized embedding of `tokens`, float32 [n_embd].

    The call runs all layers and empties the cache. Raises PopError if the text cannot be decoded or
    the vector is not finite. Raises StoppedError or the signal handler's exception if interrupted.
    """
    pooling = require_pooling(cache)
    context, api = cache.context, backend.bindings()
    total = np.zeros(context.files.n_embd, np.float64)
    with cache.slot.locked():
        api.llama_set_embeddings(context.ctx, True)
        try:
            for n_rows in append_all(cache, tokens, _MAX_ROWS):
                pointer = api.llama_get_embeddings(context.ctx)
                rows = np.ctypeslib.as_array(pointer, (n_rows, context.files.n_embd))
                is_last = pooling == gguf.PoolingType.LAST
                total = rows[-1].astype(np.float64) if is_last else total + rows.sum(0)
        finally:
            api.llama_set_embeddings(context.ctx, False)
            cache.clear()
    norm = float(np.linalg.norm(total))
    require_finite(norm)
    vector: NDArray[np.float32] = (total / max(norm, 1e-12)).astype("f4")
    return vector
