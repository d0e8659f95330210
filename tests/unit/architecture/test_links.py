"""Check that the documents' links and paths lead to existing files and headings."""

import re
from pathlib import Path

import pytest

from support.paths import ROOT

DOCUMENTS = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "patches" / "README.md",
    ROOT / "tests" / "bench" / "README.md",
]
NOTEBOOK = ROOT / "docs" / "notebook"
# Pages that explain the code: each path in them must exist, from one of these folders.
MAPS = [ROOT / "docs" / "how-it-works.md", *sorted((ROOT / "docs" / "internals").glob("*.md"))]
PATH_ROOTS = [
    ROOT,
    ROOT / "pop_local",
    ROOT / "pop_local" / "engine",
    ROOT / "converter" / "pop_converter",
    ROOT / "patches",
    ROOT / "patches" / "llama.cpp",
    ROOT / "patches" / "llama.cpp" / "src",
    ROOT / "patches" / "llama.cpp" / "ggml" / "src",
    *(ROOT / "patches" / "llama.cpp" / "ggml" / "src" / "ggml-cpu").rglob("."),
]
_LINK = re.compile(
    r"\]\((?!https?:|mailto:)([^)\s]+)\)|<(?:img|source)[^>]* src(?:set)?=\"([^\"]+)\""
)
_PATH = re.compile(r"`([\w.-]+(?:/[\w.-]+)*(?:/|\.(?:py|h|cpp|patch|md|toml|json)))`")
# A name in inline code, with or without arguments: `name`, `Class.name`, `name(argument)`.
_NAME = re.compile(r"`([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)(?:\([\w.]*\))?`")
# Definitions of Python functions, classes, fields and constants.
_DEFINED = re.compile(r"^\s*(?:async )?(?:def|class) (\w+)|^\s*(\w+)(?:: [^=\n]+)?(?: =|$)", re.M)
# The patches' build folder is left out, because it contains upstream's sources.
SOURCES = [
    *(ROOT / name for name in ("pop_local", "converter", "tests")),
    ROOT / "patches" / "llama.cpp",
    ROOT / "patches" / "llama-cpp-python" / "pop_build",
]
_CODE = re.compile(r"(?s:^```.*?^```$)|(?<=\n\n)(?: {4}.*\n+)+", re.M)


def anchors(path: Path) -> set[str]:
    """Return the anchors that GitHub generates for a page's headings."""
    headings = re.findall(r"^#+ (.*)$", _CODE.sub("", path.read_text(encoding="utf-8")), re.M)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


def broken_links(document: Path) -> list[str]:
    broken = []
    for link in _LINK.finditer(_CODE.sub("", document.read_text(encoding="utf-8"))):
        name, _, section = (link[1] or link[2]).partition("#")
        target = document.parent / name if name else document
        if not target.exists() or (section and section not in anchors(target)):
            broken.append(link[0])
    return broken


def named_paths(text: str) -> list[str]:
    """Return the paths in inline code; those with a NAME in capitals are patterns."""
    paths = _PATH.findall(_CODE.sub("", text))
    return [path for path in paths if not re.search(r"[A-Z]{3,}(?!\.md)", path)]


def where_to_change() -> str:
    page = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    extending = (ROOT / "docs" / "internals" / "extending.md").read_text(encoding="utf-8")
    return page.split("\n## Where to change what\n")[1] + extending


def defined_names() -> set[str]:
    """Return the names that Python files define, and all words of the backend's sources."""
    result: set[str] = set()
    for path in (path for folder in SOURCES for path in folder.rglob("*.*")):
        if path.suffix == ".py":
            text = path.read_text(encoding="utf-8")
            result |= {name for names in _DEFINED.findall(text) for name in names}
        elif path.suffix in (".h", ".cpp", ".patch") and path.is_file():
            result |= set(re.findall(r"\w+", path.read_text(encoding="utf-8")))
    return result


def unknown_names(text: str, known: set[str]) -> list[str]:
    """Return the names in inline code that have an undefined part; NAME is a placeholder."""
    names = [name for name in _NAME.findall(text) if not _PATH.fullmatch(f"`{name}`")]
    parts = [(name, name.replace("NAME.", "").split(".")) for name in names]
    return [name for name, each in parts if not known.issuperset(each)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(document: Path) -> None:
    assert broken_links(document) == []


@pytest.mark.parametrize("document", MAPS, ids=lambda path: str(path.relative_to(ROOT)))
def test_paths_that_explain_the_code_exist(document: Path) -> None:
    # A short name may abbreviate the path of a link.
    text = document.read_text(encoding="utf-8")
    linked = {Path(link[1] or link[2]).name for link in _LINK.finditer(text)}
    missing = [
        path
        for path in named_paths(text)
        if not any((root / path).exists() for root in PATH_ROOTS) and Path(path).name not in linked
    ]
    assert missing == []


def test_names_of_where_to_change_exist() -> None:
    assert unknown_names(where_to_change(), defined_names()) == []


def test_notebook_lists_each_of_its_pages() -> None:
    listed = set(re.findall(r"\]\(([\w./-]+\.md)", (NOTEBOOK / "README.md").read_text("utf-8")))
    pages = {path.relative_to(NOTEBOOK).as_posix() for path in NOTEBOOK.rglob("*.md")}
    assert pages - {"README.md"} <= listed


def test_each_benchmark_is_listed() -> None:
    text = (ROOT / "tests" / "bench" / "README.md").read_text(encoding="utf-8")
    programs = {path.name for path in (ROOT / "tests" / "bench").glob("*.py")}
    assert programs == set(re.findall(r"`(\w+\.py)`", text))
