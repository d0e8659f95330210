"""Test the build's diff applier on tiny trees."""

from pathlib import Path

import pytest

from pop_build.apply import apply_patch
from pop_build.errors import BuildError
from support.building import DIFF, LINES, PATCHED, read, write


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    write(tmp_path / "tree/src/a.cpp", "\n".join(LINES) + "\n")
    return tmp_path / "tree"


def patch_of(tmp_path: Path, text: str) -> Path:
    return write(tmp_path / "0001-hook.patch", text)


def test_diff_applies(tree, tmp_path):
    assert apply_patch(patch_of(tmp_path, DIFF), tree) == ("src/a.cpp",)
    assert read(tree / "src/a.cpp") == "\n".join(PATCHED) + "\n"


def test_diff_applies_at_an_offset(tree, tmp_path):
    moved = ["new 1", "new 2", *LINES[:10], "new 3", *LINES[10:]]
    write(tree / "src/a.cpp", "\n".join(moved) + "\n")
    apply_patch(patch_of(tmp_path, DIFF), tree)
    expected = ["new 1", "new 2", *PATCHED[:11], "new 3", *PATCHED[11:]]
    assert read(tree / "src/a.cpp") == "\n".join(expected) + "\n"


@pytest.mark.parametrize("patch_end", ["\n", "\r\n"])
@pytest.mark.parametrize("file_end", ["\n", "\r\n"])
def test_line_ends_are_preserved(tree, tmp_path, patch_end, file_end):
    write(tree / "src/a.cpp", file_end.join(LINES) + file_end)
    apply_patch(patch_of(tmp_path, DIFF.replace("\n", patch_end)), tree)
    assert read(tree / "src/a.cpp") == file_end.join(PATCHED) + file_end


def test_unchanged_lines_keep_their_bytes_in_a_mixed_file(tree, tmp_path):
    text = "line 1\r\nline 2\fx\nline 3\r\nline 4\n" + "\n".join(LINES[4:]) + "\n"
    write(tree / "src/a.cpp", text)
    apply_patch(patch_of(tmp_path, DIFF), tree)
    assert read(tree / "src/a.cpp").startswith(
        "line 1\r\nline 2\fx\nline 3\r\nline 4\nline five\nline five and a half\n"
    )


def test_last_line_without_a_newline_is_replaced(tree, tmp_path):
    write(tree / "src/a.cpp", "one\ntwo")
    diff = "--- a/src/a.cpp\n+++ b/src/a.cpp\n@@ -1,2 +1,3 @@\n one\n-two\n"
    marker = "\\ No newline at end of file\n"
    apply_patch(patch_of(tmp_path, f"{diff}{marker}+2\n+three\n{marker}"), tree)
    assert read(tree / "src/a.cpp") == "one\n2\nthree"


def test_diff_creates_a_file(tree, tmp_path):
    diff = "--- /dev/null\n+++ b/src/new/b.h\n@@ -0,0 +1,2 @@\n+#pragma once\n+int b;\n"
    apply_patch(patch_of(tmp_path, diff), tree)
    assert read(tree / "src/new/b.h") == "#pragma once\nint b;\n"
    write(tree / "src/new/b.h", "something else\n")
    with pytest.raises(BuildError, match=r"creates src/new/b.h, but src/new/b.h already exists"):
        apply_patch(tmp_path / "0001-hook.patch", tree)


def test_second_application_is_refused(tree, tmp_path):
    patch = patch_of(tmp_path, DIFF)
    apply_patch(patch, tree)
    with pytest.raises(BuildError, match=r"0001-hook.patch has already been applied to src/a.cpp"):
        apply_patch(patch, tree)
    assert read(tree / "src/a.cpp") == "\n".join(PATCHED) + "\n"


def test_failing_hunk_is_reported_and_writes_no_file(tree, tmp_path):
    write(tree / "src/a.cpp", read(tree / "src/a.cpp").replace("line 16", "line XVI"))
    write(tree / "src/b.cpp", "int b;\n")
    first = "--- a/src/b.cpp\n+++ b/src/b.cpp\n@@ -1 +1 @@\n-int b;\n+int c;\n"
    before = read(tree / "src/a.cpp")
    with pytest.raises(BuildError) as caught:
        apply_patch(patch_of(tmp_path, first + DIFF), tree)
    message = caught.value.message
    assert "0001-hook.patch does not apply to src/a.cpp: hunk 2 of 2 (@@ -15,3 +16,4 @@)" in message
    # The line number includes the line that the first hunk adds.
    assert "line 17:" in message
    assert "expected 'line 16'" in message
    assert "found    'line XVI'" in message
    assert "patches/README.md" in caught.value.hint
    assert read(tree / "src/a.cpp") == before
    assert read(tree / "src/b.cpp") == "int b;\n"


def test_ambiguous_hunk_is_refused(tree, tmp_path):
    twice = ["begin", *LINES, "middle", *LINES]
    write(tree / "src/a.cpp", "\n".join(twice) + "\n")
    with pytest.raises(BuildError, match="matches at lines 4, 25, but not at"):
        apply_patch(patch_of(tmp_path, DIFF), tree)


def test_hunk_that_fits_before_the_previous_one_is_refused(tree, tmp_path):
    first, second = DIFF.index("@@ -3"), DIFF.index("@@ -15")
    swapped = DIFF[:first] + DIFF[second:] + DIFF[first:second]
    with pytest.raises(BuildError, match="matches only at line"):
        apply_patch(patch_of(tmp_path, swapped), tree)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing here\n", "contains no diff"),
        (DIFF.replace("b/src/a.cpp", "b/../a.cpp"), "outside the tree"),
        (DIFF.replace("b/src/a.cpp", "/etc/a.cpp"), "outside the tree"),
        (DIFF.replace("-15,3", "-15,9"), "ends in the middle of hunk"),
        (DIFF.replace("-3,4", "-3,2"), "does not match the line counts"),
        (DIFF.replace("b/src/a.cpp", "/dev/null"), "deletes a/src/a.cpp"),
        ("rename from src/a.cpp\n" + DIFF, "contains an unsupported line"),
        (DIFF.replace("src/a.cpp", "src/z.cpp"), "but src/z.cpp does not exist"),
        ("--- a/src/a.cpp\n+++ b/src/a.cpp\n@@ -4,0 +5 @@\n+x\n", "no context lines"),
    ],
)
def test_bad_diffs_are_refused(tree, tmp_path, text, message):
    with pytest.raises(BuildError, match=message):
        apply_patch(patch_of(tmp_path, text), tree)
