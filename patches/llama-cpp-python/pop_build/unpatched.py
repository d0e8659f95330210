"""For comparison tests, build llama.cpp libraries without our patches.

The release and the build flags are the same as in a build with our patches.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from .errors import BuildError
from .tree import UNPATCHED_VARIABLE, key, recipe

_IN_WHEEL = "llama_cpp/lib/"


def build_unpatched(package: Path, target: Path) -> bool:
    """Build the libraries into `target`. Return False if the libraries were already up to date.

    If LLAMA_CPP_LIB_PATH is set to `target`, the llama_cpp package loads these libraries.
    """
    env = os.environ | {UNPATCHED_VARIABLE: "1"}
    build_key = key(recipe(package, env))
    stamp = target / "key"
    if stamp.is_file() and stamp.read_text() == build_key:
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        wheel = _wheel(package, Path(scratch), env)
        fresh = Path(scratch, "lib")
        fresh.mkdir()
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.infolist():
                if member.filename.startswith(_IN_WHEEL) and not member.is_dir():
                    (fresh / Path(member.filename).name).write_bytes(archive.read(member))
        (fresh / "key").write_text(build_key)
        shutil.rmtree(target, ignore_errors=True)
        fresh.replace(target)
    return True


def _wheel(package: Path, folder: Path, env: dict[str, str]) -> Path:
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--disable-pip-version-check"]
    command += ["--wheel-dir", str(folder), str(package)]
    if subprocess.run(command, env=env, stdout=sys.stderr).returncode != 0:
        raise BuildError(
            "pip could not build the unpatched library.",
            "Look for the error in pip's output above.",
        )
    (wheel,) = folder.glob("*.whl")
    return wheel
