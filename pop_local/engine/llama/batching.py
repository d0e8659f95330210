"""Continuous batching: the rows of several sequences of one context share batches.

Each sequence has its own thread, which blocks in `decode`. A batch runs once all working sequences
have queued a request. The batch contains one row per answer, and rows of at most one prompt.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import numpy as np

from pop_converter.base.errors import PopError, StoppedError
from pop_local.engine.llama import backend, logs
from pop_local.engine.llama.backend import Counters, Mode, Reading
from pop_local.engine.llama.batch import Outputs
from pop_local.engine.llama.cells import Cells, SequenceCells
from pop_local.engine.llama.context import Context
from pop_local.engine.llama.interrupt import current_should_stop
from pop_local.engine.llama.prefill_throttle import PrefillThrottle
from pop_local.engine.llama.slot import decode_now, last_logits, overwriting

_NO_COUNTERS = Counters(0, 0)


@dataclass(eq=False)
class _Request:
    """A sequence's rows to decode. The first `n_done` rows are decoded."""

    slot: "BatchedSlot"
    tokens: Sequence[int]
    first: int
    outputs: Outputs
    should_stop: Callable[[], bool]
    overwrites: bool
    n_done: int = 0
    error: BaseException | None = None

    @property
    def n_left(self) -> int:
        return len(self.tokens) - self.n_done

    @property
    def is_over(self) -> bool:
        return self.error is not None or self.n_left == 0

    def gives_logits(self, n: int) -> bool:
        """Return whether the last of the next `n` rows has logits."""
        return self.outputs is Outputs.LAST and n == self.n_left

    def are_context(self, n: int) -> bool:
        """Return whether no row of the next `n` is full."""
        return not self.gives_logits(n) and self.slot._is_context(self.first + self.n_done, n)


class Batcher:
    """Queue of decode requests, run as shared batches by one of the waiting threads."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._api = backend.bindings()
        self._turn = threading.Condition(threading.RLock())
        self._n_working = 0
        self._queue: list[_Request] = []
        self._throttle = PrefillThrottle(context.n_batch)
        self._in_batch: list[_Request] = []
        self._callback = self._api.ggml_abort_callback(lambda _: self._should_stop())
        self._holder = 0

    @contextmanager
    def working(self) -> Iterator[None]:
        """Count one more working sequence, which batches wait for, until exit."""
        with self._turn:
            self._n_working += 1
        try:
            yield
        finally:
            with self._turn:
                self._n_working -= 1
                self._turn.notify_all()

    @property
    def is_held(self) -> bool:
        """True if the calling thread holds the context."""
        return self._holder == threading.get_ident()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Prevent other threads from decoding and from changing cells until exit."""
        with self._turn:
            before, self._holder = self._holder, threading.get_ident()
            try:
                yield
            finally:
                self._holder = before

    def decode(self, request: _Request) -> None:
        """Queue a request and block until it is decoded. Raises its error."""
        with self._turn:
            self._queue.append(request)
            while not request.is_over:
                if len(self._queue) >= self._n_working:
                    self._compute()
                    self._turn.notify_all()
                else:
                    self._turn.wait()
        if request.error is not None:
            raise request.error

    def _compute(self) -> None:
        """Decode a batch of queued rows, with rows of at most one prompt."""
        for request in self._queue:
            try:
                if request.should_stop():
                    request.error = StoppedError()
            except BaseException as error:  # the thread that queued the request raises it
                request.error = error
        steps = [one for one in self._queue if not (one.is_over or one.slot._is_prefilling)]
        prompts = [one for one in self._queue if not one.is_over and one.slot._is_prefilling]
        try:
            if steps or prompts:
                self._decode(steps, prompts[:1])
        except BaseException as error:
            for request in (*steps, *prompts[:1]):
                if not request.is_over:
                    request.error = error
        self._queue = [request for request in self._queue if not request.is_over]

    def _decode(self, steps: list[_Request], prompts: list[_Request]) -> None:
        ctx = self._context.ctx
        n_rows = self._throttle.max_prompt_rows(len(steps))
        of_steps = [(one, 1) for one in steps]
        of_prompts = [(one, min(one.n_left, n_rows)) for one in prompts if n_rows]
        before = backend.get_counters(ctx)
        started_s = time.perf_counter()
        if any(one.overwrites for one, _ in of_prompts):
            # An answer's new row cannot share a batch with rows that have cells.
            if of_steps:
                self._run(of_steps)
            with overwriting(ctx):
                self._run(of_prompts)
        else:
            self._run(of_steps + of_prompts)
        n_read = sum(n for _, n in of_prompts)
        self._throttle.record(len(steps), n_read, time.perf_counter() - started_s)
        self._count(prompts, len(steps), before)

    def _run(self, parts: list[tuple[_Request, int]]) -> None:
        ctx = self._context.ctx
        backend.set_reading(ctx, _reading_of(parts))
        tokens: list[int] = []
        positions: list[int] = []
        sequences: list[int] = []
        wanted: list[bool] = []
        for one, n in parts:
            tokens += list(one.tokens[one.n_done : one.n_done + n])
            first = one.first + one.n_done
            positions += range(first, first + n)
            sequences += [one.slot.sequence] * n
            wanted += [False] * (n - 1) + [one.gives_logits(n)]
        logs.forget_errors()
        self._in_batch = [one for one, _ in parts]
        # The callback runs at each node and waits for the GIL. A step of answers is short.
        has_prompt = len(tokens) > len(parts)
        callback = self._callback if has_prompt else self._api.ggml_abort_callback(0)
        self._api.llama_set_abort_callback(ctx, callback, None)
        try:
            code = self._context.batch.run(ctx, tokens, positions, sequences, wanted)
        finally:
            self._api.llama_set_abort_callback(ctx, self._api.ggml_abort_callback(0), None)
        if code != 0:
            raise StoppedError if self._should_stop() else logs.not_decoded(code)
        self._copy_logits(parts)

    def _should_stop(self) -> bool:
        """Return whether the callers of all requests in the batch want to stop."""
        return all(one.should_stop() for one in self._in_batch)

    def _count(self, prompts: list[_Request], n_steps: int, before: Counters) -> None:
        """Add a batch's counters to its prompt's counters, without the answers' full rows."""
        now = backend.get_counters(self._context.ctx)
        for one in prompts:
            others = replace(before, n_full=before.n_full + n_steps)
            one.slot._counted = added(one.slot._counted, others, now)

    def _copy_logits(self, parts: list[tuple[_Request, int]]) -> None:
        """Copy each request's logits, since the next batch overwrites them."""
        last = -1
        for one, n in parts:
            last += n
            one.n_done += n
            if one.outputs is Outputs.LAST and one.is_over:
                row = self._api.llama_get_logits_ith(self._context.ctx, last)
                one.slot._logits = np.ctypeslib.as_array(
                    row, (self._context.vocabulary.n_tokens,)
                ).copy()


def _reading_of(parts: Sequence[tuple[_Request, int]]) -> Reading:
    of_prompts = [(one, n) for one, n in parts if one.slot._is_prefilling]
    if not of_prompts:
        return Reading.NONE
    return Reading.CONTEXT if all(one.are_context(n) for one, n in of_prompts) else Reading.SOME


def added(known: Counters, before: Counters, now: Counters) -> Counters:
    return Counters(
        known.n_context + now.n_context - before.n_context,
        known.n_full + now.n_full - before.n_full,
        known.n_exact + now.n_exact - before.n_exact,
        n_deep=known.n_deep + now.n_deep - before.n_deep,
    )


class BatchedSlot:
    """A sequence among several of a context, used by its own thread.

    Prompts are prefilled in the context's mode, or in mode OFF, in which all rows are full.
    """

    def __init__(self, batcher: Batcher, context: Context, sequence: int) -> None:
        self.context, self.sequence = context, sequence
        self.cells: Cells = SequenceCells(context, sequence, batcher.locked)
        self._batcher = batcher
        self._mode = backend.get_mode(context.ctx)
        self._is_prefilling = False
        self._counted = _NO_COUNTERS
        self._context_rows = range(0)
        self._deep_rows = np.empty(0, np.int32)
        self._logits = np.zeros(0, np.float32)
        self._is_overwriting = False

    def working(self) -> AbstractContextManager[None]:
        return self._batcher.working()

    def locked(self) -> AbstractContextManager[None]:
        return self._batcher.locked()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        ctx = self.context.ctx
        with self.locked(), self.context.interrupt.watching(ctx):
            before = backend.get_counters(ctx)
            backend.set_reading(ctx, Reading.SOME)
            yield
            self._counted = added(self._counted, before, backend.get_counters(ctx))

    def interruptible(self) -> AbstractContextManager[None]:
        return nullcontext()

    def raise_if_stopped(self) -> None:
        if current_should_stop()():
            raise StoppedError

    def require_idle(self) -> None:
        """Do nothing: callbacks run only in the batch's thread, so no caller is within a batch."""

    @property
    def mode(self) -> Mode:
        return self._mode

    def set_mode(self, mode: Mode) -> None:
        if mode not in (Mode.OFF, backend.get_mode(self.context.ctx)):
            raise PopError(f"a context of several sequences cannot switch to mode {mode.name}")
        self._mode = mode

    def begin_prefill(self) -> None:
        self._is_prefilling = True
        self._counted = _NO_COUNTERS

    def begin_decode(self) -> None:
        self._is_prefilling = False

    @property
    def counters(self) -> Counters:
        return self._counted

    def set_full(self, sink_tokens: int, full_from: int) -> None:
        full_from = 0 if self._mode is Mode.OFF else full_from
        self._context_rows = range(sink_tokens, full_from)
        with self.locked():
            backend.set_sink(self.context.ctx, sink_tokens)
            backend.set_full_from(self.context.ctx, self.sequence, full_from)

    def set_deep_rows(self, positions: np.ndarray) -> None:
        self._deep_rows = positions
        with self.locked():
            backend.set_deep_rows(self.context.ctx, self.sequence, positions)

    def _is_context(self, first: int, n: int) -> bool:
        """Return whether no row of [first, first + n) is full by position or token."""
        if not (self._context_rows.start <= first and first + n <= self._context_rows.stop):
            return False
        start, end = np.searchsorted(self._deep_rows, (first, first + n))
        return bool(start == end)

    def decode(self, tokens: Sequence[int], first_position: int, outputs: Outputs) -> None:
        if self._batcher.is_held:
            with overwriting(self.context.ctx) if self._is_overwriting else nullcontext():
                decode_now(self.context, self.sequence, tokens, first_position, outputs)
            if outputs is not Outputs.NONE:
                self._logits = last_logits(self.context).copy()
            return
        self._batcher.decode(
            _Request(
                self, tokens, first_position, outputs, current_should_stop(), self._is_overwriting
            )
        )

    @contextmanager
    def overwriting(self) -> Iterator[None]:
        self._is_overwriting = True
        try:
            yield
        finally:
            self._is_overwriting = False

    @property
    def logits(self) -> np.ndarray:
        return self._logits

    def run_deep(self, positions: np.ndarray) -> bool:
        ctx = self.context.ctx
        with self.locked(), self.context.interrupt.watching(ctx):
            return backend.run_deep(ctx, self.sequence, positions)


def batched_slots(context: Context, n: int) -> list[BatchedSlot]:
    """Return a context's slots. Raises PopError if the context cannot have several sequences."""
    # llama.cpp reuses cells that a sequence's window has passed for other sequences, also with
    # swa_full. The sequence then cannot be truncated or refilled.
    if context.is_recurrent or backend.bindings().llama_model_n_swa(context.model):
        raise PopError(
            "a model with recurrent layers or sliding windows reads one prompt at a time",
            "open it with n_parallel=1",
            cause="one-sequence",
        )
    if context.n_batch < 2 * n:
        raise PopError(
            f"batches of {context.n_batch} tokens are too small for {n} sequences",
            f"open the model with n_batch={2 * n} or more",
            cause="one-sequence",
        )
    batcher = Batcher(context)
    return [BatchedSlot(batcher, context, sequence) for sequence in range(n)]
