"""Run README's commands and its Python unchanged in a clone with SmolLM2."""

import os
import re
import shlex
import subprocess
import sys
import textwrap

import pytest

from support.paths import ROOT

USE = (ROOT / "README.md").read_text("utf-8").split("## Use it")[1].split("\n## ")[0]
COMMANDS = [
    shlex.split(line, comments=True) for line in re.findall("^    pop-local (.*)", USE, re.M)
]
# Arguments that keep slow or endless commands short.
LESS = {
    "chat": [],
    "run": ["--max-tokens", "8"],
    "convert": ["--dry-run"],
    "serve": ["--help"],
    "bench": ["--help"],
}


def run(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env=os.environ | {"POP_LOCAL_MODEL": "smollm2", "POP_LOCAL_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_command_runs(words, smollm2):
    run("-m", "pop_local", *words, *LESS[words[0]])


def test_python_example_runs(smollm2):
    [code] = re.findall(r"from Python:\n\n((?:    .*\n)+)", USE)
    assert run("-c", textwrap.dedent(code)).strip()
