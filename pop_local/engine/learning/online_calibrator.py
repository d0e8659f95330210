"""Learning while reading: rows that run all layers anyway are added to the sums of fits.

Full readings give rows at several boundaries, refilled rows those at the boundary in use. While a
prompt is read its rows are only kept; they are added later, when nobody waits.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import psutil

from pop_converter.base.errors import PopError
from pop_converter.fit import least_squares as fit
from pop_converter.popfile.format import pop_meta
from pop_converter.popfile.sidecar import fitted_tensors
from pop_converter.projection import Projection
from pop_local.engine.learning.store import SumsFile
from pop_local.engine.learning.sums import Summing, Sums
from pop_local.engine.llama import taps
from pop_local.engine.llama.taps import Rows, Tapped

if TYPE_CHECKING:
    from pop_converter.architecture.shape import ModelShape
    from pop_local.engine.cache.kv_cache import KvCache
    from pop_local.engine.llama.context import Context

log = logging.getLogger("pop_local.learning")

# Shares of the layers that may be skipped, the deepest first.
_SHARES = (0.5, 0.46, 0.4, 1 / 3)
# One chunk of a prompt in N_APART is kept apart, to measure on; N_HELD_OUT are kept.
N_APART = 6
N_HELD_OUT = 16
N_WINDOW = 512
# Rows for each dimension of the state: by which the wider input is chosen, and after which a fit is
# worth trying.
_ROWS_TO_CHOOSE, ROWS_TO_FIT = 2, 16
_LEAST_ROWS = 32
# Sums of fewer rows are not written: of a few, something might be read back.
LEAST_SAVED = 2048
# Sums are written after so many rows, and at the end.
_ROWS_TO_SAVE = 16_384


def require_learnable(context: Context, *, cannot: bool) -> None:
    """Raises PopError where nothing can be learned; `cannot`: fits cannot prune the model."""
    options = context.options
    message, hint = "", "open it without learning"
    if options.n_sequences > 1:
        message, hint = "a model learns from one prompt at a time", "open it with n_parallel=1"
    elif cannot or options.rpc or pop_meta(context.source.first) is not None:
        message = (
            "nothing can be learned of this model: it is converted itself, leaves layers out"
            " exactly, its rows have several positions, or are computed on another machine"
        )
    elif not N_WINDOW <= context.n_ubatch == context.n_batch:
        message = f"learning needs batches and ubatches of {N_WINDOW} tokens or more, of one size"
    if message:
        raise PopError(message, hint, cause="cannot-learn")


@dataclass(frozen=True)
class Learned:
    """The figures of what was learned of a model so far, by all who use it.

    `n_rows` of the boundary that has most. `n_waiting` are kept to be added, `n_missed` found no
    room. `boundaries` are those that are learned, the deepest first.
    """

    n_rows: int
    n_wanted: int
    n_waiting: int
    n_missed: int
    n_held_out: int
    boundaries: tuple[int, ...]


@dataclass(frozen=True)
class _Apart:
    """A chunk of a prompt that is kept to measure on: its tokens from a row on."""

    start: int
    tokens: np.ndarray

    def overlaps(self, start: int, tokens: np.ndarray) -> bool:
        first, last = (
            max(start, self.start),
            min(start + len(tokens), self.start + len(self.tokens)),
        )
        ours, theirs = self.tokens[first - self.start : last - self.start], tokens[first - start :]
        return first < last and bool(np.array_equal(ours, theirs[: last - first]))


def _key(tokens: Sequence[int] | np.ndarray) -> int:
    return hash(np.asarray(tokens, np.int32).tobytes())


class OnlineCalibrator:
    """Learns from what a KvCache reads; one thread at a time uses both."""

    def __init__(
        self, cache: KvCache, shape: ModelShape, file: SumsFile, memory_bytes: int
    ) -> None:
        """`memory_bytes`: for sums and rows that wait together, at most."""
        self.file, self._shape = file, shape
        self.held_out: deque[np.ndarray] = deque(maxlen=N_HELD_OUT)
        self._apart: deque[_Apart] = deque(maxlen=N_HELD_OUT)
        self._waiting: deque[Tapped] = deque()
        self._used: list[Rows] = []
        # Chunks that were added, so that what is read again does not count again.
        self._seen: set[int] = set()
        self._n_chunks = self._n_missed = self._waiting_bytes = 0
        self._known = file.known()
        self._new = Sums(dict(self._known.wides))
        self._room_bytes = memory_bytes
        self._begin(cache.context, memory_bytes)
        self._room_bytes -= sum(map(self._sums_bytes, self.boundaries))
        self.attach(cache)

    def _begin(self, context: Context, memory_bytes: int) -> None:
        """Learn at the boundary of the fit in use, which is bent; without one at several."""
        meta, source, start = context.meta, context.source, {}
        self.boundaries = (meta.boundary,) if meta else self._candidates(memory_bytes // 2)
        kinds: dict[int, tuple[Projection, ...]]
        kinds = dict.fromkeys(self.boundaries, (Projection.FITTED, Projection.WIDE))
        if meta and meta.is_fitted and not self._known.is_own(meta.boundary):
            start = fitted_tensors(context.sidecar or context.path)
            kinds = {meta.boundary: (meta.projection,)}
        self.summing = Summing(source, self._shape, kinds, start=start)
        if meta and self._sums_bytes(meta.boundary) > memory_bytes // 2:
            raise _too_little()
        if start and self.summing.is_wide(self.boundaries[0]):
            self._new.wides.setdefault(
                self.boundaries[0], self.summing.start_input(self.boundaries[0])
            )

    def attach(self, cache: KvCache) -> None:
        """Learn from this cache from now on."""
        self._cache = cache
        cache.learner = self
        taps.set_taps(cache.context.ctx, self.summing.wanted(self.boundaries))

    def detach(self) -> None:
        """Learn no longer, and save what was learned."""
        self._cache.learner = None
        if not self._cache.context.is_closed:
            taps.set_taps(self._cache.context.ctx, None)
        try:
            self.save()
        except PopError as error:
            log.warning("what was learned is not saved: %s", error)

    def _candidates(self, memory_bytes: int) -> tuple[int, ...]:
        """Boundaries whose sums fit, the deepest first; those of the file where it has some."""
        n = self._shape.n_layer
        known = sorted(self._known.n_rows)
        wanted = known or [n - max(1, round(n * share)) for share in _SHARES]
        chosen: list[int] = []
        for boundary in dict.fromkeys(wanted):
            can_be = max(1, self._shape.n_deepstack) <= boundary < n - 1
            n_bytes = self._sums_bytes(boundary)
            if can_be and self._shape.fits(boundary) and n_bytes <= memory_bytes:
                chosen.append(boundary)
                memory_bytes -= n_bytes
        if not chosen:
            raise _too_little()
        return tuple(chosen)

    def _sums_bytes(self, boundary: int) -> int:
        n_inputs = self._shape.n_embd + self._shape.n_wide(boundary, Projection.WIDE)
        cross = (
            fit.cross_bytes(n_inputs, self._shape.n_kv(layer))
            for layer in range(boundary + 1, self._shape.n_layer)
        )
        return fit.gram_bytes(n_inputs) + sum(cross)

    # While a prompt is read

    def read(self, start: int, tokens: Sequence[int]) -> None:
        """A chunk of a prompt was read from row `start` on, in whatever mode."""
        if len(tokens) < N_WINDOW or _key(tokens) in self._seen:
            return
        self._n_chunks += 1
        if self._n_chunks % N_APART == 0:
            apart = _Apart(start, np.asarray(tokens[:N_WINDOW]))
            self.held_out.append(apart.tokens)
            self._apart.append(apart)

    def computed(self) -> None:
        """Rows were computed: keep those that are the full model's own."""
        cache = self._cache
        used = self._used.pop() if self._used else None
        tapped = taps.take(cache.context.ctx, used)
        if tapped is None:  # of a token that was decoded, say
            if used is not None:
                self._used.append(used)
            return
        start, end = tapped.position, tapped.position + tapped.n_rows
        tokens = cache.tokens[start:end]
        is_apart = any(each.overlaps(start, tokens) for each in self._apart)
        key = _key(tokens)
        is_known = key in self._seen
        is_wanted = tapped.n_rows >= _LEAST_ROWS and not (cache.images or is_apart or is_known)
        has_room = self._waiting_bytes + tapped.block.nbytes <= self._room_bytes
        if end <= cache.n_exact and is_wanted and has_room:
            self._seen.add(key)
            self._waiting.append(tapped)
            self._waiting_bytes += tapped.block.nbytes
            return
        self._used.append(tapped.block)
        if end <= cache.n_exact and is_wanted:
            self._n_missed += tapped.n_rows

    # While nobody waits

    @property
    def has_work(self) -> bool:
        """Whether rows wait, and can be added."""
        return bool(self._waiting) and (not self._lacks_input or self._can_choose)

    def work(self, should_stop: Callable[[], bool]) -> None:
        """Add the rows that wait, and save the sums. Raises PopError."""
        while self.has_work and not should_stop():
            if self._lacks_input:
                self._choose()
                continue
            tapped = self._waiting.popleft()
            self._waiting_bytes -= tapped.block.nbytes
            for boundary in tapped.states.keys() & set(self.boundaries):
                if boundary not in self._new.grams:
                    layers = self.summing.layers(boundary)
                    self._new.grams[boundary] = self.summing.empty(boundary, layers)
            self.summing.add(self._new, tapped)
            self._used.append(tapped.block)
            if self._n_new >= _ROWS_TO_SAVE:
                self.save()

    def save(self) -> None:
        """Add what is new to the file. Raises PopError; what is new stays here then."""
        if self._n_new >= LEAST_SAVED:
            kinds = {each: list(self.summing.projections[each]) for each in self._new.grams}
            self.file.add(self._new, kinds)
            self._known = self.file.known()
            self._new = Sums(self._new.wides | self._known.wides)

    def sums(self) -> Sums:
        """Save what is new, and return all that was learned, of whatever process.

        Raises PopError.
        """
        self.save()
        self._known = self.file.known()
        return self.file.load()

    @property
    def learned(self) -> Learned:
        """The figures so far."""
        return Learned(
            n_rows=self._n_new + max(self._known.n_rows.values(), default=0),
            n_wanted=ROWS_TO_FIT * self._shape.n_embd,
            n_waiting=sum(each.n_rows for each in self._waiting),
            n_missed=self._n_missed,
            n_held_out=len(self.held_out),
            boundaries=self.boundaries,
        )

    @property
    def _n_new(self) -> int:
        return max((gram.n_rows for gram in self._new.grams.values()), default=0)

    @property
    def _lacks_input(self) -> bool:
        return any(
            self.summing.is_wide(each) and each not in self._new.wides for each in self.boundaries
        )

    @property
    def _can_choose(self) -> bool:
        n_waiting = sum(each.n_rows for each in self._waiting)
        is_full = self._waiting_bytes > self._room_bytes * 3 // 4
        return is_full or n_waiting >= _ROWS_TO_CHOOSE * self._shape.n_embd

    def _choose(self) -> None:
        for boundary in set(self.boundaries) - self._new.wides.keys():
            seen = [
                self.summing.state(boundary, each)[1:]
                for each in self._waiting
                if boundary in each.states
            ]
            if not seen:  # of rows that are refilled at another boundary
                self.boundaries = tuple(each for each in self.boundaries if each != boundary)
                continue
            self._new.wides[boundary] = self.summing.choose_input(boundary, seen)


def _too_little() -> PopError:
    return PopError(
        "there is too little memory to learn, or the model cannot be fitted",
        "read in full, or convert it",
        cause="cannot-learn",
    )


def default_memory() -> int:
    """Return a sixth of the memory that is free, 2 GiB at most."""
    return min(2**31, int(psutil.virtual_memory().available) // 6)
