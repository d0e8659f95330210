"""Suggest known names that are similar to an unknown name."""

import difflib
from collections.abc import Mapping

_CUTOFF = 0.5
# Names that are less similar than the most similar name by up to this much are suggested, too.
_SLACK = 0.05
_MOST = 3


def nearest_hint(wanted: str, known: Mapping[str, str], listed: str = "") -> str:
    """Return a hint that lists the known names most similar to `wanted` and ends with `listed`.

    If no name is similar, the hint is `listed`. `known` maps each name to its display text.
    The comparison ignores case.
    """
    shown, wanted = {name.lower(): text for name, text in known.items()}, wanted.lower()
    near = difflib.get_close_matches(wanted, shown, n=_MOST, cutoff=_CUTOFF)
    if not near:
        return listed
    least = difflib.SequenceMatcher(None, near[0], wanted).ratio() - _SLACK
    near = difflib.get_close_matches(wanted, near, n=_MOST, cutoff=max(least, _CUTOFF))
    *others, last = dict.fromkeys(shown[name] for name in near)
    question = f"did you mean {', '.join(others)}{' or ' * bool(others)}{last}?"
    return f"{question} ({listed})" if listed else question
