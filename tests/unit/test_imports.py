"""No module imports one that imports it, not for its types either."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

from support.paths import ROOT

FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("converter", "pop_local")
    for path in (ROOT / package).rglob("*.py")
}


def imported(path: Path) -> Iterator[str]:
    """The modules of ours that are named in its imports, wherever these stand."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.module is not None and node.level == 0, f"{path} imports relatively"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in FILES else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_no_module_is_in_a_circle():
    graph = {name: FILES.keys() & imported(path) for name, path in FILES.items()}
    assert graph["pop_local.engine.model"] > {"pop_local.engine.chat_model"}
    graphlib.TopologicalSorter(graph).prepare()
