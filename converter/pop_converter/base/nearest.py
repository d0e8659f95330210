"""Suggest the known name most similar to an unknown name."""

import difflib
from collections.abc import Mapping

_CUTOFF = 0.5


def nearest_hint(wanted: str, known: Mapping[str, str], listed: str = "") -> str:
    """Return a hint that suggests the known name most similar to `wanted`, followed by `listed`.

    If no name is similar, the hint is `listed` alone. `known` maps names to the texts shown to the
    user. Case is ignored.
    """
    shown = {name.lower(): text for name, text in known.items()}
    near = difflib.get_close_matches(wanted.lower(), shown, n=1, cutoff=_CUTOFF)
    if not near:
        return listed
    question = f"did you mean {shown[near[0]]}?"
    return f"{question} ({listed})" if listed else question
