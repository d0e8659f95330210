"""Pruning on other devices: as far from the CPU as the full model is there, and no farther.

Devices are the local GPUs, with POP_TEST_GPU_LAYERS=99 in the environment; without it two RPC
servers of this machine. Whatever is not equal bit for bit is noise of kernels and of the order of
sums, of which the full model has its own.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from converter.fit import KvType
from support.kv_reference import fit_at_random
from support.oracle import Q8_0, Trio, make_trio, random_tokens
from support.raw import GPU_LAYERS, Job, Step, run
from support.rpc import rpc_server
from support.synthetic import make_gguf

N_VOCAB, N_LAYER, BOUNDARY, N_TAIL = 380, 8, 5, 16
ALL = N_LAYER + 1  # the output counts as a layer
PROMPTS = [random_tokens(n, N_VOCAB, seed=n) for n in (90, 130, 170, 210, 250)]
AT_MOST = 1.3

QUANTISED = {"flash_attn": True, "type_k": Q8_0, "type_v": Q8_0}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "gemma3": ("gemma3", {}),
    "phi3": ("phi3", {}),
    "moe": ("llama-moe", {}),
    "fitted": ("llama-fitted", {}),
    "flash attention": ("llama", {"flash_attn": True}),
    "q8_0 cache": ("llama", QUANTISED),
    "gemma3, q8_0 cache": ("gemma3", QUANTISED),
    "below the boundary": ("llama", {"n_gpu_layers": ALL - BOUNDARY + 1}),
    "at the boundary": ("llama", {"n_gpu_layers": ALL - BOUNDARY}),
    "above the boundary": ("llama", {"n_gpu_layers": ALL - BOUNDARY - 1}),
    "fitted, at the boundary": ("llama-fitted", {"n_gpu_layers": ALL - BOUNDARY}),
    "sequences": ("llama", {"n_seq_max": len(PROMPTS), "n_ctx": 256 * len(PROMPTS)}),
    "sequences, one stream": ("gemma3", {"n_seq_max": len(PROMPTS), "kv_unified": True}),
}


@pytest.fixture(scope="module")
def trios(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trio]:
    made = {}
    for name in ("llama", "qwen2", "gemma3", "phi3", "llama-moe"):
        folder = tmp_path_factory.mktemp(name)
        arch, _, kind = name.partition("-")
        experts = {"n_expert": 4} if kind == "moe" else {}
        model = make_gguf(folder / "model.gguf", arch, type=Type.Q8_0, **experts)
        made[name] = make_trio(model, folder, boundary=BOUNDARY)
    llama = made["llama"]
    fitted = fit_at_random(llama, llama.pruned.with_name("fitted.gguf"), KvType.Q8_0)
    return made | {"llama-fitted": replace(llama, pruned=fitted)}


@pytest.fixture(scope="module")
def device() -> Iterator[dict[str, Any]]:
    """What a job on the devices has."""
    if GPU_LAYERS:
        yield {"n_gpu_layers": GPU_LAYERS}
        return
    with ExitStack() as stack:
        servers = tuple(stack.enter_context(rpc_server()).name for _ in range(2))
        yield {"n_gpu_layers": ALL, "servers": servers}


def logits(job: Job, *, mode: int) -> tuple[np.ndarray, int]:
    """After each prompt and the token behind it, float32 [n, n_vocab]; and the context rows."""
    steps = [Step("mode", value=mode)]
    apart = job.n_seq_max > 1
    for seq, tokens in enumerate(PROMPTS):
        steps.append(Step("full_from", seq=seq if apart else 0, value=len(tokens) - N_TAIL))
        if not apart:
            next_token = Step("decode", f"next {seq}", tokens=(7,), pos=len(tokens))
            steps += [Step("remove"), Step("decode", str(seq), tokens=tokens), next_token]
    if apart:
        more = tuple((seq, 0, tokens) for seq, tokens in enumerate(PROMPTS) if seq)
        after = tuple((seq, len(tokens), (7,)) for seq, tokens in enumerate(PROMPTS) if seq)
        steps.append(Step("decode", "all", tokens=PROMPTS[0], more=more))
        steps.append(Step("decode", "next", tokens=(7,), pos=len(PROMPTS[0]), more=after))
    results = run(replace(job, steps=(*steps, Step("counters", "counters"))))
    n_context = int(results.pop("counters")[0])
    return np.concatenate(list(results.values())), n_context


def noise(job: Job, device: dict[str, Any], mode: int) -> float:
    here, n_here = logits(replace(job, n_gpu_layers=0), mode=mode)
    there, n_there = logits(replace(job, **device), mode=mode)
    assert n_here == n_there == mode * sum(len(tokens) - N_TAIL for tokens in PROMPTS)
    assert here.std() > 0.1
    return float(np.sqrt(np.mean((here - there) ** 2)))


@pytest.mark.parametrize("case", CASES)
def test_pruning_has_the_noise_of_the_full_model(
    case: str, trios: dict[str, Trio], device: dict[str, Any]
) -> None:
    name, options = CASES[case]
    here = {key: value for key, value in options.items() if key != "n_gpu_layers"}
    job = Job(str(trios[name].pruned), (), **here)
    there = device | {key: value for key, value in options.items() if key not in here}
    pruned, full = noise(job, there, 1), noise(job, there, 0)
    assert pruned <= AT_MOST * full, (pruned, full)
