"""Includes of the C++ files have no cycles."""

import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

LLAMA_CPP = Path(__file__).resolve().parents[3] / "patches" / "llama.cpp"
FOLDERS = ("src", "ggml/src/ggml-cpu/fast", "common/pop")
INCLUDE = re.compile(r'^#\s*include "([^"]+)"', re.MULTILINE)


def includes(folder: Path) -> dict[str, set[str]]:
    """Map each module (a header and its source) to the modules of the folder that it includes."""
    files = [path for path in folder.iterdir() if path.suffix in (".h", ".cpp")]
    modules = {path.stem for path in files}
    graph: dict[str, set[str]] = {module: set() for module in modules}
    for path in files:
        included = {Path(name).stem for name in INCLUDE.findall(path.read_text(encoding="utf-8"))}
        graph[path.stem] |= (included & modules) - {path.stem}
    return graph


@pytest.mark.parametrize("folder", FOLDERS)
def test_includes_have_no_cycles(folder):
    graph = includes(LLAMA_CPP / folder)
    assert graph
    TopologicalSorter(graph).prepare()
