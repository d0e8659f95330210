"""A sequence of a context, as the KV cache sees it: its cells, its batches, its logits."""

import ctypes
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from pop_local.engine.llama import backend, logs
from pop_local.engine.llama.backend import Counters, Mode, Reading
from pop_local.engine.llama.batch import Outputs
from pop_local.engine.llama.context import Context


class Slot:
    """The only sequence of a context; `SharedSlot` (batching.py) is one of several.

    For one thread at a time.
    """

    def __init__(self, context: Context, sequence: int = 0) -> None:
        self.context = context
        self.sequence = sequence
        self._api = backend.bindings()

    @property
    def _ctx(self) -> Any:
        return self.context.ctx

    @property
    def _memory(self) -> Any:
        return self._api.llama_get_memory(self._ctx)

    # Taking turns

    def work(self) -> AbstractContextManager[None]:
        """Let batches of other sequences wait for those of this one, from here to the end."""
        return nullcontext()

    def held(self) -> AbstractContextManager[None]:
        """Keep others from changing what is cached."""
        return nullcontext()

    def alone(self) -> AbstractContextManager[None]:
        """Have the context for this sequence alone: its batches are computed at once, and those of
        others wait."""
        return nullcontext()

    def watching(self) -> AbstractContextManager[None]:
        """Stop what is computed meanwhile where the caller wants it, see Interrupt."""
        return self.context.interrupt.watching(self._ctx)

    def check(self) -> None:
        """Raise why what was computed has been stopped, see Interrupt.check."""
        self.context.interrupt.check()

    def require_idle(self) -> None:
        """Raises PopError for whoever is asked whether to stop, in the midst of a batch."""
        self.context.interrupt.require_idle()

    # Batches

    @property
    def mode(self) -> Mode:
        return backend.get_mode(self._ctx)

    def set_mode(self, mode: Mode) -> None:
        """Switch it. Raises PopError for a mode that the model lacks."""
        backend.set_mode(self._ctx, mode)

    def begin_reading(self) -> None:
        """Batches are of a prompt from now on, and counted anew."""
        backend.reset_counters(self._ctx)
        backend.set_reading(self._ctx, Reading.SOME)

    def begin_step(self) -> None:
        """Batches are of an answer from now on."""
        backend.set_reading(self._ctx, Reading.NONE)

    @property
    def counters(self) -> Counters:
        """The rows that were read since `begin_reading`."""
        return backend.get_counters(self._ctx)

    def set_full(self, sink_tokens: int, full_from: int) -> None:
        """Say which rows are full: those below the sink's number of tokens, those from a position
        on; -1: none by position."""
        backend.set_sink(self._ctx, sink_tokens)
        backend.set_full_from(self._ctx, self.sequence, full_from)

    def set_deep_rows(self, positions: np.ndarray) -> None:
        """Run the next batch's rows at these ascending positions through all layers.

        They replace those of an earlier call.
        """
        backend.set_deep_rows(self._ctx, self.sequence, positions)

    def decode(self, tokens: Sequence[int], first_position: int, outputs: Outputs) -> None:
        """Decode tokens at consecutive positions.

        Raises PopError where llama.cpp refuses them; when interrupted, StoppedError or whatever
        Ctrl-C raises.
        """
        ctx = self._ctx
        logs.forget_errors()
        code = self.context.batch.decode(ctx, tokens, first_position, outputs, self.sequence)
        if code != 0:
            self.context.interrupt.check()
            raise logs.not_decoded(code)

    @property
    def logits(self) -> np.ndarray:
        """The logits of the last row that had some, float32 [n_vocab], until the next batch."""
        row = self._api.llama_get_logits_ith(self._ctx, -1)
        return np.ctypeslib.as_array(row, (self.context.n_vocab,))

    def run_deep(self, positions: np.ndarray, *, logits: bool) -> bool:
        """Run rows deep, see backend.run_deep."""
        return backend.run_deep(self._ctx, self.sequence, positions, logits=logits)

    # Cells

    @property
    def end(self) -> int:
        """The position after the last one in llama.cpp's memory."""
        with self.held():
            if not (memory := self._memory):
                return 0
            return int(self._api.llama_memory_seq_pos_max(memory, self.sequence)) + 1

    @property
    def first_kept(self) -> int:
        """The first position that is in it."""
        with self.held():
            return int(self._api.llama_memory_seq_pos_min(self._memory, self.sequence))

    def forget_from(self, position: int) -> bool:
        """Forget what is cached from this position on; False for a memory that cannot."""
        with self.held():
            if self.end <= position:
                return True
            return bool(self._api.llama_memory_seq_rm(self._memory, self.sequence, position, -1))

    def forget_all(self) -> None:
        """Forget all that is cached, whatever a state of strangers has put there."""
        if memory := self._memory:
            self._api.llama_memory_clear(memory, True)

    def share(self, other: "Slot", n_positions: int) -> None:
        """Have the first cells of another sequence as well (llama_memory_seq_cp)."""
        self._api.llama_memory_seq_cp(self._memory, other.sequence, self.sequence, 0, n_positions)

    def state_size(self) -> int:
        """Return the bytes of `state`, at most."""
        return int(self._api.llama_state_get_size(self._ctx))

    def state(self) -> bytes:
        """Return all that the context holds (llama_state_get_data).

        That of a sequence alone lacks rows that a sliding window has passed.
        """
        buffer = np.empty(self.state_size(), dtype=np.uint8)
        n = self._api.llama_state_get_data(self._ctx, bytes_at(buffer), buffer.size)
        return buffer[:n].tobytes()

    def restore(self, state: bytes) -> bool:
        """Take over a `state`; what is cached is undefined where that is False.

        Nothing is no state, though llama.cpp reads 0 bytes of it, as many as there are.
        """
        if not state:
            return False
        buffer = np.frombuffer(state, dtype=np.uint8).copy()
        return self._set_state(buffer) == buffer.size

    def _set_state(self, buffer: np.ndarray) -> int:
        return int(self._api.llama_state_set_data(self._ctx, bytes_at(buffer), buffer.size))


def bytes_at(buffer: np.ndarray) -> Any:
    return buffer.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
