"""Check the diff that we offer to llama-cpp-python (docs/internals/upstream-backends.md)."""

import ctypes
import os
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pop_build.apply import apply_patch
from pop_build.diff import parse
from pop_build.fetch import fetch_or_keep, read_pin
from support.building import read, write
from support.paths import PACKAGE

PAGE = Path(__file__).parents[3] / "docs/internals/upstream-backends.md"


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Apply the diff to the files of the pinned release and return their folder."""
    folder = tmp_path_factory.mktemp("offer")
    diff = read(PAGE).partition("```diff\n")[2].partition("```")[0]
    patch = write(folder / "offer.patch", diff)
    missing = {each.path for each in parse(diff, patch.name)}
    with tarfile.open(fetch_or_keep(read_pin(PACKAGE / "upstream.txt"), folder)) as archive:
        for member in archive:
            inside = member.name.partition("/")[2]
            if inside in missing:
                file = archive.extractfile(member)
                assert file is not None
                write(folder / inside, file.read().decode())
                missing.remove(inside)
            if not missing:
                break
    apply_patch(patch, folder)
    return folder


@pytest.mark.slow
def test_the_diff_applies_to_the_pinned_release(patched):
    assert "GGML_AVAILABLE_BACKENDS" in read(patched / "CMakeLists.txt")
    compile(read(patched / "llama_cpp/llama_cpp.py"), "llama_cpp.py", "exec")


@pytest.mark.slow
@pytest.mark.parametrize("n_registered", [0, 1])
def test_backends_are_loaded_only_if_none_is_registered(patched, tmp_path, n_registered):
    source = read(patched / "llama_cpp/llama_cpp.py")
    code = source[source.index("def _load_backends") : source.index("ctypes_function =")]
    loaded: list[bytes] = []
    ggml = SimpleNamespace(
        ggml_backend_reg_count=lambda: n_registered,
        ggml_backend_load_all_from_path=lambda path: loaded.append(path),
    )
    names: dict[str, Any] = {"ctypes": ctypes, "os": os, "_base_path": tmp_path}
    exec(code, names | {"load_shared_library": lambda name, path: ggml})
    assert loaded == ([] if n_registered else [os.fsencode(tmp_path)])
