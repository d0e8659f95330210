"""Run the commands of README and Getting started with SmolLM2, and README's Python.

The document is cut to one section; tests/cli/test_demo.py asks the same question about all of it.
Commands for the user's own model use a tiny one.
"""

import re
import shlex
import subprocess
import sys
import textwrap

import pytest
from gguf import GGMLQuantizationType

from pop_local.models.model_names import MODELS_VARIABLE
from support.converted import converted
from support.paths import ROOT
from support.program import called
from support.synthetic import TEMPLATE, make_gguf

USE = (ROOT / "README.md").read_text("utf-8").split("## Use it")[1].split("\n## ")[0]
DOCUMENT = "pop_local/data/document.md"
GUIDE = (ROOT / "docs" / "getting-started.md").read_text("utf-8")


def commands_in(text: str) -> list[list[str]]:
    lines = re.findall("^    pop-local (.*)", text, re.M)
    return [shlex.split(line, comments=True) for line in lines]


COMMANDS = commands_in(USE)
[QUOTED] = re.findall(r'should contain "([^"]+)"', GUIDE)
OWN_MODEL = commands_in(GUIDE.split("## 6. Use your own model")[1].split("\n## ")[0])
# Arguments that keep slow or endless commands short.
LESS = {
    "chat": [],
    "run": ["--max-tokens", "8"],
    "convert": ["--dry-run"],
    "serve": ["--help"],
    "bench": ["--help"],
}


@pytest.fixture(autouse=True)
def folder(smollm2, tmp_path, monkeypatch):
    """Enter a folder with a document of 500 tokens in the original's place."""
    whole = (ROOT / DOCUMENT).read_text("utf-8")
    title, section = whole.split("\n")[0], whole.split("## The keepers")[1].split("\n## ")[0]
    (tmp_path / DOCUMENT).parent.mkdir(parents=True)
    (tmp_path / DOCUMENT).write_text(f"{title}\n\n## The keepers{section}", "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(MODELS_VARIABLE, str(smollm2.parent))
    monkeypatch.setenv("POP_LOCAL_MODEL", "smollm2")
    monkeypatch.setenv("POP_LOCAL_THREADS", "1")
    return tmp_path


def run(*words: str, typed: str = "") -> str:
    done = called(*words, text=typed)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_command_runs(words, smollm2):
    arguments = [str(smollm2) if word == "MODEL.gguf" else word for word in words]
    run(*arguments, *LESS[words[0]])


def test_python_example_runs():
    [code] = re.findall(r"from Python:\n\n((?:    .*\n)+)", USE)
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_chat_of_the_guide_answers():
    [chat] = commands_in(GUIDE.split("## 2. Chat")[1].split("\n## ")[0])
    typed = "".join(f"{line}\n" for line in re.findall("^    > (.*)", GUIDE, re.M))
    answers = run(*chat, typed=typed).splitlines()
    assert len(answers) == 1 and QUOTED in answers[0]


def test_full_and_fast_reading_of_the_guide_answer():
    fast, full = commands_in(GUIDE.split("## 4. ")[1].split("\n## ")[0])
    assert "--full" in full and [word for word in full if word != "--full"] == fast
    for words in (fast, full):
        assert QUOTED in run(*words)


@pytest.mark.parametrize("words", OWN_MODEL, ids=" ".join)
def test_commands_for_own_model_run(words, folder):
    kind = GGMLQuantizationType.Q4_0
    model = make_gguf(folder / "MODEL.gguf", "llama", type=kind, chat_template=TEMPLATE)
    if "MODEL.pop.gguf" in words:
        converted(model, folder, boundary=5)
    less = {"convert": ["--dry-run"], "bench": ["--prompt", "128", "--repeat", "1"]}
    run(*words, *less.get(words[0], []))
