"""Calibration text: the user's files, or default text available on any machine."""

import hashlib
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pop_base.errors import PopError
from pop_base.files import read_file
from pop_base.progress import Progress
from pop_local.calibration.carrier_windows import SHARE, carrier_windows
from pop_local.calibration.samples import sample_windows
from pop_local.engine.llama.backend import bindings
from pop_local.engine.llama.context import Context
from pop_local.engine.prompt.prompter import Prompter
from pop_local.texts.document_readers import decoded, read_text

Windows = NDArray[np.int32]

N_WINDOW = 512
SEED = 0
# Extra weight of answer tokens in the distillation loss.
_ANSWER_WEIGHT = 3.0
DEFAULT_NAME = "look-ups, Python documentation, Python code, and text sampled from the model"
# Maximum number of characters to tokenize for each token of a window.
_MAX_CHARS_PER_TOKEN = 16
_LEAST_DISTINCT = 16


class CalibrationError(PopError):
    """Error raised if text is unusable or too short."""


@dataclass(frozen=True)
class CalibrationText:
    """The windows [n_windows, N_WINDOW] to fit on. `sha256`: the hash of the text or tokens."""

    name: str
    sha256: str
    windows: Windows

    @property
    def n_tokens(self) -> int:
        return int(self.windows.size)


def default_tokens(n_embd: int) -> int:
    """Return the default text length in tokens: 24 per state dimension, but at least 16,384.

    A fit's error is proportional to n_embd / n_tokens. The length is a multiple of 2 * N_WINDOW.
    """
    pair = 2 * N_WINDOW
    return max(16 * 1024, -(-24 * n_embd // pair) * pair)


def least_tokens(n_embd: int) -> int:
    """Return the minimum text length: one token per state dimension, but at least 4 windows."""
    # If the text were shorter, the ridge penalty would dominate the fit.
    return max(4, -(-n_embd // N_WINDOW)) * N_WINDOW


def n_sampled_of(count: int) -> int:
    return count // 2


def own_text(context: Context, count: int, on_progress: Progress) -> CalibrationText:
    """Combine look-ups, Python's documentation and library code, and text sampled from the model.

    Half of the sampled windows are free text, and half are questions and answers that start with
    the chat template's first tokens. Nothing is downloaded. Progress is reported in sampled tokens.
    """
    n_sampled = n_sampled_of(count)
    carriers = carrier_windows(context, count // SHARE, N_WINDOW, _topics(), SEED).windows
    cut = _spread(context, _texts(), count - n_sampled - len(carriers))
    chat = context.vocabulary.tokenize(Prompter(context).before_question(), special=True)[:N_WINDOW]
    n_chat = n_sampled // 2 if chat else 0
    starts = [chat] * n_chat + [[first_token(context)]] * (n_sampled - n_chat)
    sampled = sample_windows(context, starts, N_WINDOW, seed=SEED, on_progress=on_progress)
    windows = np.concatenate([carriers, cut, sampled])
    return CalibrationText(DEFAULT_NAME, hashlib.sha256(windows.tobytes()).hexdigest(), windows)


def first_token(context: Context) -> int:
    """Return the BOS token or, if the vocabulary has none, the EOS token (0 if it has neither)."""
    api, vocab = bindings(), context.vocabulary.pointer
    tokens = (api.llama_vocab_bos(vocab), api.llama_vocab_eos(vocab))
    return next((int(token) for token in tokens if token >= 0), 0)


@dataclass(frozen=True)
class DistillText:
    """The windows [n_windows, N_WINDOW] to distill on, and each row's weight in the loss."""

    windows: Windows
    weights: NDArray[np.float32]


def distill_text(
    context: Context, text: CalibrationText, paths: Sequence[Path], n_windows: int
) -> DistillText:
    """Return the calibration windows, additional windows from the same text, and look-up windows.

    `paths`: the calibration's files (empty: the default text). The result has
    `n_windows` windows, or fewer if the text is too short.
    """
    parts = [read_text(path) for path in paths] or _texts()
    carriers = carrier_windows(context, n_windows // SHARE, N_WINDOW, parts[0], SEED + 1)
    every = np.concatenate([text.windows, _spread(context, parts, n_windows)])
    _, first = np.unique(every, axis=0, return_index=True)
    distinct = every[np.sort(first)[: n_windows - len(carriers.windows)]]
    windows = np.concatenate([distinct, carriers.windows])
    weights = np.ones(windows.shape, np.float32)
    # Each row predicts the next token.
    weights[len(distinct) :, :-1] += _ANSWER_WEIGHT * carriers.answers[:, 1:]
    return DistillText(windows, weights)


def given_text(context: Context, paths: Sequence[Path], count: int, n_embd: int) -> CalibrationText:
    """Choose the same number of windows from each file.

    If a file is too short to fill its share, longer files make up the difference. Windows are
    spread evenly over each file. One in every SHARE windows contains look-ups. Raises PopError if
    the text is empty, binary, too short, or too repetitive.
    """
    parts = [read_text(path) for path in paths]
    least = least_tokens(n_embd)
    carriers = carrier_windows(context, count // SHARE, N_WINDOW, parts[0], SEED).windows
    windows = np.concatenate([carriers, _spread(context, parts, count - len(carriers))])
    if windows.size < least:
        amount = f"{windows.size:,} tokens in complete {N_WINDOW}-token windows"
        raise _too_short(paths, amount, least)
    if np.unique(windows).size < _LEAST_DISTINCT:
        raise CalibrationError(
            f"{_names(paths)} contains fewer than {_LEAST_DISTINCT} distinct tokens",
            "use more varied text, or the default text",
        )
    whole = "\n\n".join(parts)
    return CalibrationText(_names(paths), hashlib.sha256(whole.encode()).hexdigest(), windows)


def require_text(paths: Sequence[Path], n_embd: int) -> None:
    """Raise PopError if a path is unusable or if the text is too short, whatever the tokenizer."""
    for path in paths:
        if path.exists() and not path.is_file():
            raise CalibrationError(
                f"{path} is a folder, a pipe, or a device, not a file",
                "save the text to a file first: pop-local reads it twice",
            )
    least = least_tokens(n_embd)
    n_bytes = sum(len(read_text(path).encode()) for path in paths)
    if n_bytes < least:
        raise _too_short(paths, f"{n_bytes:,} bytes", least)


def _too_short(paths: Sequence[Path], amount: str, least: int) -> CalibrationError:
    return CalibrationError(
        f"{_names(paths)} contains only {amount}, but this model needs at least {least:,} tokens",
        "use more text, or the default text",
    )


def _names(paths: Sequence[Path]) -> str:
    return ", ".join(path.name or str(path) for path in paths)


def _spread(context: Context, parts: Sequence[str], count: int) -> Windows:
    """Choose the same number of windows from each part.

    If a part is too short to fill its share, longer parts make up the difference.
    """
    groups: list[Windows] = []
    for n_done, part in enumerate(sorted(parts, key=len)):
        groups.append(_cut(context, part, count // (len(parts) - n_done)))
        count -= len(groups[-1])
    return np.concatenate(groups)


def _texts() -> list[str]:
    return [text for text in (_topics(), _library_code()) if text]


def _topics() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def _library_code() -> str:
    """Return the standard library's source code as one string, or "" if no source is installed."""
    folder = Path(sysconfig.get_path("stdlib"))
    sources = [decoded(read_file(file), str(file)) for file in sorted(folder.glob("*.py"))]
    return "\n\n".join(sources)


def _cut(context: Context, text: str, count: int) -> Windows:
    """Choose up to `count` windows spread evenly over the text, and start each with BOS."""
    prefix = list(context.vocabulary.bos)
    n_text = N_WINDOW - len(prefix)
    n_chars = n_text * _MAX_CHARS_PER_TOKEN
    if len(text) > count * n_chars:
        starts = [i * (len(text) - n_chars) // max(count - 1, 1) for i in range(count)]
        parts = [
            context.vocabulary.tokenize(text[start : start + n_chars])[:n_text] for start in starts
        ]
    else:
        tokens = context.vocabulary.tokenize(text)
        n_whole = len(tokens) // n_text
        numbers = (
            [i * n_whole // count for i in range(count)] if n_whole > count else range(n_whole)
        )
        parts = [tokens[i * n_text : (i + 1) * n_text] for i in numbers]
    whole = [prefix + part for part in parts if len(part) == n_text]
    return np.array(whole, np.int32).reshape(-1, N_WINDOW)
