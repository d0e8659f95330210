"""Programs that run in the tests of the Python API."""

from pathlib import Path

from pop_local import PopModel
from pop_local.engine.turn_options import AnswerOptions

QUESTION = "a b c d e f g h " * 20
GREEDY: AnswerOptions = {"temperature": 0.0, "max_tokens": 8}


def opened(file: Path | str, **options) -> PopModel:
    return PopModel.open(file, **{"n_ctx": 1024, "n_threads": 1} | options)
