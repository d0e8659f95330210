"""A model and its llama_context: opened, tokenised with, decoded on, freed."""

import ctypes
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pop_converter.architecture.shape import ModelShape, source_shape
from pop_converter.base.errors import PopError
from pop_converter.gguf.header import Header
from pop_converter.gguf.source import Source
from pop_converter.popfile.format import PopMeta
from pop_local.engine.llama import backend, loading, logs
from pop_local.engine.llama.batch import TokenBatch
from pop_local.engine.llama.devices import devices, has_kernels
from pop_local.engine.llama.graph_macs import GraphMacs
from pop_local.engine.llama.interrupt import Interrupt
from pop_local.engine.llama.pieces import Pieces
from pop_local.engine.llama.rpc import Servers, close_at_exit
from pop_local.engine.llama.threads import default_threads
from pop_local.models.sidecars import is_learned

_N_BATCH = 512


@dataclass(frozen=True)
class ContextOptions:
    """How a model is opened.

    `n_ctx`: None takes the model's own context, at most 8192 tokens. `n_parallel`: sequences, with
    so many tokens each; their rows share batches. `n_threads`: None takes the physical cores.
    `n_gpu_layers`: -1 for all, without effect where there is no GPU. `rpc`: servers (HOST:PORT)
    that hold these layers, before local GPUs; if one goes away, llama.cpp ends the process.
    `kernels`: whether our kernels compute, where there are any for this CPU.
    `flash_attn`: None takes it where it wins: on a CPU with them, and on GPUs that have it.
    `repack`: whether llama.cpp copies weights in another order for its own CPU kernels; None does
    where they are the ones that compute. Ours leave such copies to them, for prompts too.
    `others`: fields of llama_model_params and llama_context_params by their own names.
    """

    n_ctx: int | None = None
    n_parallel: int | None = 1
    n_batch: int = _N_BATCH
    n_ubatch: int = _N_BATCH
    n_threads: int | None = None
    n_gpu_layers: int = -1
    rpc: Sequence[str] = ()
    kernels: bool = True
    flash_attn: bool | None = None
    repack: bool | None = None
    use_mmap: bool = True
    others: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n_sequences(self) -> int:
        return 1 if self.n_parallel is None else self.n_parallel

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "ContextOptions":
        """Make options of keywords. Raises TypeError for a name that llama.cpp does not know."""
        api = backend.bindings()
        known = cls.__dataclass_fields__.keys() - {"others"}
        others = {name: value for name, value in given.items() if name not in known}
        structures = (api.llama_model_params, api.llama_context_params)
        # Pointers and callbacks are no options.
        fields = {
            name
            for each in structures
            for name, kind in each._fields_
            if issubclass(kind, ctypes._SimpleCData) and kind is not ctypes.c_void_p
        }
        if unknown := sorted(others.keys() - fields):
            raise TypeError(f"a model is not opened with {unknown[0]!r}: no such option")
        ours = {name: value for name, value in given.items() if name in known}
        return cls(**ours, others=others)


class Context:
    """A model's weights and vocabulary, and one llama_context on them.

    `model`, `vocab` and `ctx` are llama.cpp's pointers, `settings` its llama_context_params.
    `window`: how many positions layers with a sliding window keep, 0 where they keep all. Raises
    PopError with llama.cpp's reason when the file cannot be opened. For one thread at a time;
    closing from another one is postponed.
    """

    def __init__(
        self,
        source: Source,
        meta: PopMeta | None,
        options: ContextOptions,
        *,
        sidecar: Path | None = None,
        holds_states: bool = False,
    ) -> None:
        """Open a model with its POP keys, of the file or the sidecar.

        `holds_states`: whether memory is needed for states at the boundary, too.
        """
        self._ctx: Any = None
        self._model: Any = None
        backend.require_patched()
        self._api = backend.bindings()
        self.source, self.meta, self.sidecar, self.options = source, meta, sidecar, options
        self.path = source.first.path
        self.n_threads = options.n_threads or default_threads()
        has_gpu = any(device.is_gpu for device in devices())
        self.on_device = options.n_gpu_layers != 0 and (bool(options.rpc) or has_gpu)
        self.settings = self._context_params(has_gpu)
        # llama.cpp keeps all rows otherwise.
        is_windowed = options.others.get("swa_full") is False
        loading.require_room(
            self.source,
            self.settings.n_ctx,
            is_windowed=is_windowed,
            holds_kv=not self.on_device and not {"type_k", "type_v"} & options.others.keys(),
            holds_states=holds_states,
        )
        self._files = {path: _mark(path) for path in self._mapped()}  # looked at for each token
        self.interrupt = Interrupt()
        self._servers = Servers(tuple(options.rpc)) if options.rpc else None
        params = self._model_params()
        try:
            with self.interrupt.opening(params):
                self._open(params)
        except BaseException:  # Ctrl-C, too
            self.close()
            raise
        self.window = self._api.llama_model_n_swa(self.model) if is_windowed else 0
        self.n_positions = loading.n_positions(self.source)
        self.is_mrope = backend.is_mrope(self.model)
        self._opened_by = os.getpid()
        if self._servers:
            close_at_exit(self)

    def _context_params(self, has_gpu: bool) -> Any:
        api, options = self._api, self.options
        params = api.llama_context_default_params()
        # It also refuses a file whose context has no sensible size.
        default = loading.default_ctx(self.header)
        n_ctx = options.n_ctx or default
        if options.n_sequences < 1:
            raise PopError(f"n_parallel is {options.n_parallel}", "give 1 or more")
        params.n_ctx = min(n_ctx * options.n_sequences, 2**32 - 1)  # more would wrap around
        params.n_seq_max, params.kv_unified = options.n_sequences, True
        params.n_batch = min(n_ctx, options.n_batch)
        params.n_ubatch = min(params.n_batch, options.n_ubatch)
        params.n_threads = params.n_threads_batch = self.n_threads
        if self.header.of_arch("pooling_type") is not None:
            params.pooling_type = api.LLAMA_POOLING_TYPE_NONE  # embeddings are pooled here
        flash_attn = options.flash_attn
        if flash_attn is None:
            # A server's device may lack it, and cannot be asked.
            flash_attn = not options.rpc and self._has_kernels
        params.flash_attn_type = int(flash_attn)
        if options.flash_attn is None and self.on_device and has_gpu:
            params.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_AUTO
        _fill(params, options.others)
        return params

    @property
    def _has_kernels(self) -> bool:
        return self.options.kernels and has_kernels()

    def _model_params(self) -> Any:
        api, options = self._api, self.options
        params = api.llama_model_default_params()
        params.n_gpu_layers = 2**31 - 1 if options.n_gpu_layers == -1 else options.n_gpu_layers
        repack = options.repack
        params.use_extra_bufts = not self._has_kernels if repack is None else repack
        mapped, copied = api.LLAMA_LOAD_MODE_MMAP, api.LLAMA_LOAD_MODE_NONE
        params.load_mode = mapped if options.use_mmap else copied
        _fill(params, options.others)
        return params

    def _open(self, model_params: Any) -> None:
        api, options = self._api, self.options
        self._model = loading.load_model(
            self.source, self.sidecar, self.meta, model_params, self._servers
        )
        self._vocab = api.llama_model_get_vocab(self._model)
        self.n_vocab = int(api.llama_vocab_n_tokens(self._vocab))
        self.n_batch, self.n_ubatch = self.settings.n_batch, self.settings.n_ubatch
        self.batch = TokenBatch(self.n_batch)
        self._ctx = api.llama_init_from_model(self._model, self.settings)
        if not self._ctx:
            self.batch.close()
            raise PopError(f"{self.path} cannot be opened: {logs.first_error()}")
        # llama.cpp rounds the context up.
        self.n_ctx = int(api.llama_n_ctx(self._ctx)) // options.n_sequences
        backend.set_kernels(self._ctx, options.kernels)

    @contextmanager
    def another(self, **params: Any) -> Iterator[Any]:
        """Open another llama_context on the same weights, to be freed at the end.

        `params`: llama_context_params that are not to be the defaults. Raises PopError.
        """
        settings = self._api.llama_context_default_params()
        settings.n_threads = settings.n_threads_batch = self.n_threads
        _fill(settings, params)
        logs.forget_errors()
        ctx = self._api.llama_init_from_model(self.model, settings)
        if not ctx:
            raise PopError(f"no context for {self.path}: {logs.first_error()}")
        try:
            yield ctx
        finally:
            self._api.llama_free(ctx)

    def _mapped(self) -> Iterator[Path]:
        """Give the files that must stay as they are, since their pages are read when needed."""
        if self.options.use_mmap:
            yield from self.source.paths
            # A learned sidecar is only ever renamed over, and stays mapped.
            if self.sidecar is not None and not is_learned(self.sidecar):
                yield self.sidecar

    @property
    def replaced(self) -> list[Path]:
        """The files that are no longer those that were opened; those that are gone stay mapped."""
        return [path for path, mark in self._files.items() if _mark(path) not in (None, mark)]

    @property
    def ctx(self) -> Any:
        """llama.cpp's context. Raises PopError once it is closed."""
        if self._ctx is None:
            raise PopError(f"the model {self.path} is closed", "open it again")
        return self._ctx

    @property
    def model(self) -> Any:
        """llama.cpp's model. Raises PopError once it is closed."""
        if self._model is None:
            raise PopError(f"the model {self.path} is closed", "open it again")
        return self._model

    @property
    def vocab(self) -> Any:
        """llama.cpp's vocabulary. Raises PopError once it is closed."""
        _ = self.model
        return self._vocab

    @property
    def is_closed(self) -> bool:
        return self._ctx is None

    @property
    def header(self) -> Header:
        """The keys of the model's file."""
        return self.source.first

    @property
    def bos(self) -> tuple[int, ...]:
        """The token that the model wants before any text, or nothing."""
        adds = self._api.llama_vocab_get_add_bos(self.vocab)
        return (int(self._api.llama_vocab_bos(self.vocab)),) if adds else ()

    @property
    def is_recurrent(self) -> bool:
        """Whether some layer has a state that cannot go back."""
        api = self._api
        recurrent = api.llama_model_is_recurrent(self.model)
        return bool(recurrent or api.llama_model_is_hybrid(self.model))

    def require_usable(self) -> None:
        """Raise PopError in a fork, which has no threads of it, and once a file was replaced."""
        if os.getpid() != self._opened_by:
            raise PopError(
                "the model was opened by another process, whose threads a fork does not have",
                "open it in the process that asks it",
            )
        if replaced := self.replaced:
            raise PopError(
                f"{replaced[0]} is another file than when it was opened",
                "open the model again",
                cause="model-replaced",
            )

    def tokenize(self, text: str, *, add_bos: bool = False, special: bool = False) -> list[int]:
        """Return the tokens of a text; what looks like a special token is text unless `special`.

        Raises PopError for what cannot be split, or written as UTF-8; StoppedError, or whatever
        Ctrl-C raises, when it is interrupted.
        """
        raw, split = utf8(text), backend.require_patched().llama_pop_tokenize
        room = len(raw) + 8
        tokens = (ctypes.c_int32 * room)()
        logs.forget_errors()
        with Interrupt().tokenizing() as callback:
            n = split(self.vocab, raw, len(raw), tokens, room, add_bos, special, callback, None)
            if n < 0 and (reason := logs.first_error()):
                raise PopError(f"the text cannot be split into tokens: {reason}")
        return tokens[: max(n, 0)]

    def detokenize(self, tokens: Iterable[int]) -> str:
        """Return the tokens' text, without control tokens or incomplete characters at its ends."""
        pieces = Pieces(self)
        return b"".join(pieces[token] for token in tokens).decode(errors="ignore")

    @property
    def n_ctx_train(self) -> int:
        """Context length in tokens that the model was trained with."""
        return int(self._api.llama_model_n_ctx_train(self.model))

    @cached_property
    def shape(self) -> ModelShape:
        """Sizes of the model's layers.

        Raises UnsupportedArchitectureError for a model that cannot be pruned.
        """
        return source_shape(self.source)

    @cached_property
    def no_refill(self) -> str:
        """Why no row can be selected or refilled, or ""."""
        with suppress(PopError):
            return self.shape.no_refill
        return ""

    @cached_property
    def macs(self) -> GraphMacs:
        """Counter of multiply-accumulates."""
        return GraphMacs(self.path, self.sidecar)

    @property
    def n_embd(self) -> int:
        """The width of a row's state."""
        return int(self._api.llama_model_n_embd(self.model))

    def logits(self, n_rows: int = 1) -> np.ndarray:
        """Return the last batch's outputs, float32 [n_rows, n_vocab], until the next decode."""
        found = self._api.llama_get_logits(self.ctx)
        return np.ctypeslib.as_array(found, (n_rows, self.n_vocab))

    def close(self) -> None:
        """Free the model. Where this thread reads a prompt, that is stopped first."""
        if self._model is None or self.interrupt.postponed(self.close):
            return
        if self._ctx:
            self.batch.close()
            self._api.llama_free(self._ctx)
        self._api.llama_model_free(self._model)
        self._model = self._ctx = self._servers = None

    def __del__(self) -> None:
        self.close()


def _mark(path: Path) -> tuple[int, ...] | None:
    """Return what tells a file from another one in its place, or None where there is none."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def utf8(text: str) -> bytes:
    """Encode a text. Raises PopError for what cannot be written so."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise PopError("the prompt is not UTF-8 text", "save or type it as UTF-8") from error


def _fill(params: Any, others: Mapping[str, Any]) -> None:
    for name, _ in params._fields_:
        if others.get(name) is not None:
            setattr(params, name, others[name])
