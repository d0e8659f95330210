"""Measure the time to first token (TTFT) with and without pruning.

Each round runs both modes in the same process with the same weights. Ratios are computed within
each round, so a temporary slowdown affects both modes. The order of the runs is reversed after
each round. Each run starts with an empty KV cache. The measured time covers prefill and the
sampling of the first token. Decoding is measured separately. Each run raises PopError unless the
backend's row counters show that all prompt tokens were evaluated and pruned as planned.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice

import numpy as np

from pop_base.errors import PopError
from pop_base.progress import Progress, Ran, counting
from pop_local.engine.llama.backend import Counters, Mode
from pop_local.engine.model import PopModel
from pop_local.engine.prefill.deep_rows import find_deep_rows
from pop_local.engine.prefill.plan import NO_FULL_ROWS, plan_prefill
from pop_local.engine.prefill.reading import Read
from pop_local.engine.prompt.prompt import Prompt
from pop_local.engine.turn_options import TurnOptions
from pop_local.measure.heldout import shipped_text

N_DECODE = 32


@dataclass(frozen=True)
class Spread:
    """The median, minimum, and maximum of repeated measurements."""

    median: float
    min: float
    max: float


@dataclass(frozen=True)
class ModePair:
    """A measurement in both modes: full and pruned."""

    full: float
    pop: float


@dataclass(frozen=True)
class SpeedRow:
    """Speed measurements for one prompt length. Times are in seconds.

    `speedup`: the TTFT in full mode divided by the TTFT in pruned mode. `n_deep`: the number of
    deep rows in the prompt. `n_skipped_exact`: the number of rows that skipped layers without loss.
    `upstream_ttft_s`: the TTFT without pop-local's kernels (None: not measured).
    """

    n_prompt: int
    n_pruned: int
    n_deep: int
    n_skipped_exact: int
    full_ttft_s: Spread
    pop_ttft_s: Spread
    speedup: Spread
    decode_tokens_per_s: ModePair
    upstream_ttft_s: Spread | None = None

    @property
    def in_words(self) -> str:
        full_s, pop_s = self.full_ttft_s.median, self.pop_ttft_s.median
        words = (
            f"pop-local reads a prompt of {self.n_prompt:,} tokens in {pop_s:.3g} s with fast"
            f" reading and {full_s:.3g} s without it."
        )
        if self.upstream_ttft_s is not None:
            words += f" llama.cpp takes {self.upstream_ttft_s.median:.3g} s."
        return words


@dataclass(frozen=True)
class Run:
    """A measured run."""

    ttft_s: float
    decode_tokens_per_s: float
    read: Read


def measure_speed(
    model: PopModel,
    n_prompts: Sequence[int],
    n_rounds: int,
    on_progress: Progress,
    upstream: Callable[[Prompt], Run] | None = None,
    on_row: Callable[[SpeedRow], object] = lambda row: None,
) -> tuple[SpeedRow, ...]:
    """Measure the speed at each prompt length in `n_rounds` rounds, after a warm-up round.

    `upstream`: a function that runs a prompt without pop-local's kernels. `on_progress` is called
    only after each round, because full and pruned runs progress at different rates. `on_row` is
    called with every row except the last. The context must have room for the longest prompt plus
    N_DECODE tokens. Raises PopError if the backend's counters differ from the plan.
    """
    n_ways = 2 if upstream is None else 3
    ran = counting(sum(n_prompts) * n_ways * (n_rounds + 1), on_progress)
    prompts = [text_prompt(model, n_prompt) for n_prompt in n_prompts]
    rows: list[SpeedRow] = []
    for prompt in prompts:
        if rows:
            on_row(rows[-1])
        rows.append(_row(model, upstream, prompt, n_rounds, ran))
    return tuple(rows)


def _row(
    model: PopModel,
    upstream: Callable[[Prompt], Run] | None,
    prompt: Prompt,
    n_rounds: int,
    ran: Ran,
) -> SpeedRow:
    n_prompt = len(prompt)
    ways = [partial(run, model, Mode.OFF, prompt), partial(run, model, Mode.CONTEXT, prompt)]
    if upstream is not None:
        ways.insert(0, partial(upstream, prompt))
    *others, full, pop = run_rounds(ways, n_rounds, lambda: ran(n_prompt * len(ways)))
    rows = pop[0].read.counters
    return SpeedRow(
        n_prompt=n_prompt,
        n_pruned=rows.n_context,
        n_deep=rows.n_deep,
        n_skipped_exact=rows.n_exact,
        full_ttft_s=spread(run.ttft_s for run in full),
        pop_ttft_s=spread(run.ttft_s for run in pop),
        speedup=spread(a.ttft_s / b.ttft_s for a, b in zip(full, pop, strict=True)),
        decode_tokens_per_s=ModePair(
            full=statistics.median(run.decode_tokens_per_s for run in full),
            pop=statistics.median(run.decode_tokens_per_s for run in pop),
        ),
        upstream_ttft_s=spread(run.ttft_s for run in others[0]) if others else None,
    )


def run_rounds(
    ways: Sequence[Callable[[], Run]], n_rounds: int, ran: Callable[[], None] = lambda: None
) -> list[list[Run]]:
    """Call each function once per round, and return one list of results per function.

    The first round, the warm-up, is excluded from the results. The order of the functions is
    reversed after each round. `ran` is called after each round.
    """
    runs: list[list[Run]] = [[] for _ in ways]
    order = list(range(len(ways)))
    for _ in range(n_rounds + 1):
        order.reverse()
        for way in order:
            runs[way].append(ways[way]())
        ran()
    return [results[1:] for results in runs]


def run(
    model: PopModel,
    mode: Mode,
    prompt: Prompt,
    n_decode: int = N_DECODE,
    clock: Callable[[], float] = time.perf_counter,
) -> Run:
    """Read a prompt into an empty cache, sample a token, and decode `n_decode` more tokens."""
    model.engine.set_mode(mode)
    model.engine.sequences[0].cache.clear()
    started_s = clock()
    read = model.read(prompt)
    with closing(model.engine.sampled(TurnOptions(temperature=0.0))) as sampled:
        next(sampled)
        first_s = clock()
        for _ in range(n_decode):
            next(sampled)
        decoded_s = clock()
    require_rows(model, mode, prompt, read.counters)
    return Run(first_s - started_s, n_decode / (decoded_s - first_s), read)


def require_rows(model: PopModel, mode: Mode, prompt: Prompt, counters: Counters) -> None:
    """Raise PopError unless the counters show that the whole prompt was pruned as planned."""
    sequence = model.engine.sequences[0]
    rule = NO_FULL_ROWS if sequence.settings.exact else sequence.rule
    n_prompt = len(prompt)
    deep = find_deep_rows(model.engine.context, np.asarray(prompt.tokens), rule.deep_rows)
    plan = plan_prefill(0, n_prompt, rule, model.engine.context.n_batch, prompt.spans, deep)
    n_left = 0 if mode is Mode.OFF else plan.n_pruned
    expected = (0, n_left) if sequence.settings.exact else (n_left, 0)
    n_pruned, n_full = counters.n_context, counters.n_full
    if (n_pruned, counters.n_exact, n_full) != (*expected, n_prompt - n_left):
        raise PopError(
            f"the measurement is invalid: expected {expected[0]} pruned and {expected[1]} lossless"
            f" prompt tokens, but the backend counted {n_pruned} pruned, {counters.n_exact}"
            f" lossless, and {n_full} full tokens"
        )


def text_prompt(model: PopModel, n_prompt: int) -> Prompt:
    """Return a prompt with `n_prompt` tokens of held-out prose, dialogue, code, and tables.

    The prompt is real text because its words determine which rows run through all layers.
    """
    kinds = [model.engine.context.vocabulary.tokenize(part) for part in shipped_text().parts]
    n_each = -(-n_prompt // len(kinds))
    return Prompt([token for kind in kinds for token in islice(cycle(kind), n_each)][:n_prompt])


def spread(values: Iterable[float]) -> Spread:
    """Return the median, minimum, and maximum of the values."""
    samples = list(values)
    return Spread(statistics.median(samples), min(samples), max(samples))
