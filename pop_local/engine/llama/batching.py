"""Continuous batching: rows from multiple sequences of one context share batches.

Each sequence has its own thread, which blocks in `decode`. A batch runs once all active sequences
have queued a request. A batch contains the next rows of each answer and of at most one prompt.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np

from pop_base.errors import PopError, StoppedError
from pop_local.engine.llama import backend, logs
from pop_local.engine.llama.backend import Counters, Mode, Reading
from pop_local.engine.llama.batch import Outputs
from pop_local.engine.llama.context import Context
from pop_local.engine.llama.interrupt import current_should_stop
from pop_local.engine.llama.prefill_throttle import PrefillThrottle
from pop_local.engine.llama.slot import Slot, overwriting


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a sequence to decode. All arrays have the length n."""

    sequence: int
    tokens: np.ndarray  # int32
    positions: np.ndarray  # int32
    outputs: np.ndarray  # bool, True for rows that need logits
    context: np.ndarray  # bool, True for a prompt's rows that stop at the boundary
    is_prompt: bool
    is_overwriting: bool  # whether the rows already have cells

    def __len__(self) -> int:
        return len(self.tokens)

    def part(self, start: int, n: int) -> "Rows":
        """Return up to `n` rows from row `start` onward."""
        names = ("tokens", "positions", "outputs", "context")
        return replace(self, **{name: getattr(self, name)[start : start + n] for name in names})


@dataclass(eq=False)
class _Request:
    """A request to decode rows. The first `n_done` rows have been decoded.

    `logits`: float32 [n_outputs, n_vocab]. `count` receives the counters of the prompt's batches.
    """

    rows: Rows
    logits: np.ndarray
    count: Callable[[Counters], None]
    should_stop: Callable[[], bool]
    n_done: int = 0
    error: BaseException | None = None

    @property
    def is_over(self) -> bool:
        return self.error is not None or self.n_done == len(self.rows)

    def next_rows(self, n: int) -> Rows:
        return self.rows.part(self.n_done, n)


class Batcher:
    """A queue of decode requests. One of the waiting threads runs the requests in shared batches.

    `holder`: the ID of the thread that has locked the context, or 0 if no thread has.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._turn = threading.Condition(context.interrupt.lock)
        self._n_working = 0
        self._queue: list[_Request] = []
        self._throttle = PrefillThrottle(context.n_batch)
        self.holder = 0

    @contextmanager
    def working(self, n: int) -> Iterator[None]:
        """Context manager that makes each batch wait for requests from `n` more sequences."""
        with self._turn:
            self._n_working += n
            self._turn.notify_all()
        try:
            yield
        finally:
            with self._turn:
                self._n_working -= n
                self._turn.notify_all()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Context manager that prevents other threads from decoding rows or changing cells."""
        with self._turn:
            before, self.holder = self.holder, threading.get_ident()
            try:
                yield
            finally:
                self.holder = before

    def decode(self, rows: Rows, count: Callable[[Counters], None]) -> np.ndarray:
        """Queue rows and block until they are decoded.

        Returns the output rows' logits, float32 [n_outputs, n_vocab]. `count` is called with the
        counters of each batch. Raises the error of the batch, or StoppedError if the caller's
        `should_stop` returns True.
        """
        n_vocab = self._context.vocabulary.n_tokens
        logits = np.empty((np.count_nonzero(rows.outputs), n_vocab), np.float32)
        request = _Request(rows, logits, count, current_should_stop())
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
        return logits

    def _compute(self) -> None:
        """Decode one batch of queued rows. At most one prompt contributes rows."""
        for request in self._queue:
            try:
                if request.should_stop():
                    request.error = StoppedError()
            except BaseException as error:  # the thread that queued the request raises it
                request.error = error
        pending = [request for request in self._queue if not request.is_over]
        answers = [request for request in pending if not request.rows.is_prompt]
        prompts = [request for request in pending if request.rows.is_prompt][:1]
        try:
            if answers or prompts:
                self._decode(answers, prompts)
        except BaseException as error:
            for request in (*answers, *prompts):
                if not request.is_over:
                    request.error = error
        self._queue = [request for request in self._queue if not request.is_over]

    def _decode(self, answers: list[_Request], prompts: list[_Request]) -> None:
        ctx = self._context.ctx
        # A prompt gets at least one row of each batch, unless the throttle excludes it.
        n_each = max(1, (self._context.n_batch - len(prompts)) // max(1, len(answers)))
        of_answers = [(request, request.next_rows(n_each)) for request in answers]
        n_answered = sum(len(rows) for _, rows in of_answers)
        n_rows = self._throttle.max_prompt_rows(n_answered)
        of_prompts = [(request, request.next_rows(n_rows)) for request in prompts if n_rows]
        before = backend.get_counters(ctx)
        started_s = time.perf_counter()
        if of_prompts and of_prompts[0][1].is_overwriting:
            # An answer's new rows cannot share a batch with rows that already have cells.
            if of_answers:
                self._run(of_answers)
            with overwriting(ctx):
                self._run(of_prompts)
        else:
            self._run(of_answers + of_prompts)
        n_read = sum(len(rows) for _, rows in of_prompts)
        self._throttle.record(n_answered, n_read, time.perf_counter() - started_s)
        # The batch's full rows include the answers' rows.
        before = replace(before, n_full=before.n_full + n_answered)
        for request in prompts:
            request.count(_difference(backend.get_counters(ctx), before))

    def _run(self, parts: list[tuple[_Request, Rows]]) -> None:
        """Decode some rows of each request and copy the output rows' logits."""

        def should_stop(_: object = None) -> bool:
            return all(request.should_stop() for request, _ in parts)

        ctx, api = self._context.ctx, backend.bindings()
        parts_rows = [rows for _, rows in parts]
        backend.set_reading(ctx, _reading_of(parts_rows))
        tokens, positions, outputs = (
            np.concatenate([getattr(rows, name) for rows in parts_rows])
            for name in ("tokens", "positions", "outputs")
        )
        sizes = [len(rows) for rows in parts_rows]
        sequences = np.repeat([rows.sequence for rows in parts_rows], sizes)
        logs.forget_errors()
        # The callback waits for the GIL at each node, so short batches of answers run without it.
        has_prompt = any(rows.is_prompt for rows in parts_rows)
        callback = api.ggml_abort_callback(should_stop if has_prompt else 0)
        api.llama_set_abort_callback(ctx, callback, None)
        try:
            code = self._context.batch.run(ctx, tokens, positions, sequences, outputs)
        finally:
            api.llama_set_abort_callback(ctx, api.ggml_abort_callback(0), None)
        if code != 0:
            raise StoppedError if should_stop() else logs.not_decoded(code)
        start = 0
        for request, rows in parts:
            for row in np.flatnonzero(rows.outputs).tolist():
                # Copied, because the next batch overwrites the logits.
                logits = api.llama_get_logits_ith(ctx, start + row)
                n_before = np.count_nonzero(request.rows.outputs[: request.n_done + row])
                shape = request.logits.shape[1:]
                request.logits[n_before] = np.ctypeslib.as_array(logits, shape)
            start += len(rows)
            request.n_done += len(rows)


def _reading_of(parts: Sequence[Rows]) -> Reading:
    prompts = [rows for rows in parts if rows.is_prompt]
    if not prompts:
        return Reading.NONE
    is_context = all((rows.context & ~rows.outputs).all() for rows in prompts)
    return Reading.CONTEXT if is_context else Reading.SOME


def _difference(now: Counters, before: Counters) -> Counters:
    return Counters(*np.subtract(astuple(now), astuple(before)).tolist())


class BatchedSlot(Slot):
    """One slot of a context that has multiple sequences. Each slot has its own thread.

    Prefill uses either the context's mode or OFF, in which every row runs through all layers.
    """

    _starts_with_size = False

    def __init__(self, batcher: Batcher, context: Context, sequence: int) -> None:
        super().__init__(context, sequence)
        self._batcher = batcher
        self._mode = backend.get_mode(context.ctx)
        self._is_prefilling = False
        self._counted = Counters(0, 0)
        self._context_rows = range(0)
        self._deep_rows = np.empty(0, np.int32)
        self._logits = np.zeros((0, context.vocabulary.n_tokens), np.float32)
        self._is_overwriting = False

    def working(self, *, pauses: bool = False) -> AbstractContextManager[None]:
        return self._batcher.working(-1 if pauses else 1)

    def locked(self) -> AbstractContextManager[None]:
        return self._batcher.locked()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        with self.locked(), super().interruptible():
            before = backend.get_counters(self.context.ctx)
            backend.set_reading(self.context.ctx, Reading.SOME)
            yield
            self._count(_difference(backend.get_counters(self.context.ctx), before))

    def interruptible(self) -> AbstractContextManager[None]:
        return nullcontext()  # the batcher calls `should_stop`

    def raise_if_stopped(self) -> None:
        if current_should_stop()():
            raise StoppedError

    def require_idle(self) -> None:
        """Allow calls during a batch, because only the batch's own thread runs callbacks."""

    @property
    def mode(self) -> Mode:
        return self._mode

    def set_mode(self, mode: Mode) -> None:
        if mode not in (Mode.OFF, backend.get_mode(self.context.ctx)):
            raise PopError(f"a context with multiple sequences cannot switch to mode {mode.name}")
        self._mode = mode

    def begin_prefill(self) -> None:
        self._is_prefilling = True
        self._counted = Counters(0, 0)

    def begin_decode(self) -> None:
        self._is_prefilling = False

    @property
    def counters(self) -> Counters:
        return self._counted

    def _count(self, counters: Counters) -> None:
        self._counted = Counters(*np.add(astuple(self._counted), astuple(counters)).tolist())

    def set_full(self, sink_tokens: int, full_from: int) -> None:
        full_from = 0 if self._mode is Mode.OFF else full_from
        self._context_rows = range(sink_tokens, full_from)
        with self.locked():
            super().set_full(sink_tokens, full_from)

    def set_deep_rows(self, positions: np.ndarray) -> None:
        self._deep_rows = positions
        with self.locked():
            super().set_deep_rows(positions)

    def decode(self, tokens: Sequence[int], first_position: int, outputs: Outputs) -> None:
        if self._batcher.holder == threading.get_ident():
            with super().overwriting() if self._is_overwriting else nullcontext():
                super().decode(tokens, first_position, outputs)
            # Callers read the other rows' logits from the context, which they have locked.
            self._logits = super().logits[-1:].copy()
            return
        rows = self._rows(np.asarray(tokens, np.int32), first_position, outputs)
        self._logits = self._batcher.decode(rows, self._count)

    def _rows(self, tokens: np.ndarray, first_position: int, outputs: Outputs) -> Rows:
        positions = first_position + np.arange(len(tokens), dtype=np.int32)
        context, is_deep = self._context_rows, np.isin(positions, self._deep_rows)
        return Rows(
            sequence=self.sequence,
            tokens=tokens,
            positions=positions,
            outputs=outputs.mask(len(tokens)),
            context=(context.start <= positions) & (positions < context.stop) & ~is_deep,
            is_prompt=self._is_prefilling,
            is_overwriting=self._is_overwriting,
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
        with self.locked(), super().interruptible():
            return super().run_deep(positions)

    def clear(self) -> None:
        self.truncate(0)

    def _state(self, action: str, *values: Any) -> int:
        call = getattr(self._api, f"llama_state_seq_{action}")
        return int(call(self.context.ctx, *values, self.sequence))


def batched_slots(context: Context, n: int) -> list[BatchedSlot]:
    """Return a context's slots. Raises PopError if the context supports only one sequence."""
    # Even with swa_full, llama.cpp reuses cells that have left a sequence's window for other
    # sequences. The first sequence then cannot be truncated or refilled.
    if context.is_recurrent or backend.bindings().llama_model_n_swa(context.model):
        raise PopError(
            "a model with recurrent layers or sliding windows can read only one prompt at a time",
            "open the model with n_parallel=1",
            cause="one-sequence",
        )
    batcher = Batcher(context)
    return [BatchedSlot(batcher, context, sequence) for sequence in range(n)]
