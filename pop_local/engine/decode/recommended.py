"""How a model's publisher wants it sampled: the general.sampling keys of newer GGUF files.

Names as in llama.cpp's src/llama-arch.cpp; older files have none, and TurnOptions' defaults hold.
"""

import math
from collections.abc import Mapping
from contextlib import suppress

_OPTIONS = {
    "general.sampling.temp": ("temperature", float),
    "general.sampling.top_k": ("top_k", int),
    "general.sampling.top_p": ("top_p", float),
    "general.sampling.min_p": ("min_p", float),
    "general.sampling.penalty_repeat": ("repeat_penalty", float),
}


def recommended(metadata: Mapping[str, str]) -> dict[str, float]:
    """Fields of TurnOptions, from keys and values as text; what is no sensible number is left."""
    found = {}
    for key, (option, kind) in _OPTIONS.items():
        with suppress(ValueError):
            value = float(metadata.get(key, ""))
            if math.isfinite(value) and value >= 0:
                found[option] = kind(value)
    return found
