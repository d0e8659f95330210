"""A PEP 517 build backend that runs scikit-build-core in the patched source tree."""

import os
import shutil
import sys
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import NoReturn

from filelock import FileLock

from . import missing
from .errors import BuildError
from .tree import PORTABLE_VARIABLE, find_hooks, hook_files, key, package_files, prepare, recipe

Settings = dict[str, "list[str] | str"] | None

PACKAGE = Path(__file__).resolve().parent.parent
_DEFINES = {
    # llama.cpp's multimodal library, without videos: it would run ffmpeg on a client's data.
    "LLAVA_BUILD": "ON",
    "MTMD_VIDEO": "OFF",
    # A wheel cannot contain links, so each versioned library name would be a copy.
    "CMAKE_PLATFORM_NO_VERSIONED_SONAME": "ON",
    # With CMake 4, this keeps the build folder's path out of ccache's keys.
    "CMAKE_UNITY_BUILD_RELOCATABLE": "ON",
}
# Portable wheels load backends at run time, with the CPU variant for the machine.
_PORTABLE_DEFINES = {
    "GGML_NATIVE": "OFF",
    "GGML_BACKEND_DL": "ON",
    "GGML_CPU_ALL_VARIANTS": "ON",
}
_CACHED_LANGUAGES = ("C", "CXX", "CUDA", "HIP", "OBJC")


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    from scikit_build_core import build

    # The upstream tree is not extracted yet, so this package's folder is used.
    with _in(PACKAGE):
        requires: list[str] = build.get_requires_for_build_wheel(config_settings)
    return requires


def prepare_metadata_for_build_wheel(
    metadata_directory: str, config_settings: Settings = None
) -> str:
    from scikit_build_core import build

    target = str(Path(metadata_directory).resolve())
    with _prepared(config_settings) as settings:
        name: str = build.prepare_metadata_for_build_wheel(target, settings)
    return name


def build_wheel(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    from scikit_build_core import build

    target = str(Path(wheel_directory).resolve())
    metadata = metadata_directory and str(Path(metadata_directory).resolve())
    with _prepared(config_settings) as settings:
        name: str = build.build_wheel(target, settings, metadata)
    return name


def get_requires_for_build_sdist(config_settings: Settings = None) -> list[str]:
    return []


def build_sdist(sdist_directory: str, config_settings: Settings = None) -> str:
    """Build an sdist with this package and the patches, but without the upstream sources."""
    with _short_errors():
        hooks = find_hooks(PACKAGE)
        own = recipe(PACKAGE, os.environ)
        name, version = own.name.replace("-", "_"), own.version
        root = f"{name}-{version}"
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode()
        with tarfile.open(Path(sdist_directory, f"{root}.tar.gz"), "w:gz") as archive:
            for path in package_files(PACKAGE):
                archive.add(path, f"{root}/{path.relative_to(PACKAGE).as_posix()}")
            for path in hook_files(hooks):
                archive.add(path, f"{root}/llama.cpp/{path.relative_to(hooks).as_posix()}")
            info = tarfile.TarInfo(f"{root}/PKG-INFO")
            info.size = len(metadata)
            archive.addfile(info, BytesIO(metadata))
    return f"{root}.tar.gz"


def build_editable(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> NoReturn:
    with _short_errors():
        raise BuildError(
            "The patched llama-cpp-python does not support editable installs.",
            "Run `pip install ./patches/llama-cpp-python` now and after each change to a patch.",
        )
    raise AssertionError


@contextmanager
def _prepared(config_settings: Settings) -> Iterator[Settings]:
    """Change to the patched tree and yield our default settings merged with the user's.

    A lock prevents concurrent builds with the same key, because such builds share a CMake folder.
    """
    with _short_errors():
        missing.check_architecture(os.environ)
        build_recipe = recipe(PACKAGE, os.environ)
    (PACKAGE / "build").mkdir(exist_ok=True)
    with FileLock(PACKAGE / "build" / f"{key(build_recipe)}.lock"):
        with _short_errors():
            folder = prepare(build_recipe)
        with _configured(folder, config_settings) as settings:
            yield settings


@contextmanager
def _configured(folder: Path, config_settings: Settings) -> Iterator[Settings]:
    settings: dict[str, list[str] | str] = {"build-dir": str(folder / "cmake")}
    settings["wheel.license-files"] = ["LICENSE.md", "vendor/llama.cpp/LICENSE"]
    settings |= {f"cmake.define.{name}": value for name, value in defines(os.environ).items()}
    # By default, Make and Visual Studio compile one file at a time.
    os.environ.setdefault("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
    # Without this, ccache's keys contain the folder's path, and each new patch recompiles all.
    os.environ.setdefault("CCACHE_BASEDIR", str(folder))
    with _short_errors(), _in(folder / "src"):
        try:
            yield settings | (config_settings or {})
        except SystemExit:  # scikit-build-core exits if CMake fails
            missing.explain(folder / "cmake" / "CMakeCache.txt")
            raise


def defines(env: Mapping[str, str]) -> dict[str, str]:
    """Return the default CMake definitions for this environment. CMAKE_ARGS overrides them."""
    portable = _PORTABLE_DEFINES if env.get(PORTABLE_VARIABLE) else {}
    return _DEFINES | portable | launchers(env)


def launchers(env: Mapping[str, str]) -> dict[str, str]:
    """Return CMake definitions for ccache or sccache unless the user configured a launcher.

    llama.cpp's own launcher detection breaks the build if the launcher is not on PATH.
    """
    arguments = env.get("CMAKE_ARGS", "")
    if "COMPILER_LAUNCHER" in arguments or "GGML_CCACHE" in arguments:
        return {}
    if any(name.endswith("_COMPILER_LAUNCHER") for name in env):
        return {}
    tools = (shutil.which(name, path=env.get("PATH")) for name in ("ccache", "sccache"))
    tool = next(filter(None, tools), None)
    if tool is None:
        return {"GGML_CCACHE": "OFF"}
    return {f"CMAKE_{language}_COMPILER_LAUNCHER": tool for language in _CACHED_LANGUAGES}


@contextmanager
def _in(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextmanager
def _short_errors() -> Iterator[None]:
    """Exit with a BuildError's message so that build frontends do not show a traceback."""
    try:
        yield
    except BuildError as error:
        sys.exit(str(error))
