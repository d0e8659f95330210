"""Extract and patch the source tree, and compute its build key."""

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
# The file in the package `llama_cpp` that identifies an installed wheel's build.
KEY_FILE = "pop_build_key.txt"
# Environment variables that change the compiled library.
_FLAGS = (
    *("CMAKE_ARGS", "CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS"),
    *("CUDACXX", "CUDAHOSTCXX", "CUDAARCHS", "CUDAFLAGS", "VULKAN_SDK", PORTABLE_VARIABLE),
)
_PACKAGE_FILES = ("pyproject.toml", "upstream.txt", "*.patch", "pop_build/*.py")
_HOOK_SUFFIXES = (".patch", ".cpp", ".h", ".hpp", ".c", ".cu", ".cuh", ".m", ".metal", ".txt")
_LLAMA_CPP = Path("vendor", "llama.cpp")
_NOT_SOURCE = (".git", "build", "__pycache__")
# These folders are not compiled. They contain two thirds of the bytes, and their paths are too
# long for Windows.
_LEFT_OUT = ("benches", "docs", "examples", "models", "tests", "tools/ui")
_KEPT = ("models/templates",)  # small files for the tests of chat formats
_MAX_TREES = 4


@dataclass(frozen=True)
class Recipe:
    """A build's inputs.

    `hooks` is None for an unpatched build, and `source` is None for the pinned release.
    """

    package: Path
    hooks: Path | None
    source: Path | None
    flags: tuple[str, ...]

    @property
    def pin(self) -> Pin:
        return read_pin(self.package / "upstream.txt")

    @property
    def name(self) -> str:
        """The package's name, which is also the wheel's name."""
        return self._own("name")

    @property
    def version(self) -> str:
        """The package's version, which is also the wheel's version."""
        return self._own("version")

    def _own(self, field: str) -> str:
        text = (self.package / "pyproject.toml").read_text(encoding="utf-8")
        match = re.search(rf'^{field} = "([^"]+)"$', text, re.MULTILINE)
        assert match is not None
        return match[1]


def recipe(package: Path, env: Mapping[str, str]) -> Recipe:
    """Return this environment's build recipe. Raises BuildError for invalid settings."""
    source = Path(env[SOURCE_VARIABLE]).expanduser() if env.get(SOURCE_VARIABLE) else None
    if source is not None and not source.is_absolute():
        raise BuildError(
            f"{SOURCE_VARIABLE} is a relative path ({source}), but pip builds in another folder.",
            f"Set {SOURCE_VARIABLE} to an absolute path.",
        )
    if source is not None and not source.exists():
        raise BuildError(
            f"{source} does not exist.",
            f"Set {SOURCE_VARIABLE} to a source distribution (.tar.gz) or an extracted tree.",
        )
    hooks = None if env.get(UNPATCHED_VARIABLE) else find_hooks(package)
    flags = tuple(f"{name}={env[name]}" for name in _FLAGS if env.get(name))
    if not env.get(PORTABLE_VARIABLE):
        flags += (f"CPU={cpu()}",)
    return Recipe(package, hooks, source, flags)


def find_hooks(package: Path) -> Path:
    """Return the folder with the llama.cpp patches. In an sdist, the folder is in the package."""
    for folder in (package / "llama.cpp", package.parent / "llama.cpp"):
        if any(folder.glob("*.patch")):
            return folder
    raise BuildError(
        f"No llama.cpp patches were found in or next to {package}.",
        "Build from a complete clone with pip 21.3 or newer (`python -m pip install -U pip`)."
        " Older versions of pip copy the package without its sibling folders.",
    )


def hook_files(hooks: Path) -> tuple[Path, ...]:
    """Return the patches and the source files to add to llama.cpp, sorted by path."""
    paths = (path for path in hooks.rglob("*") if path.suffix in _HOOK_SUFFIXES)
    return tuple(sorted(path for path in paths if path.is_file()))


def package_files(package: Path) -> tuple[Path, ...]:
    return tuple(sorted(path for glob in _PACKAGE_FILES for path in package.glob(glob)))


def key(recipe: Recipe) -> str:
    """Return the build key: the pinned version, a hash of the patches, and a hash of the flags."""
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
    """Return the build folder, whose `src` subfolder contains the patched tree.

    An existing tree is reused if it is intact.
    """
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
        tree = extract(recipe, Path(scratch))
        _patch(recipe, tree)
        _set(tree / "llama_cpp" / "__init__.py", "__version__", recipe.version)
        _set(tree / "pyproject.toml", "name", recipe.name)
        (tree / "llama_cpp" / KEY_FILE).write_text(folder.name, encoding="utf-8")
        tree.replace(source)
    stamp.write_text(_fingerprint(source))
    _delete_old_trees(builds, folder)
    return folder


def extract(recipe: Recipe, scratch: Path) -> Path:
    source = recipe.source or fetch_or_keep(recipe.pin, recipe.package / "build" / "source")
    if source.is_dir():
        skipped = shutil.ignore_patterns(*_NOT_SOURCE)
        tree = Path(shutil.copytree(source, scratch / "tree", symlinks=True, ignore=skipped))
    else:
        with tarfile.open(source) as archive:
            if hasattr(tarfile, "data_filter"):
                archive.extractall(scratch, members=_safe(archive), filter="data")
            else:  # Python older than 3.10.12 or 3.11.4
                archive.extractall(scratch, members=_safe(archive))
        (tree,) = scratch.iterdir()
    if not (tree / "llama_cpp" / "__init__.py").is_file() or not (tree / _LLAMA_CPP).is_dir():
        raise BuildError(
            f"{source} is not a llama-cpp-python source tree.",
            f"The tree must contain llama_cpp/__init__.py and the submodule"
            f" {_LLAMA_CPP.as_posix()}.",
        )
    return tree


def _safe(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for member in archive:
        parts = Path(member.name).parts
        if not (member.isfile() or member.isdir()) or ".." in parts or Path(member.name).anchor:
            raise BuildError(
                f"The archive contains an unsafe path: {member.name}.", "Use a trusted archive."
            )
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
            f"llama.cpp already contains a file named {target.name}.",
            "Rename our file in patches/llama.cpp and update the patches that refer to it.",
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, target)


def _set(path: Path, field: str, value: str) -> None:
    pattern = re.compile(rf'^{field} = "[^"]+"$', re.MULTILINE)
    text, n = pattern.subn(f'{field} = "{value}"', path.read_text(encoding="utf-8"))
    if n != 1:
        raise BuildError(
            f'{path.name} must contain exactly one line of the form {field} = "...".',
            "Update pop_build/tree.py, because the field has moved or changed upstream.",
        )
    path.write_text(text, encoding="utf-8", newline="\n")


def _fingerprint(source: Path) -> str:
    """Hash file names, sizes, and modification times. Hashing 200 MB of data would be slow."""
    digest = hashlib.sha256()
    for path in _files(source):
        stat = path.lstat()
        digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _files(source: Path) -> Iterable[Path]:
    if not source.is_dir():
        return (source,)
    paths: list[Path] = []
    for folder, folders, names in os.walk(source):
        folders[:] = [name for name in folders if name not in _NOT_SOURCE]
        paths += [Path(folder, name) for name in names]
    # Upstream's build installs its libraries into the source tree.
    libraries = source / "llama_cpp" / "lib"
    return sorted(path for path in paths if path.parent != libraries)


def _delete_old_trees(builds: Path, current: Path) -> None:
    stamps = sorted(builds.glob("*/tree.sha256"), key=lambda stamp: -stamp.stat().st_mtime_ns)
    for stamp in stamps[_MAX_TREES:]:
        if stamp.parent != current:
            stamp.unlink(missing_ok=True)
            shutil.rmtree(stamp.parent, ignore_errors=True)
