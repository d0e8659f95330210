"""Calibrate online by learning from rows that run through all layers.

Unpruned prompts yield rows for multiple boundaries, but refills yield rows only for the current
boundary. The rows are queued after each batch and added to the sums while the model is idle.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import psutil

from pop_converter.base.errors import PopError, StoppedError
from pop_converter.fit import least_squares as fit
from pop_converter.fit.wide import WideInput
from pop_converter.popfile.format import pop_meta
from pop_converter.popfile.sidecar import fitted_tensors
from pop_converter.projection import Projection
from pop_local.engine.learning.shipped_windows import read_shipped_windows
from pop_local.engine.learning.sums import Summing, Sums, SumsFile
from pop_local.engine.llama import taps
from pop_local.engine.llama.interrupt import stopped_by
from pop_local.engine.llama.taps import Rows, Tapped
from pop_local.models.sidecars import is_learned

if TYPE_CHECKING:
    from pop_local.engine.cache.kv_cache import KvCache
    from pop_local.engine.llama.context import Context

log = logging.getLogger("pop_local.learning")

# Shares of the layers to skip, one for each candidate boundary.
_SHARES = (0.5, 0.46, 0.4, 1 / 3)
# One prompt chunk in N_APART is held out for measuring. The newest N_HELD_OUT chunks are kept.
N_APART = 6
N_HELD_OUT = 16
N_WINDOW = 512
# Numbers of rows, as multiples of n_embd, needed to choose a wide fit's inputs and to try a fit.
_ROWS_TO_CHOOSE, ROWS_TO_FIT = 2, 16
_LEAST_ROWS = 32
# Minimum rows per input for writing sums or a sidecar based on them. An attacker distinguishes
# a tiny model's summed rows from other rows with an AUC of at most .60 (docs/learning.md).
SAVED_ROWS = 2000


def _require_learnable(cache: KvCache) -> None:
    context, hint = cache.context, "open the model with learning off"
    if context.options.n_sequences > 1:
        message, hint = (
            "learning supports only one prompt at a time",
            "open the model with n_parallel=1",
        )
    elif (
        cache.pruning.exact
        or context.files.shape.no_refill
        or pop_meta(context.files.source.first) is not None
    ):
        message = (
            "learning does not support converted files, models that skip layers without loss,"
            " or models with multiple positions per token"
        )
    elif not N_WINDOW <= context.n_ubatch == context.n_batch:
        message = f"learning requires equal batch and ubatch sizes of at least {N_WINDOW} tokens"
    else:
        return
    raise PopError(message, hint, cause="cannot-learn")


@dataclass(frozen=True)
class LearnedFit:
    """A sidecar fitted on `n_rows` tokens. `speedup_limit`: the maximum prefill speedup."""

    sidecar: Path
    boundary: int
    speedup_limit: float
    n_rows: int

    def __str__(self) -> str:
        learned = f"Learned from {self.n_rows:,} tokens in your prompts."
        when = "From now on" if is_learned(self.sidecar) else "Until the model is closed"
        times = f"up to {self.speedup_limit:.1f} times as fast"
        return f"{learned} {when}, pop-local reads prompts {times}."


class Fitter(Protocol):
    """A fitter that uses learned sums. pop_local.workflows.learning implements this protocol."""

    @property
    def has_work(self) -> bool:
        """True if the caller should call `idle`."""

    def idle(self, should_stop: Callable[[], bool]) -> LearnedFit | None:
        """Return a better fit if one is found before a stop is requested. Raises PopError."""


@dataclass(frozen=True)
class HeldOutChunk:
    """A held-out chunk of a prompt, with its first row and its tokens."""

    start: int
    tokens: np.ndarray

    def overlaps(self, start: int, tokens: np.ndarray) -> bool:
        first = max(start, self.start)
        last = min(start + len(tokens), self.start + len(self.tokens))
        ours, theirs = self.tokens[first - self.start : last - self.start], tokens[first - start :]
        return first < last and bool(np.array_equal(ours, theirs[: last - first]))


def _key(tokens: Sequence[int] | np.ndarray) -> int:
    return hash(np.asarray(tokens, np.int32).tobytes())


class OnlineCalibrator:
    """A calibrator that learns from the rows in a KvCache.

    `boundaries`: the boundaries to fit, in ascending order. `n_missed`: rows dropped to limit
    memory use. Only one thread at a time may use the cache and the calibrator.
    """

    def __init__(self, cache: KvCache, memory_bytes: int | None = None) -> None:
        """`memory_bytes`: the memory limit for the sums and queued rows combined.

        The default is a sixth of the free memory, up to 2 GiB. Raises PopError if no fit is
        possible.
        """
        _require_learnable(cache)
        if not memory_bytes:
            memory_bytes = min(2**31, int(psutil.virtual_memory().available) // 6)
        files = cache.context.files
        self.file, self._shape = SumsFile.of(files.source), files.shape
        self.held_out: deque[HeldOutChunk] = deque(maxlen=N_HELD_OUT)
        self._waiting: deque[Tapped] = deque()
        self._used: list[Rows] = []
        # Hashes of the added chunks, so that a repeated prompt is added only once.
        self._seen: set[int] = set()
        self._n_chunks = self.n_missed = self._waiting_bytes = 0
        self._known = self.file.known()
        self._new = Sums(dict(self._known.wides))
        self._room_bytes = memory_bytes
        self._set_boundaries(cache.context, memory_bytes)
        self._room_bytes -= sum(map(self._sums_bytes, self.boundaries))
        self.attach(cache)

    def _set_boundaries(self, context: Context, memory_bytes: int) -> None:
        """Learn at the current fit's boundary, or at multiple boundaries if no fit exists yet."""
        meta, source, start = context.files.meta, context.files.source, {}
        self.boundaries = (meta.boundary,) if meta else self._candidates(memory_bytes // 2)
        kinds: dict[int, tuple[Projection, ...]]
        kinds = dict.fromkeys(self.boundaries, (Projection.FITTED, Projection.WIDE))
        # Sums that were started without a fit support several projection kinds.
        if meta and meta.is_fitted and len(self._known.kinds.get(meta.boundary, ())) <= 1:
            start = fitted_tensors(context.files.sidecar or context.files.path)
            kinds = {meta.boundary: (meta.projection,)}
        self.summing = Summing(source, self._shape, kinds, start=start)
        if meta and self._sums_bytes(meta.boundary) > memory_bytes // 2:
            raise _insufficient_memory()
        if start and self.summing.is_wide(self.boundaries[0]):
            self._new.wides.setdefault(
                self.boundaries[0], self.summing.start_input(self.boundaries[0])
            )

    def attach(self, cache: KvCache) -> None:
        self._cache = cache
        cache.learner = self
        taps.set_taps(cache.context.ctx, self.summing.wanted(self.boundaries))

    def detach(self) -> None:
        """Stop learning and save the sums."""
        self._cache.learner = None
        if not self._cache.context.is_closed:
            taps.set_taps(self._cache.context.ctx, None)
        try:
            self.save()
        except PopError as error:
            log.warning("cannot save the learned sums: %s", error)

    def _candidates(self, memory_bytes: int) -> tuple[int, ...]:
        """Choose boundaries whose sums fit in memory. Stored boundaries override the defaults."""
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
            raise _insufficient_memory()
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
        """Record a chunk of a prompt, regardless of the mode. `start`: the chunk's first row."""
        if len(tokens) < N_WINDOW or _key(tokens) in self._seen:
            return
        self._n_chunks += 1
        if self._n_chunks % N_APART == 0:
            self.held_out.append(HeldOutChunk(start, np.asarray(tokens[:N_WINDOW])))

    def computed(self) -> None:
        """Queue the last ubatch's rows if they are exact, new, and not held out."""
        cache = self._cache
        used = self._used.pop() if self._used else None
        tapped = taps.take(cache.context.ctx, used)
        if tapped is None:  # decoded tokens, for example, are not tapped
            if used is not None:
                self._used.append(used)
            return
        start, end = tapped.position, tapped.position + tapped.n_rows
        tokens = cache.tokens[start:end]
        is_held_out = any(each.overlaps(start, tokens) for each in self.held_out)
        key = _key(tokens)
        is_known = key in self._seen
        is_wanted = tapped.n_rows >= _LEAST_ROWS and not (cache.images or is_held_out or is_known)
        if end <= cache.n_exact and is_wanted:
            if self._waiting_bytes + tapped.block.nbytes <= self._room_bytes:
                self._seen.add(key)
                self._waiting.append(tapped)
                self._waiting_bytes += tapped.block.nbytes
                return
            self.n_missed += tapped.n_rows
        self._used.append(tapped.block)

    # While the model is idle

    @property
    def has_work(self) -> bool:
        """True if queued rows can be added to the sums."""
        return bool(self._waiting)

    def work(self, should_stop: Callable[[], bool]) -> None:
        """Add the queued rows to the sums, then save the file. Raises PopError if saving fails."""
        while self.has_work and not should_stop():
            lacking = [each for each in self.boundaries if self._lacks_input(each)]
            if lacking:
                with suppress(StoppedError), stopped_by(should_stop), self._cache.context.locked():
                    self._choose(lacking)
                continue
            tapped = self._waiting.popleft()
            self._waiting_bytes -= tapped.block.nbytes
            for boundary in tapped.states.keys() & set(self.boundaries):
                if boundary not in self._new.grams:
                    layers = self.summing.layers(boundary)
                    self._new.grams[boundary] = self.summing.empty(boundary, layers)
            self.summing.add(self._new, tapped)
            self._used.append(tapped.block)
            self.save()

    def save(self) -> None:
        """Move each boundary's new sums to the file if they cover enough rows.

        Raises PopError if saving fails. Sums that were not moved stay in memory.
        """
        new = self._new.grams
        saved = {at: sums for at, sums in new.items() if sums.n_rows >= SAVED_ROWS * len(sums.xx)}
        if saved:
            kinds = {each: list(self.summing.projections[each]) for each in saved}
            self.file.add(Sums(self._new.wides, saved), kinds)
            self._known = self.file.known()
            rest = {at: sums for at, sums in new.items() if at not in saved}
            self._new = Sums(self._new.wides | self._known.wides, rest)

    def sums(self) -> Sums:
        """Return the file's sums, or the unsaved sums if the file contains no sums.

        Raises PopError if saving fails. If the sums were merged, the sidecar and the file together
        could reveal unsaved rows.
        """
        self.save()
        self._known = self.file.known()
        every = self.file.load()
        if not every.grams:
            every.merge(deepcopy(self._new))  # learning continues during the fit
        return every

    @property
    def is_saved(self) -> bool:
        """True if the sums file contains rows."""
        return bool(self._known.n_rows)

    @property
    def n_fittable(self) -> int:
        """The number of rows that a fit can use."""
        return max(self._known.n_rows.values(), default=self._n_new)

    @property
    def n_rows(self) -> int:
        """The number of rows in memory and in the file (the maximum over all boundaries)."""
        return self._n_new + max(self._known.n_rows.values(), default=0)

    @property
    def n_wanted(self) -> int:
        """The number of rows required for the first fit."""
        return ROWS_TO_FIT * self._shape.n_embd

    @property
    def n_waiting(self) -> int:
        """The number of queued rows."""
        return sum(each.n_rows for each in self._waiting)

    @property
    def _n_new(self) -> int:
        return max((gram.n_rows for gram in self._new.grams.values()), default=0)

    def _lacks_input(self, boundary: int) -> bool:
        return self.summing.is_wide(boundary) and boundary not in self._new.wides

    def _choose(self, boundaries: Sequence[int]) -> None:
        """Choose wide fits' inputs from bundled text, so that the choice reveals no prompts."""
        n_windows = _ROWS_TO_CHOOSE * self._shape.n_embd // N_WINDOW + 1
        wanted, context = self.summing.wanted(boundaries), self._cache.context
        windows = list(read_shipped_windows(context, wanted, n_windows, N_WINDOW))
        chosen: dict[int, WideInput] = {}
        for boundary in boundaries:
            states = [self.summing.state(boundary, each)[1:] for each in windows]
            chosen[boundary] = self.summing.choose_input(boundary, states)
        # Processes that start learning together use the inputs that the first one stores.
        self.file.add(Sums(chosen), {})
        stored = self.file.known().wides
        self._new.wides.update((each, stored.get(each, chosen[each])) for each in boundaries)


def _insufficient_memory() -> PopError:
    return PopError(
        "there is not enough free memory for learning, or the model cannot be fitted",
        "open the model with learning off, or convert it",
        cause="cannot-learn",
    )
