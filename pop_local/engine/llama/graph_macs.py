"""Count the multiply-accumulates in llama.cpp's graph without reading any weights."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from pop_base.errors import PopError
from pop_converter.gguf.source import read_source
from pop_converter.popfile.sidecar import pop_of
from pop_local.engine.llama import backend, loading, logs
from pop_local.engine.llama.backend import Mode

# Longer prompts' counts are extrapolated, because some recurrent layers' graphs grow with length.
_N_CTX = 2048


class GraphMacs:
    """An implementation of pop_converter.architecture.work.Macs that uses llama.cpp's graph.

    The first call reads the headers of the model's file and sidecar, which takes a few tenths of a
    second. Counts are cached. Counts for more than 2,048 tokens are extrapolated. The extrapolated
    counts are exact unless a sliding window exceeds 1,024 tokens.
    """

    def __init__(self, path: Path, sidecar: Path | None = None) -> None:
        self._path, self._sidecar = path, sidecar
        self._model: Any = None
        self._ctx: Any = None
        self._found: dict[tuple[int, int | None, int], int] = {}

    def __call__(self, n_prompt: int, boundary: int | None, n_full: int) -> int:
        """Return a prompt's multiply-accumulate count (`boundary`: None without pruning).

        The count includes fitted projections if `boundary` is the file's boundary. Raises PopError.
        """
        key = n_prompt, boundary, 1 if boundary is None else n_full
        if n_prompt > _N_CTX and 2 * key[2] < _N_CTX:
            return self._extrapolate(*key)
        if key not in self._found:
            ctx = self._context(n_prompt)
            backend.set_mode(ctx, Mode.OFF)
            if boundary is not None:
                layer = 0 if boundary == self._exact else boundary
                if layer != backend.get_boundary(ctx):
                    backend.set_boundary(ctx, layer)
                backend.set_mode(ctx, Mode.CONTEXT)
            self._found[key] = backend.count_macs(ctx, n_prompt, key[2])
        return self._found[key]

    def _extrapolate(self, n_prompt: int, boundary: int | None, n_full: int) -> int:
        """Extrapolate quadratically from the counts for three shorter prompts."""
        step = _N_CTX // 4
        first, second, third = (self(i * step, boundary, n_full) for i in (2, 3, 4))
        n = n_prompt / step - 2
        bent = third - 2 * second + first
        return round(first + n * (second - first) + n * (n - 1) / 2 * bent)

    def _context(self, n_prompt: int) -> Any:
        api = backend.bindings()
        if self._model is None:
            source = read_source(self._path)
            params = api.llama_model_default_params()
            params.no_alloc, params.load_mode = True, api.LLAMA_LOAD_MODE_NONE
            params.n_gpu_layers, params.use_extra_bufts = 0, False
            meta = pop_of(source, self._sidecar)
            self._model = loading.load_model(source, self._sidecar, meta, params)
            self._exact = backend.model_exact(self._model)
        if self._ctx is None or api.llama_n_ctx(self._ctx) < n_prompt:
            if self._ctx is not None:
                api.llama_free(self._ctx)
            params = api.llama_context_default_params()
            params.n_ctx = params.n_batch = params.n_ubatch = max(n_prompt, _N_CTX)
            # Flash-attention nodes lack a layer number.
            params.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_DISABLED
            logs.forget_errors()
            self._ctx = api.llama_init_from_model(self._model, params)
            if not self._ctx:
                raise PopError(f"cannot create a context for {self._path}: {logs.first_error()}")
        return self._ctx

    def __del__(self) -> None:
        with suppress(Exception):
            api = backend.bindings()
            if self._ctx is not None:
                api.llama_free(self._ctx)
            if self._model is not None:
                api.llama_model_free(self._model)
