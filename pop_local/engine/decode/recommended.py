"""How a model's publisher wants it sampled: the general.sampling keys of newer GGUF files.

Names as in llama.cpp's src/llama-arch.cpp; older files have none, and TurnOptions' defaults hold.
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
    """Return fields of TurnOptions; what is no sensible number is left out."""
    found: dict[str, float] = {}
    for key, (option, kind) in _OPTIONS.items():
        value = header.get(key)
        if isinstance(value, int | float) and math.isfinite(value) and value >= 0:
            found[option] = kind(value)
    return found
