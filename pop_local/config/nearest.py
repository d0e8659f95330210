"""The hint for a name that nobody knows."""

import difflib
from collections.abc import Mapping

_CUTOFF = 0.5


def nearest_hint(wanted: str, known: Mapping[str, str], listed: str = "") -> str:
    """Asks for the nearest of `known` (as typed, in any case, to as shown), and says `listed`."""
    shown = {name.lower(): text for name, text in known.items()}
    near = difflib.get_close_matches(wanted.lower(), shown, n=1, cutoff=_CUTOFF)
    if not near:
        return listed
    question = f"did you mean {shown[near[0]]}?"
    return f"{question} ({listed})" if listed else question
