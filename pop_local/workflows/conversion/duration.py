"""Estimate how long a conversion takes on this machine, without opening the model."""

import time

import numpy as np

from pop_converter.architecture.shape import source_shape
from pop_converter.gguf.source import Source
from pop_local.calibration.texts import default_tokens, n_sampled_of

# Size of the square matrices that are multiplied to measure the machine's speed.
_N_PRODUCT = 384
# Cost of sampling a token relative to reading one.
_SAMPLING_COST = 5
# Number of tokens whose prefill takes as long as fitting and measuring the candidates.
_N_MEASURED = 200_000
# Number of tokens for which these measurements also compute logits.
_N_SCORED = 68_000


def sidecar_seconds(source: Source) -> float:
    """Estimate a default conversion's duration in seconds. The measurement takes a few ms.

    The estimate counts multiply-accumulates, and assumes that llama.cpp multiplies as fast as
    numpy. The constants were tuned against two conversions with one thread on Zen 4, each measured
    once. SmolLM2-135M took 577 s of CPU time, and Gemma-3-270M took 836 s. On the same processor,
    the estimates are within 10% of these times. Other models and processors may differ more.
    Raises PopError if the model cannot be converted.
    """
    n_fitted = default_tokens(source_shape(source).n_embd)
    n_sampling = _SAMPLING_COST * n_sampled_of(n_fitted)
    macs = (n_fitted + n_sampling + _N_MEASURED) * _layer_macs(source)
    return (macs + (n_sampling + _N_SCORED) * _head_macs(source)) / _macs_per_s()


def _layer_macs(source: Source) -> float:
    """Return the number of weights in the layers that a token uses."""
    n_experts = source.first.of_arch("expert_count") or 0
    n_used = source.first.of_arch("expert_used_count") or n_experts
    assert isinstance(n_experts, int) and isinstance(n_used, int), "llama.cpp requires numbers"
    matrices = [it for it in source.tensors if it.name.startswith("blk.") and len(it.dims) > 1]
    share = n_used / n_experts if n_experts else 1.0
    return sum(it.n_elements * (share if len(it.dims) > 2 else 1.0) for it in matrices)


def _head_macs(source: Source) -> int:
    """Return the number of weights in the output head, which may share the token embeddings."""
    sizes = {it.name: it.n_elements for it in source.tensors}
    return sizes.get("output.weight") or sizes.get("token_embd.weight", 0)


def _macs_per_s() -> float:
    matrix = np.ones((_N_PRODUCT, _N_PRODUCT), np.float32)
    times_s = []
    for _ in range(3):
        start_s = time.perf_counter()
        matrix @ matrix
        times_s.append(time.perf_counter() - start_s)
    return _N_PRODUCT**3 / min(times_s)
