"""Calls of the engine on tiny random models."""

import ctypes
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pop_local.engine.answer import Answering
from pop_local.engine.cache.prompt_cache import PromptCache
from pop_local.engine.engine_options import EngineOptions
from pop_local.engine.llama import backend
from pop_local.engine.llama.backend import Counters, Mode
from pop_local.engine.llama.vocabulary import Pieces
from pop_local.engine.model import PopModel
from pop_local.engine.prefill import read as prefill
from pop_local.engine.prefill.reading import OnPrefill, Read
from pop_local.engine.prompt.prompt import Prompt
from pop_local.engine.sequence import Sequence
from pop_local.engine.turn_options import TurnOptions

N_VOCAB = 384
# Logits have a standard deviation of 1. Other batch shapes change them by up to 0.002, a mode
# switch changes them by 1.2, and 15 context rows in a prompt's tail by 0.14.
NOISE = 0.01
MODES = [Mode.OFF, Mode.CONTEXT]


def never() -> bool:
    """Never request a stop."""
    return False


def ignore(done: int, total: int) -> None:
    """Ignore progress."""


def wait_for(condition: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    return wide - np.log(np.exp(wide - wide.max()).sum()) - wide.max()


def opened(path: Path, **options: Any) -> PopModel:
    defaults: dict[str, Any] = {"n_ctx": 1024, "n_threads": 1, "n_batch": 64, "n_ubatch": 64}
    return PopModel(EngineOptions.of(path, **defaults | options))


def first_of(model: PopModel) -> Sequence:
    return model.engine.sequences[0]


def continued(model: PopModel, text: str, **options: Any) -> Answering:
    """Stream chunks that continue the text, without a chat template."""
    engine = model.engine
    return engine.answer(lambda: engine.prompter.text(text), TurnOptions(**options))


def set_rule(model: PopModel, **changes: Any) -> None:
    """Change which rows of a prompt are full, in every sequence."""
    engine = model.engine
    rule = replace(engine.sequences[0].rule, **changes)
    sequences = tuple(replace(sequence, rule=rule) for sequence in engine.sequences)
    model.engine = replace(engine, sequences=sequences)


def keep_prompts(model: PopModel, prompts: PromptCache) -> None:
    for sequence in model.engine.sequences:
        sequence.states.prompts = prompts


def prompt(n_tokens: int, seed: int = 0) -> list[int]:
    tokens: list[int] = np.random.default_rng(seed).integers(3, N_VOCAB, n_tokens).tolist()
    return tokens


def last_logits(model: PopModel) -> np.ndarray:
    row = backend.bindings().llama_get_logits_ith(model.engine.context.ctx, -1)
    return np.ctypeslib.as_array(row, (N_VOCAB,)).copy()


def kv_bytes(model: PopModel) -> bytes:
    """Return the saved state of sequence 0."""
    api = backend.bindings()
    size = api.llama_state_seq_get_size(model.engine.context.ctx, 0)
    buffer = (ctypes.c_uint8 * size)()
    api.llama_state_seq_get_data(model.engine.context.ctx, buffer, size, 0)
    return bytes(buffer)


def append(model: PopModel, tokens: list[int], on_prefill: OnPrefill | None = None) -> Read:
    """Read tokens after the cached rows, pruned as one prompt."""
    return prefill.append(first_of(model).cache, Prompt(tokens), first_of(model).rule, on_prefill)


def read(model: PopModel, tokens: list[int]) -> np.ndarray:
    """Return the logits after a prompt, reusing the prefix that is in the KV cache."""
    model.read(Prompt(tokens))
    return last_logits(model)


def evaluated(model: PopModel, tokens: list[int]) -> Counters:
    return model.read(Prompt(tokens)).counters


def steps(model: PopModel, tokens: list[int]) -> Generator[int]:
    """Yield greedy tokens after a prompt."""
    model.read(Prompt(tokens))
    return model.engine.sampled(TurnOptions(temperature=0.0))


def greedy(model: PopModel, tokens: list[int], n: int = 12) -> list[int]:
    with closing(steps(model, tokens)) as sampled:
        return [next(sampled) for _ in range(n)]


def text_of(model: PopModel, tokens: Iterable[int]) -> str:
    """Return the text of tokens, including control tokens."""
    pieces = Pieces(
        model.engine.context.vocabulary, range(model.engine.context.vocabulary.n_tokens)
    )
    return b"".join(pieces[token] for token in tokens).decode(errors="replace")


def completed(model: PopModel, tokens: list[int], **options: Any) -> str:
    """Return the greedy continuation's text."""
    selection = TurnOptions(temperature=0.0, **options)
    return "".join(chunk.text for chunk in model.engine.answer(Prompt(tokens), selection))
