"""Run llama-server's own tests against `pop-local serve`.

The tests are read from the pinned source distribution, which the build downloads and checks.
Usage: python tests/llama_server/run_upstream.py [PYTEST ARGUMENTS], for example -k tokenize.
"""

import os
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "patches" / "llama-cpp-python"
sys.path.insert(0, str(PACKAGE))

from pop_build.fetch import fetch_or_keep, read_pin  # noqa: E402

# The tests name templates by a path relative to their own folder.
_FOLDERS = ("tools/server/tests", "models/templates")


def extract(folder: Path) -> Path:
    """Extract the tests and their templates once per release, and return the tests' folder."""
    pin = read_pin(PACKAGE / "upstream.txt")
    source = folder / f"{pin.name}-{pin.version}"
    done = source / "complete"
    if not done.is_file():
        with tarfile.open(fetch_or_keep(pin, PACKAGE / "build" / "source")) as archive:
            for member in archive:
                _, *inside = Path(member.name).parts
                path = Path(*inside)
                is_selected = any(
                    path.is_relative_to(f"vendor/llama.cpp/{folder}") for folder in _FOLDERS
                )
                if is_selected and member.isfile() and ".." not in inside:
                    target = source / path
                    target.parent.mkdir(parents=True, exist_ok=True)
                    file = archive.extractfile(member)
                    assert file is not None
                    target.write_bytes(file.read())
        done.touch()
    return source / "vendor" / "llama.cpp" / "tools" / "server" / "tests"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main(arguments: list[str]) -> int:
    folder = PACKAGE / "build" / "llama-server-tests"
    tests = extract(folder)
    paths = [str(ROOT), str(ROOT / "converter"), str(ROOT / "tests")]
    inherited = [os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else []
    changes = {
        "POP_STAND_INS": str(folder / "models"),
        "POP_SERVER_LOG": str(folder / "servers.log"),
        "PORT": str(free_port()),
        "PYTHONPATH": os.pathsep.join(paths + inherited),
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "llama_server.adaptation",
        "-p",
        "no:cacheprovider",
    ]
    command += ["-q", "-m", "not slow", *(arguments or ["unit"])]
    process = subprocess.run(command, cwd=tests, env=os.environ | changes)
    # No test is left if the arguments select only tests that the list excludes.
    return 0 if process.returncode == pytest.ExitCode.NO_TESTS_COLLECTED else process.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
