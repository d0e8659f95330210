"""A model's worker threads and their job queue."""

import asyncio
import logging
import queue
import threading
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace

from pop_base.errors import PopError, StoppedError
from pop_local.engine.chat_messages import Chunk, TurnStats
from pop_local.engine.embedding import embedding
from pop_local.engine.llama.backend import Mode
from pop_local.engine.llama.interrupt import stopped_by
from pop_local.engine.model import PopModel
from pop_local.engine.prefill_scheduler import PrefillTurns, QueuedPrompt
from pop_local.engine.prompt.prompt import Prompt
from pop_local.engine.sequence import Sequence
from pop_local.engine.slot_scheduler import SlotScheduler
from pop_local.engine.turn_options import TurnOptions
from pop_local.server.api_errors import ApiError, client_gone, stopping
from pop_local.server.metrics import Metrics

log = logging.getLogger("pop_local.server")

# A model counts as hung if no answer makes progress for this long. Workers record progress between
# a graph's nodes, or between batches on a GPU.
_HUNG_S = 60.0
_POLL_S = 0.01
_LOG_S = 10.0  # interval between log lines while a prompt is read


@dataclass(frozen=True)
class Task:
    """An answer to generate or, if `embeds` is true, an embedding to compute.

    `reason` explains why the prompt is read in full (None if it is pruned). `cache_scope` is the
    owner of the cached rows ("" if they are shared). If `reports` is true, the worker reports
    prefill progress. If `alone` is true, no other job runs at the same time.
    """

    prompt: Prompt
    options: TurnOptions
    reason: str | None = None
    embeds: bool = False
    cache_scope: str = ""
    reports: bool = False
    alone: bool = False


class Job:
    """A queued or running task. A worker thread writes the answer, and the event loop reads it.

    `id` is random and unique. `queued_s` is the time in the queue (0 until the task runs). `read`
    contains the number of rows prefilled so far and the total number of rows to prefill. `read_s`
    is the prefill time so far. `place` returns a job's position in the queue.
    """

    def __init__(self, task: Task, place: Callable[["Job"], int] = lambda _: 0) -> None:
        self.task, self.id = task, uuid.uuid4().hex
        self.read, self.read_s = (0, 0), 0.0
        self._place = place
        self.queued_s = 0.0
        self.submitted_s = time.perf_counter()
        self.cancelled = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._arrived: deque[Chunk | Exception] = deque()
        self._awaited: asyncio.Future[None] = self._loop.create_future()
        self._is_awaited = False

    def cancel(self) -> None:
        """Cancel a queued job immediately, or stop a running job as soon as possible.

        Must be called from the event loop.
        """
        self.cancelled.set()
        if not self.queued_s:
            self._arrived.append(client_gone())
            self._wake()

    def put(self, item: Chunk | Exception) -> None:
        """Append a chunk or the error that ends the answer. Must be called from a worker thread."""
        self._arrived.append(item)
        if self._is_awaited or isinstance(item, Exception) or item.stats is not None:
            with suppress(RuntimeError):  # the event loop and its reader have ended
                self._loop.call_soon_threadsafe(self._wake)

    @property
    def progress(self) -> str:
        """The job's progress, as text for a stream's comments ("" while decoding)."""
        if place := self._place(self):
            return f"queued {place}"
        n_read, n_rows = self.read
        return f"read {n_read} of {n_rows}" if n_read < n_rows else ""

    @property
    def left_s(self) -> float | None:
        """Estimated time in seconds until the prompt has been read (None: unknown)."""
        n_read, n_rows = self.read
        return round((n_rows - n_read) * self.read_s / n_read, 1) if n_read else None

    def _wake(self) -> None:
        if not self._awaited.done():
            self._awaited.set_result(None)

    async def _wait(self, seconds: float | None) -> None:
        self._awaited = self._loop.create_future()
        await asyncio.wait([self._awaited], timeout=seconds)

    async def batches(
        self, pause_s: float, idle_s: float | None = None
    ) -> AsyncIterator[list[Chunk]]:
        """Yield lists of chunks that arrived together, or [] after `idle_s` seconds without chunks.

        Raises the exception that ended the answer, if any. For `pause_s` seconds after each batch,
        only the end of the answer wakes this coroutine. Frequent wakeups would slow a small
        model's decoding by 5%.
        """
        while True:
            self._is_awaited = True
            if not self._arrived:
                await self._wait(idle_s)
            self._is_awaited = False
            batch: list[Chunk] = []
            while self._arrived:
                item = self._arrived.popleft()
                if isinstance(item, Exception):
                    if batch:
                        yield batch
                    raise item
                batch.append(item)
            yield batch
            if batch and batch[-1].stats is not None:
                return
            if batch and not self._arrived:
                await self._wait(pause_s)


class Worker(threading.Thread):
    """The threads that run a model's jobs. Each sequence has one thread.

    The thread that holds `_turn` waits for the next job. Threads with jobs take turns reading
    prompts, but they decode their answers together.
    """

    def __init__(self, model: PopModel, metrics: Metrics, max_waiting: int) -> None:
        super().__init__(name="pop-local model", daemon=True)
        self._engine, self._slots = model.engine, SlotScheduler(model.engine)
        self._metrics, self._max_waiting = metrics, max_waiting
        self._waiting: deque[Job] = deque()
        self._lock = threading.Lock()
        self._turn = threading.Lock()
        self._prefills = PrefillTurns()
        # submit() and stop() each add an item. Signal handlers call stop(), so the queue must be
        # reentrant.
        self._calls: queue.SimpleQueue[None] = queue.SimpleQueue()
        # The time of each running job's last progress.
        self._seen_s: dict[Job, float] = {}
        self.running: dict[int, Job] = {}  # by slot
        self.latest_ids: dict[int, str] = {}  # the id of each slot's latest job
        self.stopping = threading.Event()

    def stop(self) -> None:
        """Stop running answers and reject queued jobs. May be called from any thread."""
        self.stopping.set()
        self._calls.put(None)

    def hung_s(self) -> float:
        """Return how many seconds ago a hung model last made progress (0 if it is not hung)."""
        # The most recent progress counts: jobs pause while another job has the model to itself.
        seen_s = max(self._seen_s.copy().values(), default=None)
        unseen_s = 0.0 if seen_s is None else time.monotonic() - seen_s
        return unseen_s if unseen_s > _HUNG_S else 0.0

    def require_open(self) -> None:
        """Raise ApiError if the server is stopping."""
        if self.stopping.is_set():
            raise stopping()

    def n_waiting(self) -> int:
        with self._lock:
            return len(self._still_waiting())

    def place(self, job: Job) -> int:
        """Return a job's position in the queue, starting at 1 (0 if it has left the queue)."""
        with self._lock:
            waiting = self._still_waiting()
            return waiting.index(job) + 1 if job in waiting else 0

    def _still_waiting(self) -> list[Job]:
        return [job for job in self._waiting if not job.cancelled.is_set()]

    def submit(self, task: Task) -> Job:
        """Queue a task. Raises ApiError if the queue is full or the server is stopping."""
        job = Job(task, self.place)
        with self._lock:
            self._waiting = deque(self._still_waiting())
            if len(self._waiting) >= self._max_waiting:
                message = f"the queue is full ({self._max_waiting} requests); try again later"
                raise ApiError(503, message)
            self._waiting.append(job)
        self._calls.put(None)
        self.require_open()
        return job

    def run(self) -> None:
        others = [
            threading.Thread(target=self._serve_all, name=f"{self.name} {number}", daemon=True)
            for number in range(2, len(self._engine.sequences) + 1)
        ]
        for thread in others:
            thread.start()
        self._serve_all()
        for thread in others:
            thread.join()
        while (job := self._next()) is not None:
            job.put(stopping())

    def _serve_all(self) -> None:
        while not self.stopping.is_set():
            with ExitStack() as turn:
                turn.enter_context(self._turn)
                self._wait()
                job = None if self.stopping.is_set() else self._next()
                if job is not None and not job.cancelled.is_set():
                    self._serve(job, turn.close)

    def _wait(self) -> None:
        """Wait for a job. While idle, refill cached prompts."""
        while not self.stopping.is_set():
            is_free = self._calls.empty() and not self._seen_s
            index = self._slots.refillable()
            if is_free and index is not None:
                self._refill(index)
            has_work = not self._seen_s and index is not None
            with suppress(queue.Empty):
                self._calls.get(timeout=0.0 if has_work else None)
                return

    def _refill(self, index: int) -> None:
        refiller = self._slots.sequence(index).refiller
        try:
            n_rows = refiller.refill(lambda: not self._calls.empty())
            self._metrics.refilled.inc(n_rows)
        except Exception:  # the failure must not stop the worker
            log.exception("catch-up failed and is now disabled")
            self._engine.set_refill(False)

    def _next(self) -> Job | None:
        with self._lock:
            return self._waiting.popleft() if self._waiting else None

    def _serve(self, job: Job, end_turn: Callable[[], None]) -> None:
        """Run a job and call `end_turn` as soon as another thread may start the next job."""
        job.queued_s = time.perf_counter() - job.submitted_s
        self._seen_s[job] = time.monotonic()
        self._metrics.queued.observe(job.queued_s)
        if job.task.alone and len(self._engine.sequences) > 1:
            self._wait_until_alone(job)
        else:
            end_turn()
        prompt, scope = job.task.prompt, job.task.cache_scope
        queued = QueuedPrompt(prompt, scope, len(prompt) - self._slots.n_cached(prompt, scope))
        self._prefills.begin(queued, lambda: self._is_over(job))
        index = self._slots.take(prompt, scope)
        sequence = self._slots.sequence(index)
        self.running[index], self.latest_ids[index] = job, job.id
        end: Chunk | Exception | None = None
        try:
            with sequence.cache.slot.working():
                sequence.states.set_scope(scope)
                # A mode change clears the KV cache if the cached rows depend on the mode.
                sequence.set_mode(Mode.CONTEXT if job.task.reason is None else Mode.OFF)
                if not job.task.options.repeatable:
                    self._slots.share(index, prompt)
                for chunk in self._answer(job, sequence, queued):
                    if chunk.stats is None:
                        job.put(chunk)
                    else:
                        self._metrics.answered(chunk.stats)
                        end = chunk
        except StoppedError:
            end = stopping()
        except Exception as error:
            if not isinstance(error, PopError):
                log.exception("an answer failed")
            end = error
        finally:
            self._prefills.end(queued)
            self._slots.give_back(index)
            del self._seen_s[job], self.running[index]
            # Sent after give_back: a lone client's next request must reuse this slot and its cells.
            if end is not None:
                job.put(end)
            if len(self._engine.sequences) > 1:
                self._calls.put(None)  # wakes the waiting thread, which may refill now

    def _is_over(self, job: Job) -> bool:
        return job.cancelled.is_set() or self.stopping.is_set()

    def _wait_until_alone(self, job: Job) -> None:
        """Wait until all other answers have finished, then clear all slots.

        If the job is stopped during the wait, the slots stay unchanged.
        """
        while len(self._seen_s) > 1 and not self._is_over(job):
            time.sleep(_POLL_S)
        if len(self._seen_s) == 1:
            self._slots.clear()

    def _answer(self, job: Job, sequence: Sequence, queued: QueuedPrompt) -> Iterator[Chunk]:
        def should_stop() -> bool:
            self._seen_s[job] = time.monotonic()
            return self._is_over(job)

        started_s = logged_s = time.perf_counter()
        task, cache = job.task, sequence.cache
        n_prompt = len(task.prompt)

        def has_read(n_done: int, n_rows: int) -> None:
            nonlocal logged_s
            now_s, n_cached = time.perf_counter(), n_prompt - n_rows
            job.read, job.read_s = (n_done, n_rows), now_s - started_s
            if task.reports:
                counts = {"total": n_prompt, "cache": n_cached, "processed": n_cached + n_done}
                job.put(Chunk("", progress={**counts, "time_ms": round(job.read_s * 1e3)}))
            keeps_turn = self._prefills.record(queued, n_rows - n_done)
            if n_done == n_rows:
                self._prefills.end(queued)
            elif not keeps_turn:
                with cache.slot.working(pauses=True):
                    self._prefills.wait(queued, lambda: self._is_over(job))
            if 0 < n_done < n_rows and now_s - logged_s >= _LOG_S:
                logged_s = now_s
                log.info("read %s of %s prompt tokens, about %s s left", *job.read, job.left_s)

        options = replace(task.options, should_stop=should_stop, on_prefill=has_read)
        if task.embeds:
            sequence.states.stash(task.prompt.n_equal)
            with stopped_by(should_stop):
                vector = embedding(cache, task.prompt.tokens)
            took_s = time.perf_counter() - started_s
            figures = TurnStats(n_prompt, 0, 0, n_prompt, took_s, took_s, 0, 0.0, "stop")
            yield Chunk("", figures, embedding=tuple(vector.tolist()))
            return
        for chunk in self._engine.answer(task.prompt, options, sequence):
            self._prefills.end(queued)
            yield chunk
