"""Deep rows by token: the context rows that run all layers because of how their words are spelled.

Projections keep a word's meaning and lose its spelling, so exact strings need true K and V.
"""

from enum import Enum


class DeepRows(str, Enum):
    """Which words of a prompt run deep.

    `SPELLING`: words with a digit, an inner capital, or a sign between letters. `NAMES`: these, and
    capitalised words within a sentence.
    """

    NONE = "none"
    SPELLING = "spelling"
    NAMES = "names"

    def __str__(self) -> str:
        return self.value
