"""The real parts that tests share: two small models and the unpatched library."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pop_local.fetching.catalog import fetch
from support.paths import MODELS, PACKAGE, TESTS

# Whoever runs the tests may have settings; children inherit this, too.
for name in [name for name in os.environ if name.startswith("POP_LOCAL_")]:
    del os.environ[name]
os.environ["POP_LOCAL_CONFIG"] = str(TESTS / "no-such-config.toml")


@pytest.fixture(scope="session", autouse=True)
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """History and sessions of the tests; children inherit it, too."""
    folder = tmp_path_factory.mktemp("state")
    os.environ["POP_LOCAL_STATE_DIR"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct Q4_1, in the clone's models folder; never write there."""
    return fetch("SmolLM2-135M-Instruct", folder=MODELS)


@pytest.fixture(scope="session")
def gemma() -> Path:
    """Gemma-3-270M Q4_K_M (a base model), in the clone's models folder; never write there."""
    return fetch("Gemma-3-270M", folder=MODELS)


@pytest.fixture(scope="session")
def unpatched_lib() -> Path:
    """Upstream's own libraries of the same release and flags: LLAMA_CPP_LIB_PATH of a child."""
    folder = PACKAGE / "build" / "unpatched"
    subprocess.run([sys.executable, PACKAGE / "tool.py", "unpatched", folder], check=True)
    return folder
