"""Sampling parameters that a model's publisher recommends, in `general.sampling` GGUF keys.

The keys are those of llama.cpp's src/llama-arch.cpp. Older files have none, so the defaults of
TurnOptions apply.
"""

import math

from pop_converter.gguf.header import Header

_OPTIONS = {
    "general.sampling.temp": ("temperature", float),
    "general.sampling.top_k": ("top_k", int),
    "general.sampling.top_p": ("top_p", float),
    "general.sampling.min_p": ("min_p", float),
    "general.sampling.penalty_repeat": ("repeat_penalty", float),
}


def recommended(header: Header) -> dict[str, float]:
    """Return recommended fields of TurnOptions, without negative and non-finite values."""
    found: dict[str, float] = {}
    for key, (option, kind) in _OPTIONS.items():
        value = header.get(key)
        if isinstance(value, int | float) and math.isfinite(value) and value >= 0:
            found[option] = kind(value)
    return found
