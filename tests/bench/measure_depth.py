"""The cost of depth on demand: keeping states, selecting rows, refilling them. Not a test.

    python tests/bench/measure_depth.py MODEL.pop.gguf [--sidecar PATH] [--boundary LAYER]
        [--prompts 512,2048] [--select 0.1] [--tail 32] [--rounds 5] [--clock wall]

One model, one thread. In each round every variant reads the prompt once, from an empty KV cache,
in an order that rotates; ratios are taken within the round, the first round only warms up. After
the pruned reading with states all rows are refilled. `--clock cpu` takes the process's CPU time,
which one thread makes comparable on a machine with other work to do. Prints Markdown:

- keeping: pruned with states kept, against without;
- selecting: what a selection adds to the pruned reading, against what the same rows cost in full;
- refilling: all rows, against what they take in full, by full minus pruned.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from pop_local.engine.llama.backend import Mode
from pop_local.engine.model import PopModel
from pop_local.engine.prefill.read import Read
from pop_local.engine.prompt.prompt import Prompt
from pop_local.measure.forced import use_rule
from pop_local.measure.speed import Spread, random_prompt, spread

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Variant:
    mode: Mode
    select: float = 0.0
    keep: bool = False


@dataclass(frozen=True)
class Round:
    """Seconds of one round; `n_selected` rows ran deep because of the selection."""

    full_s: float
    pruned_s: float
    kept_s: float
    selected_s: float
    refilled_s: float
    n_selected: int
    n_pruned: int


def read(
    model: PopModel, variant: Variant, prompt: Prompt, clock: Callable[[], float]
) -> tuple[float, Read]:
    model.set_mode(variant.mode)
    model.set_depth(variant.select, keep_states=variant.keep)
    model.cache.clear()
    started_s = clock()
    done = model.read(prompt)
    return clock() - started_s, done


def one_round(
    model: PopModel, prompt: Prompt, share: float, number: int, clock: Callable[[], float]
) -> Round:
    variants = {
        "full": Variant(Mode.OFF),
        "pruned": Variant(Mode.CONTEXT),
        "kept": Variant(Mode.CONTEXT, keep=True),
        "selected": Variant(Mode.CONTEXT, select=share, keep=True),
    }
    names = list(variants)
    shift = number % len(names)
    took_s: dict[str, float] = {}
    refilled_s, n_selected, n_pruned = 0.0, 0, 0
    for name in names[shift:] + names[:shift]:
        took_s[name], done = read(model, variants[name], prompt, clock)
        if name == "kept":
            n_pruned = done.counters.n_context
            started_s = clock()
            assert model.refill() == len(prompt)
            refilled_s = clock() - started_s
        if name == "selected":
            n_selected = done.n_selected
    return Round(
        took_s["full"],
        took_s["pruned"],
        took_s["kept"],
        took_s["selected"],
        refilled_s,
        n_selected,
        n_pruned,
    )


def told(values: Spread) -> str:
    return f"{values.median:.3f} ({values.min:.3f}-{values.max:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--sidecar", type=Path)
    parser.add_argument("--boundary", type=int, default=0)
    parser.add_argument("--prompts", default="512,2048")
    parser.add_argument("--select", type=float, default=0.1)
    parser.add_argument("--tail", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    given = parser.parse_args()
    lengths = [int(part) for part in given.prompts.split(",")]
    model = PopModel(given.model, sidecar=given.sidecar, n_ctx=max(lengths) + 16, n_threads=1)
    if given.boundary:
        model.set_boundary(given.boundary)
    if given.tail is not None:
        use_rule(model, replace(model.rule, tail_tokens=given.tail))
    print(
        f"boundary {model.boundary}, {given.select:.0%} selected, a tail of"
        f" {model.rule.tail_tokens}, {given.rounds} rounds\n"
    )
    print("| prompt | pruned | selected | full / pruned | full / selected | keeping | ", end="")
    print("selecting, of its rows' cost | refilling s | refilling, of its rows' cost |")
    print("|---:" * 9 + "|")
    for n_prompt in lengths:
        prompt = random_prompt(model, n_prompt)
        clock = CLOCKS[given.clock]
        rounds = [
            one_round(model, prompt, given.select, number, clock)
            for number in range(given.rounds + 1)
        ][1:]
        last = rounds[-1]
        share, all_rows = last.n_selected / last.n_pruned, n_prompt / last.n_pruned
        figures = (
            spread(r.full_s / r.pruned_s for r in rounds),
            spread(r.full_s / r.selected_s for r in rounds),
            spread(r.kept_s / r.pruned_s for r in rounds),
            spread((r.selected_s - r.pruned_s) / (share * (r.full_s - r.pruned_s)) for r in rounds),
            spread(r.refilled_s for r in rounds),
            spread(r.refilled_s / (all_rows * (r.full_s - r.pruned_s)) for r in rounds),
        )
        print(f"| {n_prompt} | {last.n_pruned} | {last.n_selected} |", end="")
        print(" | ".join(f" {told(figure)}" for figure in figures), "|", flush=True)


if __name__ == "__main__":
    main()
