"""Compare pruning on other devices with the CPU: it adds no error to the full model's.

The tests run on the local GPUs if POP_TEST_GPU_LAYERS=99 is set. Differences in some bits are noise
of kernels and of summation order, which the full model also has.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from oracle.test_deep_pass import KEEP, N_UBATCH, deepened
from oracle.test_image_rows import PROMPTS as PICTURES
from oracle.test_image_rows import asking, n_rows, steps_of
from pop_converter.fit.least_squares import KvType
from pop_converter.projection import Projection
from support.kv_reference import fit_at_random, rms
from support.oracle import Q8_0, Trio, make_trio, random_tokens
from support.raw import Job, Step, run
from support.raw_jobs import GPU_LAYERS
from support.shared_kv import DEFAULTS as SHARED_KV
from support.shared_kv import make_shared
from support.synthetic import make_gguf

OWN, FITTED, WIDE = Projection

N_VOCAB, N_LAYER, BOUNDARY, N_TAIL = 380, 8, 5, 16
# An edit removes these rows from the middle of a prompt.
EDIT, REMOVED = 40, random_tokens(30, N_VOCAB, seed=1)
ALL = N_LAYER + 1  # the output counts as a layer
PROMPTS = [random_tokens(n, N_VOCAB, seed=n) for n in (90, 130, 170, 210, 250)]
AT_MOST = 1.3
# Scales of random fits that store K/V of the own projections' size: larger K/V have more noise.
AS_OWN = {FITTED: 0.7, WIDE: 0.43}

QUANTISED = {"flash_attn": True, "type_k": Q8_0, "type_v": Q8_0}
AT_BOUNDARY = {"n_gpu_layers": ALL - BOUNDARY}
FITS = (
    ("llama", FITTED),
    ("llama", WIDE),
    ("gemma3", WIDE),
)
ARCHS = ("llama", "qwen2", "gemma3", "phi3", "llama-moe", "qwen2vl", "qwen3vl")


@dataclass(frozen=True)
class Case:
    """An architecture (`model`) with experts or a fit, and its prompts (`reads`)."""

    model: str = "llama"
    options: dict[str, Any] = field(default_factory=dict)
    reads: Literal["texts", "sequences", "deep", "edited", "pictures"] = "texts"

    @property
    def exact(self) -> bool:
        return self.model in SHARED_KV


CASES = {
    "llama": Case(),
    "qwen2": Case("qwen2"),
    "gemma3": Case("gemma3"),
    "phi3": Case("phi3"),
    "moe": Case("llama-moe"),
    "flash attention": Case(options={"flash_attn": True}),
    "q8_0 cache": Case(options=QUANTISED),
    "gemma3, q8_0 cache": Case("gemma3", QUANTISED),
    "below the boundary": Case(options={"n_gpu_layers": ALL - BOUNDARY + 1}),
    "at the boundary": Case(options=AT_BOUNDARY),
    "above the boundary": Case(options={"n_gpu_layers": ALL - BOUNDARY - 1}),
    "fitted": Case("llama-fitted"),
    "fitted, at the boundary": Case("llama-fitted", AT_BOUNDARY),
    "wide": Case("llama-fitted-wide"),
    "wide, at the boundary": Case("llama-fitted-wide", AT_BOUNDARY),
    "wide, several ubatches": Case("llama-fitted-wide", {"n_ubatch": 64, **QUANTISED}),
    "gemma3, wide": Case("gemma3-fitted-wide"),
    "sequences": Case(
        options={"n_seq_max": len(PROMPTS), "n_ctx": 256 * len(PROMPTS)}, reads="sequences"
    ),
    "sequences, one stream": Case(
        "gemma3", {"n_seq_max": len(PROMPTS), "kv_unified": True}, "sequences"
    ),
    "wide, one stream": Case(
        "llama-fitted-wide", {"n_seq_max": len(PROMPTS), "kv_unified": True}, "sequences"
    ),
    "deep": Case(reads="deep"),
    "deep, at the boundary": Case(options=AT_BOUNDARY, reads="deep"),
    "deep, q8_0 cache": Case(options=QUANTISED, reads="deep"),
    "gemma3, deep": Case("gemma3", reads="deep"),
    "moe, deep": Case("llama-moe", reads="deep"),
    "edited": Case(reads="edited"),
    "wide, edited": Case("llama-fitted-wide", {"flash_attn": True}, "edited"),
    "gemma3n": Case("gemma3n"),
    "gemma4": Case("gemma4"),
    "pictures": Case(reads="pictures"),
    "gemma3, pictures": Case("gemma3", reads="pictures"),
    "qwen2vl, pictures": Case("qwen2vl", reads="pictures"),
    "qwen3vl, pictures": Case("qwen3vl", reads="pictures"),
}


@pytest.fixture(scope="module")
def trios(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trio]:
    by_name = {}
    for name in ARCHS:
        folder = tmp_path_factory.mktemp(name)
        arch, _, kind = name.partition("-")
        experts = {"n_expert": 4} if kind == "moe" else {}
        model = make_gguf(folder / "model.gguf", arch, type=Type.Q8_0, **experts)
        by_name[name] = make_trio(model, folder, boundary=BOUNDARY)
    for name, fit in FITS:
        path = by_name[name].pruned.with_name(f"{fit}.gguf")
        fit_at_random(by_name[name], path, KvType.Q8_0, fit, AS_OWN[fit])
        by_name[f"{name}-{fit}"] = replace(by_name[name], pruned=path)
    for name in SHARED_KV:
        model = make_shared(tmp_path_factory.mktemp(name) / "model.gguf", name)
        by_name[name] = Trio(model, model, model, boundary=0, n_sink=0)
    return by_name


def in_turn(mode: int, *, deep: bool) -> list[Step]:
    """Return steps that read each prompt and a next token; `deep`: refill pruned prompts first."""
    steps = []
    for number, tokens in enumerate(PROMPTS):
        rule = Step("full_from", value=len(tokens) - N_TAIL)
        steps += [Step("remove"), rule, Step("decode", str(number), tokens=tokens)]
        if deep and mode:
            *first, last = deepened(0, len(tokens))
            steps[-1] = replace(steps[-1], name="")
            steps += [*first, replace(last, name=str(number), logits="last")]
        steps.append(Step("decode", f"next {number}", tokens=(7,), pos=len(tokens)))
    return steps


def after_an_edit() -> list[Step]:
    """Return steps that read longer prompts, remove a passage, and read a next token.

    The rows after the passage move to other cells, where the device rotates their K.
    """
    steps = []
    for number, tokens in enumerate(PROMPTS):
        old = tokens[:EDIT] + REMOVED + tokens[EDIT:]
        rows = tuple(range(EDIT + len(REMOVED), len(old)))
        steps += [
            Step("remove"),
            Step("full_from", value=len(old) - N_TAIL),
            Step("decode", tokens=old, logits="none"),
            Step("move", tokens=tokens[EDIT:], rows=rows, pos=EDIT),
            Step("decode", f"next {number}", tokens=(7,), pos=len(tokens)),
        ]
    return steps


def in_sequences() -> list[Step]:
    """Return steps that read all prompts in one batch, then a next token of each."""
    rules = [
        Step("full_from", seq=seq, value=len(tokens) - N_TAIL) for seq, tokens in enumerate(PROMPTS)
    ]
    more = tuple((seq, 0, tokens) for seq, tokens in enumerate(PROMPTS) if seq)
    after = tuple((seq, len(tokens), (7,)) for seq, tokens in enumerate(PROMPTS) if seq)
    return [
        *rules,
        Step("decode", "all", tokens=PROMPTS[0], more=more),
        Step("decode", "next", tokens=(7,), pos=len(PROMPTS[0]), more=after),
    ]


def steps_and_rows(case: Case, mode: int) -> tuple[list[Step], int]:
    """Return the steps, and the number of rows that are context or skip layers exactly."""
    if case.reads == "pictures":
        *before, last = steps_of(PICTURES["over several ubatches"][0], case.model)
        return [*before, asking(last)], sum(map(n_rows, (*before, last))) - 1
    n = sum(len(tokens) - (1 if case.exact else N_TAIL) for tokens in PROMPTS)
    if case.reads == "sequences":
        return in_sequences(), n
    if case.reads == "edited":
        return after_an_edit(), n + len(PROMPTS) * len(REMOVED)
    return in_turn(mode, deep=case.reads == "deep"), n


def noise(case: Case, job: Job, n_gpu_layers: int, mode: int) -> float:
    """Return the distance of the device's logits from the CPU's."""
    steps, n = steps_and_rows(case, mode)
    keep = [KEEP] if case.reads == "deep" and mode else []
    counted = [Step("deep", "deep"), Step("exact", "exact"), Step("counters", "counters")]
    job = replace(job, steps=(Step("mode", value=mode), *keep, *steps, *counted))
    logits = []
    for n_layers in (0, n_gpu_layers):
        results = run(replace(job, n_gpu_layers=n_layers))
        assert results.pop("deep") == [len(keep) * sum(map(len, PROMPTS))]
        assert results.pop("counters")[0] + results.pop("exact") == [mode * n]
        logits.append(np.concatenate(list(results.values())))
    here, there = logits
    assert here.std() > 0.1
    return rms(here - there)


@pytest.mark.skipif(not GPU_LAYERS, reason="needs POP_TEST_GPU_LAYERS")
@pytest.mark.parametrize("name", CASES)
def test_pruning_has_no_more_noise_than_the_full_model(name: str, trios: dict[str, Trio]) -> None:
    case = CASES[name]
    options: dict[str, Any] = {"n_ubatch": N_UBATCH if case.reads == "deep" else 256}
    options |= {key: value for key, value in case.options.items() if key != "n_gpu_layers"}
    n_gpu_layers = case.options.get("n_gpu_layers", GPU_LAYERS)
    job = Job(str(trios[case.model].pruned), (), **options)
    pruned, full = (noise(case, job, n_gpu_layers, mode) for mode in (1, 0))
    print(f"{name}: pruned {pruned:.2e}, full {full:.2e} from the CPU")
    assert pruned <= AT_MOST * full, (pruned, full)
    assert full > 0  # otherwise both ran on the CPU
