"""Read a prompt: reuse cached rows, prune context rows, and run other rows through all layers."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from pop_base.errors import PopError
from pop_converter.popfile.format import DeepRows
from pop_local.engine.cache.align import n_leading
from pop_local.engine.cache.checkpoints import END_ROWS, EVERY
from pop_local.engine.cache.kv_cache import KvCache
from pop_local.engine.cache.saved_states import SavedStates
from pop_local.engine.llama.backend import Counters
from pop_local.engine.llama.batch import Outputs
from pop_local.engine.prefill.deep_rows import find_deep_rows
from pop_local.engine.prefill.edit import ReusableRows
from pop_local.engine.prefill.plan import NO_FULL_ROWS, Reuse, RowRule, plan_prefill, split_at
from pop_local.engine.prefill.read_edited import EditedReading
from pop_local.engine.prefill.reading import OnPrefill, PromptReading, Read
from pop_local.engine.prompt.prompt import Prompt


def read(
    states: SavedStates, prompt: Prompt, rule: RowRule, on_prefill: OnPrefill | None = None
) -> Read:
    """Read a prompt, reusing cached rows, and compute the last row's logits.

    | cached rows                | rows to decode                                   |
    |----------------------------|--------------------------------------------------|
    | an edited prompt's rows    | the edit's rows, in place                        |
    | the whole prompt           | none, or the last row if its logits are lost     |
    | a prefix of the prompt     | all rows from the prefix (or a checkpoint) onward |

    Raises PopError if the prompt does not fit in the context or cannot be decoded. If interrupted,
    raises PrefillStoppedError or the signal handler's exception. Decoded rows stay cached.
    """
    if not len(prompt):
        raise PopError("the prompt is empty", "add text to the prompt")
    cache, tokens = states.cache, np.asarray(prompt.tokens, np.int32)
    deep = _deep_rows(cache, tokens, rule)
    n_usable, sources = _find_reusable(states, prompt, rule, deep)
    if sources is not None:
        cache.make_room(len(prompt) - cache.n_tokens)
        if cache.edit(tokens, sources):
            return EditedReading(cache, tokens, sources, deep, rule, on_prefill).complete()
        # The memory cannot move rows. The second search stashes the rows that will be replaced.
        prefix_only = replace(rule, reuse=Reuse.EXACT)
        n_usable, _ = _find_reusable(states, prompt, prefix_only, deep)
    if n_usable == len(prompt) == cache.n_tokens and cache.has_logits:
        return Read(
            len(prompt),
            n_usable,
            Counters(0, 0),
            n_exact=cache.n_exact,
            n_stale=cache.n_stale(len(prompt)),
            is_short=cache.settings.is_pruning,
        )
    n_kept = prompt.whole(min(n_usable, len(prompt) - 1))
    cache.has_logits = False
    if not cache.truncate(n_kept) and not cache.truncate(cache.checkpoints.best(n_kept)):
        cache.clear()
    return append(cache, prompt.from_row(cache.n_tokens), rule, on_prefill, deep[cache.n_tokens :])


def _find_reusable(
    states: SavedStates, prompt: Prompt, rule: RowRule, deep: NDArray[np.bool_]
) -> tuple[int, NDArray[np.int32] | None]:
    """Load the best cached rows for a prompt and stash the rows that reading it would drop.

    Returns the length of the reusable prefix and, for an edited prompt, each token's cached row
    (see ReusableRows.edit).
    """
    cache = states.cache
    cache.epoch += 1
    reusable = ReusableRows(cache, prompt, rule)
    states.stash(reusable.count, reusable.end)
    if rule.reuse is Reuse.OFF:
        return 0, None
    states.restore_best(reusable.count)
    must_be_full = deep.copy()
    must_be_full[: rule.sink_tokens] = True
    must_be_full[max(prompt.text_from, len(prompt) - rule.tail_tokens) :] = True
    n_same = states.n_same(prompt)
    n_usable = n_leading(~must_be_full[:n_same] | cache.is_full[:n_same])
    return n_usable, reusable.edit(cache, n_usable, must_be_full)


def append(
    cache: KvCache,
    prompt: Prompt,
    rule: RowRule,
    on_prefill: OnPrefill | None = None,
    deep: NDArray[np.bool_] | None = None,
) -> Read:
    """Append a prompt with its own sink and tail. Raises the same errors as `read`.

    `deep`: a mask of the deep rows, bool [n_prompt], or None to compute it.
    """
    cache.make_room(len(prompt))
    if prompt.images and prompt.text_from == len(prompt):
        raise PopError("the prompt ends with an image", "add a question after the image")
    n_at_once = min(cache.context.n_batch, cache.context.n_ubatch)
    n = max((image.n_rows for image in prompt.images.values() if image.is_mutual), default=0)
    if n > n_at_once:
        raise PopError(
            f"the image's {n} tokens must fit in one ubatch, but a ubatch holds only {n_at_once}",
            f"open the model with n_batch and n_ubatch of at least {n}",
        )
    if deep is None:
        tokens = np.concatenate([cache.tokens, prompt.tokens])
        deep = _deep_rows(cache, tokens, rule)[cache.n_tokens :]
    # With exact skipping, the rows of the sink and tail need not be full.
    rule = NO_FULL_ROWS if cache.settings.exact else rule
    return _PlannedReading(cache, prompt, rule, deep, on_prefill).complete()


def append_all(cache: KvCache, tokens: Sequence[int], step: int) -> Iterator[int]:
    """Empty the cache, run `tokens` through all layers, and compute logits for all rows.

    Decodes pieces of up to `step` rows and yields the number of rows in each.
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


def _deep_rows(cache: KvCache, tokens: np.ndarray, rule: RowRule) -> NDArray[np.bool_]:
    """Return a mask of a prompt's deep rows, bool [n_tokens] (all False without pruning)."""
    criterion = rule.deep_rows if cache.settings.is_pruning else DeepRows.NONE
    return find_deep_rows(cache.context, tokens, criterion)


class _PlannedReading(PromptReading):
    """A PromptReading that follows a PrefillPlan to append a prompt to the cached rows."""

    def __init__(
        self,
        cache: KvCache,
        prompt: Prompt,
        rule: RowRule,
        deep: NDArray[np.bool_],
        on_prefill: OnPrefill | None,
    ) -> None:
        super().__init__(cache, rule, on_prefill, len(prompt))
        self._prompt, self._deep = prompt, deep
        self._n_cached = cache.n_tokens
        n_batch, end_rows_from = cache.context.n_chunk, 0
        if cache.checkpoints.is_needed:
            n_batch = min(n_batch, EVERY)
            if len(prompt) >= 2 * END_ROWS:
                end_rows_from = max(prompt.text_from, len(prompt) - END_ROWS)
        self._plan = plan_prefill(
            self._n_cached, len(prompt), rule, n_batch, prompt.spans, self._deep
        )
        self._chunks = split_at(self._plan.chunks, end_rows_from)
        self._checkpoints_at = (end_rows_from, len(prompt))
        self._encode_s = 0.0

    def result(self) -> Read:
        cache = self._cache
        counters = cache.slot.counters
        return Read(
            n_prompt=self._n_cached + len(self._prompt),
            # The counters include rows of a stopped batch, which the cache has dropped.
            n_cached=min(self._n_cached, max(0, cache.n_tokens - counters.n_rows)),
            counters=counters,
            encode_s=self._encode_s,
            n_exact=cache.n_exact,
            n_stale=cache.n_stale(self._n_cached),
            is_short=cache.settings.is_pruning and self._plan.n_pruned == 0,
        )

    def run(self) -> None:
        cache = self._cache
        self._report(0)
        # The tail is text, so its rows have consecutive positions.
        full_from = self._position_of(self._plan.full_from - self._n_cached)
        cache.slot.set_full(self._rule.sink_tokens, full_from)
        cache.checkpoints.add(cache.n_tokens)
        with cache.slot.interruptible():
            for start, end in self._chunks:
                self._decode(start, end, full_from)
                cache.slot.raise_if_stopped()
                self._require_undisplaced()
                is_due = cache.n_tokens - cache.checkpoints.last >= EVERY
                if is_due or end in self._checkpoints_at:
                    cache.checkpoints.add(cache.n_tokens)
                self._report(end)

    def _decode(self, start: int, end: int, full_from: int) -> None:
        cache, prompt = self._cache, self._prompt
        positions = np.arange(end - start)
        outputs = Outputs.LAST if end == len(prompt) else Outputs.NONE
        image = prompt.images.get(start)
        if image is not None:
            positions, outputs = positions * (not cache.context.is_mrope), Outputs.NONE
        full = self._full_rows(self._next + positions, self._deep[start:end], full_from, outputs)
        if image is None:
            cache.append(prompt.tokens[start:end], outputs, full)
        else:
            self._encode_s += cache.append_image(image, full)

    def _position_of(self, n: int) -> int:
        """Return the position `n` rows ahead. No image may extend across the returned position."""
        images = self._prompt.images.items()
        lost = sum(each.n_rows - each.n_pos for start, each in images if start + each.n_rows <= n)
        return self._next + n - lost

    @property
    def _next(self) -> int:
        return int(self._cache.positions[self._cache.n_tokens])
