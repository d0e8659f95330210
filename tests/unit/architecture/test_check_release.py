"""Test the check of a release's tag, versions, changelog, and wheels."""

import zipfile
from pathlib import Path

import pytest

from absolute_links import README, absolute, relative_links
from check_release import ROOT, problems, versions
from support.building import write

WHEELS = (
    "pop_local-0.2.0-py3-none-any.whl",
    "pop_local_llama_cpp-0.3.36.1-py3-none-manylinux_2_28_x86_64.manylinux_2_27_x86_64.whl",
    "pop_local_llama_cpp-0.3.36.1-py3-none-manylinux_2_31_aarch64.whl",
    "pop_local_llama_cpp-0.3.36.1-py3-none-macosx_14_0_arm64.whl",
    "pop_local_llama_cpp-0.3.36.1-py3-none-win_amd64.whl",
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path / "pop_local/__init__.py", '__version__ = "0.2.0"\n')
    write(tmp_path / "pyproject.toml", '    "pop-local-llama-cpp==0.3.36.1",\n')
    write(tmp_path / "patches/llama-cpp-python/pyproject.toml", 'version = "0.3.36.1"\n')
    write(tmp_path / "CHANGELOG.md", "## [Unreleased]\n\n## [0.2.0] - 2027-01-31\n")
    for name in WHEELS:
        write(tmp_path / "dist" / name, "")
    describe(tmp_path, "[Documents](https://github.com/a/b/blob/v0.2.0/docs/a.md), [above](#top)")
    return tmp_path


def describe(root: Path, description: str) -> None:
    """Write pop-local's wheel with a description."""
    with zipfile.ZipFile(root / "dist" / WHEELS[0], "w") as archive:
        archive.writestr("pop_local-0.2.0.dist-info/METADATA", f"Name: pop-local\n\n{description}")


def found(root: Path, tag: str = "v0.2.0") -> list[str]:
    return list(problems(root, tag, root / "dist"))


def test_complete_release_has_no_problem(root):
    assert found(root) == []


@pytest.mark.parametrize("number", range(len(WHEELS)))
def test_each_missing_wheel_is_found(root, number):
    (root / "dist" / WHEELS[number]).unlink()
    [message] = found(root)
    assert message.startswith("there is no wheel of pop-local")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("notes.txt", "notes.txt is not a wheel"),
        ("numpy-2.4.6-py3-none-any.whl", "is neither pop-local 0.2.0 nor pop-local-llama-cpp"),
        ("pop_local_llama_cpp-0.3.36.1-py3-none-linux_x86_64.whl", "is for no further system"),
    ],
)
def test_other_files_are_found(root, name, message):
    write(root / "dist" / name, "")
    assert any(message in problem for problem in found(root))


def test_no_link_of_the_readme_stays_relative():
    text = README.read_text(encoding="utf-8")
    assert len(relative_links(text)) > 20
    assert relative_links(absolute(text, "https://github.com/a/b", "v1")) == []


def test_versions_of_this_tree_are_found():
    app, backend, required = versions(ROOT)
    assert app.count(".") == 2
    assert backend == required
