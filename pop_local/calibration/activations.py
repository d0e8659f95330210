"""The activations of a model while it reads windows of a text in full, one by one."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pop_local.base.errors import PopError
from pop_local.calibration.loaded import LoadedModel
from pop_local.engine.llama import backend, logs, taps
from pop_local.engine.llama.backend import bindings
from pop_local.engine.llama.batch import Outputs, TokenBatch, decode_rows
from pop_local.engine.llama.devices import kernels_read_prompts
from pop_local.engine.llama.interrupt import Interrupt
from pop_local.engine.llama.taps import Rows, Tapped, Wanted


class Reading:
    """A context that reads windows one by one; each begins with an empty KV cache."""

    def __init__(self, ctx: Any, wanted: Wanted, batch: TokenBatch) -> None:
        self._api = bindings()
        self._ctx, self._wanted, self._batch = ctx, wanted, batch
        self._interrupt = Interrupt()
        backend.set_reading(ctx, backend.Reading.SOME)
        taps.set_taps(ctx, wanted)

    def window(self, tokens: Sequence[int]) -> Tapped:
        """Read one window, of two tokens at least.

        Raises PopError when llama.cpp fails, and whatever Ctrl-C raises.
        """
        return self._read(lambda: self._batch.decode(self._ctx, tokens, 0, Outputs.NONE))

    def image(self, rows: Rows, positions: NDArray[np.int32], *, is_mutual: bool) -> Tapped:
        """Read an image as a window, see `decode_rows`. Raises as `window` does."""
        return self._read(lambda: decode_rows(self._ctx, rows, positions, is_mutual=is_mutual))

    def _read(self, decode: Callable[[], int]) -> Tapped:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._ctx), False)
        logs.forget_errors()
        with self._interrupt.watching(self._ctx):
            code = decode()
            self._interrupt.check()
        if code != 0:
            raise logs.not_decoded(code)
        tapped = taps.take(self._ctx)
        if tapped is None or not tapped.has(self._wanted):
            raise PopError(
                "the backend does not show what layers of this model compute",
                "reinstall the backend, or convert with the model's own projections",
                cause="activations-not-shown",
            )
        return tapped


@contextmanager
def reading(model: LoadedModel, wanted: Wanted, n_window: int) -> Iterator[Reading]:
    """Open a context whose windows of up to `n_window` tokens show what is wanted of them."""
    opened = model.context(
        n_ctx=n_window,
        n_batch=n_window,
        n_ubatch=n_window,
        flash_attn_type=int(kernels_read_prompts()),
    )
    with opened as ctx, closing(TokenBatch(n_window)) as batch:
        yield Reading(ctx, wanted, batch)
