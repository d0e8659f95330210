"""Compute activations for pop-local's bundled text, which reveals nothing about users' prompts."""

import importlib.resources
from collections.abc import Iterator
from contextlib import closing

import numpy as np

from pop_local.engine.llama import backend, logs, taps
from pop_local.engine.llama.backend import Mode
from pop_local.engine.llama.batch import Outputs, TokenBatch
from pop_local.engine.llama.context import Context
from pop_local.engine.llama.taps import Tapped, TapRequest

_TEXTS = importlib.resources.files("pop_local") / "data" / "heldout"


def read_shipped_windows(
    context: Context, wanted: TapRequest, n_windows: int, n_window: int
) -> Iterator[Tapped]:
    """Yield the full model's activations for evenly spaced windows of `n_window` tokens.

    Raises PopError if llama.cpp fails, or StoppedError if the caller's `should_stop` returns True.
    """
    names = sorted(each.name for each in _TEXTS.iterdir() if each.name.endswith(".txt"))
    text = "\n".join((_TEXTS / name).read_text("utf-8") for name in names)
    tokens = context.vocabulary.tokenize(text)
    sizes = dict.fromkeys(("n_ctx", "n_batch", "n_ubatch"), n_window)
    api, interrupt = backend.bindings(), context.interrupt
    with context.extra_context(**sizes) as ctx, closing(TokenBatch(n_window)) as batch:
        backend.set_mode(ctx, Mode.OFF)
        taps.set_taps(ctx, wanted)
        for start in np.linspace(0, len(tokens) - n_window, n_windows, dtype=int).tolist():
            api.llama_memory_clear(api.llama_get_memory(ctx), True)
            logs.forget_errors()
            with interrupt.watching(ctx):
                code = batch.decode(ctx, tokens[start : start + n_window], 0, Outputs.NONE)
                interrupt.check()
            if code:
                raise logs.not_decoded(code)
            tapped = taps.take(ctx)
            assert tapped is not None
            yield tapped
