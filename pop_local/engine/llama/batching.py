"""Several sequences on one context, whose rows share batches (continuous batching).

Each sequence is used by a thread of its own, which blocks in `decode`. A batch is computed once all
that are at work wait for it. It has a row of each answer, and rows of the one prompt that is read.
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
from pop_local.engine.llama.context import Context
from pop_local.engine.llama.interrupt import whether_to_stop
from pop_local.engine.llama.slot import Slot, bytes_at

# Rows of a prompt beside answers, before it is known how long they take.
_FIRST_ROWS = 64
# For how long rows of a prompt may hold up an answer's token. Few of them take as long as many.
_WAIT_S = 0.25
# Answers keep this share of their speed while a prompt is read.
_SHARE = 0.52
_SMOOTHING = 0.3
_NO_COUNTERS = Counters(0, 0)


@dataclass(eq=False)
class _Request:
    """Rows that a sequence wants decoded; `n_done` of them are."""

    slot: "SharedSlot"
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
    def is_over(self) -> bool:
        return self.error is not None or self.n_left == 0

    def gives_logits(self, n: int) -> bool:
        """Whether the last of the next `n` rows does."""
        return self.outputs is Outputs.LAST and n == self.n_left

    def are_context(self, n: int) -> bool:
        """Whether none of the next `n` rows is full."""
        return not self.gives_logits(n) and self.slot.is_context(self.first + self.n_done, n)


class PrefillThrottle:
    """How many rows of a prompt go beside answers, by the time that earlier batches took.

    A batch takes as long as one of its answers alone, and something for having a prompt, and
    something for each of its rows. After one that took long come others of answers alone.
    """

    def __init__(self, n_batch: int) -> None:
        self._n_batch = n_batch
        self._step_s: dict[int, float] = {}
        self._row_s = 0.0
        self._prompt_s = 0.0
        self._owed_s = 0.0

    def rows_beside(self, n_answers: int) -> int:
        """Return so many rows that the answers keep half of their tokens per second."""
        if not n_answers:
            return self._n_batch
        if self._owed_s > 0:
            return 0
        if not (self._step_s and self._row_s):
            return min(_FIRST_ROWS, self._n_batch - n_answers)
        wait_s = max(_WAIT_S, self._step_of(n_answers)) - self._prompt_s
        return min(max(int(wait_s / self._row_s), _FIRST_ROWS), self._n_batch - n_answers)

    def took(self, n_answers: int, n_rows: int, seconds: float) -> None:
        if not n_answers:
            self._owed_s = 0.0
            if n_rows >= _FIRST_ROWS:
                self._row_s = _smoothed(self._row_s, seconds / n_rows)
            return
        if n_rows:
            rest_s = seconds - self._step_of(n_answers) - n_rows * self._row_s
            self._prompt_s = max(0.0, _smoothed(self._prompt_s, rest_s))
        else:
            self._step_s[n_answers] = _smoothed(self._step_s.get(n_answers), seconds)
        step_s = self._step_of(n_answers)
        owed_s = self._owed_s + _SHARE * seconds - step_s
        # Time that other programs took is not made up for: a prompt would wait for that.
        self._owed_s = min(max(0.0, owed_s), max(_WAIT_S, step_s))

    def _step_of(self, n_answers: int) -> float:
        """The seconds of a batch of so many answers, or of the nearest number that is known."""
        if not self._step_s:
            return 0.0
        return self._step_s[min(self._step_s, key=lambda n: abs(n - n_answers))]


def _smoothed(known: float | None, seconds: float) -> float:
    return known + _SMOOTHING * (seconds - known) if known else seconds


class Batcher:
    def __init__(self, context: Context) -> None:
        self._context = context
        self._api = backend.bindings()
        self._turn = threading.Condition(threading.RLock())
        self._n_at_work = 0
        self._wanted: list[_Request] = []
        self._throttle = PrefillThrottle(context.n_batch)
        self._in_batch: list[_Request] = []
        self._callback = self._api.ggml_abort_callback(lambda _: self._is_unwanted())
        self._holder = 0

    @contextmanager
    def work(self) -> Iterator[None]:
        """Have batches wait for one more sequence."""
        with self._turn:
            self._n_at_work += 1
        try:
            yield
        finally:
            with self._turn:
                self._n_at_work -= 1
                self._turn.notify_all()

    @property
    def is_held(self) -> bool:
        """Whether this thread has the context for itself."""
        return self._holder == threading.get_ident()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep others from computing, and from changing what is cached."""
        with self._turn:
            before, self._holder = self._holder, threading.get_ident()
            try:
                yield
            finally:
                self._holder = before

    def decode(self, request: _Request) -> None:
        """Have rows decoded. Raises what became of them."""
        with self._turn:
            self._wanted.append(request)
            while not request.is_over:
                if len(self._wanted) >= self._n_at_work:
                    self._compute()
                    self._turn.notify_all()
                else:
                    self._turn.wait()
        if request.error is not None:
            raise request.error

    def _compute(self) -> None:
        """Decode a batch of what is wanted, at most one request's rows of a prompt among them."""
        for request in self._wanted:
            try:
                if request.should_stop():
                    request.error = StoppedError()
            except BaseException as error:  # for whoever asks so, who may be in another thread
                request.error = error
        steps = [one for one in self._wanted if not (one.is_over or one.slot.is_reading)]
        prompts = [one for one in self._wanted if not one.is_over and one.slot.is_reading]
        try:
            if steps or prompts:
                self._decode(steps, prompts[:1])
        except BaseException as error:
            for request in (*steps, *prompts[:1]):
                request.error = error
        self._wanted = [request for request in self._wanted if not request.is_over]

    def _decode(self, steps: list[_Request], prompts: list[_Request]) -> None:
        ctx = self._context.ctx
        n_rows = self._throttle.rows_beside(len(steps))
        parts = [(one, 1) for one in steps]
        parts += [(one, min(one.n_left, n_rows)) for one in prompts if n_rows]
        before = backend.get_counters(ctx)
        backend.set_reading(ctx, _reading_of(parts))
        started_s = time.perf_counter()
        self._run(parts)
        n_read = sum(n for one, n in parts if one.slot.is_reading)
        self._throttle.took(len(steps), n_read, time.perf_counter() - started_s)
        self._count(prompts, len(steps), before)
        self._hand_out(parts)

    def _run(self, parts: list[tuple[_Request, int]]) -> None:
        ctx = self._context.ctx
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
        # Asked at each node, it waits for other threads of Python. A step of answers is short.
        has_prompt = len(tokens) > len(parts)
        asked = self._callback if has_prompt else self._api.ggml_abort_callback(0)
        self._api.llama_set_abort_callback(ctx, asked, None)
        try:
            code = self._context.batch.run(ctx, tokens, positions, sequences, wanted)
        finally:
            self._api.llama_set_abort_callback(ctx, self._api.ggml_abort_callback(0), None)
        if code != 0:
            raise StoppedError if self._is_unwanted() else logs.not_decoded(code)

    def _is_unwanted(self) -> bool:
        """Whether all whose rows are in the batch want it stopped."""
        return all(one.should_stop() for one in self._in_batch)

    def _count(self, prompts: list[_Request], n_steps: int, before: Counters) -> None:
        """Count a batch for the prompt in it; the rows of answers all were full."""
        now = backend.get_counters(self._context.ctx)
        for one in prompts:
            others = replace(before, n_full=before.n_full + n_steps)
            one.slot.counted = added(one.slot.counted, others, now)

    def _hand_out(self, parts: list[tuple[_Request, int]]) -> None:
        """Give each its logits, before the next batch overwrites them."""
        last = -1
        for one, n in parts:
            last += n
            one.n_done += n
            if one.outputs is Outputs.LAST and one.is_over:
                row = self._api.llama_get_logits_ith(self._context.ctx, last)
                one.slot.handed = np.ctypeslib.as_array(row, (self._context.n_vocab,)).copy()


def _reading_of(parts: Sequence[tuple[_Request, int]]) -> Reading:
    of_prompts = [(one, n) for one, n in parts if one.slot.is_reading]
    if not of_prompts:
        return Reading.NONE
    return Reading.CONTEXT if all(one.are_context(n) for one, n in of_prompts) else Reading.SOME


def added(known: Counters, before: Counters, now: Counters) -> Counters:
    return Counters(
        known.n_context + now.n_context - before.n_context,
        known.n_full + now.n_full - before.n_full,
        known.n_exact + now.n_exact - before.n_exact,
        n_marked=known.n_marked + now.n_marked - before.n_marked,
    )


class SharedSlot(Slot):
    """One of several sequences of a context, for one thread at a time; others use the others.

    All prompts are read in the context's one mode. In mode OFF a sequence has full rows alone.
    """

    def __init__(self, batcher: Batcher, context: Context, sequence: int) -> None:
        super().__init__(context, sequence)
        self._batcher = batcher
        self._mode = super().mode
        self.is_reading = False
        self.counted = _NO_COUNTERS
        self._context_rows = range(0)
        self._deep_rows = np.empty(0, np.int32)
        self.handed = np.zeros(0, np.float32)

    def work(self) -> AbstractContextManager[None]:
        return self._batcher.work()

    def held(self) -> AbstractContextManager[None]:
        return self._batcher.held()

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self.held(), super().watching():
            before = backend.get_counters(self._ctx)
            backend.set_reading(self._ctx, Reading.SOME)
            yield
            self.counted = added(self.counted, before, backend.get_counters(self._ctx))

    def watching(self) -> AbstractContextManager[None]:
        return nullcontext()

    def check(self) -> None:
        if whether_to_stop()():
            raise StoppedError

    def require_idle(self) -> None:
        """Nobody is asked in the midst of a batch but by the thread that computes it."""

    @property
    def mode(self) -> Mode:
        return self._mode

    def set_mode(self, mode: Mode) -> None:
        if mode not in (Mode.OFF, super().mode):
            raise PopError(f"one of several sequences cannot be read in mode {mode.name}")
        self._mode = mode

    def begin_reading(self) -> None:
        self.is_reading = True
        self.counted = _NO_COUNTERS

    def begin_step(self) -> None:
        self.is_reading = False

    @property
    def counters(self) -> Counters:
        return self.counted

    def set_full(self, sink_tokens: int, full_from: int) -> None:
        full_from = 0 if self._mode is Mode.OFF else full_from
        self._context_rows = range(sink_tokens, full_from)
        with self.held():
            super().set_full(sink_tokens, full_from)

    def set_deep_rows(self, positions: np.ndarray) -> None:
        self._deep_rows = positions
        with self.held():
            super().set_deep_rows(positions)

    def is_context(self, first: int, n: int) -> bool:
        """Return whether no row of [first, first + n) is full by its position or its token."""
        if not (self._context_rows.start <= first and first + n <= self._context_rows.stop):
            return False
        start, end = np.searchsorted(self._deep_rows, (first, first + n))
        return bool(start == end)

    def decode(self, tokens: Sequence[int], first_position: int, outputs: Outputs) -> None:
        if self._batcher.is_held:
            super().decode(tokens, first_position, outputs)
            if outputs is not Outputs.NONE:
                self.handed = super().logits.copy()
            return
        request = _Request(self, tokens, first_position, outputs, whether_to_stop())
        self._batcher.decode(request)

    @property
    def logits(self) -> np.ndarray:
        return self.handed

    def run_deep(self, positions: np.ndarray, *, logits: bool) -> bool:
        with self.held(), super().watching():
            return super().run_deep(positions, logits=logits)

    def forget_all(self) -> None:
        self.forget_from(0)

    def state_size(self) -> int:
        with self.held():
            return int(self._api.llama_state_seq_get_size(self._ctx, self.sequence))

    def state(self) -> bytes:
        """Return what the context holds of it (llama_state_seq_get_data)."""
        with self.held():
            buffer = np.empty(self.state_size(), dtype=np.uint8)
            size, at = buffer.size, bytes_at(buffer)
            n = self._api.llama_state_seq_get_data(self._ctx, at, size, self.sequence)
            return buffer[:n].tobytes()

    def _set_state(self, buffer: np.ndarray) -> int:
        with self.held():
            size, at = buffer.size, bytes_at(buffer)
            found = self._api.llama_state_seq_set_data(self._ctx, at, size, self.sequence)
            return int(found)


def shared_slots(context: Context, n: int) -> list[SharedSlot]:
    """Return the sequences of a context. Raises PopError for one that cannot have several."""
    # llama.cpp gives cells that a sequence's window has passed to others, also with swa_full: a
    # sequence cannot go back then, or be refilled.
    if context.is_recurrent or backend.bindings().llama_model_n_swa(context.model):
        raise PopError(
            "a model with recurrent layers or sliding windows reads one prompt at a time",
            "open it with n_parallel=1",
            cause="one-sequence",
        )
    if context.n_batch < 2 * n:
        raise PopError(
            f"batches of {context.n_batch} tokens are too small for {n} sequences",
            f"open the model with n_batch={2 * n} at least",
            cause="one-sequence",
        )
    batcher = Batcher(context)
    return [SharedSlot(batcher, context, sequence) for sequence in range(n)]
