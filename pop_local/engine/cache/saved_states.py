"""Save and restore a KV cache's rows, and share them with other sequences."""

from collections.abc import Mapping
from contextlib import suppress

import numpy as np

from pop_base.errors import PopError
from pop_local.engine.cache.cache_keys import conversion, model_key
from pop_local.engine.cache.kv_cache import KvCache
from pop_local.engine.cache.prompt_cache import PromptCache
from pop_local.engine.cache.saved_state import FULL, CountReusable, SavedState
from pop_local.engine.images.mmproj import Mmproj
from pop_local.engine.llama.backend import Mode
from pop_local.engine.prompt.prompt import Prompt

# If a prompt would drop at least this many trailing rows, they are stored in case another
# conversation needs them. Reading 256 rows takes longer than copying the state.
MIN_LOST = 256


class SavedStates:
    """The saved states of a KV cache's prompts. `prompts`: the prompt cache, if any.

    `scope`: the owner of the cached rows, or "" if shared. Prompts never reuse another owner's
    rows. Otherwise, response times and cached-token counts would reveal that owner's prompts.
    """

    def __init__(
        self, cache: KvCache, prompts: PromptCache | None, vision: Mmproj | None = None
    ) -> None:
        self.cache, self.prompts, self._vision = cache, prompts, vision
        self.scope = ""
        files = cache.context.files
        # The keys contain hashes, which are computed now because the files may be deleted later.
        self._conversion = conversion(files.meta, files.source, files.sidecar)
        self._model_key = model_key(cache.context)

    def set_scope(self, scope: str) -> None:
        """Set the owner. If the owner changes, store the cached rows and empty the KV cache."""
        if scope != self.scope and self.cache.n_tokens:
            self.store()
            self.cache.clear()
        self.scope = scope

    # Keys

    @property
    def model_key(self) -> str:
        """Key for the model, its options, and its vision encoder, regardless of mode."""
        return f"{self._model_key}, images {self._vision.key if self._vision else ''}"

    @property
    def mode_key(self) -> str:
        """Key for rows prefilled in the current mode."""
        settings = self.cache.settings
        if settings.mode is Mode.OFF or settings.exact:
            return FULL
        return f"mode {settings.mode.name}, boundary {settings.boundary}, {self._conversion}"

    @property
    def key(self) -> str:
        """Key for the cached rows. Caches with different keys are never combined."""
        return FULL if 0 < self.cache.n_tokens == self.cache.n_exact else self.mode_key

    # One state

    def n_same(self, prompt: Prompt) -> int:
        """Return how many of a prompt's leading rows are cached."""
        return prompt.n_equal(self.cache.tokens, self.cache.images)

    def save(self) -> SavedState:
        """Return a copy of the state. Raises PopError if KvCache.forget_unfinished fails."""
        cache = self.cache
        with cache.context.locked():
            cache.forget_unfinished()
            n = cache.n_tokens
            return SavedState(
                key=self.key,
                model=self.model_key,
                tokens=cache.tokens.copy(),
                is_full=cache.is_full[:n].copy(),
                positions=cache.positions[: n + 1].copy(),
                cells=cache.slot.state(),
                images=dict(cache.images),
                first_stale=cache.first_stale,
                n_exact=cache.n_exact,
            )

    def restore(self, state: SavedState) -> None:
        """Replace the cached rows with a saved state.

        Raises PopError if the state does not fit or was saved with a different model or mode.
        """
        if state.model != self.model_key:
            raise PopError(
                "the state was saved with a different model or different options",
                "submit the prompt again",
            )
        if state.key not in (FULL, self.mode_key):
            raise PopError(
                f"the state was computed in {state.key}, but the model is in {self.mode_key}",
                "switch the model's mode first, or submit the prompt again",
            )
        with self.cache.context.locked():
            self.cache.load(state)

    # The prompt cache

    def stash(self, count: CountReusable, end: CountReusable | None = None) -> None:
        """Store the rows in the prompt cache if reading a prompt would drop many of them.

        Rows are stored if fewer than half of them are reusable, or if at least MIN_LOST trailing
        rows would be lost. `end` returns the index after the last reusable row (default: `count`).
        """
        tokens, images = self.cache.tokens, self.cache.images
        n_lost = len(tokens) - (end or count)(tokens, images)
        if n_lost >= MIN_LOST or 2 * count(tokens, images) < len(tokens):
            self.store()

    def store(self) -> None:
        """Store the rows in the prompt cache if one exists and the state is not too large."""
        if self.prompts is None or not self.cache.n_tokens:
            return
        if self.prompts.accepts(self.cache.slot.state_size()):
            with suppress(PopError):  # the recurrent state is ahead of the tokens
                self.prompts.add(self._prompts_key, self.save())

    def restore_best(self, count: CountReusable) -> None:
        """Restore the prompt cache's best state if its reusable rows outnumber the KV cache's."""
        if self.prompts is None:
            return
        tokens, images = self.cache.tokens, self.cache.images
        checkpoints, window = self.cache.checkpoints, self.cache.context.window

        def count_kept(tokens: np.ndarray, images: Mapping[int, str]) -> int:
            """Return the number of rows that a prompt can reuse without a checkpoint."""
            n = count(tokens, images)
            is_kept = not checkpoints.is_needed or n == len(tokens) or len(tokens) <= window
            return n if is_kept else 0

        n_returned = checkpoints.best(count(tokens, images))
        n_here = max(count_kept(tokens, images), n_returned)
        state = self.prompts.best(self._prompts_key, count_kept, n_here)
        if state is not None:
            with suppress(PopError):  # for example, the state was saved from a larger context
                self.restore(state)

    @property
    def _prompts_key(self) -> str:
        owner = f", client {self.scope}" if self.scope else ""
        return f"{self.model_key}, {self.mode_key}{owner}"

    # Other sequences

    def share(self, other: "SavedStates", prompt: Prompt) -> None:
        """Share the rows of the longest prompt prefix that another sequence has cached.

        Does nothing if this sequence already has these rows or if the mode keys differ.
        """
        with self.cache.slot.locked():
            n = prompt.whole(other.n_same(prompt))
            if n <= self.n_same(prompt) or other.mode_key != self.mode_key:
                return
            self.stash(prompt.n_equal)
            self.cache.share(other.cache, n)
