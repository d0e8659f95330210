"""The KV cache of one sequence: its rows, their key, and the rows that a prompt may reuse."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Protocol

import numpy as np

from pop_converter.base.errors import PopError
from pop_local.engine.cache.keys import FULL, conversion, opened_with, own_sha256
from pop_local.engine.cache.prompt_cache import PromptCache, SavedState
from pop_local.engine.cache.rows import CachedRows
from pop_local.engine.images.mmproj import NO_TOKEN, ImageChunk, Mmproj
from pop_local.engine.llama import backend
from pop_local.engine.llama.backend import Mode
from pop_local.engine.llama.batch import Outputs
from pop_local.engine.llama.slot import Slot
from pop_local.engine.prompt.prompt import Prompt


class ReadObserver(Protocol):
    """Observer of prompt reads."""

    def attach(self, cache: "KvCache") -> None:
        """Start to observe a cache."""

    def detach(self) -> None:
        """Stop observing the cache."""

    def read(self, start: int, tokens: Sequence[int]) -> None:
        """Handle tokens that were prefilled into the rows from `start` on."""

    def computed(self) -> None:
        """Handle computed rows, whose taps may be read (engine/llama/taps.py)."""


class KvCache:
    """The cached rows of a sequence, in one mode.

    Switching the boundary empties the cache. Switching the mode does so unless the model skips
    layers exactly, or the new mode is OFF and all rows equal the full model's.

    `exact`: first layer that context rows skip exactly (0: none). `images`: each image's key by
    its first row. `has_logits`: whether the last row's logits can be sampled from. `epoch` changes
    if a running answer cannot continue. `prompts` stores other prompts' states. `learner` observes
    reads.
    """

    def __init__(self, slot: Slot, vision: Mmproj | None = None) -> None:
        """`vision`: encoder of images, if the model has one."""
        context = slot.context
        self.context, self.vision, self.slot = context, vision, slot
        self.rows = CachedRows(context.n_ctx)
        self.images: dict[int, str] = {}
        self.n_tokens = 0
        self.has_logits = False
        self.keeps_states = False
        self.epoch = 0
        self.prompts: PromptCache | None = None
        self.learner: ReadObserver | None = None
        self.mode = self.slot.mode
        self.exact = self._exact_layer()
        self._tokens = np.zeros(context.n_ctx, dtype=np.intc)
        self._conversion = conversion(context.meta, context.source, context.sidecar)
        # Computed now, since the file may be deleted later.
        self._own_sha256 = own_sha256(context.source)

    @property
    def tokens(self) -> np.ndarray:
        """The cached tokens, int32 [n_tokens]; NO_TOKEN for rows of images."""
        return self._tokens[: self.n_tokens]

    @property
    def n_exact(self) -> int:
        """Number of leading rows that equal the full model's."""
        return self.n_tokens if self.exact else min(self.rows.n_exact, self.n_tokens)

    @property
    def position(self) -> int:
        """Position of the next row."""
        return int(self.rows.positions[self.n_tokens])

    # Keys

    @property
    def boundary(self) -> int:
        return backend.get_boundary(self.context.ctx)

    @property
    def can_switch(self) -> bool:
        """True if prompts can be pruned or can skip layers exactly."""
        return bool(self.boundary or self.exact)

    @property
    def model_key(self) -> str:
        """Key of the model, its options and its vision model, in any mode."""
        images = self.vision.key if self.vision else ""
        return f"model {self._own_sha256[:16]}{opened_with(self.context)}, images {images}"

    @property
    def key(self) -> str:
        """Key of the cached rows. Caches with different keys are never combined."""
        return FULL if 0 < self.n_tokens == self.n_exact else self.mode_key

    @property
    def mode_key(self) -> str:
        """Key of rows that are prefilled in the current mode."""
        if self.mode is Mode.OFF or self.exact:
            return FULL
        return f"mode {self.mode.name}, boundary {self.boundary}, {self._conversion}"

    @property
    def fit(self) -> str:
        """Name and length of the text that the projections were fitted on."""
        meta = self.context.meta
        if meta is None or meta.calibration is None:
            return "the model's own projections"
        return f"{meta.calibration.name}, {meta.calibration.n_tokens:,} tokens"

    def accepts(self, key: str) -> bool:
        """Return whether a read can continue after K/V of this key."""
        return key in (FULL, self.mode_key)

    def set_mode(self, mode: Mode) -> None:
        """Switch the mode, and empty the cache if its rows depend on it.

        Raises PopError if the model can neither prune nor skip layers exactly.
        """
        self.slot.require_idle()
        if mode is self.mode:
            return
        if mode is not Mode.OFF and not self.can_switch:
            raise PopError(
                f"{self.context.path} has no pruning keys",
                "convert it first",
                cause="not-converted",
                model=str(self.context.path),
            )
        if not self.exact:
            self._store_prompt()
        # Drop a full prompt before pruning, so that the user can compare both.
        is_its_own = mode is Mode.OFF and self.n_exact == self.n_tokens
        self.slot.set_mode(mode)
        self.mode = self.slot.mode
        if not (is_its_own or self.exact):
            self.clear()

    def set_boundary(self, layer: int) -> None:
        """Prune from another layer on, and empty the cache (see backend.set_boundary)."""
        self.slot.require_idle()
        backend.set_boundary(self.context.ctx, layer)
        self.exact = self._exact_layer()
        self.mode = self.slot.mode
        self.clear()

    def keep_states(self, keep: bool) -> None:
        """Store the boundary states of the following rows, or drop all states."""
        backend.set_snapshots(self.context.ctx, keep)
        self.keeps_states = keep
        if not keep:
            self.rows.has_state[:] = False

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """Detach the learner until exit, then restore the settings and empty the cache."""
        mode, boundary, keeps = self.mode, self.boundary, self.keeps_states
        learner = self.learner
        if learner is not None:
            learner.detach()
        try:
            yield
        finally:
            if learner is not None:
                learner.attach(self)
            self.set_boundary(boundary)
            self.set_mode(mode)
            self.keep_states(keeps)
            self.clear()

    def _exact_layer(self) -> int:
        """Return the first layer that context rows skip exactly (0: none, or pruned earlier)."""
        exact = backend.model_exact(self.context.model)
        return 0 if 0 < self.boundary < exact else exact

    # Forgetting

    def clear(self) -> None:
        """Drop all rows. Raises PopError during a batch."""
        self.slot.require_idle()
        with self.slot.locked():
            self.n_tokens = 0
            self.images.clear()
            self.has_logits = False
            self.rows.forget_from(0)
            self.slot.cells.clear()
            self.epoch += 1

    def truncate(self, n_rows: int) -> bool:
        """Keep the first `n_rows`, which must not end within an image, and drop the others.

        Returns False if the memory cannot do so. Raises PopError during a batch.
        """
        self.slot.require_idle()
        with self.slot.locked():
            kept = max(0, min(n_rows, self.n_tokens))
            if self._lacks_rows_before(kept) or not self._forget_from(kept):
                return False
            if kept < self.n_tokens:
                self.n_tokens = kept
                self.images = {start: key for start, key in self.images.items() if start < kept}
                self.rows.forget_from(kept)
                self.has_logits = False
                self.epoch += 1
            return True

    def forget_unfinished(self) -> None:
        """Drop the cells of a failed batch.

        Raises PopError if a recurrent state cannot be truncated, and empties the cache.
        """
        if not self._forget_from(self.n_tokens):
            self.clear()
            raise PopError("the recurrent state is ahead of the tokens", "read the prompt again")

    def _forget_from(self, row: int) -> bool:
        return self.slot.cells.truncate(int(self.rows.positions[row]))

    def _lacks_rows_before(self, row: int) -> bool:
        """Return whether a sliding window has dropped rows that this row attends to.

        llama.cpp truncates the cache even so (llama_kv_cache_iswa::seq_rm).
        """
        window = self.context.window
        seen_from = max(0, int(self.rows.positions[row]) - window + 1)
        return bool(window) and self.slot.cells.first > seen_from

    # Sharing

    def share(self, other: "KvCache", prompt: Prompt) -> None:
        """Share the longest prefix of a prompt that another sequence has cached.

        Does nothing if this cache has a prefix as long, or if the keys differ.
        """
        with self.slot.locked():
            n = prompt.whole(other.n_same(prompt))
            if n <= self.n_same(prompt) or other.mode_key != self.mode_key:
                return
            self.stash(prompt)
            self.clear()
            self.slot.cells.share(other.slot.cells, int(other.rows.positions[n]))
            self._tokens[:n] = other.tokens[:n]
            self.images = {start: key for start, key in other.images.items() if start < n}
            self.rows.share(other.rows, n)
            self.n_tokens = n

    def follow(self, other: "KvCache") -> None:
        """Take over the depth of shared rows that another sequence has refilled."""
        if self.rows.follow(other.rows, min(self.n_tokens, other.n_tokens)):
            self.has_logits = False

    # Saving

    def n_same(self, prompt: Prompt) -> int:
        """Return the length in rows of a prompt's cached prefix."""
        return prompt.n_equal(self.tokens, self.images)

    def save(self) -> SavedState:
        """Return the cache's state. Raises PopError as `forget_unfinished` does."""
        self.forget_unfinished()
        n = self.n_tokens
        return SavedState(
            key=self.key,
            model=self.model_key,
            tokens=self.tokens.copy(),
            is_full=self.rows.is_full[:n].copy(),
            positions=self.rows.positions[: n + 1].copy(),
            cells=self.slot.cells.state(),
            images=dict(self.images),
        )

    def restore(self, state: SavedState) -> None:
        """Replace the cache by a saved state.

        Raises PopError if it has another model, mode, boundary or conversion.
        """
        if state.model != self.model_key:
            raise PopError(
                "the saved state belongs to another model, or to other options",
                "read the prompt again",
            )
        if not self.accepts(state.key):
            raise PopError(
                f"the saved state has the key {state.key!r}, the model has {self.key!r}",
                "switch the model's mode first, or read the prompt again",
            )
        self.take_over(state)

    def take_over(self, state: SavedState) -> None:
        """Replace the cache by a state, regardless of its key.

        Raises PopError if the state does not fit, and empties the cache.
        """
        self.clear()
        n = state.n_tokens
        end = int(state.positions[n - 1]) + 1 if n else 0
        if not self.slot.cells.restore(state.cells) or self.slot.cells.end != end:
            self.clear()
            raise PopError(
                "the saved state does not fit this model and context", "read the prompt again"
            )
        self._tokens[:n] = state.tokens
        self.images = dict(state.images)
        self.rows.take_over(state.is_full, state.positions, is_exact=state.key == FULL)
        self.n_tokens = n

    def stash(self, prompt: Prompt) -> None:
        """Store the rows in the prompt cache if a prompt reuses less than half of them."""
        if 2 * self.n_same(prompt) < self.n_tokens:
            self._store_prompt()

    def restore_best(self, prompt: Prompt) -> None:
        """Restore the prompt cache's best state if it has a longer prefix of a prompt."""
        if self.prompts is None:
            return
        n_same = self.n_same(prompt)
        state, n_there = self.prompts.longest(self._prompts_key, prompt)
        if state is not None and n_there > n_same:
            with suppress(PopError):  # such as a larger context's state
                self.restore(state)

    @property
    def _prompts_key(self) -> str:
        return f"{self.model_key}, {self.mode_key}"

    def _store_prompt(self) -> None:
        if self.prompts is None or not self.n_tokens:
            return
        if self.slot.cells.state_size() <= self.prompts.capacity_bytes:
            with suppress(PopError):  # a recurrent state that is ahead of its tokens
                self.prompts.add(self._prompts_key, self.save())

    # Reading

    def make_room(self, n_rows: int) -> None:
        """Drop a failed batch's cells. Raises PopError unless `n_rows` more rows fit."""
        context = self.context
        self.slot.require_idle()
        context.require_usable()
        total = self.n_tokens + n_rows
        if total > context.n_ctx:
            larger = total + 256
            raise PopError(
                f"the context is too small: {total:,} tokens, the limit is {context.n_ctx:,}",
                f"open the model with n_ctx={larger}",
                cause="context-too-small",
                n_ctx=larger,
            )
        if 0 < context.n_positions < total:
            raise PopError(
                f"{total:,} tokens exceed the model's {context.n_positions:,} positions",
                "shorten the text",
            )
        self.forget_unfinished()

    def step(self, token: int) -> None:
        """Append an answer's token, which runs in full unless the mode is ALWAYS."""
        self.make_room(1)
        self.slot.begin_decode()
        self.append([token], Outputs.LAST, np.ones(1, bool))

    def append(self, tokens: Sequence[int], outputs: Outputs, full: np.ndarray) -> None:
        """Decode tokens after the last row. `full`: bool [n], the rows that run all layers.

        Raises PopError if they cannot be decoded.
        """
        self.has_logits = False
        first = self.position
        self.slot.decode(tokens, first, outputs)
        positions = first + np.arange(len(tokens) + 1, dtype=np.int32)
        self._record(tokens, positions, full, keeps_states=self.keeps_states)
        self.has_logits = outputs is not Outputs.NONE
        if self.learner is not None:
            self.learner.read(self.n_tokens - len(tokens), tokens)
            self.learner.computed()

    def append_all(self, tokens: Sequence[int], step: int) -> Iterator[int]:
        """Empty the cache and read a text in full, with each row's logits.

        Yields the number of rows of each decoded piece, up to `step`.
        """
        self.clear()
        step = min(step, self.context.n_batch)
        self.slot.begin_prefill()
        with self.slot.exclusive(), self.slot.interruptible():
            for start in range(0, len(tokens), step):
                piece = tokens[start : start + step]
                self.append(piece, Outputs.ALL, np.ones(len(piece), bool))
                self.slot.raise_if_stopped()
                yield len(piece)

    def append_image(self, image: ImageChunk, full: np.ndarray) -> float:
        """Encode an image and decode its rows. Returns the encoding time in seconds.

        Raises PopError if the image cannot be read.
        """
        assert self.vision is not None, "the vision model creates image chunks"
        start, n = self.n_tokens, image.n_rows
        self.has_logits = False
        first = self.position
        with self.slot.exclusive():
            encode_s = self.vision.decode(self.slot, image, first)
        positions = first + np.arange(n + 1, dtype=np.int32)
        if self.context.is_mrope:
            positions[1:-1] = first
        positions[-1] = first + image.n_pos
        # A deep pass is causal, so it cannot redo rows that attend to later rows.
        has_states = self.keeps_states and not image.is_mutual
        self._record([NO_TOKEN] * n, positions, full, keeps_states=has_states)
        self.images[start] = image.key
        return encode_s

    def _record(
        self,
        tokens: Sequence[int],
        positions: np.ndarray,
        full: np.ndarray,
        *,
        keeps_states: bool,
    ) -> None:
        if self.exact or self.mode is not Mode.CONTEXT:
            full = np.full(len(tokens), self.mode is not Mode.ALWAYS)
        start, end = self.n_tokens, self.n_tokens + len(tokens)
        self._tokens[start:end] = tokens
        self.rows.read(start, full, keeps_states=keeps_states, positions=positions)
        self.n_tokens = end  # last, since other threads look up rows concurrently
