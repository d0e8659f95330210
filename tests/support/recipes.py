"""Build tiny random models of all architectures with the recipes of llama.cpp's own test.

`python -m support.recipes` compiles the test, which the source distribution contains, against the
unpatched library. A small program of ours (recipes.cpp) wraps it. New architectures of a
llama.cpp update are included automatically.
"""

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from filelock import FileLock

from pop_build.errors import BuildError
from pop_build.fetch import fetch_or_keep
from pop_build.tree import UNPATCHED_VARIABLE, Recipe, key, recipe
from support.paths import PACKAGE

FOLDER = PACKAGE / "build" / "recipes"
UNPATCHED = PACKAGE / "build" / "unpatched"
# Upstream's two layers would leave none between the first and the last.
N_LAYERS = 4

_PROGRAM = Path(__file__).with_suffix(".cpp")
_TEST = "tests/test-llama-archs.cpp"
_HEADERS = ("common", "ggml/include", "include", "src")
_UPSTREAM_LAYERS = "uint32_t n_layer = 2;"
_OUR_LAYERS = "uint32_t n_layer = pop_n_layer;"


class NoModelError(Exception):
    """Raised with stderr if llama.cpp cannot open a recipe's model."""


@dataclass(frozen=True, order=True)
class Name:
    """A recipe: an architecture, with or without experts."""

    arch: str
    is_moe: bool

    def __str__(self) -> str:
        return f"{self.arch}+experts" if self.is_moe else self.arch


def names() -> list[Name]:
    """Return all recipes of the program in upstream's order; empty if it was not built."""
    listed = FOLDER / "names.txt"
    if not listed.is_file():
        return []
    pairs = (line.split() for line in listed.read_text().splitlines())
    return [Name(arch, kind == "moe") for arch, kind in pairs]


def make(name: Name, path: Path, more: Sequence[str] = (), seed: int = 1) -> Path:
    """Write a model in F32 and return its path. `more`: additional keys as KEY=VALUE.

    The model has N_LAYERS layers unless the recipe sets a number or supports only upstream's two.
    Raises NoModelError.
    """
    kind = "moe" if name.is_moe else "dense"
    for n_layers in (N_LAYERS, 2):
        arguments = [name.arch, kind, str(n_layers), str(seed), str(path), *more]
        command = [str(FOLDER / "recipes"), "make", *arguments]
        process = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if process.returncode == 0:
            return path
    raise NoModelError(process.stderr)


def build() -> None:
    """Compile the program into FOLDER if it is missing, against the library in UNPATCHED."""
    backend = recipe(PACKAGE, os.environ | {UNPATCHED_VARIABLE: "1"})
    program = hashlib.sha256(_PROGRAM.read_bytes() + Path(__file__).read_bytes()).hexdigest()
    stamp = f"{key(backend)} {program}"
    FOLDER.parent.mkdir(exist_ok=True)
    with FileLock(f"{FOLDER}.lock"):
        kept = FOLDER / "key"
        if kept.is_file() and kept.read_text() == stamp:
            return
        with tempfile.TemporaryDirectory(dir=FOLDER.parent) as scratch:
            tree, fresh = Path(scratch, "tree"), Path(scratch, "recipes")
            fresh.mkdir()
            _extract(backend, tree)
            _compile(tree, fresh / "recipes")
            listed = subprocess.run([fresh / "recipes", "list"], check=True, capture_output=True)
            (fresh / "names.txt").write_bytes(listed.stdout)
            (fresh / "key").write_text(stamp)
            shutil.rmtree(FOLDER, ignore_errors=True)
            fresh.replace(FOLDER)


def _extract(backend: Recipe, tree: Path) -> None:
    """Extract the test and its headers, and make the number of layers configurable."""
    for inside, content in llama_cpp_files(backend):
        is_header = inside.suffix == ".h" and str(inside.parent) in _HEADERS
        if is_header or str(inside) == _TEST:
            path = tree / inside
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content())
    test = tree / _TEST
    text = test.read_text(encoding="utf-8") if test.is_file() else ""
    if text.count(_UPSTREAM_LAYERS) != 1:
        raise BuildError(
            f"llama.cpp's {_TEST} is not there, or no longer says {_UPSTREAM_LAYERS}",
            "Teach tests/support/recipes.py where its recipes are now.",
        )
    test.write_text(text.replace(_UPSTREAM_LAYERS, _OUR_LAYERS), encoding="utf-8")


def llama_cpp_files(backend: Recipe) -> Iterator[tuple[PurePosixPath, Callable[[], bytes]]]:
    """Yield each file of llama.cpp and a function that reads it."""
    source = backend.source or fetch_or_keep(backend.pin, PACKAGE / "build" / "source")
    if source.is_dir():
        root = source / "vendor" / "llama.cpp"
        for folder in (*_HEADERS, "tests"):
            for path in root.glob(f"{folder}/*"):
                if path.is_file():
                    yield PurePosixPath(path.relative_to(root).as_posix()), path.read_bytes
        return
    with tarfile.open(source) as archive:
        for member in archive:
            parts = PurePosixPath(member.name).parts
            file = archive.extractfile(member) if parts[1:3] == ("vendor", "llama.cpp") else None
            if file is not None:
                yield PurePosixPath(*parts[3:]), file.read


def _compile(tree: Path, program: Path) -> None:
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    flags = [f"-I{tree / folder}" for folder in (*_HEADERS, "tests")]
    libs = [f"-L{UNPATCHED}", f"-Wl,-rpath,{UNPATCHED}", "-lllama", "-lggml", "-lggml-base"]
    command = [*compiler, "-std=c++17", "-O1", *flags, str(_PROGRAM), "-o", str(program), *libs]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode != 0:
        raise BuildError("llama.cpp's recipes were not compiled.", process.stderr[-3000:])


if __name__ == "__main__":
    try:
        build()
    except BuildError as error:
        sys.exit(str(error))
