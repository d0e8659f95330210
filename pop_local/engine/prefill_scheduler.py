"""Before each prompt chunk, choose which queued prompt to read next."""

import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pop_local.engine.prompt.prompt import Prompt

# Chunks of other prompts before the oldest prompt gets a turn. We count chunks instead of rows,
# because answering a short prompt takes longer than reading it.
AGE_CHUNKS = 2
SHORT_ROWS = 256  # prompts with up to this many rows left are read in order of arrival
# A prompt waits for another prompt that is about to read at least this many rows for both.
MIN_SHARED = 256
_POLL_S = 0.01


@dataclass(eq=False)
class QueuedPrompt:
    """A prompt that is being read or is waiting for its first turn.

    `scope`: the owner of the prompt's rows. `n_left`: the number of rows left to read.
    `has_started`: whether the prompt has had a turn.
    """

    prompt: Prompt
    scope: str
    n_left: int
    has_started: bool = False

    @property
    def n_read(self) -> int:
        return len(self.prompt) - self.n_left

    def should_wait_for(self, other: "QueuedPrompt") -> bool:
        """Return whether `other` is about to read many rows that this prompt can share."""
        if self.has_started or not other.has_started or self.scope != other.scope:
            return False
        images = {row: image.key for row, image in other.prompt.images.items()}
        n_common = self.prompt.n_equal(np.asarray(other.prompt.tokens, np.intc), images)
        return n_common - max(self.n_read, other.n_read) >= MIN_SHARED


class PrefillScheduler:
    """A scheduler that determines the order in which queued prompts are read.

    The prompt with the fewest unread rows goes first. Among prompts with up to 256 unread rows, the
    oldest goes first. The oldest prompt gets a turn after `AGE_CHUNKS` chunks of other prompts.
    """

    def __init__(self) -> None:
        self._prompts: list[QueuedPrompt] = []  # oldest first
        self._n_passed = 0  # chunks read since the oldest prompt's last chunk

    def add(self, prompt: QueuedPrompt) -> None:
        self._prompts.append(prompt)

    def remove(self, prompt: QueuedPrompt) -> None:
        """Remove a prompt if it is still queued."""
        if self._prompts[:1] == [prompt]:
            self._n_passed = 0
        self._prompts = [queued for queued in self._prompts if queued is not prompt]

    def record(self, prompt: QueuedPrompt, n_left: int) -> None:
        """Record that a prompt has `n_left` rows left to read."""
        if self._prompts[:1] == [prompt]:
            self._n_passed = 0
        elif prompt.has_started:  # otherwise, nothing has been read yet
            self._n_passed += 1
        prompt.n_left, prompt.has_started = n_left, True

    def next(self) -> QueuedPrompt | None:
        """Return the prompt that gets the next turn, or None if the queue is empty."""
        if not self._prompts:
            return None
        shortest = min(self._prompts, key=lambda prompt: max(prompt.n_left, SHORT_ROWS))
        best = self._prompts[0] if self._n_passed >= AGE_CHUNKS else shortest
        return next((prompt for prompt in self._prompts if best.should_wait_for(prompt)), best)


class PrefillTurns:
    """A lock for threads that read prompts. The scheduler decides which thread goes next."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._scheduler = PrefillScheduler()
        self._current: QueuedPrompt | None = None

    def begin(self, prompt: QueuedPrompt, is_over: Callable[[], bool]) -> None:
        """Queue a prompt and wait until its turn comes or `is_over` returns True."""
        with self._changed:
            self._scheduler.add(prompt)
            self._current = self._current or self._scheduler.next()
        self.wait(prompt, is_over)

    def wait(self, prompt: QueuedPrompt, is_over: Callable[[], bool]) -> None:
        """Wait until a prompt's turn comes or `is_over` returns True."""
        with self._changed:
            while self._current is not prompt and not is_over():
                self._changed.wait(_POLL_S)

    def record(self, prompt: QueuedPrompt, n_left: int) -> bool:
        """Record the end of a chunk. Returns whether the prompt keeps its turn."""
        with self._changed:
            self._scheduler.record(prompt, n_left)
            self._pass_on(prompt)
            return self._current is prompt

    def end(self, prompt: QueuedPrompt) -> None:
        """Remove a prompt from the queue and start the next turn."""
        with self._changed:
            self._scheduler.remove(prompt)
            self._pass_on(prompt)

    def _pass_on(self, prompt: QueuedPrompt) -> None:
        if self._current is prompt:
            self._current = self._scheduler.next()
            self._changed.notify_all()
