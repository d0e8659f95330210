"""Deep rows by token: find the prompt rows that run all layers because of their words.

The choice depends on the prompt's tokens alone. So it is the same for any batch size, cut of the
prompt and number of sequences, and the cached rows serve every later question.
"""

import re

import numpy as np
from numpy.typing import NDArray

from pop_converter.deep_rows import DeepRows
from pop_local.engine.decode.text import Pieces
from pop_local.engine.llama.context import Context

# Brackets, quotes and commas end a word, so that one number does not make a line of CSV or JSON
# deep.
_WORD = re.compile(rb"[^\s,;\"'`(){}\[\]<>|*]+")
_SPELLED = re.compile(rb"\d|[a-z][A-Z]|/|\w[@_\\#=+~-]+\w")


def find_deep_rows(context: Context, tokens: np.ndarray, criterion: DeepRows) -> NDArray[np.bool_]:
    """Return which rows run all layers because of their words: bool [n_tokens].

    `tokens`: int [n_tokens], from the start of the prompt, negative for rows of images. A word is
    deep as a whole. Control tokens and images separate words.
    """
    found = np.zeros(len(tokens), bool)
    if criterion is DeepRows.NONE or not len(tokens):
        return found
    pieces = _spelled(context, tokens)
    ends = np.cumsum([len(piece) for piece in pieces])
    starts = np.append(0, ends[:-1])
    for word in _WORD.finditer(b"".join(pieces)):
        if _SPELLED.search(word[0]):
            first = np.searchsorted(ends, word.start(), side="right")
            found[first : np.searchsorted(starts, word.end())] = True
    return found


def _spelled(context: Context, tokens: np.ndarray) -> list[bytes]:
    distinct, which = np.unique(tokens, return_inverse=True)
    pieces = Pieces(context)
    spelled = [pieces[int(token)] if token >= 0 else b"" for token in distinct]
    return [spelled[i] or b"\n" for i in which]
