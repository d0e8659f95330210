"""The KV cache of one sequence."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from pop_base.errors import PopError
from pop_local.engine.cache.align import n_leading
from pop_local.engine.cache.checkpoints import Checkpoints
from pop_local.engine.cache.saved_state import FULL, NO_STALE, SavedState
from pop_local.engine.cache.sequence_settings import SequenceSettings
from pop_local.engine.images.mmproj import NO_TOKEN, ImageChunk, Mmproj
from pop_local.engine.llama import backend
from pop_local.engine.llama.backend import Mode
from pop_local.engine.llama.batch import Outputs
from pop_local.engine.llama.slot import Slot


class KvCache:
    """The cached rows of one sequence.

    The first `n_exact` rows are identical to the full model's. A row is exact only if all earlier
    rows are exact, because the row attends to them. Full rows after a context row are not exact, so
    a refill recomputes them, too. A refill needs each row's boundary state (`has_state`).

    Rows from `first_stale` onward are stale, because they were computed before an earlier row was
    edited. A refill re-decodes stale rows, so they do not need boundary states.

    `positions`: int32 [n_ctx + 1], including the next row's position. An image's rows may share a
    position. `is_copied`: True for text rows that were copied from another sequence. Boundary
    states are not copied, so a refill also re-decodes copied rows. `images` maps an image's first
    row to the image's key. `has_logits`: whether the last row has logits to sample from. `epoch`
    increases after each change that stops answers in progress.
    """

    def __init__(
        self, slot: Slot, settings: SequenceSettings, vision: Mmproj | None = None
    ) -> None:
        context = slot.context
        self.context, self.slot, self.settings = context, slot, settings
        self.checkpoints = Checkpoints(slot)
        self.positions = np.zeros(context.n_ctx + 1, dtype=np.int32)
        self.is_full, self.has_state, self.is_copied = np.zeros((3, context.n_ctx), dtype=bool)
        self.first_stale = NO_STALE
        self.images: dict[int, str] = {}
        self.n_tokens = 0
        self.has_logits = False
        self.epoch = 0
        self._vision = vision
        self._must_place = False
        self._n_exact = 0
        self._tokens = np.zeros(context.n_ctx, dtype=np.intc)

    @property
    def tokens(self) -> np.ndarray:
        """The cached tokens, int32 [n_tokens], with NO_TOKEN for image rows."""
        return self._tokens[: self.n_tokens]

    @property
    def n_exact(self) -> int:
        """Number of leading rows that are identical to the full model's."""
        return self.n_tokens if self.settings.exact else min(self._n_exact, self.n_tokens)

    def n_stale(self, n_rows: int) -> int:
        """Return the number of stale rows among the first `n_rows`."""
        return max(0, n_rows - self.first_stale)

    # Forgetting

    def forget_from(self, n_rows: int) -> None:
        """Clear the flags of all rows after the first `n_rows`, but keep their cells."""
        self._n_exact = min(self._n_exact, n_rows)
        for flags in (self.is_full, self.has_state, self.is_copied):
            flags[n_rows:] = False
        if self.first_stale >= n_rows:
            self.first_stale = NO_STALE

    def clear(self) -> None:
        """Drop all rows. Raises PopError if called during a batch."""
        with self.slot.locked():
            self.slot.require_idle()
            self.n_tokens = 0
            self._must_place = False
            self.images.clear()
            self.has_logits = False
            self.forget_from(0)
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
            if self._lacks_rows_before(kept) or not self._truncate_cells(kept):
                if not kept or self.checkpoints.best(kept) != kept:
                    return False
                if not self.checkpoints.return_to(kept, int(self.positions[kept])):
                    self.clear()
                    return False
            self.checkpoints.drop_after(kept)
            if kept < self.n_tokens:
                self.n_tokens = kept
                self.images = {start: key for start, key in self.images.items() if start < kept}
                self.forget_from(kept)
                self.has_logits = False
                self.epoch += 1
            return True

    def forget_unfinished(self) -> None:
        """Drop the cells of a failed batch.

        If a recurrent state cannot be truncated, this method empties the cache and raises PopError.
        """
        if not self._truncate_cells(self.n_tokens):
            self.clear()
            raise PopError(
                "the recurrent state is ahead of the cached tokens", "submit the prompt again"
            )

    def _truncate_cells(self, row: int) -> bool:
        return self.slot.truncate(int(self.positions[row]))

    def _lacks_rows_before(self, row: int) -> bool:
        """Return whether a sliding window has dropped rows that `row` attends to.

        llama.cpp does not check for dropped rows (llama_kv_cache_iswa::seq_rm). Recurrent models do
        not need this check, because llama.cpp never truncates their state.
        """
        window = 0 if self.context.is_recurrent else self.context.window
        seen_from = max(0, int(self.positions[row]) - window + 1)
        return row > 0 and bool(window) and self.slot.first_position > seen_from

    # Replacing

    def share(self, other: "KvCache", n_rows: int) -> None:
        """Replace the rows with another sequence's first rows. The caller must lock the cells."""
        self.clear()
        tokens, n_positions = other.tokens[:n_rows], int(other.positions[n_rows])
        is_copied = self.slot.share(other.slot, n_positions, tokens)
        self._tokens[:n_rows] = tokens
        self.images = {start: key for start, key in other.images.items() if start < n_rows}
        self.positions[: n_rows + 1] = other.positions[: n_rows + 1]
        self.is_full[:n_rows] = other.is_full[:n_rows]
        if is_copied:
            self.is_copied[:n_rows] = tokens != NO_TOKEN
        else:
            self.has_state[:n_rows] = other.has_state[:n_rows]
        self._n_exact = min(other._n_exact, n_rows)
        if other.first_stale < n_rows:
            self.first_stale = other.first_stale
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
        self.positions[: n + 1] = state.positions
        self.is_full[:n] = state.is_full
        self._n_exact = n if state.key == FULL else 0
        if state.first_stale < n:
            # Rows before the stale ones have no boundary states, so a refill must decode them too.
            self._n_exact = self.first_stale = state.n_exact
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
        first = int(self.positions[self.n_tokens])
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
        first = int(self.positions[self.n_tokens])
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
        first, sources = int(self.positions[self.n_tokens]), np.full(len(tokens), -1, np.int32)
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
        self.positions[start : end + 1] = positions
        self.forget_from(start)
        self.is_full[start:end] = full
        self.has_state[start:end] = keeps_states and start < self.first_stale
        if self._n_exact == start and full.all():
            self._n_exact = end
        self.n_tokens = end  # set last, because other threads read it concurrently

    # Editing and refilling

    def edit(self, tokens: np.ndarray, sources: np.ndarray) -> bool:
        """Replace the rows with an edited prompt's. No image may follow the first changed row.

        `tokens`, `sources`: int32 [n]. A source is the row index of the token's K/V, or -1 if
        `decode_again` must decode the token. Until the caller extends the cache, it ends before the
        first such token, so no unfinished rows are shared. Returns False if the rows cannot move.
        """
        n = len(tokens)
        start = n_leading(sources == np.arange(n))
        with self.slot.locked():
            try:
                self.slot.move_rows(start, sources[start:], tokens[start:])
            except PopError as error:
                has_invalid_rows = error.fields.get("status") == backend.INVALID_ROWS
                if has_invalid_rows and not self.truncate(start):
                    self.clear()
                return False
            self._must_place = True
            self._tokens[:n] = tokens
            self.n_tokens = n_leading(sources >= 0)
            self.images = {row: key for row, key in self.images.items() if row < start}
            is_full = (sources >= 0) & self.is_full[sources]
            moved = start + np.flatnonzero(sources[start:] >= 0)
            self.forget_from(start)
            self.is_full[:n] = is_full
            self.positions[: n + 1] = np.arange(n + 1)
            if moved.size:
                self.first_stale = min(self.first_stale, int(moved[0]))
            self.checkpoints.drop_after(start)
            self.has_logits = False
            self.epoch += 1
            return True

    def decode_again(
        self, start: int, tokens: np.ndarray, outputs: Outputs, full: np.ndarray
    ) -> None:
        """Re-decode rows in place, starting at row `start`, inside Slot.overwriting.

        `tokens`: int32 [n]. `full`: bool [n], True for full rows. Raises PopError on failure.
        """
        self.has_logits = False
        self.slot.decode(tokens.tolist(), int(self.positions[start]), outputs)
        end = start + len(full)
        self.is_full[start:end] = full
        self.has_state[start:end] = self.settings.keeps_states and end <= self.first_stale
        if start <= self._n_exact and full.all():
            self._n_exact = max(self._n_exact, end)
            self.first_stale = max(self.first_stale, end)
        self.has_logits = outputs is not Outputs.NONE

    def record_deep_pass(self, rows: range) -> None:
        """Record that a deep pass has run the skipped layers for `rows`."""
        self.is_full[rows.start : rows.stop] = True
        if rows.start <= self._n_exact:
            self._n_exact = max(self._n_exact, rows.stop)
