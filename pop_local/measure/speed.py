"""Time to first token, pruned against full: in pairs, in one process, on the same weights.

The two runs of a pair follow each other, in an order that changes from pair to pair, and what is
reported is the ratio within the pair: a machine that slows down for a while slows down both. Each
run starts from an empty KV cache, and the backend's row counters must say that every prompt token
was evaluated, and pruned or not as expected; otherwise nothing is reported.

A run is what a user waits for: prefill and the sampling of the first token. Some more tokens are
then decoded, which always run all layers.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from converter.errors import PopError
from converter.macs import exact_limit, speedup_limit
from converter.progress import Progress, Ran, counting
from converter.shape import ModelShape
from pop_local.engine.llama import backend
from pop_local.engine.llama.backend import Counters, Mode
from pop_local.engine.model import PopModel
from pop_local.engine.prefill.plan import plan_prefill
from pop_local.engine.turn import TurnOptions

N_DECODE = 32
_SEED = 20260203


@dataclass(frozen=True)
class Spread:
    """Median, least and most of repeated measurements."""

    median: float
    min: float
    max: float


@dataclass(frozen=True)
class ModePair:
    """The same figure in full and in pruned mode."""

    full: float
    pop: float


@dataclass(frozen=True)
class SpeedRow:
    """One prompt length; `speedup` is of the pairs, `of_limit` is its median by the limit.

    `n_skipped_exact`: rows that left exactly, of a model that allows it. `n_selected`: context rows
    that ran all layers because the prompt's tail needs them.
    """

    n_prompt: int
    n_pruned: int
    n_selected: int
    n_skipped_exact: int
    full_ttft_s: Spread
    pop_ttft_s: Spread
    speedup: Spread
    limit: float
    of_limit: float
    decode_tokens_per_s: ModePair


@dataclass(frozen=True)
class Run:
    """One measurement; the counters are those of the prefill."""

    ttft_s: float
    decode_tokens_per_s: float
    counters: Counters


def measure_speed(
    model: PopModel,
    shape: ModelShape,
    n_prompts: Sequence[int],
    n_pairs: int,
    on_progress: Progress,
) -> tuple[SpeedRow, ...]:
    """Measure each prompt length in `n_pairs` pairs after one to warm up.

    `on_progress` gets (done_tokens, total_tokens). The context must hold the longest prompt and
    N_DECODE more tokens. Raises PopError when the counters do not prove what is measured.
    """
    ran = counting(sum(n_prompts) * 2 * (n_pairs + 1), on_progress)
    return tuple(_row(model, shape, n_prompt, n_pairs, ran) for n_prompt in n_prompts)


def _row(model: PopModel, shape: ModelShape, n_prompt: int, n_pairs: int, ran: Ran) -> SpeedRow:
    full, pop = run_pairs(model, n_prompt, n_pairs, ran=ran)
    rows = pop[0].counters
    limit = (
        exact_limit(shape, n_prompt)
        if model.exact
        else speedup_limit(shape, n_prompt, model.boundary, rows.n_full + rows.n_deep)
    )
    speedup = spread(ratios(full, pop))
    return SpeedRow(
        n_prompt=n_prompt,
        n_pruned=rows.n_context - rows.n_deep,
        n_selected=model.selection.n_selected,
        n_skipped_exact=rows.n_exact,
        full_ttft_s=spread(run.ttft_s for run in full),
        pop_ttft_s=spread(run.ttft_s for run in pop),
        speedup=speedup,
        limit=limit,
        of_limit=speedup.median / limit,
        decode_tokens_per_s=ModePair(
            full=statistics.median(run.decode_tokens_per_s for run in full),
            pop=statistics.median(run.decode_tokens_per_s for run in pop),
        ),
    )


def run_pairs(
    model: PopModel,
    n_prompt: int,
    n_pairs: int,
    n_decode: int = N_DECODE,
    clock: Callable[[], float] = time.perf_counter,
    ran: Ran = lambda n_tokens: None,
) -> tuple[list[Run], list[Run]]:
    """Run one prompt in pairs, in full and pruned, after a pair to warm up.

    Their order changes from pair to pair. `ran` gets the prompt tokens of each run.
    """
    tokens = random_prompt(model, n_prompt)
    runs: dict[Mode, list[Run]] = {Mode.OFF: [], Mode.CONTEXT: []}
    for pair in range(n_pairs + 1):
        for mode in runs if pair % 2 else reversed(runs):
            runs[mode].append(run(model, mode, tokens, n_decode, clock))
            ran(n_prompt)
    return runs[Mode.OFF][1:], runs[Mode.CONTEXT][1:]


def ratios(full: Sequence[Run], pop: Sequence[Run]) -> list[float]:
    """Return the speed-up of each pair."""
    return [a.ttft_s / b.ttft_s for a, b in zip(full, pop, strict=True)]


def run(
    model: PopModel,
    mode: Mode,
    tokens: Sequence[int],
    n_decode: int = N_DECODE,
    clock: Callable[[], float] = time.perf_counter,
) -> Run:
    """Read the tokens into an empty cache, take the first token, decode `n_decode` more."""
    model.set_pop(mode)
    model.clear()
    backend.reset_counters(model.ctx)
    sampled = model.sampled(tokens, TurnOptions(temperature=0.0))
    started_s = clock()
    next(sampled)
    first_s = clock()
    counters = backend.get_counters(model.ctx)
    for _ in range(n_decode):
        next(sampled)
    decoded_s = clock()
    sampled.close()
    require_rows(model, mode, len(tokens), counters)
    return Run(first_s - started_s, n_decode / (decoded_s - first_s), counters)


def require_rows(model: PopModel, mode: Mode, n_prompt: int, counters: Counters) -> None:
    """Raise PopError unless the whole prompt was evaluated, and pruned as the mode says."""
    plan = plan_prefill(0, n_prompt, model.rule, model.n_batch)
    n_left = 0 if mode is Mode.OFF else plan.n_pruned
    if model.exact:
        expected = Counters(0, n_prompt - n_left, n_left)
    elif n_left and model.select:
        n_deep = n_prompt - n_left + round(model.select * n_left)
        expected = Counters(n_prompt, 0, 0, n_deep)
    else:
        expected = Counters(n_left, n_prompt - n_left)
    if counters != expected:
        raise PopError(
            f"the measurement does not hold: of {n_prompt} prompt tokens {expected.n_context}"
            f" should be pruned, {expected.n_exact} leave exactly, {expected.n_deep} run all layers"
            f" afterwards; the backend counted {counters.n_context} pruned, {counters.n_exact}"
            f" left, {counters.n_deep} afterwards, {counters.n_full} full"
        )


def random_prompt(model: PopModel, n_prompt: int) -> list[int]:
    """Draw token ids evenly: what they say does not matter to the time they take."""
    tokens: list[int] = np.random.default_rng(_SEED).integers(0, model.n_vocab(), n_prompt).tolist()
    return tokens


def spread(values: Iterable[float]) -> Spread:
    """Return median, least and most of the values."""
    known = list(values)
    return Spread(statistics.median(known), min(known), max(known))
