"""Run the commands of README and Getting started with SmolLM2, and README's Python."""

import os
import re
import shlex
import subprocess
import sys
import textwrap

import pytest

from support.paths import ROOT

USE = (ROOT / "README.md").read_text("utf-8").split("## Use it")[1].split("\n## ")[0]
GUIDE = (ROOT / "docs" / "getting-started.md").read_text("utf-8")


def commands_in(text: str) -> list[list[str]]:
    lines = re.findall("^    pop-local (.*)", text, re.M)
    return [shlex.split(line, comments=True) for line in lines]


COMMANDS = commands_in(USE)
[QUOTED] = re.findall(r'should contain "([^"]+)"', GUIDE)
OWN_MODEL = commands_in(GUIDE.split("## 6. Use your own model")[1])
# Arguments that keep slow or endless commands short.
LESS = {
    "chat": [],
    "run": ["--max-tokens", "8"],
    "convert": ["--dry-run"],
    "serve": ["--help"],
    "bench": ["--help"],
}


def run(*words: str, typed: str = "") -> str:
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env=os.environ | {"POP_LOCAL_MODEL": "smollm2", "POP_LOCAL_THREADS": "1"},
        input=typed,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_command_runs(words, smollm2):
    given = [str(smollm2) if word == "MODEL.gguf" else word for word in words]
    run("-m", "pop_local", *given, *LESS[words[0]])


def test_python_example_runs(smollm2):
    [code] = re.findall(r"from Python:\n\n((?:    .*\n)+)", USE)
    assert run("-c", textwrap.dedent(code)).strip()


def test_chat_of_the_guide_answers(smollm2):
    [chat] = commands_in(GUIDE.split("## 2. Chat")[1].split("\n## ")[0])
    typed = "".join(f"{line}\n" for line in re.findall("^    > (.*)", GUIDE, re.M))
    answers = run("-m", "pop_local", *chat, typed=typed).splitlines()
    assert len(answers) == 1 and QUOTED in answers[0]


def test_both_ways_of_reading_in_the_guide_answer(smollm2):
    fast, full = commands_in(GUIDE.split("## 4. ")[1].split("\n## ")[0])
    assert "--full" in full and [word for word in full if word != "--full"] == fast
    for words in (fast, full):
        assert QUOTED in run("-m", "pop_local", *words)


@pytest.mark.parametrize("words", OWN_MODEL, ids=" ".join)
def test_own_model_of_the_guide(words, smollm2_q4_0, smollm2_pop):
    paths = {"MODEL.gguf": str(smollm2_q4_0), "MODEL.pop.gguf": str(smollm2_pop)}
    less = {"convert": ["--dry-run"], "bench": ["--prompt", "128", "--repeat", "1"]}
    run("-m", "pop_local", *(paths.get(word, word) for word in words), *less.get(words[0], []))
