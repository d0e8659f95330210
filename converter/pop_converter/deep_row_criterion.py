"""Deep rows: context rows that run all layers because of their words' spelling.

Projections keep a word's meaning and lose its spelling, so exact strings need true K and V.
"""

from enum import Enum


class DeepRows(str, Enum):
    """The words of a prompt that run deep.

    `SPELLING`: words with a digit, an inner capital, or a sign between letters. `NAMES`: these, and
    capitalised words within a sentence.
    """

    NONE = "none"
    SPELLING = "spelling"
    NAMES = "names"

    def __str__(self) -> str:
        return self.value

    @property
    def fewer(self) -> tuple["DeepRows", ...]:
        """The rules that choose fewer rows, from more rows to none."""
        rules = list(DeepRows)
        return tuple(reversed(rules[: rules.index(self)]))
