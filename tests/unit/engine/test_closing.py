"""Closing a model: during prefill, in forks and threads, and after the last reference."""

import gc
import logging
import os
import signal
import sys
import weakref
from functools import partial
from multiprocessing import spawn
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pop_base.errors import PopError, StoppedError
from pop_local.engine.limited.process import KeptProcess, NoChildError
from pop_local.engine.llama import backend, logs
from pop_local.engine.llama.backend import Mode
from pop_local.engine.llama.interrupt import stopped_by
from pop_local.engine.prompt import template_child
from pop_local.engine.prompt.prompt import Prompt
from pop_local.engine.turn_options import TurnOptions
from support.calls import NOISE, append, first_of, opened, prompt, read
from support.converted import tiny


def test_ctrl_c_interrupts_opening_a_model(pop_file):
    """The signal arrives in a log callback, where ctypes swallows exceptions."""
    presses: list[logging.LogRecord] = []

    class Pressing(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if not presses:
                presses.append(record)
                signal.raise_signal(signal.SIGINT)

    handler, level = Pressing(), logs.logger.level
    logs.logger.addHandler(handler)
    logs.logger.setLevel(logging.DEBUG)
    try:
        with pytest.raises(KeyboardInterrupt):
            opened(pop_file)
    finally:
        logs.logger.removeHandler(handler)
        logs.logger.setLevel(level)
    assert presses


def test_closing_a_model_during_prefill_stops_it_first(pop_file):
    """A SIGTERM handler closes the model between two nodes of llama.cpp's graph."""
    model = opened(pop_file)

    def stop(number: int, frame: object) -> None:
        model.close()
        sys.exit(3)

    before = signal.signal(signal.SIGTERM, stop)

    def should_stop() -> bool:
        signal.raise_signal(signal.SIGTERM)
        return False

    try:
        with stopped_by(should_stop), pytest.raises(SystemExit) as ended:
            append(model, prompt(300))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 3
    with pytest.raises(PopError, match="is closed"):
        append(model, prompt(10))


@pytest.mark.parametrize("when", [0, 512, 968])
@pytest.mark.parametrize("should_stop", [None, lambda: False])
def test_closing_a_model_during_an_answers_prefill_is_an_error(pop_file, when, should_stop):
    model = opened(pop_file, n_batch=512)

    def close(done: int, total: int) -> None:
        if done == when:
            model.close()

    options = TurnOptions(max_tokens=2, on_prefill=close, should_stop=should_stop)
    with pytest.raises(PopError if when != 512 else StoppedError):
        list(model.engine.answer(Prompt(prompt(968)), options))
    assert model.engine.context.is_closed


@pytest.mark.parametrize(
    "use",
    [
        lambda model: first_of(model).cache.clear(),
        lambda model: append(model, [3]),
        lambda model: model.engine.set_mode(Mode.OFF),
    ],
    ids=["clear", "append", "set_mode"],
)
def test_computing_model_refuses_other_calls(pop_file, use):
    model = opened(pop_file)
    expected = read(model, prompt(300))
    first_of(model).cache.clear()
    should_stop = partial(use, model)
    with stopped_by(should_stop), pytest.raises(PopError, match="from a callback during a batch"):
        append(model, prompt(300))
    assert (
        first_of(model).settings.mode is backend.get_mode(model.engine.context.ctx) is Mode.CONTEXT
    )
    np.testing.assert_allclose(read(model, prompt(300)), expected, atol=NOISE)


def test_forked_model_refuses_to_compute(pop_file, monkeypatch):
    model = opened(pop_file, keep_states=True)
    read(model, prompt(100))
    monkeypatch.setattr(os, "getpid", lambda: -1)
    for use in (lambda: append(model, prompt(10)), first_of(model).refiller.refill):
        with pytest.raises(PopError, match="opened in another process"):
            use()


def test_frozen_application_requires_set_executable(monkeypatch):
    """sys.executable is the application; multiprocessing.set_executable names Python."""
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    limits: Any = {"limit_s": 5.0, "limit_bytes": 2**29}
    child = KeptProcess(template_child.TemplateRenderer, **limits)
    with pytest.raises(NoChildError) as refused:
        child.start()
    assert "multiprocessing.set_executable" in refused.value.hint
    named = Path(sys.executable)
    monkeypatch.setattr(sys, "executable", "application")
    monkeypatch.setattr(spawn, "_python_exe", os.fsencode(named))
    assert child.call("rendered", "{{ 1 + 1 }}", {}) == "2"
    child.close()


def test_model_closed_between_two_chunks_of_refilling_stops_first(pop_file):
    model = opened(pop_file, keep_states=True)
    read(model, prompt(300))
    assert 0 < first_of(model).refiller.refill(on_progress=lambda done, total: model.close()) < 300
    with pytest.raises(PopError, match="is closed"):
        append(model, prompt(10))


def test_state_is_saved_after_the_model_file_was_deleted(tmp_path):
    model = opened(tiny(tmp_path))
    read(model, prompt(50))
    for path in tmp_path.glob("*.gguf"):
        path.unlink()
    assert first_of(model).states.save().n_tokens == 50


def test_unreferenced_model_is_freed_immediately(pop_file):
    model = opened(pop_file)
    model.chat("a b", max_tokens=2)
    reference = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert reference() is None
    finally:
        gc.enable()
