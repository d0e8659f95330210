"""The KV cache of one sequence."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from pop_base.errors import PopError
from pop_local.engine.cache.checkpoints import Checkpoints
from pop_local.engine.cache.rows import CachedRows, n_leading
from pop_local.engine.cache.saved_state import FULL, SavedState
from pop_local.engine.cache.sequence_settings import SequenceSettings
from pop_local.engine.images.mmproj import NO_TOKEN, ImageChunk, Mmproj
from pop_local.engine.llama import backend
from pop_local.engine.llama.backend import Mode
from pop_local.engine.llama.batch import Outputs
from pop_local.engine.llama.slot import Slot


class KvCache:
    """The cached rows of one sequence.

    `images` maps an image's first row to the image's key. `has_logits`: whether the last row has
    logits to sample from. `epoch` increases after each change that stops answers in progress.
    """

    def __init__(self, slot: Slot, vision: Mmproj | None = None) -> None:
        context = slot.context
        self.context, self.slot = context, slot
        self.settings = SequenceSettings.of(slot)
        self.rows = CachedRows(context.n_ctx)
        self.checkpoints = Checkpoints(slot)
        self.images: dict[int, str] = {}
        self.n_tokens = 0
        self.has_logits = False
        self.epoch = 0
        self._vision = vision
        self._must_place = False
        self._tokens = np.zeros(context.n_ctx, dtype=np.intc)

    @property
    def tokens(self) -> np.ndarray:
        """The cached tokens, int32 [n_tokens], with NO_TOKEN for image rows."""
        return self._tokens[: self.n_tokens]

    @property
    def n_exact(self) -> int:
        """Number of leading rows that are identical to the full model's."""
        return self.n_tokens if self.settings.exact else min(self.rows.n_exact, self.n_tokens)

    # Forgetting

    def clear(self) -> None:
        """Drop all rows. Raises PopError if called during a batch."""
        with self.slot.locked():
            self.slot.require_idle()
            self.n_tokens = 0
            self._must_place = False
            self.images.clear()
            self.has_logits = False
            self.rows.forget_from(0)
            self.checkpoints.drop_after(0)
            self.slot.clear()
            self.epoch += 1

    def truncate(self, n_rows: int) -> bool:
        """Keep the first `n_rows` rows and drop the rest. The cut must not be inside an image.

        Returns False if the cells can be neither truncated nor restored from a checkpoint. Raises
        PopError if called during a batch.
        """
        with self.slot.locked():
            self.slot.require_idle()
            kept = max(0, min(n_rows, self.n_tokens))
            if self._lacks_rows_before(kept) or not self._forget_from(kept):
                if not kept or self.checkpoints.best(kept) != kept:
                    return False
                if not self.checkpoints.return_to(kept, int(self.rows.positions[kept])):
                    self.clear()
                    return False
            self.checkpoints.drop_after(kept)
            if kept < self.n_tokens:
                self.n_tokens = kept
                self.images = {start: key for start, key in self.images.items() if start < kept}
                self.rows.forget_from(kept)
                self.has_logits = False
                self.epoch += 1
            return True

    def forget_unfinished(self) -> None:
        """Drop the cells of a failed batch.

        If a recurrent state cannot be truncated, this method empties the cache and raises PopError.
        """
        if not self._forget_from(self.n_tokens):
            self.clear()
            raise PopError(
                "the recurrent state is ahead of the cached tokens", "submit the prompt again"
            )

    def _forget_from(self, row: int) -> bool:
        return self.slot.truncate(int(self.rows.positions[row]))

    def _lacks_rows_before(self, row: int) -> bool:
        """Return whether a sliding window has dropped rows that `row` attends to.

        llama.cpp does not check for dropped rows (llama_kv_cache_iswa::seq_rm). Recurrent models do
        not need this check, because llama.cpp never truncates their state.
        """
        window = 0 if self.context.is_recurrent else self.context.window
        seen_from = max(0, int(self.rows.positions[row]) - window + 1)
        return row > 0 and bool(window) and self.slot.first_position > seen_from

    # Replacing

    def share(self, other: "KvCache", n_rows: int) -> None:
        """Replace the rows with another sequence's first rows. The caller must lock the cells."""
        self.clear()
        tokens, n_positions = other.tokens[:n_rows], int(other.rows.positions[n_rows])
        is_copied = self.slot.share(other.slot, n_positions, tokens)
        self._tokens[:n_rows] = tokens
        self.images = {start: key for start, key in other.images.items() if start < n_rows}
        self.rows.share(other.rows, n_rows, (tokens != NO_TOKEN) if is_copied else None)
        self.n_tokens = n_rows

    def load(self, state: SavedState) -> None:
        """Replace the rows with a saved state, regardless of its key.

        If the state cannot be restored, this method empties the cache and raises PopError.
        """
        self.clear()
        n = state.n_tokens
        end = int(state.positions[n - 1]) + 1 if n else 0
        if not self.slot.restore(state.cells) or self.slot.end_position != end:
            self.clear()
            raise PopError(
                "the saved state does not match this model and context", "submit the prompt again"
            )
        self._must_place = not (self.context.window or self.context.is_recurrent)
        self._tokens[:n] = state.tokens
        self.images = dict(state.images)
        self.rows.take_over(state.is_full, state.positions, is_exact=state.key == FULL)
        if state.first_stale < n:
            # Rows before the stale ones have no boundary states, so a refill must decode them too.
            self.rows.n_exact = self.rows.first_stale = state.n_exact
        self.n_tokens = n

    # Reading

    def make_room(self, n_rows: int) -> None:
        """Drop a failed batch's cells. Raises PopError if `n_rows` more rows do not fit."""
        context = self.context
        self.slot.require_idle()
        context.require_usable()
        total = self.n_tokens + n_rows
        if total > context.n_ctx:
            larger = total + 256
            raise PopError(
                f"the context is too small for {total:,} tokens: the limit is {context.n_ctx:,}",
                f"open the model with n_ctx={larger}",
                cause="context-too-small",
                n_ctx=larger,
            )
        n_most = context.files.n_positions
        if 0 < n_most < total:
            raise PopError(
                f"the text has {total:,} tokens, but the model supports only {n_most:,} tokens",
                f"shorten the text to {n_most:,} tokens",
            )
        self.forget_unfinished()

    def append(self, tokens: Sequence[int], outputs: Outputs, full: np.ndarray) -> None:
        """Decode tokens and append their rows to the cache. `full`: bool [n], True for full rows.

        Raises PopError if the tokens cannot be decoded.
        """
        self.has_logits = False
        first = int(self.rows.positions[self.n_tokens])
        with self._placed(tokens):
            self.slot.decode(tokens, first, outputs)
        positions = first + np.arange(len(tokens) + 1, dtype=np.int32)
        self._record(tokens, positions, full, keeps_states=self.settings.keeps_states)
        self.has_logits = outputs is not Outputs.NONE

    def append_image(self, image: ImageChunk, full: np.ndarray) -> float:
        """Encode an image and decode its rows. Returns the encoding time in seconds.

        Raises PopError if the image cannot be read.
        """
        assert self._vision is not None, "image chunks need a vision model"
        start, n = self.n_tokens, image.n_rows
        self.has_logits = False
        first = int(self.rows.positions[self.n_tokens])
        with self.slot.exclusive(), self._placed([NO_TOKEN] * n):
            encode_s = self._vision.decode(self.slot, image, first)
        positions = first + np.arange(n + 1, dtype=np.int32)
        if self.context.is_mrope:
            positions[1:-1] = first
        positions[-1] = first + image.n_pos
        # A deep pass is causal, so it cannot redo rows that attend to later rows.
        has_states = self.settings.keeps_states and not image.is_mutual
        self._record([NO_TOKEN] * n, positions, full, keeps_states=has_states)
        self.images[start] = image.key
        return encode_s

    @contextmanager
    def _placed(self, tokens: Sequence[int]) -> Iterator[None]:
        """Make llama.cpp place new rows in empty cells after rows have been moved or restored.

        By default, llama.cpp searches for free cells from the first moved or restored row onward,
        and it reuses the cells of rows outside the sliding window.
        """
        if not (self._must_place and backend.bindings().llama_model_n_swa(self.context.model)):
            yield
            return
        first, sources = int(self.rows.positions[self.n_tokens]), np.full(len(tokens), -1, np.int32)
        self.slot.move_rows(first, sources, np.asarray(tokens, np.int32))
        with self.slot.overwriting():
            yield

    def _record(
        self, tokens: Sequence[int], positions: np.ndarray, full: np.ndarray, *, keeps_states: bool
    ) -> None:
        if self.settings.exact or self.settings.mode is not Mode.CONTEXT:
            full = np.full(len(tokens), self.settings.mode is not Mode.ALWAYS)
        start, end = self.n_tokens, self.n_tokens + len(tokens)
        self._tokens[start:end] = tokens
        self.rows.read(start, full, keeps_states=keeps_states, positions=positions)
        self.n_tokens = end  # set last, because other threads read it concurrently


def move_rows(cache: KvCache, tokens: np.ndarray, sources: np.ndarray) -> bool:
    """Replace the rows with an edited prompt's rows. No image may follow the first changed row.

    `tokens`, `sources`: int32 [n]. A source is the row index of the token's K/V, or -1 if
    `decode_again` must decode the token. Until the caller extends the cache, it ends before the
    first such token, so no unfinished rows are shared. Returns False if the rows cannot be moved.
    """
    start = n_leading(sources == np.arange(len(sources)))
    with cache.slot.locked():
        try:
            cache.slot.move_rows(start, sources[start:], tokens[start:])
        except PopError as error:
            has_invalid_rows = error.fields.get("status") == backend.INVALID_ROWS
            if has_invalid_rows and not cache.truncate(start):
                cache.clear()
            return False
        cache._must_place = True
        cache.n_tokens = len(tokens)  # `cache.tokens` ends there
        cache.tokens[:] = tokens
        cache.n_tokens = n_leading(sources >= 0)
        cache.images = {row: key for row, key in cache.images.items() if row < start}
        cache.rows.edit(sources)
        cache.checkpoints.drop_after(start)
        cache.has_logits = False
        cache.epoch += 1
        return True


def decode_again(
    cache: KvCache, start: int, tokens: np.ndarray, outputs: Outputs, full: np.ndarray
) -> None:
    """Re-decode rows in place, starting at row `start`. Call this function inside Slot.overwriting.

    `tokens`: int32 [n]. `full`: bool [n], True for full rows. Raises PopError if decoding fails.
    """
    cache.has_logits = False
    cache.slot.decode(tokens.tolist(), int(cache.rows.positions[start]), outputs)
    cache.rows.record_redone(start, full, keeps_states=cache.settings.keeps_states)
    cache.has_logits = outputs is not Outputs.NONE
