"""llama_cpp's `Llama` on the patched backend: which rows run in full, and whose the KV cache is."""

import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from jinja2 import TemplateError

from converter.errors import PopError
from converter.shape import ModelShape, read_shape
from converter.sidecar import pop_of
from converter.source import read_source
from pop_local.engine import templates
from pop_local.engine.decode.grammar import GrammarSampler
from pop_local.engine.decode.greedy import GreedySampler
from pop_local.engine.llama import backend, logs, opening
from pop_local.engine.llama.backend import Mode
from pop_local.engine.llama.batch import Outputs, TokenBatch
from pop_local.engine.llama.interrupt import DisplacedError, Interrupt
from pop_local.engine.llama.upstream import BaseLlamaCache, Llama, LlamaGrammar, LlamaState, api
from pop_local.engine.prefill.kv_state import (
    FULL,
    KeyedCache,
    KvKey,
    PopState,
    context_state,
    conversion,
    restore_context_state,
)
from pop_local.engine.prefill.plan import EXACT_RULE, full_rows, n_equal, n_usable, plan_prefill
from pop_local.engine.turn import TurnOptions


class _Closed:
    """What llama.cpp's objects become once they are freed: any use is a PopError, not a crash."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __getattr__(self, name: str) -> NoReturn:
        raise PopError(f"the model {self._path} is closed", "open it again")


class PrunedLlama(Llama):
    """`Llama` with its own `eval`, so that what llama_cpp builds upon it prunes, too.

    The KV cache belongs to one mode and boundary: switching either empties it. Where rows leave
    exactly (`exact`: from which layer on, 0 for no such model) it is the full model's own.
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
        verbose: bool = False,
        **options: Any,
    ) -> None:
        """Load a model; raises PopError with llama.cpp's reason when it cannot be.

        `sidecar`: a file with POP keys and tensors for this model. `n_ctx`: None takes the model's
        own context, at most 8192. `n_threads`: for prefill (unless `n_threads_batch` says
        otherwise) and decode; None takes the physical cores. `n_gpu_layers`: -1 for all, of no
        effect without a GPU. `options` go to `llama_cpp.Llama` (n_batch, n_ubatch, flash_attn,
        type_k, lora_path, ...). A converted model starts in mode CONTEXT.
        """
        backend.require_patched()
        source = read_source(Path(model_path))
        self.sidecar = None if sidecar is None else Path(sidecar)
        self.meta = pop_of(source, self.sidecar)
        self.rule = opening.rule_of(self.meta)
        self._conversion = conversion(self.meta, source, self.sidecar)
        n_ctx_default = opening.default_ctx(source.first)
        n_threads = n_threads or backend.default_threads()
        logs.forget_errors()
        if "tokenizer.chat_template" in source.first.keys:
            templates.start()  # while the model is loaded
        try:
            with opening.with_sidecar(source, self.sidecar):
                super().__init__(
                    os.fspath(model_path),
                    n_ctx=n_ctx or n_ctx_default,
                    n_threads=n_threads,
                    n_threads_batch=n_threads_batch or n_threads,
                    n_gpu_layers=n_gpu_layers,
                    verbose=verbose,
                    **options,
                )
        except (ValueError, RuntimeError, TemplateError) as error:
            what = f"{model_path}" if sidecar is None else f"{model_path} with {sidecar}"
            raise PopError(f"{what} cannot be opened: {logs.first_error() or error}") from error
        backend.require_boundary(self._model.model, self.meta)
        self.exact = backend.model_exact(self._model.model)
        if self.exact:
            self.rule = EXACT_RULE
        self.pop_mode = backend.get_mode(self.ctx)
        # llama.cpp rounds the context up.
        self.input_ids = np.zeros(self._n_ctx, dtype=np.intc)
        # Of each cached position, whether its row was full.
        self._is_full = np.zeros(self._n_ctx, dtype=bool)
        # Counts what makes an answer that is still being sampled wrong to go on with.
        self.epoch = 0
        self._rows = TokenBatch(self.n_batch)
        self._stack.callback(self._rows.close)
        self.interrupt = Interrupt()
        self._on_prefill: Callable[[int, int], None] | None = None

    @property
    def vocab(self) -> Any:
        """llama.cpp's vocabulary, for Pieces, check_grammar and the backend's bindings."""
        return self._model.vocab

    @cached_property
    def shape(self) -> ModelShape:
        """What the multiply-accumulates of a prefill depend on.

        Raises UnsupportedArchitectureError for a model that cannot be pruned.
        """
        return read_shape(Path(self.model_path))

    # Pruning

    @property
    def boundary(self) -> int:
        """The first layer that context tokens skip; 0 when there is none."""
        return backend.get_boundary(self.ctx)

    @property
    def can_switch(self) -> bool:
        """Whether prompts can be read otherwise than in full."""
        return bool(self.boundary or self.exact)

    @property
    def kv_key(self) -> KvKey:
        if self.pop_mode is Mode.OFF or self.exact:
            return FULL
        return KvKey(self.pop_mode, self.boundary, self._conversion)

    def set_pop(self, mode: Mode) -> None:
        """Switch pruning, or exact skipping; the KV cache is emptied if it is not the same in both.

        Raises PopError for a model that has neither.
        """
        if mode is self.pop_mode:
            return
        if mode is not Mode.OFF and not self.can_switch:
            raise PopError(
                f"{self.model_path} has no pruning keys",
                "convert it first",
                cause="not-converted",
                model=self.model_path,
            )
        backend.set_mode(self.ctx, mode)
        self._switched()

    def set_boundary(self, layer: int) -> None:
        """Prune from another layer on, own projections only; 0 goes back to the file's boundary."""
        backend.set_boundary(self.ctx, layer)
        self._switched()

    def _switched(self) -> None:
        self.pop_mode = backend.get_mode(self.ctx)
        if self.exact:
            return
        self.clear()
        if isinstance(self.cache, KeyedCache):
            self.set_cache(self.cache.cache)

    # The KV cache

    def clear(self) -> None:
        """Empty the KV cache."""
        self.n_tokens = 0
        self._requires_eval = True
        if memory := self._ctx.memory:
            api.llama_memory_clear(memory, True)
        self.epoch += 1

    def n_cached(self, tokens: Sequence[int]) -> int:
        """Count the tokens, from the first on, that are cached."""
        return n_equal(tokens, self._input_ids)

    def truncate(self, n_tokens: int) -> bool:
        """Forget all cached tokens but the first; False for a memory that cannot do so."""
        if not self._forget_from(n_tokens):
            return False
        if n_tokens < self.n_tokens:
            self.n_tokens = n_tokens
            self._requires_eval = True
            self.epoch += 1
        return True

    def _forget_from(self, position: int) -> bool:
        if self._end > position:
            return bool(api.llama_memory_seq_rm(self._ctx.memory, 0, position, -1))
        return True

    @property
    def _end(self) -> int:
        """The position after the last one in llama.cpp's memory."""
        memory = self._ctx.memory
        return int(api.llama_memory_seq_pos_max(memory, 0)) + 1 if memory else 0

    def set_cache(self, cache: BaseLlamaCache | None) -> None:
        self.cache = None if cache is None else KeyedCache(cache, self.kv_key)

    def save_state(self) -> PopState:
        kv = context_state(self.ctx)
        return PopState(
            key=self.kv_key,
            is_full=self._is_full[: self.n_tokens].copy(),
            input_ids=self.input_ids.copy(),
            scores=self.scores[: self.n_tokens if self._logits_all else 0].copy(),
            n_tokens=self.n_tokens,
            llama_state=kv,
            llama_state_size=len(kv),
            seed=self._seed,
        )

    def load_state(self, state: LlamaState) -> None:
        """Take over a saved KV cache. Raises PopError for another mode, boundary or conversion."""
        key = state.key if isinstance(state, PopState) else FULL
        if key != self.kv_key:
            raise PopError(
                f"the saved state belongs to {key}, the model is set to {self.kv_key}",
                "switch the model first, or read the prompt again",
            )
        n = state.n_tokens
        is_full = state.is_full if isinstance(state, PopState) else np.ones(n, bool)
        self.take_over(state.llama_state, state.input_ids[:n], is_full)
        self.scores[: len(state.scores)] = state.scores
        self._seed = state.seed

    def take_over(self, kv: bytes, tokens: np.ndarray, is_full: np.ndarray) -> None:
        """Take over llama.cpp's state of a model of the same key, with the tokens of its cells.

        `is_full` says of each whether it ran all layers. Raises PopError when it does not fit; the
        KV cache is empty then.
        """
        self.clear()
        n = len(tokens)
        if not restore_context_state(self.ctx, kv) or self._end != n:
            self.clear()
            raise PopError("the saved state does not fit this model and context")
        self.input_ids[:n], self._is_full[:n] = tokens, is_full
        self.n_tokens = n

    # Evaluation

    def eval(self, tokens: Sequence[int]) -> None:
        """Append tokens to the KV cache. Several at once are a prompt, and are pruned as one.

        Raises PopError when they do not fit the context or cannot be decoded; when interrupted,
        StoppedError or whatever Ctrl-C raises. What was decoded by then stays.
        """
        if len(tokens) == 0:
            return
        self._make_room(len(tokens))
        if len(tokens) == 1:
            self._decode(tokens, Outputs.LAST, self.n_tokens)
        else:
            self._prefill(tokens)

    def _prefill(self, tokens: Sequence[int]) -> None:
        plan = plan_prefill(self.n_tokens, len(tokens), self.rule, self.n_batch)
        backend.set_full_from(self.ctx, plan.full_from)
        self._report(0, plan.n_tokens)
        with self.interrupt.watching(self.ctx):
            for start, end in plan.chunks:
                # llama_cpp asks for the logits of each batch's last token, which makes it full.
                outputs = Outputs.LAST if end == plan.n_tokens else Outputs.NONE
                self._decode(tokens[start:end], outputs, plan.full_from)
                self.interrupt.check()
                self._report(end, plan.n_tokens)

    def _report(self, done: int, total: int) -> None:
        epoch = self.epoch
        if self._on_prefill is not None:
            self._on_prefill(done, total)
        if self.epoch != epoch:
            raise DisplacedError

    def _decode(self, tokens: Sequence[int], outputs: Outputs, full_from: int) -> None:
        if self._logits_all or self.context_params.embeddings:
            outputs = Outputs.ALL
        start = self.n_tokens
        end = start + len(tokens)
        code = self._rows.decode(self.ctx, tokens, start, outputs)
        if code != 0:
            self.interrupt.check()
            raise PopError(logs.first_error() or f"llama.cpp could not decode (code {code})")
        self.input_ids[start:end] = tokens
        if self.pop_mode is Mode.CONTEXT and not self.exact:
            self._is_full[start:end] = full_rows(start, end, self.rule, full_from, outputs)
        else:
            self._is_full[start:end] = self.kv_key == FULL
        if self._logits_all and end <= len(self.scores):
            logits = api.llama_get_logits(self.ctx)
            self.scores[start:end] = np.ctypeslib.as_array(logits, (len(tokens), self._n_vocab))
        self.n_tokens = end
        self._requires_eval = outputs is Outputs.NONE

    def _make_room(self, n_tokens: int) -> None:
        total = self.n_tokens + n_tokens
        if total > self._n_ctx:
            larger = total + 256
            raise PopError(
                f"{total} tokens do not fit the context of {self._n_ctx}",
                f"open the model with a larger one: n_ctx={larger}",
                cause="context-too-small",
                n_ctx=larger,
            )
        logs.forget_errors()
        self._forget_from(self.n_tokens)

    # Generation

    def generate(
        self, tokens: Sequence[int], *args: Any, **options: Any
    ) -> Generator[int, Sequence[int] | None, None]:
        """Sample as llama_cpp does; K/V of the prompt's beginning are reused, its tail is full."""
        self.epoch += 1
        tokens = list(tokens)
        usable = n_usable(tokens, self._input_ids, self._is_full, self.rule)
        if options.get("reset", True) and usable < self.n_tokens:
            self.n_tokens = usable
            self._requires_eval = True
        yield from super().generate(tokens, *args, **options)

    def sampled(
        self, tokens: Sequence[int], options: TurnOptions
    ) -> Generator[int, Sequence[int] | None, None]:
        """Sample the tokens that follow, one after the other and without end."""
        self.set_seed(api.LLAMA_DEFAULT_SEED if options.seed is None else options.seed)
        return self.generate(
            tokens,
            temp=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
            repeat_penalty=options.repeat_penalty,
            frequency_penalty=options.frequency_penalty,
            presence_penalty=options.presence_penalty,
            grammar=None if options.grammar is None else LlamaGrammar(_grammar=options.grammar),
        )

    def _init_sampler(self, *args: Any, **options: Any) -> Any:
        neutral = {
            "temp": 0.0,
            "repeat_penalty": 1.0,
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
            "logits_processor": None,
            "grammar": None,
        }
        if all(options.get(name) == value for name, value in neutral.items()):
            return GreedySampler(self._n_vocab)
        grammar = options.pop("grammar", None)
        chain = super()._init_sampler(*args, **options)
        if grammar is None:
            return chain
        return GrammarSampler(self.vocab, self._n_vocab, grammar, chain)

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
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        return {**state, "sidecar": None if self.sidecar is None else str(self.sidecar)}

    def close(self) -> None:
        # __del__ calls it after a failed __init__ too.
        if hasattr(self, "_stack"):
            super().close()
            gone: Any = _Closed(self.model_path)
            self._model = self._ctx = self.tokenizer_ = gone
