"""What pruning must give, computed by the unpatched library alone (DESIGN.md, section 3).

A model whose deep layers' attn_output and ffn_down are zero keeps the boundary state through them, so it
fills the deep KV cache from that state exactly as pruning does. Context tokens run through that model,
full tokens through the real one, and the state of the KV cache is carried from one to the other.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from pop_converter.plan import make_plan
from pop_converter.rewrite import convert
from pop_converter.shape import read_shape
from raw import Job, Step, run
from synthetic import zero_deep_copy

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Trio:
    """One model three ways: as it is, with POP keys, and with silent deep layers."""

    original: Path
    pruned: Path
    silent: Path
    boundary: int
    n_sink: int


def make_trio(original: Path, folder: Path, boundary: int, n_sink: int = 0) -> Trio:
    pruned, silent = folder / "pruned.gguf", folder / "silent.gguf"
    plan = make_plan(read_shape(original), boundary=boundary, sink_tokens=n_sink)
    convert(plan, original, pruned, force=True)
    zero_deep_copy(original, silent, boundary)
    return Trio(original, pruned, silent, boundary, n_sink)


def random_tokens(n: int, n_vocab: int, seed: int = 0) -> Tokens:
    return tuple(int(token) for token in np.random.default_rng(seed).integers(3, n_vocab, n))


def expected(trio: Trio, prompts: list[Tokens], n_tail: int, folder: Path, job: Job) -> np.ndarray:
    """Logits after each prompt, float32 [n_prompts, n_vocab]: sink, context, tail, in turn."""
    phases = [
        (trio.original, lambda n: (0, trio.n_sink)),
        (trio.silent, lambda n: (trio.n_sink, n - n_tail)),
        (trio.original, lambda n: (n - n_tail, n)),
    ]
    results: dict[str, np.ndarray] = {}
    for model, span in phases:
        steps: list[Step] = []
        for number, tokens in enumerate(prompts):
            start, end = span(len(tokens))
            state = str(folder / f"state{number}")
            steps.append(Step("remove"))
            steps += [Step("load", path=state)] if start > 0 else []
            steps.append(Step("decode", str(number), tokens=tokens[start:end], pos=start))
            steps.append(Step("save", path=state))
        if trio.n_sink or model == trio.silent or results:
            results = run(replace(job, model=str(model), steps=tuple(steps)))
    return np.stack([results[str(number)][-1] for number in range(len(prompts))])


def pruned(trio: Trio, prompts: list[Tokens], n_tail: int, job: Job) -> tuple[np.ndarray, tuple[int, int]]:
    """The patched library's logits, float32 [n_prompts, n_vocab], and its (context, full) counts."""
    steps: list[Step] = []
    for number, tokens in enumerate(prompts):
        steps.append(Step("remove"))
        steps.append(Step("full_from", value=len(tokens) - n_tail))
        steps.append(Step("decode", str(number), tokens=tokens))
    steps.append(Step("counters", "counters"))
    results = run(replace(job, model=str(trio.pruned), steps=tuple(steps), lib=None))
    n_context, n_full = (int(count) for count in results["counters"])
    logits = np.stack([results[str(number)][-1] for number in range(len(prompts))])
    return logits, (n_context, n_full)


def unpatched_noise(trio: Trio, prompts: list[Tokens], n_tail: int, job: Job) -> float:
    """How far the unpatched library is from itself when the same tokens come in other batches.

    The largest distance over the prompts and three ways to cut them, the first being the oracle's own.
    """
    steps: list[Step] = []
    for number, tokens in enumerate(prompts):
        n = len(tokens)
        for way, cuts in enumerate([(), (trio.n_sink, n - n_tail), (n - n_tail,), (n // 2,)]):
            steps += [Step("remove"), *_decode_in_parts(f"{number} {way}", tokens, cuts)]
    results = run(replace(job, model=str(trio.original), steps=tuple(steps)))
    return max(
        distance(results[f"{number} 0"], results[f"{number} {way}"])
        for number in range(len(prompts))
        for way in (1, 2, 3)
    )


def distance(logits: np.ndarray, other: np.ndarray) -> float:
    """Root mean square difference: steadier than the largest one."""
    return float(np.sqrt(np.mean((logits - other) ** 2)))


def _decode_in_parts(name: str, tokens: Tokens, cuts: tuple[int, ...]) -> list[Step]:
    edges = (0, *(cut for cut in cuts if cut > 0), len(tokens))
    return [
        Step("decode", name, tokens=tokens[start:end], pos=start)
        for start, end in zip(edges, edges[1:], strict=False)
    ]
