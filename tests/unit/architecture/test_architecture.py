"""Check import rules that import-linter's contracts in pyproject.toml cannot express."""

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

from support.paths import ROOT

PACKAGES = (
    ROOT / "converter" / "pop_base",
    ROOT / "converter" / "pop_converter",
    ROOT / "pop_local",
)
FILES = {
    ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in package.rglob("*.py")
}


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports_of(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the innermost module and the name in it ("" for the whole module) of all imports."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None and node.level == 0, f"{path} imports relatively"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield (inner, "") if inner in FILES else (node.module, alias.name)


def test_ui_imports_only_types_of_results():
    results = ("pop_local.workflows", "pop_local.research")
    names = [
        name
        for path in (ROOT / "pop_local" / "ui").rglob("*.py")
        for module, name in imports_of(path)
        if module.startswith(results)
    ]
    assert names
    assert [name for name in names if not name[:1].isupper()] == []


def test_research_is_imported_lazily():
    """Outside research, imports of it are within functions or for types."""
    outside = [path for name, path in FILES.items() if not name.startswith("pop_local.research")]
    statements = [
        ast.unparse(node)
        for path in outside
        for node in parse(path).body
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    assert [line for line in statements if "research" in line] == []


def test_imports_have_no_cycles():
    graph = {
        name: {module for module, _ in imports_of(path)} & FILES.keys()
        for name, path in FILES.items()
    }
    assert graph["pop_local.engine.model"] > {"pop_local.engine.engine"}
    graphlib.TopologicalSorter(graph).prepare()


DEFINED = re.compile(r"^(?!static)[\w:<>*& ]*\b(llama_pop_\w+)\([^;{]*\) *\{", re.M)


def test_calls_between_libllama_sources_have_no_cycles():
    """See test_cpp_includes.py for includes."""
    folder = ROOT / "patches" / "llama.cpp" / "src"
    texts = {path.name: re.sub(r"//.*", "", path.read_text()) for path in folder.glob("*.*")}
    sources = [name for name in texts if name.endswith(".cpp")]
    owner = {found: name for name in sources for found in DEFINED.findall(texts[name])}
    assert len(owner) > 30
    calls = {
        name: {owner[f] for f in re.findall(r"\b(llama_pop_\w+)\(", texts[name]) if f in owner}
        for name in sources
    }
    graph = {name: found - {name} for name, found in calls.items()}
    graphlib.TopologicalSorter(graph).prepare()
