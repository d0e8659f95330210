"""llama_cpp's `Llama` on the patched backend, and whose its KV cache is."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError

from pop_converter.architecture.shape import ModelShape, source_shape
from pop_converter.gguf.source import read_source, sampled_sha256
from pop_converter.popfile.sidecar import pop_of
from pop_local.base.errors import PopError
from pop_local.engine import templates
from pop_local.engine.decode.grammar import Grammars
from pop_local.engine.depth.online import OnlineRefill
from pop_local.engine.depth.passes import DeepPasses
from pop_local.engine.depth.rows import CachedRows
from pop_local.engine.depth.select import Selection
from pop_local.engine.images.seeing import SeeingLlama
from pop_local.engine.llama import backend, logs, opening
from pop_local.engine.llama.backend import Mode
from pop_local.engine.llama.batch import TokenBatch
from pop_local.engine.llama.devices import devices, kernels_read_prompts
from pop_local.engine.llama.graph_macs import GraphMacs
from pop_local.engine.llama.interrupt import Interrupt
from pop_local.engine.llama.rpc import Servers, close_at_exit
from pop_local.engine.llama.upstream import BaseLlamaCache, Llama, LlamaState, api
from pop_local.engine.prefill.kv_state import (
    FULL,
    KeyedCache,
    KvKey,
    PopState,
    context_state,
    conversion,
    loaded_with,
    own_sha256,
    restore_context_state,
)
from pop_local.engine.prefill.plan import NO_ENDS, RowRule, n_equal


class KvLlama(SeeingLlama):
    """A model, its mode, and what is known of the rows in its KV cache.

    The cache belongs to one mode and boundary: switching either empties it, unless it is the
    full model's own: because rows leave exactly (`exact`: from which layer on, 0 for no such model)
    or because all of them were given their depth (`refill`).
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        sidecar: str | os.PathLike[str] | None = None,
        n_ctx: int | None = None,
        n_threads: int | None = None,
        n_threads_batch: int | None = None,
        n_gpu_layers: int = -1,
        rpc: Sequence[str] = (),
        select: float | None = None,
        keep_states: bool = False,
        mmproj: str | os.PathLike[str] | None = None,
        image_tokens: int | None = None,
        kernels: bool = True,
        flash_attn: bool | None = None,
        repack: bool = True,
        verbose: bool = False,
        **options: Any,
    ) -> None:
        """Load a model; raises PopError with llama.cpp's reason when it cannot be.

        `sidecar`: a file with POP keys and tensors for this model. `n_ctx`: None takes the model's
        own context, at most 8192. `n_threads`: for prefill (unless `n_threads_batch` says
        otherwise) and decode; None takes the physical cores. `n_gpu_layers`: -1 for all, of no
        effect without a GPU. `rpc`: servers (HOST:PORT) that hold these layers, before local GPUs;
        if one of them goes away, llama.cpp ends the process. `select`: the share of context rows
        that run all layers because the question needs them; None for what the file says.
        `keep_states`: whether `refill` is to be had, which a selection implies (`held_bytes`).
        `mmproj`: the file that makes rows of pictures, which is loaded with the first of them.
        `image_tokens`: the most that one image takes, of models where that varies.
        `kernels`: whether prompts are read with our kernels, where there are any for this CPU.
        `flash_attn`: None takes it where it wins, which is on a CPU with them and on GPUs that have
        it. `repack`: whether llama.cpp copies weights in another order for its own CPU kernels.
        `options` go to `llama_cpp.Llama` (n_batch, n_ubatch, type_k, lora_path, ...). A converted
        model starts in mode CONTEXT.
        """
        if unknown := sorted(options.keys() - signature(Llama).parameters.keys()):
            raise TypeError(f"a model is not opened with {unknown[0]!r}: no such option")
        backend.require_patched()
        self._source = source = read_source(Path(model_path))
        self.sidecar = None if sidecar is None else Path(sidecar)
        self.grammars = Grammars(os.fspath(model_path))
        self.meta = pop_of(source, self.sidecar)
        self.rule = opening.rule_of(self.meta)
        self._conversion = conversion(self.meta, source, self.sidecar)
        has_gpu = any(device.is_gpu for device in devices())
        on_device = n_gpu_layers != 0 and (bool(rpc) or has_gpu)
        self._opened_with = {"kernels": kernels, "flash_attn": flash_attn, "repack": repack}
        auto_attention = flash_attn is None and on_device and has_gpu
        if flash_attn is None:
            # A server's device may lack it, and cannot be asked.
            flash_attn = not rpc and kernels and kernels_read_prompts()
        n_ctx_default = opening.default_ctx(source.first)
        n_ctx = n_ctx or n_ctx_default
        # llama.cpp keeps all rows otherwise.
        is_windowed = options.get("swa_full") is False
        opening.require_room(
            source,
            n_ctx,
            is_windowed=is_windowed,
            holds_kv=not on_device and not {"type_k", "type_v"} & options.keys(),
            holds_states=bool(self.meta and (keep_states or self._share(select))),
        )
        self.interrupt = Interrupt()
        if mmproj is not None:
            is_wanted = self.interrupt.is_wanted
            self.see_with(Path(mmproj), n_gpu_layers != 0, image_tokens, is_wanted)
        n_threads = n_threads or backend.default_threads()
        self.rpc = tuple(rpc)
        self._servers = Servers(self.rpc) if self.rpc else None
        logs.forget_errors()
        if "tokenizer.chat_template" in source.first.keys:
            templates.start()  # while the model is loaded
        try:
            with opening.loading(
                source,
                self.sidecar,
                self._servers,
                auto_attention=auto_attention,
                repack=repack,
            ):
                super().__init__(
                    os.fspath(model_path),
                    n_ctx=n_ctx,
                    n_threads=n_threads,
                    n_threads_batch=n_threads_batch or n_threads,
                    n_gpu_layers=n_gpu_layers,
                    flash_attn=flash_attn,
                    verbose=verbose,
                    **options,
                )
            if (lora := options.get("lora_path")) and not self._lora_adapter:
                raise RuntimeError(f"{lora} is no LoRA adapter for it")
            self.lora_sha256 = sampled_sha256(read_source(Path(lora))) if lora else ""
        except (ValueError, RuntimeError, TemplateError) as error:
            what = f"{model_path}" if sidecar is None else f"{model_path} with {sidecar}"
            raise PopError(f"{what} cannot be opened: {logs.first_error() or error}") from error
        # The file has been read by now; later it may have gone.
        self._own_sha256 = own_sha256(source)
        if self._servers:
            close_at_exit(self)
        backend.require_boundary(self._model.model, self.meta)
        backend.set_kernels(self.ctx, kernels)
        self._window = api.llama_model_n_swa(self._model.model) if is_windowed else 0
        self.exact = self._exact_now()
        self.pop_mode = backend.get_mode(self.ctx)
        # llama.cpp rounds the context up.
        self.input_ids = np.zeros(self._n_ctx, dtype=np.intc)
        self.rows = CachedRows(self._n_ctx)
        self.n_positions = opening.n_positions(source)
        self.is_mrope = backend.is_mrope(self._model.model)
        # Counts what makes an answer that is still being sampled wrong to go on with.
        self.epoch = 0
        self._batch_rows = TokenBatch(self.n_batch)
        self._stack.callback(self._batch_rows.close)
        if self._mmproj:
            self._stack.callback(self._mmproj.close)
        n_ubatch = self.context_params.n_ubatch
        self.deep = DeepPasses(self.ctx, self.rows, self.interrupt, n_ubatch, on_device=on_device)
        self.select = 0.0
        self.selection = Selection()
        self.online = OnlineRefill(self.deep, 0)
        self._n_refilled = 0
        self._opened_by = os.getpid()
        # Of the last prompt's images.
        self.encode_s = 0.0
        self.set_depth(select, keep_states=keep_states)
        self._on_prefill: Callable[[int, int], None] | None = None

    @property
    def vocab(self) -> Any:
        """llama.cpp's vocabulary, for Pieces and the backend's bindings."""
        return self._model.vocab

    @property
    def model_key(self) -> str:
        """What tells its K/V from those of other models, whatever is pruned."""
        return f"model {self._own_sha256[:16]}{loaded_with(self)}, images {self.mmproj_key}"

    @cached_property
    def shape(self) -> ModelShape:
        """The sizes of the model's layers.

        Raises UnsupportedArchitectureError for a model that cannot be pruned.
        """
        return source_shape(self._source)

    @cached_property
    def macs(self) -> GraphMacs:
        """The multiply-accumulates of reading prompts."""
        return GraphMacs(Path(self.model_path), self.sidecar)

    # Pruning

    @property
    def boundary(self) -> int:
        """The first layer that context tokens skip; 0 when there is none."""
        return backend.get_boundary(self.ctx)

    @cached_property
    def no_refill(self) -> str:
        """Why rows can be neither selected nor refilled; "" where they can, or none is pruned."""
        with suppress(PopError):
            return self.shape.no_refill
        return ""

    def _exact_now(self) -> int:
        """The layer at which context tokens leave, exactly; 0: none, or they are pruned earlier."""
        exact = backend.model_exact(self._model.model)
        return 0 if 0 < self.boundary < exact else exact

    @property
    def rule_now(self) -> RowRule:
        """The rule of what is read now: rows that leave exactly do so at the ends, too."""
        return NO_ENDS if self.exact else self.rule

    @property
    def can_switch(self) -> bool:
        """Whether prompts can be read otherwise than in full."""
        return bool(self.boundary or self.exact)

    @property
    def kv_key(self) -> KvKey:
        return FULL if 0 < self.n_tokens == self.n_exact else self.mode_key

    @property
    def mode_key(self) -> KvKey:
        """The key of what is read now, whatever is cached."""
        if self.pop_mode is Mode.OFF or self.exact:
            return FULL
        return KvKey(self.pop_mode, self.boundary, self._conversion)

    def set_pop(self, mode: Mode) -> None:
        """Switch pruning, or exact skipping; the KV cache is emptied if it is not the same in both.

        Raises PopError for a model that has neither.
        """
        self.interrupt.require_idle()
        if mode is self.pop_mode:
            return
        if mode is not Mode.OFF and not self.can_switch:
            raise PopError(
                f"{self.model_path} has no pruning keys",
                "convert it first",
                cause="not-converted",
                model=self.model_path,
            )
        if not self.exact:
            self._keep()
        # What was read in full is read again with pruning, so that the two can be compared.
        is_its_own = mode is Mode.OFF and self.n_exact == self.n_tokens
        backend.set_mode(self.ctx, mode)
        self._switched(keeps_cache=is_its_own or bool(self.exact))

    def set_boundary(self, layer: int) -> None:
        """Prune from another layer on, own projections only; 0 goes back to the file's boundary."""
        self.interrupt.require_idle()
        backend.set_boundary(self.ctx, layer)
        self.exact = self._exact_now()
        self._switched(keeps_cache=False)

    def _switched(self, *, keeps_cache: bool) -> None:
        self.pop_mode = backend.get_mode(self.ctx)
        if not keeps_cache:
            self.clear()
        if isinstance(self.cache, KeyedCache):
            self.set_cache(self.cache.cache)

    def set_depth(self, select: float | None = None, *, keep_states: bool = False) -> None:
        """Choose the share of context rows that a question gets deep, None for the file's.

        `keep_states`: whether other rows are to be redone later (`refills`); a selection implies
        it. Of no effect on a model without a boundary. Raises PopError for a share that is none,
        or that a model cannot have: without `swa_full`, or because of `no_refill`.
        """
        self.interrupt.require_idle()
        share = self._share(select)
        if not 0 <= share <= 1:
            raise PopError(f"the share of selected rows is {share}", "give one from 0 to 1")
        if select and self.no_refill:
            raise PopError(
                f"no tokens of this model can be selected: {self.no_refill}",
                "open it without a selection",
            )
        if share and self.boundary and self._window:
            raise PopError(
                "none can be selected where layers with a sliding window keep only its rows",
                "open the model with swa_full, or with select=0",
            )
        self.select = share if self.boundary and not self.no_refill else 0.0
        self.refills = bool(self.boundary) and not self.no_refill and keep_states
        self.keeps_states = self.refills or self.select > 0
        backend.set_keep(self.ctx, self.keeps_states)
        if not self.keeps_states:
            self.rows.has_state[:] = False
            self.online.end()
            self.online = OnlineRefill(self.deep, 0)

    def _share(self, select: float | None) -> float:
        return (self.meta.select if self.meta else 0.0) if select is None else select

    @property
    def held_bytes(self) -> int:
        """What is held to redo rows: states at the boundary, and attention counted."""
        return backend.keep_size(self.ctx)

    @property
    def n_exact(self) -> int:
        """How many cached rows, from the first on, are the full model's own."""
        return self.n_tokens if self.exact else min(self.rows.n_exact, self.n_tokens)

    # The KV cache

    def clear(self) -> None:
        """Empty the KV cache. Raises PopError while a batch is computed."""
        self.interrupt.require_idle()
        self.n_tokens = 0
        self.rows.forget_from(0)
        self._requires_eval = True
        if memory := self._ctx.memory:
            api.llama_memory_clear(memory, True)
        self.epoch += 1

    def n_cached(self, tokens: Sequence[int]) -> int:
        """Count the tokens, from the first on, that are cached."""
        return n_equal(tokens, self._input_ids)

    def truncate(self, n_tokens: int) -> bool:
        """Forget all cached tokens but the first, which end with no part of an image.

        Returns False for a memory that cannot do so. Raises PopError while a batch is computed.
        """
        self.interrupt.require_idle()
        n_tokens = max(0, min(n_tokens, self.n_tokens))
        if self._lacks_rows_before(n_tokens) or not self._forget_from(n_tokens):
            return False
        if n_tokens < self.n_tokens:
            self.n_tokens = n_tokens
            self.rows.forget_from(n_tokens)
            self._requires_eval = True
            self.epoch += 1
        return True

    def _forget_from(self, row: int) -> bool:
        position = int(self.rows.positions[row])
        if self._end > position:
            return bool(api.llama_memory_seq_rm(self._ctx.memory, 0, position, -1))
        return True

    def _forget_unfinished(self) -> None:
        """Forget what was decoded of a batch that failed.

        Raises PopError where a recurrent state cannot go back; the KV cache is empty then.
        """
        if not self._forget_from(self.n_tokens):
            self.clear()
            raise PopError("the state is ahead of the tokens that were read", "read them again")

    def _lacks_rows_before(self, row: int) -> bool:
        """Whether a sliding window has dropped rows that this one attends to.

        llama.cpp forgets the rows from there on all the same (llama_kv_cache_iswa::seq_rm).
        """
        if not self._window:
            return False
        seen_from = max(0, int(self.rows.positions[row]) - self._window + 1)
        return bool(api.llama_memory_seq_pos_min(self._ctx.memory, 0) > seen_from)

    @property
    def _end(self) -> int:
        """The position after the last one in llama.cpp's memory."""
        memory = self._ctx.memory
        return int(api.llama_memory_seq_pos_max(memory, 0)) + 1 if memory else 0

    def set_cache(self, cache: BaseLlamaCache | None) -> None:
        """Keep prompts that another one drives out of the KV cache; None keeps no more of them."""
        key = f"{self.model_key}, {self.mode_key}"
        self.cache = None if cache is None else KeyedCache(cache, key)

    def _keep(self) -> None:
        size = api.llama_state_get_size(self.ctx) if self.cache and self.n_tokens else 0
        if self.cache and 0 < size <= self.cache.capacity_bytes:
            with suppress(PopError):  # a state that is ahead of its tokens is of no use
                self.cache[self._input_ids.tolist()] = self.save_state()

    def _exchange(self, tokens: Sequence[int]) -> None:
        """Take from the prompt cache what has more in common with a prompt than the KV cache has.

        What the KV cache holds goes there if less than half is reused, as in llama-server.
        """
        if self.cache is None:
            return
        n_same = n_equal(tokens, self._input_ids)
        if 2 * n_same < self.n_tokens:
            self._keep()
        if tokens in self.cache:
            state = self.cache[tokens]
            kept = state.input_ids[: state.n_tokens]
            if n_equal(tokens, kept) > n_same:
                self.load_state(state)
            else:  # a cache on disk has given it away
                self.cache[kept.tolist()] = state

    def save_state(self) -> PopState:
        self._forget_unfinished()
        kv = context_state(self.ctx)
        return PopState(
            key=self.kv_key,
            model=self.model_key,
            is_full=self.rows.is_full[: self.n_tokens].copy(),
            positions=self.rows.positions[: self.n_tokens + 1].copy(),
            input_ids=self.input_ids.copy(),
            scores=self.scores[: self.n_tokens if self._logits_all else 0].copy(),
            n_tokens=self.n_tokens,
            llama_state=kv,
            llama_state_size=len(kv),
            seed=self._seed,
        )

    def load_state(self, state: LlamaState) -> None:
        """Take over a saved KV cache.

        Raises PopError for another model, mode, boundary or conversion, and on one that prunes for
        what llama_cpp's own `Llama` saved, which does not know its pruned rows.
        """
        if not isinstance(state, PopState) and self.boundary:
            raise PopError("the saved state does not say which rows are pruned", "read it again")
        if isinstance(state, PopState) and state.model not in ("", self.model_key):
            raise PopError(
                "the saved state belongs to another model, or one that was opened otherwise",
                "read the prompt again",
            )
        key = state.key if isinstance(state, PopState) else FULL
        if not self.takes(str(key)):
            raise PopError(
                f"the saved state belongs to {key}, the model is set to {self.kv_key}",
                "switch the model first, or read the prompt again",
            )
        self.take_over(PopState.of(state), is_exact=key == FULL)
        self.scores[: len(state.scores)] = state.scores
        self._seed = state.seed

    def takes(self, key: str) -> bool:
        """Whether the model can go on with a KV cache of this key: its own, or the full model's."""
        return key in (str(FULL), str(self.mode_key))

    def take_over(self, state: PopState, *, is_exact: bool) -> None:
        """Take over llama.cpp's state of a model of the same key, with what is known of its rows.

        `is_exact` says whether all of them are the full model's own. Raises PopError when it does
        not fit; the KV cache is empty then.
        """
        self.clear()
        n, positions = state.n_tokens, state.positions
        end = int(positions[n - 1]) + 1 if n else 0
        if not restore_context_state(self.ctx, state.llama_state) or self._end != end:
            self.clear()
            raise PopError("the saved state does not fit this model and context")
        self.input_ids[:n] = state.input_ids[:n]
        self.rows.take_over(state.is_full, positions, is_exact=is_exact)
        self.n_tokens = n

    def watch_prefill(
        self,
        on_prefill: Callable[[int, int], None] | None,
        should_stop: Callable[[], bool] | None,
    ) -> None:
        """Say who is told how far a prefill is, and who may end it (StoppedError): TurnOptions."""
        self._on_prefill = on_prefill
        self.interrupt.should_stop = should_stop

    @contextmanager
    def watching_prefill(
        self,
        on_prefill: Callable[[int, int], None] | None,
        should_stop: Callable[[], bool] | None,
    ) -> Iterator[None]:
        """Say so for a while; without a `should_stop`, whoever might end it before still may."""
        before = self._on_prefill, self.interrupt.should_stop
        self.watch_prefill(on_prefill, should_stop or self.interrupt.should_stop)
        try:
            yield
        finally:
            self.watch_prefill(*before)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        return {
            **state,
            **self._opened_with,
            "sidecar": self.sidecar and str(self.sidecar),
            "rpc": self.rpc,
            "select": self.select,
            "keep_states": self.refills,
        }

    def close(self) -> None:
        """Free the model; where a prompt is read, by the same thread, that is stopped first."""
        # __del__ calls it after a failed __init__ too.
        if hasattr(self, "_stack") and not self.interrupt.postponed(self.close):
            if hasattr(self, "online"):
                self.online.end()
            super().close()
            self._sampler = None
            self.grammars.close()
            gone: Any = opening.Closed(self.model_path)
            self._model = self._ctx = self.tokenizer_ = self.deep = gone
            self.online = OnlineRefill(gone, 0)
            self._servers = None
