"""Test the application of patches to tiny trees."""

from pathlib import Path

import pytest

from pop_build.apply import apply_patch
from pop_build.errors import BuildError
from support.building import DIFF, LINES, PATCHED, read, write


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Write the file that the toy patch changes."""
    return write(tmp_path / "tree/src/a.cpp", "\n".join(LINES) + "\n")


def apply(tmp_path: Path, text: str = DIFF) -> None:
    apply_patch(write(tmp_path / "0001-hook.patch", text), tmp_path / "tree")


def test_hunks_apply_at_other_line_numbers(source, tmp_path):
    moved = ["new 1", "new 2", *LINES[:10], "new 3", *LINES[10:]]
    write(source, "\n".join(moved) + "\n")
    apply(tmp_path)
    expected = ["new 1", "new 2", *PATCHED[:11], "new 3", *PATCHED[11:]]
    assert read(source) == "\n".join(expected) + "\n"


@pytest.mark.parametrize("patch_end", ["\n", "\r\n"])
@pytest.mark.parametrize("file_end", ["\n", "\r\n"])
def test_line_ends_are_preserved(source, tmp_path, patch_end, file_end):
    write(source, file_end.join(LINES) + file_end)
    apply(tmp_path, DIFF.replace("\n", patch_end))
    assert read(source) == file_end.join(PATCHED) + file_end
    assert list(source.parent.iterdir()) == [source]


@pytest.mark.parametrize(
    "text", [DIFF, "--- a/src/a.cpp\n+++ b/src/a.cpp\n@@ -20 +20,2 @@\n line 20\n+end\n"]
)
def test_second_application_is_refused(source, tmp_path, text):
    apply(tmp_path, text)
    patched = read(source)
    with pytest.raises(BuildError, match=r"0001-hook.patch does not apply") as error:
        apply(tmp_path, text)
    assert "unpatched source tree" in error.value.hint
    assert read(source) == patched


def test_failing_hunk_is_reported_and_writes_no_file(source, tmp_path):
    write(source, read(source).replace("line 16", "line XVI"))
    other = write(tmp_path / "tree/src/b.cpp", "int b;\n")
    before = read(source)
    with pytest.raises(BuildError, match=r"src/a.cpp, hunk 2 of 2: matching lines: none") as error:
        apply(tmp_path, "--- a/src/b.cpp\n+++ b/src/b.cpp\n@@ -1 +1 @@\n-int b;\n+int c;\n" + DIFF)
    assert "patches/README.md" in error.value.hint
    assert (read(source), read(other)) == (before, "int b;\n")


def test_ambiguous_hunk_is_refused(source, tmp_path):
    write(source, "\n".join(["begin", *LINES, "middle", *LINES]) + "\n")
    with pytest.raises(BuildError, match="hunk 1 of 2: matching lines: 4, 25"):
        apply(tmp_path)


def test_hunk_that_fits_before_the_previous_one_is_refused(source, tmp_path):
    first, second = DIFF.index("@@ -3"), DIFF.index("@@ -15")
    with pytest.raises(BuildError, match="hunk 2 of 2: matching lines: none"):
        apply(tmp_path, DIFF[:first] + DIFF[second:] + DIFF[first:second])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing here\n", "not a valid patch"),
        (DIFF.replace("-15,3", "-15,9"), "not a valid patch"),
        (DIFF.replace("-3,4", "-3,2"), "not a valid patch"),
        (DIFF.replace("src/a.cpp", "src/z.cpp"), "src/z.cpp does not exist"),
    ],
)
def test_invalid_patches_are_refused(source, tmp_path, text, message):
    with pytest.raises(BuildError, match=message):
        apply(tmp_path, text)
