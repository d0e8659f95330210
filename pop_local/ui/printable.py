"""Makes foreign text (names, metadata, replies) harmless to a terminal."""

import unicodedata

# Control and format characters, halves of surrogates, separators of lines and paragraphs.
_UNPRINTABLE = ("Cc", "Cf", "Cs", "Zl", "Zp")


def printable(text: str, *, kept: str = "") -> str:
    """Escape all that would steer a terminal or cannot be encoded; all of `kept` stays."""
    return "".join(
        char.encode("unicode_escape").decode()
        if unicodedata.category(char) in _UNPRINTABLE and char not in kept
        else char
        for char in text
    )
