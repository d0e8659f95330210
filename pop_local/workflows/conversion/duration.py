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


def sidecar_seconds(source: Source) -> float:
    """Estimate a default conversion's duration in seconds. The measurement takes a few ms.

    The estimate counts each token's multiply-accumulates, and assumes that llama.cpp multiplies as
    fast as numpy. Raises PopError if the model cannot be converted.
    """
    n_fitted = default_tokens(source_shape(source).n_embd)
    n_tokens = n_fitted + _SAMPLING_COST * n_sampled_of(n_fitted) + _N_MEASURED
    return n_tokens * _macs_per_token(source) / _macs_per_s()


def _macs_per_token(source: Source) -> float:
    """Return the number of weights in the layers that a token uses."""
    n_experts = source.first.of_arch("expert_count") or 0
    n_used = source.first.of_arch("expert_used_count") or n_experts
    assert isinstance(n_experts, int) and isinstance(n_used, int), "llama.cpp requires numbers"
    matrices = [it for it in source.tensors if it.name.startswith("blk.") and len(it.dims) > 1]
    share = n_used / n_experts if n_experts else 1.0
    return sum(it.n_elements * (share if len(it.dims) > 2 else 1.0) for it in matrices)


def _macs_per_s() -> float:
    matrix = np.ones((_N_PRODUCT, _N_PRODUCT), np.float32)
    times_s = []
    for _ in range(3):
        start_s = time.perf_counter()
        matrix @ matrix
        times_s.append(time.perf_counter() - start_s)
    return _N_PRODUCT**3 / min(times_s)
