"""The build of the backend: the diff applier, the key, the pinned source, on tiny trees."""

import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "patches" / "llama-cpp-python"
sys.path.insert(0, str(PACKAGE))

from pop_build import fetch as fetching  # noqa: E402
from pop_build.apply import apply_patch  # noqa: E402
from pop_build.errors import BuildError  # noqa: E402
from pop_build.fetch import SOURCE_VARIABLE, Pin, fetch  # noqa: E402
from pop_build.hooks import launchers  # noqa: E402
from pop_build.tree import UNPATCHED_VARIABLE, key, prepare, recipe  # noqa: E402
from pop_build.unpatched import build_unpatched  # noqa: E402

LINES = [f"line {n}" for n in range(1, 21)]
DIFF = """\
Why this is here.

--- a/src/a.cpp
+++ b/src/a.cpp
@@ -3,4 +3,5 @@ int some_function() {
 line 3
 line 4
-line 5
+line five
+line five and a half
 line 6
@@ -15,3 +16,4 @@
 line 15
 line 16
+hook();
 line 17
"""
PATCHED = [*LINES[:4], "line five", "line five and a half", *LINES[5:16], "hook();", *LINES[16:]]


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


def read(path: Path) -> str:
    return path.read_bytes().decode()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    write(tmp_path / "tree/src/a.cpp", "\n".join(LINES) + "\n")
    return tmp_path / "tree"


def patch_of(tmp_path: Path, text: str) -> Path:
    return write(tmp_path / "0001-hook.patch", text)


def test_applies(tree, tmp_path):
    assert apply_patch(patch_of(tmp_path, DIFF), tree) == ("src/a.cpp",)
    assert read(tree / "src/a.cpp") == "\n".join(PATCHED) + "\n"


def test_applies_at_an_offset(tree, tmp_path):
    moved = ["new 1", "new 2", *LINES[:10], "new 3", *LINES[10:]]
    write(tree / "src/a.cpp", "\n".join(moved) + "\n")
    apply_patch(patch_of(tmp_path, DIFF), tree)
    expected = ["new 1", "new 2", *PATCHED[:11], "new 3", *PATCHED[11:]]
    assert read(tree / "src/a.cpp") == "\n".join(expected) + "\n"


@pytest.mark.parametrize("patch_end", ["\n", "\r\n"])
@pytest.mark.parametrize("file_end", ["\n", "\r\n"])
def test_the_file_keeps_its_line_ends(tree, tmp_path, patch_end, file_end):
    write(tree / "src/a.cpp", file_end.join(LINES) + file_end)
    apply_patch(patch_of(tmp_path, DIFF.replace("\n", patch_end)), tree)
    assert read(tree / "src/a.cpp") == file_end.join(PATCHED) + file_end


def test_lines_that_stay_keep_their_bytes_in_a_mixed_file(tree, tmp_path):
    text = "line 1\r\nline 2\fx\nline 3\r\nline 4\n" + "\n".join(LINES[4:]) + "\n"
    write(tree / "src/a.cpp", text)
    apply_patch(patch_of(tmp_path, DIFF), tree)
    assert read(tree / "src/a.cpp").startswith(
        "line 1\r\nline 2\fx\nline 3\r\nline 4\nline five\nline five and a half\n"
    )


def test_an_open_last_line(tree, tmp_path):
    write(tree / "src/a.cpp", "one\ntwo")
    diff = "--- a/src/a.cpp\n+++ b/src/a.cpp\n@@ -1,2 +1,3 @@\n one\n-two\n"
    marker = "\\ No newline at end of file\n"
    apply_patch(patch_of(tmp_path, f"{diff}{marker}+2\n+three\n{marker}"), tree)
    assert read(tree / "src/a.cpp") == "one\n2\nthree"


def test_creates_a_file(tree, tmp_path):
    diff = "--- /dev/null\n+++ b/src/new/b.h\n@@ -0,0 +1,2 @@\n+#pragma once\n+int b;\n"
    apply_patch(patch_of(tmp_path, diff), tree)
    assert read(tree / "src/new/b.h") == "#pragma once\nint b;\n"
    write(tree / "src/new/b.h", "something else\n")
    with pytest.raises(BuildError, match=r"would create src/new/b.h, which exists"):
        apply_patch(tmp_path / "0001-hook.patch", tree)


def test_a_second_application_is_refused(tree, tmp_path):
    patch = patch_of(tmp_path, DIFF)
    apply_patch(patch, tree)
    with pytest.raises(BuildError, match=r"0001-hook.patch is in src/a.cpp already"):
        apply_patch(patch, tree)
    assert read(tree / "src/a.cpp") == "\n".join(PATCHED) + "\n"


def test_a_failing_hunk_says_where_and_what_and_writes_nothing(tree, tmp_path):
    write(tree / "src/a.cpp", read(tree / "src/a.cpp").replace("line 16", "line XVI"))
    write(tree / "src/b.cpp", "int b;\n")
    first = "--- a/src/b.cpp\n+++ b/src/b.cpp\n@@ -1 +1 @@\n-int b;\n+int c;\n"
    before = read(tree / "src/a.cpp")
    with pytest.raises(BuildError) as caught:
        apply_patch(patch_of(tmp_path, first + DIFF), tree)
    message = caught.value.message
    assert "0001-hook.patch does not fit src/a.cpp: hunk 2 of 2 (@@ -15,3 +16,4 @@)" in message
    # Counted with the line that the first hunk adds.
    assert "line 17:" in message
    assert "expected 'line 16'" in message
    assert "found    'line XVI'" in message
    assert "patches/README.md" in caught.value.hint
    assert read(tree / "src/a.cpp") == before
    assert read(tree / "src/b.cpp") == "int b;\n"


def test_no_fuzz_and_no_guess_between_places(tree, tmp_path):
    twice = ["begin", *LINES, "middle", *LINES]
    write(tree / "src/a.cpp", "\n".join(twice) + "\n")
    with pytest.raises(BuildError, match=r"fits at several places \(lines 4, 25\)"):
        apply_patch(patch_of(tmp_path, DIFF), tree)


def test_a_hunk_that_lies_before_the_one_above_it(tree, tmp_path):
    first, second = DIFF.index("@@ -3"), DIFF.index("@@ -15")
    swapped = DIFF[:first] + DIFF[second:] + DIFF[first:second]
    with pytest.raises(BuildError, match="fits only before the hunk above it"):
        apply_patch(patch_of(tmp_path, swapped), tree)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing here\n", "holds no diff"),
        (DIFF.replace("b/src/a.cpp", "b/../a.cpp"), "outside the tree"),
        (DIFF.replace("b/src/a.cpp", "/etc/a.cpp"), "outside the tree"),
        (DIFF.replace("-15,3", "-15,9"), "cut short"),
        (DIFF.replace("-3,4", "-3,2"), "wrong line counts"),
        (DIFF.replace("b/src/a.cpp", "/dev/null"), "deletes a/src/a.cpp"),
        ("rename from src/a.cpp\n" + DIFF, "not a plain text diff"),
        (DIFF.replace("src/a.cpp", "src/z.cpp"), "which this tree does not have"),
        ("--- a/src/a.cpp\n+++ b/src/a.cpp\n@@ -4,0 +5 @@\n+x\n", "no context lines"),
    ],
)
def test_bad_diffs(tree, tmp_path, text, message):
    with pytest.raises(BuildError, match=message):
        apply_patch(patch_of(tmp_path, text), tree)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package with a toy hook, and a toy sdist in the variable's place."""
    package = tmp_path / "patches" / "llama-cpp-python"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("build", "*.patch"))
    hooks = package.parent / "llama.cpp"
    write(hooks / "0001-hook.patch", DIFF)
    write(hooks / "src" / "llama-pop.cpp", "int pop;\n")
    return package


def make_sdist(path: Path, extra: str = "src/extra.cpp") -> Path:
    files = {
        "llama_cpp/__init__.py": '__version__ = "0.3.36"\n',
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


def test_key_changes_with_what_is_built(package, tmp_path):
    hooks = package.parent / "llama.cpp"
    plain = key(recipe(package, {}))
    assert plain.startswith("0.3.36-")
    assert key(recipe(package, {"HOME": "/elsewhere"})) == plain
    seen = {
        plain,
        key(recipe(package, {"CMAKE_ARGS": "-DGGML_CUDA=on"})),
        key(recipe(package, {"CXX": "clang++"})),
        key(recipe(package, {UNPATCHED_VARIABLE: "1"})),
        key(recipe(package, {SOURCE_VARIABLE: str(make_sdist(tmp_path / "own.tar.gz"))})),
    }
    assert len(seen) == 5
    for path in (hooks / "0001-hook.patch", hooks / "src/llama-pop.cpp", package / "upstream.txt"):
        write(path, read(path) + "\n")
        changed = key(recipe(package, {}))
        assert changed not in seen
        seen.add(changed)


def test_the_unpatched_key_does_not_depend_on_the_hooks(package):
    before = key(recipe(package, {UNPATCHED_VARIABLE: "1"}))
    write(package.parent / "llama.cpp" / "0001-hook.patch", DIFF + "\n")
    assert key(recipe(package, {UNPATCHED_VARIABLE: "1"})) == before


def test_prepare_extracts_patches_and_names_the_version(package, tmp_path):
    env = {SOURCE_VARIABLE: str(make_sdist(tmp_path / "own.tar.gz"))}
    source = prepare(recipe(package, env)) / "src"
    assert read(source / "vendor/llama.cpp/src/a.cpp") == "\n".join(PATCHED) + "\n"
    assert read(source / "vendor/llama.cpp/src/llama-pop.cpp") == "int pop;\n"
    assert not (source / "vendor/llama.cpp/tools/ui").exists()
    assert read(source / "llama_cpp/__init__.py") == '__version__ = "0.3.36+pop1"\n'


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


def test_prepare_without_hooks_leaves_llama_cpp_alone(package, tmp_path):
    sdist = make_sdist(tmp_path / "own.tar.gz")
    env = {SOURCE_VARIABLE: str(sdist), UNPATCHED_VARIABLE: "1"}
    llama_cpp = prepare(recipe(package, env)) / "src/vendor/llama.cpp/src"
    assert read(llama_cpp / "a.cpp") == "\n".join(LINES) + "\n"
    assert not (llama_cpp / "llama-pop.cpp").exists()


def test_prepare_takes_an_extracted_tree_and_does_not_touch_it(package, tmp_path):
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


def test_prepare_leaves_nothing_behind_a_failing_hunk(package, tmp_path):
    write(package.parent / "llama.cpp" / "0001-hook.patch", DIFF.replace("line 16", "line XVI"))
    env = {SOURCE_VARIABLE: str(make_sdist(tmp_path / "own.tar.gz"))}
    for _ in range(2):
        with pytest.raises(BuildError, match=r"does not fit src/a.cpp"):
            prepare(recipe(package, env))
    (folder,) = (package / "build").iterdir()
    assert not any(folder.iterdir())


def test_missing_hooks_and_missing_source(package, tmp_path):
    with pytest.raises(BuildError, match="There is nothing at"):
        recipe(package, {SOURCE_VARIABLE: str(tmp_path / "nowhere")})
    shutil.rmtree(package.parent / "llama.cpp")
    with pytest.raises(BuildError, match=r"no patches for llama.cpp"):
        recipe(package, {})


@pytest.fixture
def pin(package: Path) -> Pin:
    return recipe(package, {}).pin


def serve(monkeypatch: pytest.MonkeyPatch, content: bytes) -> list[Path]:
    """Stands in for pip: puts the content where the sdist belongs; returns the calls."""
    calls: list[Path] = []

    def download(pin: Pin, folder: Path) -> None:
        calls.append(folder)
        (folder / pin.sdist).write_bytes(content)

    monkeypatch.setattr(fetching, "_download", download)
    return calls


def test_another_file_than_the_pinned_one_is_refused(pin, tmp_path, monkeypatch):
    serve(monkeypatch, b"not the release")
    with pytest.raises(BuildError, match="serves another llama_cpp_python") as caught:
        fetch(pin, tmp_path / "cache")
    assert hashlib.sha256(b"not the release").hexdigest() in caught.value.message
    assert SOURCE_VARIABLE in caught.value.hint
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_cached_file_is_checked_each_time(package, tmp_path, monkeypatch):
    digest = hashlib.sha256(b"the release").hexdigest()
    write(package / "upstream.txt", f"llama-cpp-python==0.3.36 --hash=sha256:{digest}\n")
    pin = recipe(package, {}).pin
    calls = serve(monkeypatch, b"the release")
    kept = fetch(pin, tmp_path / "cache")
    assert fetch(pin, tmp_path / "cache") == kept
    assert len(calls) == 1
    kept.write_bytes(b"damaged")
    assert fetch(pin, tmp_path / "cache").read_bytes() == b"the release"
    assert len(calls) == 2


def test_the_unpatched_library_is_built_once(package, tmp_path):
    target = tmp_path / "unpatched"
    wanted = key(recipe(package, {UNPATCHED_VARIABLE: "1"}))
    write(target / "key", wanted)
    assert build_unpatched(package, target) is False


def test_ccache_is_used_where_the_path_leads_to_it(tmp_path):
    ccache = write(tmp_path / ("ccache.exe" if sys.platform == "win32" else "ccache"), "")
    ccache.chmod(0o755)
    here = {"PATH": str(tmp_path)}
    assert launchers(here)["CMAKE_CUDA_COMPILER_LAUNCHER"] == str(ccache)
    assert launchers({"PATH": str(tmp_path / "elsewhere")}) == {"GGML_CCACHE": "OFF"}
    assert launchers(here | {"CMAKE_ARGS": "-DGGML_CCACHE=OFF"}) == {}
    assert launchers(here | {"CMAKE_ARGS": "-DCMAKE_C_COMPILER_LAUNCHER=distcc"}) == {}
    assert launchers(here | {"CMAKE_CXX_COMPILER_LAUNCHER": "distcc"}) == {}


@pytest.mark.parametrize(
    ("arguments", "code", "channel", "text"),
    [
        (["key"], 0, "stdout", "0.3.36-"),
        ([], 2, "stderr", "tool.py key"),
    ],
)
def test_tool(arguments, code, channel, text):
    command = [sys.executable, PACKAGE / "tool.py", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == code
    assert text in getattr(run, channel)


def test_the_app_asks_for_the_version_that_is_built():
    built = recipe(PACKAGE, {})
    assert built.version.startswith(f"{built.pin.version}+pop")
    project = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]
    assert f"llama-cpp-python=={built.version}" in project["dependencies"]


def test_every_module_lies_in_a_package_that_setup_finds():
    for folder in ("pop_local", "converter"):
        for module in (ROOT / folder).rglob("*.py"):
            assert (module.parent / "__init__.py").is_file()
