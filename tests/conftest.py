"""Shared by all tests: their environment, two small models and the unpatched library."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from support.own_core import WORKER  # isort: skip
from pop_local.engine.llama.backend import bindings
from pop_local.fetching.catalog import fetch
from support.converted import converted, tiny
from support.paths import MODELS, PACKAGE, TESTS

# Whoever runs the tests may have settings; children inherit this, too. A process that imports
# readline, as pytest does, hands a terminal's size to its children. All of them would compile the
# same modules again where nobody writes what was compiled.
for name in list(os.environ):
    if name.startswith("POP_LOCAL_") or name in ("COLUMNS", "LINES", "PYTHONDONTWRITEBYTECODE"):
        del os.environ[name]
sys.dont_write_bytecode = False
os.environ["POP_LOCAL_CONFIG"] = str(TESTS / "no-such-config.toml")


# A shell's background job ignores Ctrl-C, and so would the children of these tests.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that fetch a model, or build the unpatched library, are no part of `make check`."""
    for item in items:
        if {"smollm2", "gemma", "unpatched_lib"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """History and sessions of the tests; children inherit it, too."""
    folder = tmp_path_factory.mktemp("state")
    os.environ["POP_LOCAL_STATE_DIR"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a sentence 40 times; never write there."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    return path


@pytest.fixture(scope="session")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random words, by which a tiny model is fitted well: its inputs differ. Never write there."""
    drawn = np.random.default_rng(0).integers(97, 123, (9000, 5), np.uint8)
    path = tmp_path_factory.mktemp("letters") / "words.txt"
    path.write_text(" ".join(bytes(word).decode() for word in drawn))
    return path


@pytest.fixture(scope="session")
def pop_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of 8 layers that skips from 4 on; never write there."""
    return tiny(tmp_path_factory.mktemp("pop"))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct Q4_1, in the clone's models folder; never write there."""
    return fetch("SmolLM2-135M-Instruct", folder=MODELS)


@pytest.fixture(scope="session")
def gemma() -> Path:
    """Gemma-3-270M Q4_K_M (a base model), in the clone's models folder; never write there."""
    return fetch("Gemma-3-270M", folder=MODELS)


Made = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Gives a folder that the first test of all workers to ask for it fills; never write there."""
    base = tmp_path_factory.getbasetemp()
    root = base.parent if WORKER else base

    def made(name: str, make: Callable[[Path], object]) -> Path:
        folder, unfinished = root / name, root / f"{name}.unfinished"
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir()
                make(unfinished)
                unfinished.rename(folder)
        return folder

    return made


@pytest.fixture(scope="session")
def smollm2_q4_0(smollm2: Path, made_once: Made) -> Path:
    """SmolLM2 quantised further: x86 reads it in 0.4 of the time. Shared, so never write there."""

    def make(folder: Path) -> None:
        api = bindings()
        settings = api.llama_model_quantize_default_params()
        settings.ftype, settings.nthread = api.LLAMA_FTYPE_MOSTLY_Q4_0, 1
        settings.allow_requantize = True
        target = str(folder / "SmolLM2.gguf")
        assert api.llama_model_quantize(str(smollm2).encode(), target.encode(), settings) == 0

    return made_once("smollm2", make) / "SmolLM2.gguf"


@pytest.fixture(scope="session")
def smollm2_pop(smollm2_q4_0: Path, made_once: Made) -> Path:
    """It skips a third, own projections; shared, so never write there."""
    folder = made_once("smollm2-pop", lambda folder: converted(smollm2_q4_0, folder, boundary=20))
    (path,) = folder.glob("*.gguf")
    return path


@pytest.fixture(scope="session")
def unpatched_lib() -> Path:
    """Upstream's own libraries of the same release and flags: LLAMA_CPP_LIB_PATH of a child.

    Where that is set for the tests, as by `make sanitize`, all of them are those.
    """
    if chosen := os.environ.get("LLAMA_CPP_LIB_PATH"):
        return Path(chosen)
    folder = PACKAGE / "build" / "unpatched"
    subprocess.run([sys.executable, PACKAGE / "tool.py", "unpatched", folder], check=True)
    return folder
