"""The patched source tree: its key, its extraction, its patches."""

import hashlib
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from .apply import apply_patch
from .errors import BuildError
from .fetch import SOURCE_VARIABLE, Pin, fetch_or_keep, read_pin
from .machine import cpu

PORTABLE_VARIABLE = "POP_LLAMA_CPP_PORTABLE"
UNPATCHED_VARIABLE = "POP_LLAMA_CPP_UNPATCHED"
# In the package `llama_cpp`, so that a wheel says of which build it is.
KEY_FILE = "pop_build_key.txt"
# Variables that give another library out of the same sources.
_FLAGS = (
    *("CMAKE_ARGS", "CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS"),
    *("CUDACXX", "CUDAHOSTCXX", "CUDAARCHS", "CUDAFLAGS", "VULKAN_SDK", PORTABLE_VARIABLE),
)
_PACKAGE_FILES = ("pyproject.toml", "upstream.txt", "*.patch", "pop_build/*.py")
_HOOK_SUFFIXES = (".patch", ".cpp", ".h", ".hpp", ".c", ".cu", ".cuh", ".m", ".metal", ".txt")
_LLAMA_CPP = Path("vendor", "llama.cpp")
_NOT_SOURCE = (".git", "build", "__pycache__")
# Not compiled, two thirds of the bytes, and too deep a path for Windows.
_LEFT_OUT = ("benches", "docs", "examples", "models", "tests", "tools/ui")
_KEPT = ("models/templates",)  # small, and the tests of chat formats read them
_KEPT_TREES = 4


@dataclass(frozen=True)
class Recipe:
    """The parts of a build. `hooks` is None for the unpatched library; `source` one's own."""

    package: Path
    hooks: Path | None
    source: Path | None
    flags: tuple[str, ...]

    @property
    def pin(self) -> Pin:
        return read_pin(self.package / "upstream.txt")

    @property
    def name(self) -> str:
        """The name of this package, which the wheel carries."""
        return self._own("name")

    @property
    def version(self) -> str:
        """The version of this package, which the wheel carries."""
        return self._own("version")

    def _own(self, field: str) -> str:
        text = (self.package / "pyproject.toml").read_text(encoding="utf-8")
        match = re.search(rf'^{field} = "([^"]+)"$', text, re.MULTILINE)
        assert match is not None
        return match[1]


def recipe(package: Path, env: Mapping[str, str]) -> Recipe:
    """The recipe that the package and the environment ask for."""
    source = Path(env[SOURCE_VARIABLE]).expanduser() if env.get(SOURCE_VARIABLE) else None
    if source is not None and not source.is_absolute():
        raise BuildError(
            f"{SOURCE_VARIABLE} is {source}, and pip builds in another folder.",
            "Give an absolute path.",
        )
    if source is not None and not source.exists():
        raise BuildError(
            f"There is nothing at {source}.",
            f"{SOURCE_VARIABLE} takes a source distribution (.tar.gz) or an extracted tree.",
        )
    hooks = None if env.get(UNPATCHED_VARIABLE) else find_hooks(package)
    flags = tuple(f"{name}={env[name]}" for name in _FLAGS if env.get(name))
    if not env.get(PORTABLE_VARIABLE):
        flags += (f"CPU={cpu()}",)
    return Recipe(package, hooks, source, flags)


def find_hooks(package: Path) -> Path:
    """The folder with the hooks for llama.cpp: beside the package, or inside it in an sdist."""
    for folder in (package / "llama.cpp", package.parent / "llama.cpp"):
        if any(folder.glob("*.patch")):
            return folder
    raise BuildError(
        f"There are no patches for llama.cpp beside {package}.",
        "Build from a whole clone, with pip 21.3 or newer: an older pip copies the folder away"
        " from its neighbours (`python -m pip install --upgrade pip`).",
    )


def hook_files(hooks: Path) -> tuple[Path, ...]:
    """The patches and the new files, sorted by path."""
    found = (path for path in hooks.rglob("*") if path.suffix in _HOOK_SUFFIXES)
    return tuple(sorted(path for path in found if path.is_file()))


def package_files(package: Path) -> tuple[Path, ...]:
    return tuple(sorted(path for glob in _PACKAGE_FILES for path in package.glob(glob)))


def key(recipe: Recipe) -> str:
    """Names a build: the pin, what is changed in it, and how it is compiled."""
    patches = hashlib.sha256()
    for folder, files in (
        (recipe.package, package_files(recipe.package)),
        (recipe.hooks, hook_files(recipe.hooks) if recipe.hooks else ()),
    ):
        for path in files:
            patches.update(f"{path.relative_to(folder or path).as_posix()}\0".encode())
            patches.update(hashlib.sha256(path.read_bytes()).digest())
    if recipe.source is not None:
        patches.update(_fingerprint(recipe.source).encode())
    flags = hashlib.sha256("\0".join(recipe.flags).encode())
    kind = "own" if recipe.source else recipe.pin.version
    variant = "-unpatched" if recipe.hooks is None else ""
    return f"{kind}{variant}-{patches.hexdigest()[:10]}-{flags.hexdigest()[:8]}"


def prepare(recipe: Recipe) -> Path:
    """The folder of the build, whose `src` is the patched tree; extracted unless it is intact."""
    builds = recipe.package / "build"
    folder = builds / key(recipe)
    stamp = folder / "tree.sha256"
    source = folder / "src"
    if stamp.is_file() and source.is_dir() and stamp.read_text() == _fingerprint(source):
        os.utime(stamp)
        return folder
    stamp.unlink(missing_ok=True)
    shutil.rmtree(source, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=builds) as scratch:
        tree = _extract(recipe, Path(scratch))
        _patch(recipe, tree)
        _set(tree / "llama_cpp" / "__init__.py", "__version__", recipe.version)
        _set(tree / "pyproject.toml", "name", recipe.name)
        (tree / "llama_cpp" / KEY_FILE).write_text(folder.name, encoding="utf-8")
        tree.replace(source)
    stamp.write_text(_fingerprint(source))
    _forget_old(builds, folder)
    return folder


def _extract(recipe: Recipe, scratch: Path) -> Path:
    source = recipe.source or fetch_or_keep(recipe.pin, recipe.package / "build" / "source")
    if source.is_dir():
        skipped = shutil.ignore_patterns(*_NOT_SOURCE)
        tree = Path(shutil.copytree(source, scratch / "tree", symlinks=True, ignore=skipped))
    else:
        with tarfile.open(source) as archive:
            if hasattr(tarfile, "data_filter"):
                archive.extractall(scratch, members=_safe(archive), filter="data")
            else:  # before 3.10.12 and 3.11.4
                archive.extractall(scratch, members=_safe(archive))
        (tree,) = scratch.iterdir()
    if not (tree / "llama_cpp" / "__init__.py").is_file() or not (tree / _LLAMA_CPP).is_dir():
        raise BuildError(
            f"{source} is no source tree of llama-cpp-python.",
            f"It lacks llama_cpp/__init__.py or {_LLAMA_CPP.as_posix()} (a git submodule).",
        )
    return tree


def _safe(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for member in archive:
        parts = Path(member.name).parts
        if not (member.isfile() or member.isdir()) or ".." in parts or Path(member.name).anchor:
            raise BuildError(f"The archive holds {member.name}, which is unsafe.", "Do not use it.")
        inside = Path(*parts[1:])
        is_kept = any(inside.is_relative_to(_LLAMA_CPP / folder) for folder in _KEPT)
        if is_kept or not any(inside.is_relative_to(_LLAMA_CPP / name) for name in _LEFT_OUT):
            yield member


def _patch(recipe: Recipe, tree: Path) -> None:
    for patch in sorted(recipe.package.glob("*.patch")):
        apply_patch(patch, tree)
    if recipe.hooks is None:
        return
    llama_cpp = tree / _LLAMA_CPP
    for file in hook_files(recipe.hooks):
        if file.parent != recipe.hooks:
            _add(file, llama_cpp / file.relative_to(recipe.hooks))
    for patch in sorted(recipe.hooks.glob("*.patch")):
        apply_patch(patch, llama_cpp)


def _add(file: Path, target: Path) -> None:
    if target.exists():
        raise BuildError(
            f"llama.cpp has a file {target.name} of its own now.",
            "Rename ours in patches/llama.cpp and in the hooks that name it.",
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, target)


def _set(path: Path, field: str, value: str) -> None:
    pattern = re.compile(rf'^{field} = "[^"]+"$', re.MULTILINE)
    text, n = pattern.subn(f'{field} = "{value}"', path.read_text(encoding="utf-8"))
    if n != 1:
        raise BuildError(
            f"{path.name} no longer says {field} = ...",
            "Teach pop_build/tree.py where upstream keeps its name and version.",
        )
    path.write_text(text, encoding="utf-8", newline="\n")


def _fingerprint(source: Path) -> str:
    """A hash over names, sizes and times: notices an edit without reading 200 MB."""
    digest = hashlib.sha256()
    for path in _files(source):
        stat = path.lstat()
        digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _files(source: Path) -> Iterable[Path]:
    if not source.is_dir():
        return (source,)
    found: list[Path] = []
    for folder, folders, names in os.walk(source):
        folders[:] = [name for name in folders if name not in _NOT_SOURCE]
        found += [Path(folder, name) for name in names]
    # Upstream installs the library into its own tree, too.
    built = source / "llama_cpp" / "lib"
    return sorted(path for path in found if path.parent != built)


def _forget_old(builds: Path, current: Path) -> None:
    stamps = sorted(builds.glob("*/tree.sha256"), key=lambda stamp: -stamp.stat().st_mtime_ns)
    for stamp in stamps[_KEPT_TREES:]:
        if stamp.parent != current:
            stamp.unlink(missing_ok=True)
            shutil.rmtree(stamp.parent, ignore_errors=True)
