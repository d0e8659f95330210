"""The shortest prompt that pruning makes faster, as measured on the machine at hand.

Below it the full rows and the extra work of pruning (projections computed twice, more and smaller
products) take what is saved. The length depends on the hardware: where few rows cost as much as
many, on a GPU above all, it is longer than multiply-accumulates predict.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from pop_local.base.errors import PopError
from pop_local.engine.llama.backend import Mode
from pop_local.engine.model import PopModel
from pop_local.measure.forced import use_rule
from pop_local.measure.speed import Spread, random_prompt, ratios, run, run_rounds, spread
from pop_local.workflows.bench import Bench, BenchOptions, opened_to_bench
from pop_local.workflows.events import Watch

# The search ends when the answer is known to a part of this.
_PRECISION = 8


@dataclass(frozen=True)
class Tried:
    """One prompt length; `speedup` is of its pairs, `iqr` the distance of their quartiles."""

    n_prompt: int
    n_pruned: int
    speedup: Spread
    iqr: float
    wins: bool


@dataclass(frozen=True)
class BreakEven:
    """The shortest prompt that gains, None when none does, and all that were tried, by length."""

    bench: Bench
    n_prompt: int | None
    tried: tuple[Tried, ...]


def find_break_even(
    model: str, sidecar: Path | None, options: BenchOptions, watch: Watch
) -> BreakEven:
    """Search for the shortest prompt that gains. Raises PopError, StoppedError."""
    n_longest = options.n_longest
    with opened_to_bench(model, sidecar, options, watch) as (loaded, shape, found):
        if shape.exact:
            raise PopError(f"{found.model} loses nothing with any prompt: there is nothing to find")
        advance = watch.stage("Searching")

        def on_tried(n_tried: int) -> None:
            # Doubling up to the longest takes most of the steps.
            advance(n_tried, max(n_tried, n_longest.bit_length()))

        n_prompt, tried = measure_break_even(loaded, options.n_pairs, n_longest, on_tried)
    return BreakEven(found, n_prompt, tried)


def measure_break_even(
    model: PopModel,
    n_pairs: int,
    n_longest: int,
    on_tried: Callable[[int], object],
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[int | None, tuple[Tried, ...]]:
    """Search up to `n_longest` tokens, whatever `min_prompt` is; see BreakEven.

    Each length is measured in `n_pairs` pairs, 2 at least. `on_tried` gets the number of lengths so
    far. Raises PopError when the counters do not prove what is measured, or nothing of the longest
    prompt would be pruned.
    """
    tried: list[Tried] = []

    def is_won(n_prompt: int) -> bool:
        tried.append(_try(model, n_prompt, n_pairs, clock))
        on_tried(len(tried))
        return tried[-1].wins

    rule = model.rule
    shortest = rule.sink_tokens + max(1, rule.tail_tokens) + 1
    if n_longest < shortest:
        raise PopError(
            f"of {n_longest} tokens none would be pruned",
            f"give longer prompts: {shortest} tokens or more",
            cause="prompts-too-short",
            n_least=shortest,
        )
    use_rule(model, replace(rule, min_prompt=0))
    try:
        found = search(is_won, shortest, n_longest)
    finally:
        use_rule(model, rule)
    return found, tuple(sorted(tried, key=lambda one: one.n_prompt))


def search(is_won: Callable[[int], bool], shortest: int, longest: int) -> int | None:
    """Return the shortest length that is won, to an eighth of it; None when none is.

    Lengths are doubled until two in a row are won: one stroke of luck must not end the search. Then
    the gap below the first of them is halved.
    """
    lost, won = shortest - 1, None
    for n_prompt in _doubled(shortest, longest):
        if not is_won(n_prompt):
            lost, won = n_prompt, None
        elif won is not None:
            break
        else:
            won = n_prompt
    while won is not None and won - lost > max(1, won // _PRECISION):
        middle = (lost + won) // 2
        if is_won(middle):
            won = middle
        else:
            lost = middle
    return won


def wins(speedups: Sequence[float]) -> bool:
    """Tell whether the median is above 1 by more than the quartiles are apart."""
    return statistics.median(speedups) - 1 > quartile_distance(speedups)


def quartile_distance(speedups: Sequence[float]) -> float:
    """Return how far the quartiles are apart."""
    low, _, high = statistics.quantiles(speedups, n=4, method="inclusive")
    return high - low


def _doubled(shortest: int, longest: int) -> list[int]:
    lengths = []
    while shortest < longest:
        lengths.append(shortest)
        shortest *= 2
    return [*lengths, longest]


def _try(model: PopModel, n_prompt: int, n_pairs: int, clock: Callable[[], float]) -> Tried:
    tokens, modes = random_prompt(model, n_prompt), (Mode.OFF, Mode.CONTEXT)
    full, pop = run_rounds([partial(run, model, mode, tokens, 1, clock) for mode in modes], n_pairs)
    of_pairs = ratios(full, pop)
    n_pruned = pop[0].counters.n_context - pop[0].counters.n_deep
    return Tried(n_prompt, n_pruned, spread(of_pairs), quartile_distance(of_pairs), wins(of_pairs))
