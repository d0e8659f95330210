"""Run windows of text through all layers and return the model's activations."""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from pop_base.errors import PopError
from pop_converter.gguf.source import read_source
from pop_converter.popfile.format import pop_meta
from pop_local.calibration.texts import N_WINDOW
from pop_local.engine.llama import taps
from pop_local.engine.llama.batch import Outputs
from pop_local.engine.llama.context import Context, ContextOptions
from pop_local.engine.llama.devices import has_kernels
from pop_local.engine.llama.slot import Slot
from pop_local.engine.llama.taps import Tapped, TapRequest


def loaded(path: Path, *, n_threads: int | None = None, n_gpu_layers: int = -1) -> closing[Context]:
    """Open a model with a context of N_WINDOW tokens. Raises PopError."""
    options = ContextOptions(
        n_ctx=N_WINDOW,
        n_batch=N_WINDOW,
        n_ubatch=N_WINDOW,
        n_threads=n_threads,
        n_gpu_layers=n_gpu_layers,
        flash_attn=has_kernels(),
    )
    source = read_source(path)
    return closing(Context(source, pop_meta(source.first), options))


class WindowReader:
    """A reader that returns the requested activations for one window at a time."""

    def __init__(self, context: Context, request: TapRequest) -> None:
        self._slot, self._request = Slot(context), request
        self._slot.begin_prefill()
        taps.set_taps(context.ctx, request)

    def window(self, tokens: Sequence[int]) -> Tapped:
        """Run a window of two or more tokens, starting with an empty KV cache.

        Raises PopError if llama.cpp fails. Propagates exceptions from signal handlers (Ctrl-C).
        """
        self._slot.clear()
        with self._slot.interruptible():
            self._slot.decode(tokens, 0, Outputs.NONE)
            self._slot.raise_if_stopped()
        tapped = taps.take(self._slot.context.ctx)
        if tapped is None or not tapped.has(self._request):
            raise PopError(
                "the backend does not return activations for this model's layers",
                "reinstall the backend, or convert with the model's own projections",
                cause="activations-not-shown",
            )
        return tapped
