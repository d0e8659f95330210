"""Continuous batching: rows from multiple sequences of one context share batches.

Each sequence has its own thread, which blocks in `decode`. A batch runs once all active sequences
have queued a request. A batch contains one row for each answer and the rows of at most one prompt.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import astuple, dataclass, replace

import numpy as np

from pop_base.errors import PopError, StoppedError
from pop_local.engine.llama import backend, logs
from pop_local.engine.llama.backend import Counters, Mode, Reading
from pop_local.engine.llama.batch import Outputs
from pop_local.engine.llama.cells import SequenceCells
from pop_local.engine.llama.context import Context
from pop_local.engine.llama.interrupt import current_should_stop
from pop_local.engine.llama.prefill_throttle import PrefillThrottle
from pop_local.engine.llama.slot import Slot


@dataclass(eq=False)
class _Request:
    """A request to decode a sequence's rows. The first `n_done` rows have been decoded."""

    slot: "BatchedSlot"
    tokens: Sequence[int]
    first: int
    outputs: Outputs
    should_stop: Callable[[], bool]
    n_done: int = 0
    error: BaseException | None = None

    @property
    def n_left(self) -> int:
        return len(self.tokens) - self.n_done

    @property
    def position(self) -> int:
        """Position of the next row."""
        return self.first + self.n_done

    @property
    def is_over(self) -> bool:
        return self.error is not None or self.n_left == 0

    def gives_logits(self, n: int) -> bool:
        """Return True if the last of the next `n` rows needs logits."""
        return self.outputs is Outputs.LAST and n == self.n_left


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

    def decode(self, request: _Request) -> None:
        """Queue a request and block until its rows are decoded. Raises the request's error."""
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
        """Decode one batch of queued rows. At most one prompt contributes rows."""
        for request in self._queue:
            try:
                if request.should_stop():
                    request.error = StoppedError()
            except BaseException as error:  # the thread that queued the request raises it
                request.error = error
        steps = [one for one in self._queue if not (one.is_over or one.slot._is_prefilling)]
        prompts = [one for one in self._queue if not one.is_over and one.slot._is_prefilling][:1]
        try:
            if steps or prompts:
                self._decode(steps, prompts)
        except BaseException as error:
            for request in (*steps, *prompts):
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
        if of_prompts and prompts[0].slot._is_overwriting:
            # An answer's new row cannot share a batch with rows that already have cells.
            if of_steps:
                self._run(of_steps)
            with Slot.overwriting(prompts[0].slot):
                self._run(of_prompts)
        else:
            self._run(of_steps + of_prompts)
        n_read = sum(n for _, n in of_prompts)
        self._throttle.record(len(steps), n_read, time.perf_counter() - started_s)
        # The batch's full rows include the answers' rows.
        before = replace(before, n_full=before.n_full + len(steps))
        for one in prompts:
            one.slot._add_counters(before)

    def _run(self, parts: list[tuple[_Request, int]]) -> None:
        """Decode each request's next `n` rows and copy the logits of completed requests."""

        def should_stop(_: object = None) -> bool:
            return all(one.should_stop() for one, _ in parts)

        ctx, api = self._context.ctx, backend.bindings()
        backend.set_reading(ctx, _reading_of(parts))
        tokens = [token for one, n in parts for token in one.tokens[one.n_done : one.n_done + n]]
        positions = [at for one, n in parts for at in range(one.position, one.position + n)]
        sizes = [n for _, n in parts]
        sequences = np.repeat([one.slot.sequence for one, _ in parts], sizes)
        ends = np.cumsum(sizes) - 1
        wanted = np.zeros(len(tokens), bool)
        wanted[ends] = [one.gives_logits(n) for one, n in parts]
        logs.forget_errors()
        # The callback waits for the GIL at each node, so short batches of answers run without it.
        has_prompt = len(tokens) > len(parts)
        callback = api.ggml_abort_callback(should_stop if has_prompt else 0)
        api.llama_set_abort_callback(ctx, callback, None)
        try:
            code = self._context.batch.run(ctx, tokens, positions, sequences, wanted)
        finally:
            api.llama_set_abort_callback(ctx, api.ggml_abort_callback(0), None)
        if code != 0:
            raise StoppedError if should_stop() else logs.not_decoded(code)
        n_vocab = self._context.vocabulary.n_tokens
        for (one, n), end in zip(parts, ends.tolist(), strict=True):
            one.n_done += n
            if one.outputs is Outputs.LAST and one.is_over:
                row = api.llama_get_logits_ith(ctx, end)
                # Copy the row, because the next batch overwrites it.
                one.slot._logits = np.ctypeslib.as_array(row, (n_vocab,)).copy()


def _reading_of(parts: Sequence[tuple[_Request, int]]) -> Reading:
    prompts = [(one, n) for one, n in parts if one.slot._is_prefilling]
    if not prompts:
        return Reading.NONE
    is_context = all(
        not one.gives_logits(n) and one.slot._is_context(one.position, n) for one, n in prompts
    )
    return Reading.CONTEXT if is_context else Reading.SOME


class BatchedSlot(Slot):
    """One slot of a context that has multiple sequences. Each slot has its own thread.

    Prefill uses either the context's mode or OFF, in which every row runs through all layers.
    """

    def __init__(self, batcher: Batcher, context: Context, sequence: int) -> None:
        super().__init__(context, sequence)
        self.cells = SequenceCells(context, sequence, batcher.locked)
        self._batcher = batcher
        self._mode = backend.get_mode(context.ctx)
        self._is_prefilling = False
        self._counted = Counters(0, 0)
        self._context_rows = range(0)
        self._deep_rows = np.empty(0, np.int32)
        self._logits = np.zeros(0, np.float32)
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
            self._add_counters(before)

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

    def _add_counters(self, before: Counters) -> None:
        """Add the rows computed since `before` to this slot's counters."""
        now = backend.get_counters(self.context.ctx)
        fields = zip(astuple(self._counted), astuple(now), astuple(before), strict=True)
        self._counted = Counters(*(known + new - old for known, new, old in fields))

    def set_full(self, sink_tokens: int, full_from: int) -> None:
        full_from = 0 if self._mode is Mode.OFF else full_from
        self._context_rows = range(sink_tokens, full_from)
        with self.locked():
            super().set_full(sink_tokens, full_from)

    def set_deep_rows(self, positions: np.ndarray) -> None:
        self._deep_rows = positions
        with self.locked():
            super().set_deep_rows(positions)

    def _is_context(self, first: int, n: int) -> bool:
        """Return True if all rows in [first, first + n) are context rows and none are deep."""
        if not (self._context_rows.start <= first and first + n <= self._context_rows.stop):
            return False
        start, end = np.searchsorted(self._deep_rows, (first, first + n))
        return bool(start == end)

    def decode(self, tokens: Sequence[int], first_position: int, outputs: Outputs) -> None:
        if self._batcher.holder == threading.get_ident():
            with super().overwriting() if self._is_overwriting else nullcontext():
                super().decode(tokens, first_position, outputs)
            if outputs is not Outputs.NONE:
                self._logits = super().logits.copy()
            return
        self._batcher.decode(_Request(self, tokens, first_position, outputs, current_should_stop()))

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
