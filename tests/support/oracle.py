"""Compute the results of pruning with the unpatched library (DESIGN.md, section 3).

If the deep layers' attn_output and ffn_down are zero, they preserve the boundary state. The deep
KV cache is then filled from that state exactly as pruning fills it. Context tokens run through such
a copy and full tokens through the original model; a saved state carries the KV cache between them.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pop_converter.popfile.pruning_plan import make_plan
from pop_converter.popfile.rewrite import convert
from support.raw import Job, Step, run
from support.shapes import read_shape
from support.synthetic import zero_deep_copy

Tokens = tuple[int, ...]

Q8_0 = 8  # GGML_TYPE_Q8_0
# One token more than whole ubatches, so each product has the same shape here and in the oracle.
EXACT: dict[str, dict[str, Any]] = {
    "ubatch 128": {"n_ubatch": 128},
    "K in q8_0": {"type_k": Q8_0},
    "K and V in q8_0": {"flash_attn": True, "type_k": Q8_0, "type_v": Q8_0},
}


@dataclass(frozen=True)
class Trio:
    """A model in three forms: original, with POP keys, and with silent deep layers."""

    original: Path
    pruned: Path
    silent: Path
    boundary: int
    n_sink: int


def make_trio(original: Path, folder: Path, boundary: int, n_sink: int = 0) -> Trio:
    pruned, silent = folder / "pruned.gguf", folder / "silent.gguf"
    plan = make_plan(read_shape(original), boundary=boundary, sink_tokens=n_sink, min_prompt=0)
    convert(plan, original, pruned, force=True)
    zero_deep_copy(original, silent, boundary)
    return Trio(original, pruned, silent, boundary, n_sink)


def random_tokens(n: int, n_vocab: int, seed: int = 0) -> Tokens:
    return tuple(int(token) for token in np.random.default_rng(seed).integers(3, n_vocab, n))


def expected(
    trio: Trio,
    prompts: list[Tokens],
    n_tail: int,
    folder: Path,
    job: Job,
    first: tuple[Step, ...] = (),
) -> np.ndarray:
    """Return the logits after each prompt (sink, context, tail), float32 [n_prompts, n_vocab].

    `first`: steps before each of the three parts.
    """
    phases = [
        (trio.original, lambda n: (0, trio.n_sink)),
        (trio.silent, lambda n: (trio.n_sink, n - n_tail)),
        (trio.original, lambda n: (n - n_tail, n)),
    ]
    results: dict[str, np.ndarray] = {}
    for model, span in phases if trio.n_sink else phases[1:]:
        steps = [*first]
        for number, tokens in enumerate(prompts):
            start, end = span(len(tokens))
            state = str(folder / f"state{number}")
            steps.append(Step("remove"))
            steps += [Step("load", path=state)] if start > 0 else []
            steps.append(Step("decode", str(number), tokens=tokens[start:end], pos=start))
            steps.append(Step("save", path=state))
        results = run(replace(job, model=str(model), steps=tuple(steps)))
    return np.concatenate([results[str(number)] for number in range(len(prompts))])


def pruned(
    trio: Trio, prompts: list[Tokens], n_tail: int, job: Job
) -> tuple[np.ndarray, tuple[int, int]]:
    """Return the patched library's logits, [n_prompts, n_vocab], and (context, full) counts."""
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


def unpatched_noise(
    want: np.ndarray, trio: Trio, prompts: list[Tokens], n_tail: int, folder: Path, job: Job
) -> float:
    """Return the difference of `want` from the same computation in another order, unpatched.

    The largest distance of three: all prompts with an unusual ubatch size, with another sequence in
    the first cells of the KV cache, and the full model's prompt in pieces and in one.
    """
    others = [expected(trio, prompts, n_tail, folder, replace(job, n_ubatch=7))]
    shared = replace(job, n_seq_max=2, kv_unified=True)
    neighbour = Step("decode", tokens=prompts[0][:53], seq=1, logits="none")
    others.append(expected(trio, prompts, n_tail, folder, shared, (neighbour,)))
    pairs = [pair for other in others for pair in zip(want, other, strict=True)]
    full = replace(trio, silent=trio.original)
    steps: list[Step] = []
    for number, tokens in enumerate(prompts):
        steps += [Step("remove"), Step("decode", str(number), tokens=tokens)]
    in_one = run(replace(job, model=str(trio.original), steps=tuple(steps)))
    for number, in_pieces in enumerate(expected(full, prompts, n_tail, folder, job)):
        pairs.append((in_pieces, in_one[str(number)][-1]))
    return max(distance(*pair) for pair in pairs)


def distance(logits: np.ndarray, other: np.ndarray) -> float:
    """Return the root mean square difference, which is more stable than the largest one."""
    return float(np.sqrt(np.mean((logits - other) ** 2)))


def mean_distance(logits: np.ndarray, other: np.ndarray) -> float:
    return float(np.mean([distance(*pair) for pair in zip(logits, other, strict=True)]))


def check_exact(trio: Trio, n_tokens: int, n_vocab: int, folder: Path, job: Job) -> None:
    """Require equal bits and counts for a prompt of context tokens and one full token."""
    prompts = [random_tokens(n_tokens, n_vocab)]
    logits, counters = pruned(trio, prompts, 1, job)
    assert counters == (n_tokens - 1, 1)
    np.testing.assert_array_equal(logits, expected(trio, prompts, 1, folder, job))


def assert_same_logits(one: Path, other: Path, lib: Path) -> None:
    """Require equal logits of a prompt and of one more token in the library `lib`."""
    prompt = tuple(range(3, 60))
    steps = (
        Step("decode", "prefill", tokens=prompt, logits="all"),
        Step("decode", "next", tokens=(7,), pos=len(prompt)),
    )
    results = [
        run(Job(str(path), steps, lib=str(lib), n_ctx=256, n_batch=256)) for path in (one, other)
    ]
    for name in ("prefill", "next"):
        assert results[0][name].std() > 0.1
        assert results[0][name].tobytes() == results[1][name].tobytes()
