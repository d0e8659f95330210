"""How a model's publisher wants it sampled: the general.sampling keys of newer GGUF files.

Names as in llama.cpp's src/llama-arch.cpp; older files have none, and TurnOptions' defaults hold.
"""

import math
from collections.abc import Mapping

_OPTIONS = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repeat_penalty",
}
_WHOLE = ("top_k",)


def recommended(metadata: Mapping[str, str]) -> dict[str, float]:
    """Fields of TurnOptions, from keys and values as text; what is no sensible number is left."""
    found = {}
    for key, option in _OPTIONS.items():
        value = _number(metadata.get(key, ""))
        if value is not None:
            found[option] = int(value) if option in _WHOLE else value
    return found


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 else None
