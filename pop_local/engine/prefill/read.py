"""Read a prompt into a KV cache: reuse cached rows, prune context rows, run the rest in full."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from pop_converter.base.errors import PopError, StoppedError
from pop_converter.popfile.format import DeepRows
from pop_local.engine.cache.cache_states import CacheStates
from pop_local.engine.cache.checkpoints import END_ROWS, EVERY
from pop_local.engine.cache.edited_rows import move_rows
from pop_local.engine.cache.kv_cache import KvCache
from pop_local.engine.depth.deep_rows import find_deep_rows
from pop_local.engine.images.mmproj import ImageChunk
from pop_local.engine.llama.backend import Counters, Mode
from pop_local.engine.llama.batch import Outputs
from pop_local.engine.llama.interrupt import DisplacedError
from pop_local.engine.prefill.edit import CountReusable, Edit, count_edited, find_edit, pays
from pop_local.engine.prefill.plan import (
    NO_FULL_ROWS,
    NO_TAIL,
    Reuse,
    RowRule,
    full_rows,
    plan_prefill,
    split_at,
)
from pop_local.engine.prefill.read_edited import read_edited
from pop_local.engine.prefill.read_result import OnPrefill, PrefillStoppedError, Read
from pop_local.engine.prompt.prompt import Prompt


def read(
    states: CacheStates, prompt: Prompt, rule: RowRule, on_prefill: OnPrefill | None = None
) -> Read:
    """Read a prompt, reuse its cached prefix, and compute the last row's logits.

    Raises PopError if the prompt does not fit the context or cannot be decoded. Raises
    PrefillStoppedError or the signal handler's exception if interrupted. Decoded rows stay cached.
    """
    if not len(prompt):
        raise PopError("the prompt is empty", "add text to the prompt")
    cache = states.cache
    cache.epoch += 1
    count = reusable(cache, prompt, rule)
    states.stash(count)
    n_usable = 0
    if rule.reuse is not Reuse.OFF:
        states.restore_best(count)
        n_usable = _n_usable(states, prompt, rule)
        if (edit := _edit(cache, prompt, rule, n_usable)) is not None:
            cache.make_room(len(prompt) - cache.n_tokens)
            tokens = np.asarray(prompt.tokens, np.int32)
            if move_rows(cache, tokens, edit.sources):
                deep = _deep_rows(cache, tokens, rule)
                return read_edited(cache, tokens, edit, deep, rule, on_prefill)
            # The memory cannot move rows, so the prompt cache must get those that it replaces.
            return read(states, prompt, replace(rule, reuse=Reuse.EXACT), on_prefill)
    if n_usable == len(prompt) == cache.n_tokens and cache.has_logits:
        is_short = _is_pruning(cache)
        n_exact, n_stale = cache.n_exact, cache.rows.n_stale(len(prompt))
        return Read(
            len(prompt),
            n_usable,
            Counters(0, 0),
            n_exact=n_exact,
            n_stale=n_stale,
            is_short=is_short,
        )
    # Logits need a decoded token: if all are cached, the last one is read again.
    n_kept = prompt.whole(min(n_usable, max(0, len(prompt) - 1)))
    cache.has_logits = False
    if not cache.truncate(n_kept) and not cache.truncate(cache.checkpoints.best(n_kept)):
        cache.clear()
    return append(cache, prompt.from_row(cache.n_tokens), rule, on_prefill)


def reusable(cache: KvCache, prompt: Prompt, rule: RowRule) -> CountReusable:
    """Return a function that counts the cached rows that a prompt may reuse."""
    is_edited = rule.reuse is Reuse.EDITED and _is_pruning(cache)
    return count_edited(prompt) if is_edited else prompt.n_equal


def append(
    cache: KvCache, prompt: Prompt, rule: RowRule, on_prefill: OnPrefill | None = None
) -> Read:
    """Read a prompt after the cached rows, with its own sink and tail. Raises as `read` does."""
    cache.make_room(len(prompt))
    if prompt.images and prompt.spans[-1][1] == len(prompt):
        raise PopError("the prompt ends with a picture", "add a question after the picture")
    for image in prompt.images.values():
        _require_room(cache, image)
    reading = _PromptRead(cache, prompt, rule, on_prefill)
    try:
        reading.run()
    except StoppedError as error:
        if cache.context.is_closed:
            raise
        raise PrefillStoppedError(reading.result()) from error
    return reading.result()


def read_context_only(cache: KvCache, prompt: Prompt) -> Read:
    """Read a prompt after the cached rows as context: no row is full or has logits.

    This is the minimal work of a pruned prefill. Raises as `read` does.
    """
    cache.make_room(len(prompt))
    reading = _PromptRead(cache, prompt, NO_FULL_ROWS, None)
    reading.run_context()
    return reading.result()


def append_all(cache: KvCache, tokens: Sequence[int], step: int) -> Iterator[int]:
    """Empty a cache and read a text in full, with each row's logits.

    Yields the number of rows of each decoded piece, up to `step`.
    """
    cache.clear()
    step = min(step, cache.context.n_batch)
    cache.slot.begin_prefill()
    with cache.slot.exclusive(), cache.slot.interruptible():
        for start in range(0, len(tokens), step):
            piece = tokens[start : start + step]
            cache.append(piece, Outputs.ALL, np.ones(len(piece), bool))
            cache.slot.raise_if_stopped()
            yield len(piece)


def _n_usable(states: CacheStates, prompt: Prompt, rule: RowRule) -> int:
    """Return the number of leading cached rows that a prompt may reuse.

    They end at the first context row among this prompt's tail and deep rows. The sink must be full.
    """
    rows = states.cache.rows
    usable = states.n_same(prompt)
    must_be_full = _deep_rows(states.cache, np.asarray(prompt.tokens), rule)[:usable]
    must_be_full[max(prompt.text_from, len(prompt) - rule.tail_tokens) :] = True
    lacking = np.flatnonzero(must_be_full & ~rows.is_full[:usable])
    usable = int(lacking[0]) if lacking.size else usable
    n_sink = min(usable, rule.sink_tokens)
    return usable if rows.is_full[:n_sink].all() else 0


def _edit(cache: KvCache, prompt: Prompt, rule: RowRule, n_usable: int) -> Edit | None:
    """Return how a pruned prompt reuses rows after an edit, or None if it saves too little."""
    if rule.reuse is not Reuse.EDITED or not _is_pruning(cache) or cache.images or prompt.images:
        return None
    if not pays(min(cache.n_tokens, len(prompt)), n_usable, len(prompt)):
        return None
    tokens = np.asarray(prompt.tokens, np.int32)
    sources = find_edit(cache.tokens, tokens).sources
    must_be_full = _deep_rows(cache, tokens, rule)
    must_be_full[: rule.sink_tokens] = True
    sources[must_be_full & ~cache.rows.is_full[sources]] = -1
    sources[max(0, len(tokens) - max(1, rule.tail_tokens)) :] = -1
    edit = Edit(sources)
    return edit if pays(edit.n_reused, n_usable, len(tokens)) else None


def _deep_rows(cache: KvCache, tokens: np.ndarray, rule: RowRule) -> np.ndarray:
    """Return a prompt's deep rows, all False if pruning is off: bool [n_tokens]."""
    criterion = rule.deep_rows if _is_pruning(cache) else DeepRows.NONE
    return find_deep_rows(cache.context, tokens, criterion)


def _is_pruning(cache: KvCache) -> bool:
    return cache.pruning.mode is Mode.CONTEXT and not cache.pruning.exact


def _require_room(cache: KvCache, image: ImageChunk) -> None:
    n, n_at_once = image.n_rows, min(cache.context.n_batch, cache.context.n_ubatch)
    if image.is_mutual and n > n_at_once:
        raise PopError(
            f"an image of {n} tokens, which attend to each other, exceeds a ubatch of {n_at_once}",
            f"open the model with n_batch={n} and n_ubatch={n} or more",
        )


class _PromptRead:
    """A read in progress."""

    def __init__(
        self, cache: KvCache, prompt: Prompt, rule: RowRule, on_prefill: OnPrefill | None
    ) -> None:
        self._cache, self._prompt = cache, prompt
        # With exact skipping, sink and tail need no full rows.
        self._rule = NO_FULL_ROWS if cache.pruning.exact else rule
        self._on_prefill = on_prefill
        self._epoch = cache.epoch
        self._n_cached = cache.n_tokens
        tokens = np.concatenate([cache.tokens, prompt.tokens])
        self._deep = _deep_rows(cache, tokens, self._rule)[self._n_cached :]
        n_batch, end_rows_from = cache.context.n_batch, 0
        if cache.checkpoints.is_needed:
            n_batch = min(n_batch, EVERY)
            if len(prompt) >= 2 * END_ROWS:
                end_rows_from = max(prompt.text_from, len(prompt) - END_ROWS)
        self._plan = plan_prefill(
            self._n_cached,
            len(prompt),
            self._rule,
            n_batch,
            prompt.spans,
            self._deep,
        )
        self._chunks = split_at(self._plan.chunks, end_rows_from)
        self._checkpoints_at = (end_rows_from, len(prompt))
        self._encode_s = 0.0
        cache.slot.begin_prefill()

    def result(self) -> Read:
        """Return the result of the rows decoded so far."""
        cache = self._cache
        counters = cache.slot.counters
        return Read(
            n_prompt=self._n_cached + len(self._prompt),
            # The counters include rows of a stopped batch, which the cache has dropped.
            n_cached=min(self._n_cached, max(0, cache.n_tokens - counters.n_rows)),
            counters=counters,
            encode_s=self._encode_s,
            n_exact=cache.n_exact,
            n_stale=cache.rows.n_stale(self._n_cached),
            is_short=_is_pruning(cache) and self._plan.n_pruned == 0,
        )

    def run(self) -> None:
        """Read the prompt with full and context rows."""
        self._report(0)
        # The tail is text, so its rows have consecutive positions.
        full_from = self._position_of(self._plan.full_from - self._n_cached)
        self._cache.slot.set_full(self._rule.sink_tokens, full_from)
        self._run(self._rule, full_from, Outputs.LAST)

    def run_context(self) -> None:
        """Read the whole prompt as context rows."""
        self._deep[:] = False
        self._cache.slot.set_full(0, NO_TAIL)
        self._run(NO_FULL_ROWS, NO_TAIL, Outputs.NONE)

    def _run(self, rule: RowRule, full_from: int, last: Outputs) -> None:
        cache, prompt = self._cache, self._prompt
        cache.checkpoints.add(cache.n_tokens)
        with cache.slot.interruptible():
            for start, end in self._chunks:
                outputs = last if end == len(prompt) else Outputs.NONE
                n = end - start
                if start in prompt.images:
                    image = prompt.images[start]
                    positions = self._next + np.arange(n) * (not cache.context.is_mrope)
                    full = full_rows(positions, rule, full_from, Outputs.NONE)
                    cache.slot.set_deep_rows(positions[:0])
                    self._encode_s += cache.append_image(image, full)
                else:
                    positions = self._next + np.arange(n)
                    deep = self._deep[start:end]
                    full = full_rows(positions, rule, full_from, outputs) | deep
                    cache.slot.set_deep_rows(positions[deep])
                    cache.append(prompt.tokens[start:end], outputs, full)
                cache.slot.raise_if_stopped()
                if cache.epoch != self._epoch:
                    raise DisplacedError
                is_due = cache.n_tokens - cache.checkpoints.last >= EVERY
                if is_due or end in self._checkpoints_at:
                    cache.checkpoints.add(cache.n_tokens)
                self._report(end)

    def _report(self, done: int) -> None:
        if self._on_prefill is not None:
            self._on_prefill(done, len(self._prompt))
        if self._cache.epoch != self._epoch:
            raise DisplacedError

    def _position_of(self, n: int) -> int:
        """Return the position of the row after the next `n`, which must not end in an image."""
        images = self._prompt.images.items()
        lost = sum(each.n_rows - each.n_pos for start, each in images if start + each.n_rows <= n)
        return self._next + n - lost

    @property
    def _next(self) -> int:
        """Position of the next row."""
        return int(self._cache.rows.positions[self._cache.n_tokens])
