"""The hint for a name that nobody knows."""

import difflib
from collections.abc import Mapping

_CUTOFF = 0.5


def nearest_hint(wanted: str, known: Mapping[str, str], listed: str = "") -> str:
    """Ask whether the nearest of `known` was meant, and say `listed`.

    `known` maps names as they are typed, in any case, to what is shown. Without a near one the hint
    is `listed` alone.
    """
    shown = {name.lower(): text for name, text in known.items()}
    near = difflib.get_close_matches(wanted.lower(), shown, n=1, cutoff=_CUTOFF)
    if not near:
        return listed
    question = f"did you mean {shown[near[0]]}?"
    return f"{question} ({listed})" if listed else question
