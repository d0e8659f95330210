"""Test the backend's build on tiny examples: key, pinned source and tree."""

import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from support.building import DIFF, LINES, PATCHED, read, write
from support.paths import PACKAGE, ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from pop_build import fetch as fetching
from pop_build import missing, tree
from pop_build.errors import BuildError
from pop_build.fetch import SOURCE_VARIABLE, Pin, fetch
from pop_build.hooks import defines
from pop_build.tree import PORTABLE_VARIABLE, UNPATCHED_VARIABLE, key, prepare, recipe
from pop_build.unpatched import build_unpatched
from pop_local.engine.llama.backend import OTHER, OURS

# CMake reads these environment variables (docs/getting-started.md).
FLAGS = (
    *("CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS"),
    *("CUDACXX", "CUDAHOSTCXX", "CUDAARCHS", "CUDAFLAGS", "VULKAN_SDK", PORTABLE_VARIABLE),
)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """Return a copy of the package with a toy hook, and set the source variable to a toy sdist."""
    package = tmp_path / "patches" / "llama-cpp-python"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("build", "*.patch"))
    hooks = package.parent / "llama.cpp"
    write(hooks / "0001-hook.patch", DIFF)
    write(hooks / "src" / "llama-pop.cpp", "int pop;\n")
    return package


def make_sdist(path: Path, extra: str = "src/extra.cpp") -> Path:
    files = {
        "llama_cpp/__init__.py": '__version__ = "0.3.36"\n',
        "pyproject.toml": '[project]\nname = "llama_cpp_python"\ndynamic = ["version"]\n',
        "vendor/llama.cpp/src/a.cpp": "\n".join(LINES) + "\n",
        "vendor/llama.cpp/tools/ui/deep/in/a/path.svelte": "",
        extra: "",
    }
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(f"llama_cpp_python-0.3.36/{name}")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    return path


def test_key_changes_with_the_inputs(package, tmp_path):
    hooks = package.parent / "llama.cpp"
    plain = key(recipe(package, {}))
    assert plain.startswith("0.3.36-")
    assert key(recipe(package, {"HOME": "/elsewhere"})) == plain
    keys = {
        plain,
        key(recipe(package, {"CMAKE_ARGS": "-DGGML_CUDA=on"})),
        *(key(recipe(package, {name: "value"})) for name in FLAGS),
        key(recipe(package, {UNPATCHED_VARIABLE: "1"})),
        key(recipe(package, {SOURCE_VARIABLE: str(make_sdist(tmp_path / "own.tar.gz"))})),
    }
    assert len(keys) == 4 + len(FLAGS)
    for path in (hooks / "0001-hook.patch", hooks / "src/llama-pop.cpp", package / "upstream.txt"):
        write(path, read(path) + "\n")
        changed = key(recipe(package, {}))
        assert changed not in keys
        keys.add(changed)


def test_unpatched_key_does_not_depend_on_the_hooks(package):
    before = key(recipe(package, {UNPATCHED_VARIABLE: "1"}))
    write(package.parent / "llama.cpp" / "0001-hook.patch", DIFF + "\n")
    assert key(recipe(package, {UNPATCHED_VARIABLE: "1"})) == before


def test_prepare_extracts_patches_and_names_the_version(package, tmp_path):
    env = {SOURCE_VARIABLE: str(make_sdist(tmp_path / "own.tar.gz"))}
    source = prepare(recipe(package, env)) / "src"
    assert read(source / "vendor/llama.cpp/src/a.cpp") == "\n".join(PATCHED) + "\n"
    assert read(source / "vendor/llama.cpp/src/llama-pop.cpp") == "int pop;\n"
    assert not (source / "vendor/llama.cpp/tools/ui").exists()
    assert read(source / "llama_cpp/__init__.py") == '__version__ = "0.3.36.1"\n'
    assert 'name = "pop-local-llama-cpp"\n' in read(source / "pyproject.toml")


def test_prepare_keeps_an_intact_tree_and_replaces_a_touched_one(package, tmp_path):
    env = {SOURCE_VARIABLE: str(make_sdist(tmp_path / "own.tar.gz"))}
    folder = prepare(recipe(package, env))
    patched = folder / "src/vendor/llama.cpp/src/a.cpp"
    inode = patched.stat().st_ino
    write(folder / "src/llama_cpp/lib/libllama.so", "built")
    prepare(recipe(package, env))
    assert patched.stat().st_ino == inode
    write(patched, "edited by hand\n")
    prepare(recipe(package, env))
    assert read(patched) == "\n".join(PATCHED) + "\n"
    shutil.rmtree(folder / "src")
    prepare(recipe(package, env))
    assert read(patched) == "\n".join(PATCHED) + "\n"


def test_prepare_without_hooks_leaves_llama_cpp_unchanged(package, tmp_path):
    sdist = make_sdist(tmp_path / "own.tar.gz")
    env = {SOURCE_VARIABLE: str(sdist), UNPATCHED_VARIABLE: "1"}
    llama_cpp = prepare(recipe(package, env)) / "src/vendor/llama.cpp/src"
    assert read(llama_cpp / "a.cpp") == "\n".join(LINES) + "\n"
    assert not (llama_cpp / "llama-pop.cpp").exists()


def test_prepare_copies_an_extracted_tree(package, tmp_path):
    with tarfile.open(make_sdist(tmp_path / "own.tar.gz")) as archive:
        archive.extractall(tmp_path / "own")
    own = tmp_path / "own" / "llama_cpp_python-0.3.36"
    source = prepare(recipe(package, {SOURCE_VARIABLE: str(own)})) / "src"
    assert read(source / "vendor/llama.cpp/src/a.cpp") == "\n".join(PATCHED) + "\n"
    assert read(own / "vendor/llama.cpp/src/a.cpp") == "\n".join(LINES) + "\n"


def test_prepare_refuses_an_unsafe_archive(package, tmp_path):
    sdist = make_sdist(tmp_path / "own.tar.gz", extra="../../outside.txt")
    with pytest.raises(BuildError, match="unsafe"):
        prepare(recipe(package, {SOURCE_VARIABLE: str(sdist)}))
    assert not (package.parent / "outside.txt").exists()


def test_prepare_removes_the_tree_after_a_failing_hunk(package, tmp_path):
    write(package.parent / "llama.cpp" / "0001-hook.patch", DIFF.replace("line 16", "line XVI"))
    env = {SOURCE_VARIABLE: str(make_sdist(tmp_path / "own.tar.gz"))}
    for _ in range(2):
        with pytest.raises(BuildError, match=r"src/a.cpp, hunk 2 of 2"):
            prepare(recipe(package, env))
    (folder,) = (package / "build").iterdir()
    assert not any(folder.iterdir())


def test_missing_hooks_and_missing_source_are_refused(package, tmp_path):
    with pytest.raises(BuildError, match="does not exist"):
        recipe(package, {SOURCE_VARIABLE: str(tmp_path / "nowhere")})
    shutil.rmtree(package.parent / "llama.cpp")
    with pytest.raises(BuildError, match=r"No llama.cpp patches were found"):
        recipe(package, {})


def test_relative_source_path_is_refused(package, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_sdist(tmp_path / "own.tar.gz")
    with pytest.raises(BuildError, match="pip builds in another folder") as error:
        recipe(package, {SOURCE_VARIABLE: "own.tar.gz"})
    assert "absolute" in error.value.hint


def test_build_is_specific_to_the_processor_unless_portable(package, monkeypatch):
    here, portable = key(recipe(package, {})), key(recipe(package, {PORTABLE_VARIABLE: "1"}))
    monkeypatch.setattr(tree, "cpu", lambda: "another CPU")
    assert key(recipe(package, {})) != here
    assert key(recipe(package, {PORTABLE_VARIABLE: "1"})) == portable


@pytest.fixture
def pin(package: Path) -> Pin:
    return recipe(package, {}).pin


def serve(monkeypatch: pytest.MonkeyPatch, content: bytes) -> list[Path]:
    """Replace pip: write the content to the sdist's path; return the calls."""
    calls: list[Path] = []

    def download(pin: Pin, folder: Path) -> None:
        calls.append(folder)
        (folder / pin.sdist).write_bytes(content)

    monkeypatch.setattr(fetching, "_download", download)
    return calls


def test_file_other_than_the_pinned_one_is_refused(pin, tmp_path, monkeypatch):
    serve(monkeypatch, b"not the release")
    with pytest.raises(BuildError, match="copy of llama_cpp_python") as error:
        fetch(pin, tmp_path / "cache")
    assert hashlib.sha256(b"not the release").hexdigest() in error.value.message
    assert SOURCE_VARIABLE in error.value.hint
    assert list((tmp_path / "cache").iterdir()) == []


def test_cached_file_is_checked_each_time(package, tmp_path, monkeypatch):
    digest = hashlib.sha256(b"the release").hexdigest()
    write(package / "upstream.txt", f"llama-cpp-python==0.3.36 --hash=sha256:{digest}\n")
    pin = recipe(package, {}).pin
    calls = serve(monkeypatch, b"the release")
    cached = fetch(pin, tmp_path / "cache")
    assert fetch(pin, tmp_path / "cache") == cached
    assert len(calls) == 1
    cached.write_bytes(b"damaged")
    assert fetch(pin, tmp_path / "cache").read_bytes() == b"the release"
    assert len(calls) == 2


def test_error_of_pip_is_reported(pin, tmp_path, monkeypatch):
    output = "ERROR: Exception:\nTraceback (most recent call last):\nOSError: File name too long\n"
    failed = subprocess.CompletedProcess([], 2, "", output)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(BuildError, match="File name too long"):
        fetch(pin, tmp_path)


def test_unpatched_library_is_built_once(package, tmp_path):
    target = tmp_path / "unpatched"
    build_key = key(recipe(package, {UNPATCHED_VARIABLE: "1"}))
    write(target / "key", build_key)
    assert build_unpatched(package, target) is False


def test_portable_build_selects_cpu_code_at_run_time():
    portable = defines({PORTABLE_VARIABLE: "1"})
    assert "GGML_NATIVE" not in defines({})
    assert (portable["GGML_NATIVE"], portable["GGML_BACKEND_DL"]) == ("OFF", "ON")
    assert portable["GGML_CPU_ALL_VARIANTS"] == "ON"


@pytest.mark.parametrize(
    ("arguments", "code", "channel", "text"),
    [
        (["key"], 0, "stdout", "0.3.36-"),
        ([], 2, "stderr", "tool.py key"),
    ],
)
def test_tool_has_exit_status_and_output(arguments, code, channel, text):
    command = [sys.executable, PACKAGE / "tool.py", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == code
    assert text in getattr(run, channel)


def test_app_depends_on_the_built_version():
    built = recipe(PACKAGE, {})
    assert built.version.startswith(f"{built.pin.version}.")
    project = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]
    assert f"{built.name}=={built.version}" in project["dependencies"]
    assert (built.name, built.pin.name) == (OURS, OTHER)


def test_every_module_is_in_a_package_that_setup_finds():
    for folder in ("pop_local", "converter/pop_base", "converter/pop_converter"):
        for module in (ROOT / folder).rglob("*.py"):
            assert (module.parent / "__init__.py").is_file()


CACHE = """// a comment
{option}:BOOL=ON
CUDAToolkit_NVCC_EXECUTABLE:FILEPATH=/usr/bin/nvcc
CUDA_cublas_LIBRARY:FILEPATH={cublas}
CUDA_cuda_driver_LIBRARY:FILEPATH=CUDA_cuda_driver_LIBRARY-NOTFOUND
Vulkan_GLSLC_EXECUTABLE:FILEPATH=Vulkan_GLSLC_EXECUTABLE-NOTFOUND
GGML_CUDA_NO_VMM:BOOL={no_vmm}
"""


@pytest.mark.parametrize(
    ("option", "cublas", "no_vmm", "present", "absent"),
    [
        ("GGML_CUDA", "CUDA_cublas_LIBRARY-NOTFOUND", "OFF", ("cuBLAS", "stub"), ("nvcc", "glslc")),
        ("GGML_CUDA", "CUDA_cublas_LIBRARY-NOTFOUND", "ON", ("cuBLAS",), ("stub",)),
        ("GGML_CUDA", "/lib/libcublas.so", "OFF", ("stub",), ("cuBLAS",)),
        ("GGML_VULKAN", "", "OFF", ("glslc",), ("cuBLAS", "libvulkan-dev")),
    ],
)
def test_parts_missing_for_cmake_are_named(tmp_path, option, cublas, no_vmm, present, absent):
    cache = write(tmp_path / "cache", CACHE.format(option=option, cublas=cublas, no_vmm=no_vmm))
    with pytest.raises(BuildError) as error:
        missing.explain(cache)
    assert all(word in error.value.message for word in present)
    assert not any(word in error.value.message for word in absent)


CUDA = {"CMAKE_ARGS": "-DGGML_VULKAN=on -DGGML_CUDA:BOOL=ON"}


def test_cuda_build_without_a_gpu_needs_an_architecture(monkeypatch):
    sees_gpu = iter([False, True])
    monkeypatch.setattr(missing, "_sees_gpu", lambda: next(sees_gpu))
    named = CUDA | {"CUDAARCHS": "90"}, CUDA | {PORTABLE_VARIABLE: "1"}
    for env in ({}, {"CMAKE_ARGS": "-DGGML_CUDA=off"}, *named):
        missing.check_architecture(env)
    for more in ("-D GGML_NATIVE=off", "-DCMAKE_CUDA_ARCHITECTURES=80-virtual"):
        missing.check_architecture({"CMAKE_ARGS": f"{CUDA['CMAKE_ARGS']} {more}"})
    with pytest.raises(BuildError, match="No NVIDIA GPU is visible"):
        missing.check_architecture(CUDA)
    missing.check_architecture(CUDA)
