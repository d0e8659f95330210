"""Check that `uv tool` and `pipx` install pop-local from wheels; pytest does not run this file.

    python tests/try_installers.py WHEELS MODEL.gguf [INSTALLER]... [--characters N]

The installers are uv and pipx by default, and must be on PATH. Each one starts with an empty home
folder, no package index, and a PATH without a compiler. Then `pop-local run` answers a question
about the first N characters of a document (default: 3000), and `pop-local serve` answers a request
for its health. MODEL is a model from the catalog, in its usual file name. The exit status is 1 if a
step fails.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DOCUMENT = Path(__file__).parents[1] / "pop_local" / "data" / "document.md"
N_CHARS = 3000
REQUIREMENT = "pop-local[server]"
INSTALLERS = ("uv", "pipx")
START_LIMIT_S = 600  # in qemu on a busy core
WINDOWS = os.name == "nt"


class Home:
    """An empty home folder, and the environment of programs that run in it."""

    def __init__(self, folder: Path, installer: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.installer = installer
        self.env = dict.fromkeys(
            ("HOME", "USERPROFILE", "TEMP", "APPDATA", "LOCALAPPDATA"), str(folder)
        )
        self.env |= {"PATH": str(self.bin), "PIP_CONFIG_FILE": os.devnull, "UV_NO_CONFIG": "1"}
        self.env |= {"UV_TOOL_BIN_DIR": str(self.bin), "PIPX_BIN_DIR": str(self.bin)}
        kept = ("SYSTEMROOT", "QEMU_CPU")
        self.env |= {name: os.environ[name] for name in kept if name in os.environ}

    def run(self, program: str | Path, *arguments: str | Path) -> bytes:
        """Run a program and return its stdout. Exit with status 1 if the program fails."""
        print("$", program, *arguments, file=sys.stderr, flush=True)
        command = [str(program), *map(str, arguments)]
        done = subprocess.run(
            command, cwd=self.folder, env=self.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
        )
        if done.returncode != 0:
            sys.exit(f"{program} failed with status {done.returncode}")
        return done.stdout

    def install(self, wheels: Path) -> None:
        python = sys.executable
        if self.installer.stem == "uv":
            found = ["--no-index", "--find-links", str(wheels), "--no-python-downloads"]
            self.run(self.installer, "tool", "install", *found, "--python", python, REQUIREMENT)
        else:
            from_wheels = f"--pip-args=--no-index --find-links '{wheels}'"
            self.run(self.installer, "install", "--python", python, from_wheels, REQUIREMENT)

    @property
    def program(self) -> Path:
        """The path of the installed program."""
        return self.bin / ("pop-local.exe" if WINDOWS else "pop-local")


def ask(home: Home, name: str, n_chars: int) -> dict[str, Any]:
    """Ask a question about a document, and return the answer and its statistics."""
    document = home.folder / "document.txt"
    document.write_text(DOCUMENT.read_text(encoding="utf-8")[:n_chars], encoding="utf-8")
    asked = (
        name,
        "What is this about?",
        "--file",
        document,
        "--max-tokens",
        "16",
        "--threads",
        "1",
    )
    answer: dict[str, Any] = json.loads(home.run(home.program, "run", *asked, "--json"))
    return answer


@contextmanager
def served(home: Home, name: str) -> Iterator[str]:
    """Run `pop-local serve` and yield its address."""
    command = [str(home.program), "serve", name, "--port", "0", "--threads", "1"]
    print("$", *command, file=sys.stderr, flush=True)
    with (home.folder / "log").open("w+b") as log:
        process = subprocess.Popen(
            command, cwd=home.folder, env=home.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        try:
            deadline_s = time.monotonic() + START_LIMIT_S
            while process.poll() is None and time.monotonic() < deadline_s:
                shown = (home.folder / "log").read_text(encoding="utf-8", errors="replace")
                if found := re.search(r"APIs at (http://\S+)/v1", shown):
                    yield found[1]
                    return
                time.sleep(0.1)
            sys.exit(f"the server did not start: {shown}")
        finally:
            process.kill()
            process.wait()


def try_installer(installer: Path, wheels: Path, model: Path, n_chars: int) -> None:
    """Install, ask, and serve in an empty home folder, and print the times."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        home = Home(Path(scratch).resolve(), installer)
        started_s = time.monotonic()
        home.install(wheels)
        installed_s = time.monotonic()
        home.env["POP_LOCAL_MODELS_DIR"] = str(model.parent)
        answer = ask(home, model.stem.partition(".Q")[0], n_chars)
        answered_s = time.monotonic()
        with served(home, model.stem.partition(".Q")[0]) as address:
            served_s = time.monotonic()
            health = urllib.request.urlopen(f"{address}/health", timeout=60).read().decode()
    n_prompt, n_pruned = (answer["stats"][name] for name in ("n_prompt", "n_pruned"))
    print(f"{installer.stem}: {answer['text']!r}, health {health}")
    print(f"{n_pruned} of {n_prompt} tokens pruned")
    times_s = (installed_s - started_s, answered_s - installed_s, served_s - answered_s)
    print("installed in {:.1f} s, answered in {:.1f} s, served after {:.1f} s".format(*times_s))
    if not answer["text"] or not n_pruned or "ok" not in health:
        sys.exit("the answer is empty, no token was pruned, or the server is not healthy")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("wheels", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("installers", nargs="*", default=INSTALLERS)
    parser.add_argument("--characters", type=int, default=N_CHARS)
    given = parser.parse_args()
    for name in given.installers:
        installer = shutil.which(name)
        if installer is None:
            sys.exit(f"{name} is not on PATH. Install it: python -m pip install {name}")
        wheels, model = given.wheels.absolute(), given.model.absolute()
        try_installer(Path(installer), wheels, model, given.characters)


if __name__ == "__main__":
    main()
