"""The KV cache of a context: whose its rows are, what is known of each, and what may be reused."""

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


class Watcher(Protocol):
    """Who follows what is read."""

    def attach(self, cache: "KvCache") -> None:
        """Callbacks this cache from now on."""

    def detach(self) -> None:
        """Callbacks it no longer."""

    def read(self, start: int, tokens: Sequence[int]) -> None:
        """Tokens were read, the first of them as row `start`."""

    def computed(self) -> None:
        """Rows were computed, which taps may show (engine/llama/taps.py)."""


class KvCache:
    """The rows that a sequence of a context has cached, in one mode.

    The cache belongs to one mode and boundary, and switching either empties it. It stays where it
    is the full model's own: where rows leave exactly, or all of them got their depth.

    `exact`: the layer from which on context rows leave exactly, 0 for none. `images`: the key of
    each image by its first row. `has_logits`: whether the last row's logits can be sampled from.
    `epoch` changes where a running answer cannot go on. `prompts` keeps other prompts' states.
    `learner` follows what is read.
    """

    def __init__(self, slot: Slot, vision: Mmproj | None = None) -> None:
        """`vision`: what pictures are read with."""
        context = slot.context
        self.context, self.vision, self.slot = context, vision, slot
        self.rows = CachedRows(context.n_ctx)
        self.images: dict[int, str] = {}
        self.n_tokens = 0
        self.has_logits = False
        self.keeps_states = False
        self.epoch = 0
        self.prompts: PromptCache | None = None
        self.learner: Watcher | None = None
        self.mode = self.slot.mode
        self.exact = self._exact_now()
        self._tokens = np.zeros(context.n_ctx, dtype=np.intc)
        self._conversion = conversion(context.meta, context.source, context.sidecar)
        # The file has been read by now; later it may have gone.
        self._own_sha256 = own_sha256(context.source)

    @property
    def tokens(self) -> np.ndarray:
        """The cached tokens, int32 [n_tokens]; NO_TOKEN for rows of images."""
        return self._tokens[: self.n_tokens]

    @property
    def n_exact(self) -> int:
        """How many cached rows, from the first on, are the full model's own."""
        return self.n_tokens if self.exact else min(self.rows.n_exact, self.n_tokens)

    @property
    def position(self) -> int:
        """The position of the next row."""
        return int(self.rows.positions[self.n_tokens])

    # Keys

    @property
    def boundary(self) -> int:
        return backend.get_boundary(self.context.ctx)

    @property
    def can_switch(self) -> bool:
        """Whether prompts can be pruned, or can skip layers exactly."""
        return bool(self.boundary or self.exact)

    @property
    def model_key(self) -> str:
        """Tells its K/V from those of other models, whatever is pruned."""
        images = self.vision.key if self.vision else ""
        return f"model {self._own_sha256[:16]}{opened_with(self.context)}, images {images}"

    @property
    def key(self) -> str:
        """The key of what is cached besides its tokens; K/V of two keys are never mixed."""
        return FULL if 0 < self.n_tokens == self.n_exact else self.mode_key

    @property
    def mode_key(self) -> str:
        """The key of what is read now, whatever is cached."""
        if self.mode is Mode.OFF or self.exact:
            return FULL
        return f"mode {self.mode.name}, boundary {self.boundary}, {self._conversion}"

    @property
    def fit(self) -> str:
        """The text that the projections of pruned rows were fitted on, with its tokens."""
        meta = self.context.meta
        if meta is None or meta.calibration is None:
            return "own projections"
        return f"{meta.calibration.name}, {meta.calibration.n_tokens:,} tokens"

    def accepts(self, key: str) -> bool:
        """Whether reading can go on after K/V of this key: its own, or the full model's."""
        return key in (FULL, self.mode_key)

    def set_mode(self, mode: Mode) -> None:
        """Switch pruning, or exact skipping, and empty the cache if it is not the same in both.

        Raises PopError for a model that has neither.
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
            self._keep()
        # A prompt read in full is read again with pruning, so that the two can be compared.
        is_its_own = mode is Mode.OFF and self.n_exact == self.n_tokens
        self.slot.set_mode(mode)
        self.mode = self.slot.mode
        if not (is_its_own or self.exact):
            self.clear()

    def set_boundary(self, layer: int) -> None:
        self.slot.require_idle()
        backend.set_boundary(self.context.ctx, layer)
        self.exact = self._exact_now()
        self.mode = self.slot.mode
        self.clear()

    def keep_states(self, keep: bool) -> None:
        """Keep the state at the boundary of each row from now on, or drop all."""
        backend.set_snapshots(self.context.ctx, keep)
        self.keeps_states = keep
        if not keep:
            self.rows.has_state[:] = False

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """Switch back, at the end, whatever is switched meanwhile, and empty the cache."""
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

    def _exact_now(self) -> int:
        """The layer at which context tokens leave, exactly; 0: none, or they are pruned earlier."""
        exact = backend.model_exact(self.context.model)
        return 0 if 0 < self.boundary < exact else exact

    # Forgetting

    def clear(self) -> None:
        """Forget everything. Raises PopError while a batch is computed."""
        self.slot.require_idle()
        with self.slot.locked():
            self.n_tokens = 0
            self.images.clear()
            self.has_logits = False
            self.rows.forget_from(0)
            self.slot.cells.clear()
            self.epoch += 1

    def truncate(self, n_rows: int) -> bool:
        """Forget all rows but the first `n_rows`, which end with no part of an image.

        Returns False for a memory that cannot do so. Raises PopError while a batch is computed.
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
        """Forget what was decoded of a batch that failed.

        Raises PopError where a recurrent state cannot go back; the cache is empty then.
        """
        if not self._forget_from(self.n_tokens):
            self.clear()
            raise PopError("the state is ahead of the tokens that were read", "read them again")

    def _forget_from(self, row: int) -> bool:
        return self.slot.cells.truncate(int(self.rows.positions[row]))

    def _lacks_rows_before(self, row: int) -> bool:
        """Whether a sliding window has dropped rows that this one attends to.

        llama.cpp forgets the rows from there on all the same (llama_kv_cache_iswa::seq_rm).
        """
        window = self.context.window
        seen_from = max(0, int(self.rows.positions[row]) - window + 1)
        return bool(window) and self.slot.cells.first > seen_from

    # Sharing

    def share(self, other: "KvCache", prompt: Prompt) -> None:
        """Have the rows of another sequence that a prompt begins with, if they are more than here.

        Both have them then, and nothing is computed. Nothing is done where they are of another key.
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
        """Rows of another sequence were redone; those that this one shares are its own, too."""
        if self.rows.follow(other.rows, min(self.n_tokens, other.n_tokens)):
            self.has_logits = False

    # Saving

    def n_same(self, prompt: Prompt) -> int:
        """Count the rows of a prompt, from the first on, that are cached."""
        return prompt.n_equal(self.tokens, self.images)

    def save(self) -> SavedState:
        """Return all that is cached. Raises PopError as `forget_unfinished`."""
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
        """Take over a saved cache.

        Raises PopError for another model, mode, boundary or conversion.
        """
        if state.model != self.model_key:
            raise PopError(
                "the saved state belongs to another model, or one that was opened otherwise",
                "read the prompt again",
            )
        if not self.accepts(state.key):
            raise PopError(
                f"the saved state belongs to {state.key}, the model is set to {self.key}",
                "switch the model first, or read the prompt again",
            )
        self.take_over(state)

    def take_over(self, state: SavedState) -> None:
        """Take over the state of a model of the same key.

        Raises PopError when it does not fit; the cache is empty then.
        """
        self.clear()
        n = state.n_tokens
        end = int(state.positions[n - 1]) + 1 if n else 0
        if not self.slot.cells.restore(state.cells) or self.slot.cells.end != end:
            self.clear()
            raise PopError("the saved state does not fit this model and context")
        self._tokens[:n] = state.tokens
        self.images = dict(state.images)
        self.rows.take_over(state.is_full, state.positions, is_exact=state.key == FULL)
        self.n_tokens = n

    def stash(self, prompt: Prompt) -> None:
        """Give the rows to the prompt cache if a prompt has less than half, as in llama-server."""
        if 2 * self.n_same(prompt) < self.n_tokens:
            self._keep()

    def restore_best(self, prompt: Prompt) -> None:
        """Take from the prompt cache what has more in common with a prompt than this one has."""
        if self.prompts is None:
            return
        n_same = self.n_same(prompt)
        state, n_there = self.prompts.longest(self._prompts_key, prompt)
        if state is not None and n_there > n_same:
            with suppress(PopError):  # of a larger context, say; the cache is empty then
                self.restore(state)

    @property
    def _prompts_key(self) -> str:
        return f"{self.model_key}, {self.mode_key}"

    def _keep(self) -> None:
        if self.prompts is None or not self.n_tokens:
            return
        if self.slot.cells.state_size() <= self.prompts.capacity_bytes:
            with suppress(PopError):  # a state that is ahead of its tokens is of no use
                self.prompts.add(self._prompts_key, self.save())

    # Reading

    def make_room(self, n_rows: int) -> None:
        """Raise PopError unless so many more rows fit."""
        context = self.context
        self.slot.require_idle()
        context.require_usable()
        total = self.n_tokens + n_rows
        if total > context.n_ctx:
            larger = total + 256
            raise PopError(
                f"{total} tokens do not fit the context of {context.n_ctx}",
                f"open the model with a larger one: n_ctx={larger}",
                cause="context-too-small",
                n_ctx=larger,
            )
        if 0 < context.n_positions < total:
            raise PopError(
                f"{total} tokens are more than the {context.n_positions} positions of the model",
                "give a shorter text",
            )
        self.forget_unfinished()

    def step(self, token: int) -> None:
        """Append a token of an answer, which runs all layers unless the mode is ALWAYS."""
        self.make_room(1)
        self.slot.begin_decode()
        self.append([token], Outputs.LAST, np.ones(1, bool))

    def append(self, tokens: Sequence[int], outputs: Outputs, full: np.ndarray) -> None:
        """Decode tokens after the last row; `full`: bool [n], which rows run all layers.

        Raises PopError where they cannot be decoded.
        """
        self.has_logits = False
        first = self.position
        self.slot.decode(tokens, first, outputs)
        positions = first + np.arange(len(tokens) + 1, dtype=np.int32)
        self._have_read(tokens, positions, full, keeps_states=self.keeps_states)
        self.has_logits = outputs is not Outputs.NONE
        if self.learner is not None:
            self.learner.read(self.n_tokens - len(tokens), tokens)
            self.learner.computed()

    def append_all(self, tokens: Sequence[int], step: int) -> Iterator[int]:
        """Read a text in the place of all that is cached, each row in full and with its outputs.

        Gives the number of rows of each piece, at most `step`, once it is decoded.
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
        """Encode an image and decode its rows; returns the seconds that encoding took.

        Raises PopError where it cannot be read.
        """
        assert self.vision is not None, "the vision model made the image"
        start, n = self.n_tokens, image.n_rows
        self.has_logits = False
        first = self.position
        with self.slot.exclusive():
            encode_s = self.vision.decode(self.slot, image, first)
        positions = first + np.arange(n + 1, dtype=np.int32)
        if self.context.is_mrope:
            positions[1:-1] = first
        positions[-1] = first + image.n_pos
        # A row that has seen later ones is not what a deep pass would make of it.
        has_states = self.keeps_states and not image.is_mutual
        self._have_read([NO_TOKEN] * n, positions, full, keeps_states=has_states)
        self.images[start] = image.key
        return encode_s

    def _have_read(
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
        self.n_tokens = end  # last, as other sequences look for rows meanwhile
