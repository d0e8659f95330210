"""Suggest known names that are similar to an unknown name."""

import difflib
from collections.abc import Mapping

_CUTOFF = 0.5
# Names that are less similar than the most similar name by up to this much are suggested, too.
_SLACK = 0.05
_MOST = 3


def nearest_hint(name: str, names: Mapping[str, str], listed: str = "") -> str:
    """Return a hint that lists the known names most similar to `name` and ends with `listed`.

    If no name is similar, the hint is `listed`. `names` maps each name to its display text.
    The comparison ignores case.
    """
    texts, name = {name.lower(): text for name, text in names.items()}, name.lower()
    near = difflib.get_close_matches(name, texts, n=_MOST, cutoff=_CUTOFF)
    if not near:
        return listed
    least = difflib.SequenceMatcher(None, near[0], name).ratio() - _SLACK
    near = difflib.get_close_matches(name, near, n=_MOST, cutoff=max(least, _CUTOFF))
    *others, last = dict.fromkeys(texts[name] for name in near)
    question = f"did you mean {', '.join(others)}{' or ' * bool(others)}{last}?"
    return f"{question} ({listed})" if listed else question
