"""An open model and its llama_context."""

import ctypes
import math
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pop_base.errors import PopError
from pop_converter.gguf.source import Source
from pop_converter.popfile.format import PopMeta
from pop_local.config.limits import MOST_THREADS
from pop_local.engine.llama import backend, loading, logs
from pop_local.engine.llama.batch import TokenBatch
from pop_local.engine.llama.devices import default_threads, devices, has_kernels
from pop_local.engine.llama.interrupt import Interrupt
from pop_local.engine.llama.opened_files import OpenedFiles
from pop_local.engine.llama.vocabulary import Vocabulary

_N_BATCH = 512
_ROUNDED_TO = 256  # llama.cpp rounds context lengths up to a multiple
# With several sequences, a short prompt need not wait long for a long prompt's chunk to be read.
# With 256 rows, SmolLM2 reads 7,000 tokens as fast as with 512. With 128, it reads 3% slower.
_CHUNK_ROWS = 256


@dataclass(frozen=True)
class ContextOptions:
    """Options for opening a model.

    `n_ctx`: context length per sequence in tokens (None: the trained length, or less if memory is
    limited). `n_parallel`: number of sequences that share batches. `n_threads`: CPU threads (None:
    the number of physical cores). `n_gpu_layers`: number of layers to run on available GPUs (-1:
    all). `kernels`: whether to use pop-local's kernels, if they support this CPU. `flash_attn`:
    whether to use flash attention (None: only with pop-local's kernels or on GPUs that support it).
    `repack`: whether llama.cpp repacks weights for its own CPU kernels (None: only if pop-local's
    kernels are off). pop-local's kernels cannot use repacked weights. `others`: other
    llama_model_params and llama_context_params, by name.
    """

    n_ctx: int | None = None
    n_parallel: int | None = 1
    n_batch: int = _N_BATCH
    n_ubatch: int = _N_BATCH
    n_threads: int | None = None
    n_gpu_layers: int = -1
    kernels: bool = True
    flash_attn: bool | None = None
    repack: bool | None = None
    use_mmap: bool = True
    others: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n_sequences(self) -> int:
        return 1 if self.n_parallel is None else self.n_parallel

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "ContextOptions":
        """Create the options from keyword arguments. Raises TypeError for unknown arguments."""
        api = backend.bindings()
        names = cls.__dataclass_fields__.keys() - {"others"}
        others = {name: value for name, value in options.items() if name not in names}
        structures = (api.llama_model_params, api.llama_context_params)
        # Fields that are pointers or callbacks cannot be set.
        fields = {
            name
            for structure in structures
            for name, kind in structure._fields_
            if issubclass(kind, ctypes._SimpleCData) and kind is not ctypes.c_void_p
        }
        if unknown := sorted(others.keys() - fields):
            raise TypeError(f"unknown option {unknown[0]!r}")
        return cls(**{name: options[name] for name in options.keys() & names}, others=others)


class Context:
    """A model's weights and vocabulary, and a llama_context that uses them.

    `model`, `ctx`: pointers to llama.cpp's objects. `settings`: the context's
    llama_context_params. `n_chunk`: maximum number of prompt rows to decode at once. `on_device`:
    whether any layers run on a GPU. `window`: number of positions that sliding-window layers keep
    (0: all). `is_mrope`: whether each row has several positions (time, height, and width).
    """

    def __init__(
        self,
        source: Source,
        meta: PopMeta | None,
        options: ContextOptions,
        *,
        sidecar: Path | None = None,
        keeps_states: bool = False,
    ) -> None:
        """Open a model. `meta`: the POP keys from the model's file or sidecar.

        `keeps_states`: whether the memory check includes boundary states. Raises PopError with
        llama.cpp's reason if the file cannot be opened.
        """
        self._ctx: Any = None
        self._model: Any = None
        self._closing_thread = 0
        backend.require_patched()
        self._api = backend.bindings()
        self.options = options
        # Created before loading, so that any later change to the files is detected.
        self.files = OpenedFiles(source, meta, sidecar, are_mapped=options.use_mmap)
        self.n_threads = options.n_threads or min(default_threads(), MOST_THREADS)
        self._has_kernels = options.kernels and has_kernels()
        gpu_bytes = [device.memory_free_bytes for device in devices() if device.is_gpu]
        self.on_device = options.n_gpu_layers != 0 and bool(gpu_bytes)
        self.settings = self._context_params(sum(gpu_bytes) if self.on_device else None)
        # By default, sliding-window layers keep all rows.
        is_windowed = options.others.get("swa_full") is False
        loading.require_room(
            source,
            self.settings.n_ctx,
            is_windowed=is_windowed,
            holds_kv=not self.on_device and not {"type_k", "type_v"} & options.others.keys(),
            keeps_states=keeps_states,
        )
        self.interrupt = Interrupt()
        params = self._model_params()
        if options.use_mmap:
            loading.read_ahead(source)
        try:
            with self.interrupt.opening(params):
                self._open(params)
        except BaseException:  # including KeyboardInterrupt
            self.close()
            raise
        self.window = self._api.llama_model_n_swa(self.model) if is_windowed else 0
        mrope = (self._api.LLAMA_ROPE_TYPE_MROPE, self._api.LLAMA_ROPE_TYPE_IMROPE)
        self.is_mrope = self._api.llama_model_rope_type(self.model) in mrope
        self._opened_by = os.getpid()

    def _context_params(self, free_bytes: int | None) -> Any:
        api, options = self._api, self.options
        params = api.llama_context_default_params()
        if options.n_sequences < 1:
            raise PopError(f"n_parallel is {options.n_parallel}", "set n_parallel to 1 or more")
        if not 1 <= self.n_threads <= MOST_THREADS:
            raise PopError(f"n_threads is {self.n_threads}", f"use 1 to {MOST_THREADS} threads")
        # Call default_ctx even if n_ctx is set, because it rejects an invalid context length.
        default = loading.default_ctx(self.files.source, options.n_sequences, free_bytes)
        n_ctx, n = options.n_ctx or default, options.n_sequences
        self.n_ctx = -(-n_ctx // _ROUNDED_TO) * _ROUNDED_TO
        params.n_ctx = min(n * self.n_ctx, 2**32 - 1)  # prevents an overflow
        params.n_seq_max, params.kv_unified = n, True
        params.n_batch = min(n_ctx, options.n_batch)
        if params.n_batch < params.n_seq_max:  # llama.cpp would abort
            raise PopError(
                f"batches of {params.n_batch} tokens are too small for {n} sequences",
                f"open the model with n_batch={params.n_seq_max} or more",
                cause="one-sequence",
            )
        params.n_ubatch = min(params.n_batch, options.n_ubatch)
        params.n_threads = params.n_threads_batch = self.n_threads
        if self.files.header.of_arch("pooling_type") is not None:
            params.pooling_type = api.LLAMA_POOLING_TYPE_NONE  # pop-local pools them
        flash_attn = self._has_kernels if options.flash_attn is None else options.flash_attn
        params.flash_attn_type = int(flash_attn)
        if options.flash_attn is None and self.on_device:
            params.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_AUTO
        _fill(params, options.others)
        return params

    def _model_params(self) -> Any:
        api, options = self._api, self.options
        params = api.llama_model_default_params()
        params.n_gpu_layers = 2**31 - 1 if options.n_gpu_layers == -1 else options.n_gpu_layers
        params.use_extra_bufts = not self._has_kernels if options.repack is None else options.repack
        mapped, copied = api.LLAMA_LOAD_MODE_MMAP, api.LLAMA_LOAD_MODE_NONE
        params.load_mode = mapped if options.use_mmap else copied
        _fill(params, options.others)
        return params

    def _open(self, model_params: Any) -> None:
        api, options = self._api, self.options
        files = self.files
        self._model = loading.load_model(files.source, files.sidecar, files.meta, model_params)
        self.vocabulary = Vocabulary(api.llama_model_get_vocab(self._model))
        self.n_batch, self.n_ubatch = self.settings.n_batch, self.settings.n_ubatch
        self.n_chunk = min(self.n_batch, _CHUNK_ROWS) if options.n_sequences > 1 else self.n_batch
        self.batch = TokenBatch(self.n_batch)
        self._ctx = api.llama_init_from_model(self._model, self.settings)
        if not self._ctx:
            self.batch.close()
            raise PopError(f"{self.files.path} cannot be opened: {logs.first_error()}")
        if options.n_sequences == 1:
            self.n_ctx = int(api.llama_n_ctx(self._ctx))
        backend.call("llama_pop_set_kernels", self._ctx, options.kernels)

    @contextmanager
    def extra_context(self, **params: Any) -> Iterator[Any]:
        """Context manager that opens another llama_context with the same weights.

        `params`: llama_context_params fields to set. Raises PopError if llama.cpp returns an error.
        """
        settings = self._api.llama_context_default_params()
        settings.n_threads = settings.n_threads_batch = self.n_threads
        _fill(settings, params)
        logs.forget_errors()
        ctx = self._api.llama_init_from_model(self.model, settings)
        if not ctx:
            raise PopError(f"cannot create a context for {self.files.path}: {logs.first_error()}")
        try:
            yield ctx
        finally:
            self._api.llama_free(ctx)

    def locked(self) -> AbstractContextManager[Any]:
        """Context manager that keeps other threads from using the context's only sequence.

        Does nothing if the context has several sequences, because each sequence has its own thread.
        """
        return self.interrupt.lock if self.options.n_sequences == 1 else nullcontext()

    @property
    def ctx(self) -> Any:
        """The llama_context. Raises PopError if the model is closed or another thread closes it."""
        if self._ctx is None or self._closing_thread not in (0, threading.get_ident()):
            raise PopError(f"the model {self.files.path} is closed", "open it again")
        return self._ctx

    @property
    def model(self) -> Any:
        """llama.cpp's model. Raises PopError if the model is closed."""
        if self._model is None:
            raise PopError(f"the model {self.files.path} is closed", "open it again")
        return self._model

    @property
    def is_closed(self) -> bool:
        return self._ctx is None

    @property
    def is_recurrent(self) -> bool:
        """True if any layer has a recurrent state, which cannot be truncated."""
        kinds = self._api.llama_model_is_recurrent, self._api.llama_model_is_hybrid
        return any(has_kind(self.model) for has_kind in kinds)

    def require_usable(self) -> None:
        """Raise PopError if the model is closed, if it was forked, or if a mapped file changed."""
        _ = self.ctx
        if os.getpid() != self._opened_by:
            raise PopError(
                "the model was opened in another process, and forking does not copy threads",
                "open the model in the process that uses it",
            )
        if replaced := self.files.replaced:
            raise PopError(
                f"{replaced[0]} was changed after it was opened",
                "open the model again",
                cause="model-replaced",
            )

    def logits(self, n_rows: int = 1) -> np.ndarray:
        """Return float32 logits [n_rows, n_vocab], which the next decode overwrites."""
        pointer = self._api.llama_get_logits(self.ctx)
        return np.ctypeslib.as_array(pointer, (n_rows, self.vocabulary.n_tokens))

    def close(self) -> None:
        """Stop the running batch, even if another thread is running it, and free the model.

        If the calling thread is running the batch, the model is freed when the batch ends.
        """
        if self._model is None:
            return
        self._closing_thread = threading.get_ident()
        with self.interrupt.stopped(self.close) as is_stopped:
            if not is_stopped or self._model is None:
                return
            if self._ctx:
                self.batch.close()
                self._api.llama_free(self._ctx)
            self.vocabulary.close()
            self._api.llama_model_free(self._model)
            self._model = self._ctx = None

    def __del__(self) -> None:
        self.close()


def require_finite(value: float) -> None:
    """Raise PopError if a value computed by the model is NaN or infinite."""
    if not math.isfinite(value):
        raise PopError(
            "the model cannot answer because its output is NaN or infinite",
            "download or convert the model again, because its file may be damaged",
        )


def _fill(params: Any, others: Mapping[str, Any]) -> None:
    for name, _ in params._fields_:
        if others.get(name) is not None:
            setattr(params, name, others[name])
