"""Escape untrusted text (names, metadata, replies) for terminals."""

import unicodedata

# Control and format characters, surrogates, line and paragraph separators.
_UNPRINTABLE = ("Cc", "Cf", "Cs", "Zl", "Zp")


def printable(text: str, *, kept: str = "") -> str:
    """Escape characters that control a terminal or cannot be encoded, except for `kept`."""
    return "".join(
        char.encode("unicode_escape").decode()
        if unicodedata.category(char) in _UNPRINTABLE and char not in kept
        else char
        for char in text
    )
