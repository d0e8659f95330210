"""Text to calibrate on: the user's, or text that every machine has."""

import hashlib
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from pop_converter.base.errors import PopError
from pop_local.calibration.carrier_windows import SHARE, carrier_windows
from pop_local.calibration.samples import NOT_SAMPLED, sample_windows
from pop_local.engine.llama.backend import bindings
from pop_local.engine.llama.context import Context
from pop_local.engine.prompt.prompter import Prompter
from pop_local.texts.decoding import decoded, read_bytes
from pop_local.texts.folders import read_kinds

Windows = NDArray[np.int32]
T = TypeVar("T")

N_WINDOW = 512
SEED = 0
# Distilling overfits what is less: SmolLM2 with 32. It gains from more, in as many times the time.
N_DISTILLED = 128
# How much more the prediction of an answer's token counts than that of another token.
_ANSWER_WEIGHT = 3.0
DEFAULT_NAME = "look-ups, Python's documentation and code, samples of the model alone and in chat"
# Text is far shorter than this for a token; more of it is not needed to fill a window.
_MAX_CHARS_PER_TOKEN = 16
_LEAST_DISTINCT = 16


class CalibrationError(PopError):
    """The text cannot be used, or is too short; or a kept calibration cannot go on."""


@dataclass(frozen=True)
class CalibrationText:
    """The windows [n_windows, N_WINDOW] that projections are fitted on.

    `sha256` is of the text, or of the tokens where some are sampled.
    """

    name: str
    sha256: str
    windows: Windows

    @property
    def n_tokens(self) -> int:
        return int(self.windows.size)


def default_tokens(n_embd: int) -> int:
    """Return 24 tokens for each dimension of the state, 16k at least, in pairs of windows.

    The error of the fit falls like n_embd / n_tokens: it is 16k where n_embd is 640, 96k for 4096.
    """
    pair = 2 * N_WINDOW
    return max(16 * 1024, -(-24 * n_embd // pair) * pair)


def least_tokens(n_embd: int) -> int:
    """Return as many tokens as the state has dimensions, four windows at least.

    Fewer would leave the fit to the ridge.
    """
    return max(4, -(-n_embd // N_WINDOW)) * N_WINDOW


def n_windows(n_tokens: int, n_embd: int) -> int:
    """Return how many windows hold so many tokens.

    Raises CalibrationError for fewer tokens than the model needs.
    """
    least = least_tokens(n_embd)
    if n_tokens < least:
        default = default_tokens(n_embd)
        raise CalibrationError(
            f"{n_tokens:,} tokens are too few to calibrate on: this model needs {least:,}",
            f"give {least} tokens or more; the default is {default}",
            cause="too-few-tokens",
            n_least=least,
            n_default=default,
        )
    return -(-n_tokens // N_WINDOW)


def n_sampled_of(count: int) -> int:
    """Return how many of the windows of `own_text` are samples."""
    return count // 2


def own_text(context: Context, count: int) -> CalibrationText:
    """Make a text of Python's documentation, its library's code, and samples of the model.

    Half of the samples are text that the model writes by itself. The other half are questions and
    answers: they begin as its chat template does. Nothing is downloaded. Samples have only their
    beginnings yet: `sampled` completes them.
    """
    n_cut = count - n_sampled_of(count)
    carriers = carrier_windows(context, count // SHARE, N_WINDOW, _topics(), SEED).windows
    cut = _spread(context, [_texts()], n_cut - len(carriers))
    starts = _starts(context, count - n_cut)
    begun = np.full((len(starts), N_WINDOW), NOT_SAMPLED, np.int32)
    for row, start in zip(begun, starts, strict=True):
        row[: len(start)] = start
    return CalibrationText(DEFAULT_NAME, "", np.concatenate([carriers, cut, begun]))


def sampled(
    context: Context, text: CalibrationText, on_progress: Callable[[int, int], object]
) -> CalibrationText:
    """Complete the windows of `own_text` where they are; another text is returned as it is.

    `on_progress` gets (done_tokens, total_tokens) of the sampling.
    """
    windows = text.windows
    if (windows != NOT_SAMPLED).all():
        return text
    n_sampled = n_sampled_of(len(windows))
    n_given = [len(start) for start in _starts(context, n_sampled)]
    sample_windows(context, windows[-n_sampled:], n_given, seed=SEED, on_progress=on_progress)
    return replace(text, sha256=hashlib.sha256(windows.tobytes()).hexdigest())


def _starts(context: Context, n_sampled: int) -> list[list[int]]:
    chat = context.tokenize(Prompter(context).before_question(), special=True)[:N_WINDOW]
    n_chat = n_sampled // 2 if chat else 0
    return [chat] * n_chat + [[first_token(context)]] * (n_sampled - n_chat)


def first_token(context: Context) -> int:
    """Return the token that the model's own texts begin with: BOS, else EOS, else the first."""
    api, vocab = bindings(), context.vocab
    found = (api.llama_vocab_bos(vocab), api.llama_vocab_eos(vocab))
    return next((int(token) for token in found if token >= 0), 0)


@dataclass(frozen=True)
class DistillText:
    """Windows [n_windows, N_WINDOW] to distil on, and how much each row's prediction counts."""

    windows: Windows
    weights: NDArray[np.float32]


def distill_text(
    context: Context, text: CalibrationText, paths: Sequence[Path], n_windows: int
) -> DistillText:
    """Return a calibration's windows, more of its texts or of `paths`, and look-ups.

    They are `n_windows`, fewer if the texts have no more distinct ones.
    """
    shelves = _shelves(paths, n_windows) if paths else [_texts()]
    carriers = carrier_windows(context, n_windows // SHARE, N_WINDOW, shelves[0][0], SEED + 1)
    every = np.concatenate([text.windows, _spread(context, shelves, n_windows)])
    _, first = np.unique(every, axis=0, return_index=True)
    chosen = every[np.sort(first)[: n_windows - len(carriers.windows)]]
    windows = np.concatenate([chosen, carriers.windows])
    weights = np.ones(windows.shape, np.float32)
    # A row predicts the token after it.
    weights[len(chosen) :, :-1] += _ANSWER_WEIGHT * carriers.answers[:, 1:]
    return DistillText(windows, weights)


def given_text(context: Context, paths: Sequence[Path], count: int, n_embd: int) -> CalibrationText:
    """Cut windows out of texts, as many of each path, and in a folder as many of each kind.

    Those too short for their share leave it to the others. Within a text they are spread evenly.
    Raises CalibrationError when the texts are empty, binary, too short, or of one phrase.
    """
    shelves = _shelves(paths, count)
    least = least_tokens(n_embd)
    carriers = carrier_windows(context, count // SHARE, N_WINDOW, shelves[0][0], SEED).windows
    windows = np.concatenate([carriers, _spread(context, shelves, count - len(carriers))])
    if windows.size < least:
        found = f"{windows.size:,} tokens in whole windows of {N_WINDOW}"
        raise _too_short(paths, found, least)
    if np.unique(windows).size < _LEAST_DISTINCT:
        raise CalibrationError(
            f"{_names(paths)} repeats itself: fewer than {_LEAST_DISTINCT} tokens are different",
            "give a text of ordinary variety, or none: the default needs no file",
        )
    return CalibrationText(_names(paths), _sha256(shelves), windows)


def given_sha256(paths: Sequence[Path], count: int) -> str:
    """Return the hash of all text that `count` windows are cut out of. Raises PopError."""
    return _sha256(_shelves(paths, count))


def _sha256(shelves: Sequence[Sequence[str]]) -> str:
    return hashlib.sha256("\n\n".join(chain.from_iterable(shelves)).encode()).hexdigest()


def require_text(paths: Sequence[Path], n_embd: int) -> None:
    """Raise PopError where `given_text` certainly would, without a model to count tokens."""
    for path in paths:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise CalibrationError(
                f"{path} is neither a file nor a folder", "save the text first: it is read twice"
            )
    least = least_tokens(n_embd)
    texts = chain.from_iterable(_shelves(paths, least // N_WINDOW))
    n_bytes = sum(len(text.encode()) for text in texts)
    if n_bytes < least:
        raise _too_short(paths, f"{n_bytes:,} bytes", least)


def _too_short(paths: Sequence[Path], found: str, least: int) -> CalibrationError:
    return CalibrationError(
        f"{_names(paths)} has {found}: this model needs {least:,} tokens",
        "give more text, or none: the default needs no file",
    )


def _names(paths: Sequence[Path]) -> str:
    return ", ".join(path.name or str(path) for path in paths)


def _shelves(paths: Sequence[Path], count: int) -> list[list[str]]:
    """Return the texts of each path: no more of a kind than `count` windows may need."""
    return read_kinds(paths, count * N_WINDOW * _MAX_CHARS_PER_TOKEN)


def _spread(context: Context, shelves: Sequence[Sequence[str]], count: int) -> Windows:
    """Cut windows: as many of each shelf, and as many of each text on it."""

    def of_shelf(shelf: Sequence[str], n: int) -> Windows:
        return _shared(shelf, n, len, lambda text, n: _cut(context, text, n))

    return _shared(shelves, count, lambda shelf: sum(map(len, shelf)), of_shelf)


def _shared(
    parts: Sequence[T], count: int, size: Callable[[T], int], cut: Callable[[T, int], Windows]
) -> Windows:
    """Cut in equal shares; what a part is too short for goes to the longer ones."""
    found: list[Windows] = []
    for n_open, part in zip(range(len(parts), 0, -1), sorted(parts, key=size), strict=True):
        found.append(cut(part, count // n_open))
        count -= len(found[-1])
    return np.concatenate(found)


def _texts() -> list[str]:
    return [text for text in (_topics(), _library_code()) if text]


def _topics() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def _library_code() -> str:
    """The modules of Python's library in one text; empty where they come without their source."""
    folder = Path(sysconfig.get_path("stdlib"))
    sources = [decoded(read_bytes(file), str(file)) for file in sorted(folder.glob("*.py"))]
    return "\n\n".join(sources)


def _cut(context: Context, text: str, count: int) -> Windows:
    """Cut up to `count` windows, spread evenly; each begins as the model wants a text to begin."""
    prefix = list(context.bos)
    n_text = N_WINDOW - len(prefix)
    n_chars = n_text * _MAX_CHARS_PER_TOKEN
    if len(text) > count * n_chars:
        starts = [i * (len(text) - n_chars) // max(count - 1, 1) for i in range(count)]
        parts = [context.tokenize(text[start : start + n_chars])[:n_text] for start in starts]
    else:
        tokens = context.tokenize(text)
        n_whole = len(tokens) // n_text
        chosen = [i * n_whole // count for i in range(count)] if n_whole > count else range(n_whole)
        parts = [tokens[i * n_text : (i + 1) * n_text] for i in chosen]
    whole = [prefix + part for part in parts if len(part) == n_text]
    return np.array(whole, np.int32).reshape(-1, N_WINDOW)
