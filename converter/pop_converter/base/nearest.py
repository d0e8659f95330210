"""Suggest a similar known name for an unknown name."""

import difflib
from collections.abc import Mapping

_CUTOFF = 0.5


def nearest_hint(wanted: str, known: Mapping[str, str], listed: str = "") -> str:
    """Suggest the known name that is most similar to `wanted`, followed by `listed`.

    Without a similar name, only `listed` is returned. `known` maps names, whose case is ignored, to
    texts for users.
    """
    shown = {name.lower(): text for name, text in known.items()}
    near = difflib.get_close_matches(wanted.lower(), shown, n=1, cutoff=_CUTOFF)
    if not near:
        return listed
    question = f"did you mean {shown[near[0]]}?"
    return f"{question} ({listed})" if listed else question
