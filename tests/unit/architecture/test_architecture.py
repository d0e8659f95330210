"""Check the imports between and within packages (docs/internals/architecture.md)."""

import ast
import functools
import graphlib
import re
from dataclasses import dataclass

import pytest

from support.paths import ROOT

# `pop_local` is the public package without its subfolders.
ARROWS = {
    "cli": "config ui",
    "commands": (
        "calibration config converter engine fetching measure models research server texts ui"
        " workflows"
    ),
    "pop_local": "calibration engine measure research texts workflows",
    "ui": "config converter engine measure models research texts workflows",
    "research": "calibration converter engine measure models texts workflows",
    "server": "config converter engine measure models texts",
    "workflows": "calibration config converter engine fetching measure models texts",
    "calibration": "converter engine models texts",
    "measure": "converter engine models texts",
    "fetching": "config converter models",
    "engine": "converter models texts",
    "texts": "",
    "models": "config converter",
    "config": "",
    "converter": "",
}
# The same for the folders within a package, and for the modules at the engine's top.
INSIDE = {
    "engine": {
        "model": (
            "answer engine engine_options learning llama chat_messages prefill prompt sessions"
            " turn_options"
        ),
        "slot_scheduler": "cache engine prompt sequence",
        "prefill_scheduler": "prompt",
        "sessions": "answer cache engine images llama chat_messages turn_options",
        "engine": (
            "answer cache decode depth engine_options images learning llama prefill prompt"
            " sequence tools turn_options"
        ),
        "engine_options": "cache llama prefill",
        "answer": ("chat_messages decode llama prefill prompt sequence tools turn_options"),
        "sequence": "cache decode depth llama prefill prompt",
        "turn_options": "decode tools",
        "tools": "decode limited llama chat_messages prompt",
        "prefill": "cache depth images llama prompt",
        "decode": "cache limited llama chat_messages",
        "embedding": "cache llama prefill",
        "depth": "cache llama",
        "learning": "cache llama",
        "cache": "images llama prompt",
        "prompt": "images limited llama chat_messages",
        "chat_messages": "images",
        "images": "limited llama",
        "llama": "",
        "limited": "",
    },
    "converter": {
        "popfile": "architecture base fit gguf",
        "fit": "architecture base gguf",
        "architecture": "base gguf",
        "gguf": "base",
        "base": "",
    },
}
# Only types cross these arrows, since `ui` draws other packages' results.
DRAWN = [("ui", "workflows"), ("ui", "research")]
ON_THE_TERMINAL = {"cli", "commands", "ui"}
FILES = {
    ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for package in (ROOT / "converter" / "pop_converter", ROOT / "pop_local")
    for path in package.rglob("*.py")
}


@dataclass(frozen=True)
class Import:
    """An import of `module`, the innermost one; `name`: the imported name in it, "" for all."""

    by: str
    module: str
    name: str


def imports_of(module: str) -> list[Import]:
    """Return all imports, including those in functions and those for types."""
    found = []
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [Import(module, alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None and node.level == 0, f"{module} imports relatively"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                whole = Import(module, inner, "")
                found.append(whole if inner in FILES else Import(module, node.module, alias.name))
    return found


@functools.cache
def imports() -> list[Import]:
    return [found for module in FILES for found in imports_of(module)]


def package_of(module: str) -> str:
    package, *inner = module.split(".")
    if package == "pop_converter":
        return "converter"
    if package == "pop_local" and inner and inner[0] != "__main__":
        return inner[0]
    return "cli" if inner == ["__main__"] else package


def folder_of(module: str) -> str:
    """Return the folder within a package; "" for a module outside any.

    A module at the engine's top counts as a folder.
    """
    parts = module.split(".")[1 if module.startswith("pop_converter") else 2 :]
    is_folder = FILES[module].name == "__init__.py" or package_of(module) == "engine"
    return parts[0] if len(parts) > 1 or (parts and is_folder) else ""


def test_every_package_has_arrows():
    assert {package_of(module) for module in FILES} == ARROWS.keys()
    graphlib.TopologicalSorter({name: set(to.split()) for name, to in ARROWS.items()}).prepare()


@pytest.mark.parametrize("name", ARROWS)
def test_packages_import_along_their_arrows(name):
    allowed = {name, "converter", *ARROWS[name].split()}
    of_ours = [
        found for found in imports() if package_of(found.by) == name and found.module in FILES
    ]
    # Every package may import `__version__`.
    wrong = [found for found in of_ours if package_of(found.module) not in allowed]
    assert [found for found in wrong if found.name != "__version__"] == []


@pytest.mark.parametrize("outer", INSIDE)
def test_inner_folders_import_along_their_arrows(outer):
    table = INSIDE[outer]
    graphlib.TopologicalSorter({name: set(to.split()) for name, to in table.items()}).prepare()
    inner = [each for each in imports() if each.module in FILES and package_of(each.by) == outer]
    folders = {folder_of(module) for module in FILES if package_of(module) == outer}
    assert folders - {""} == table.keys()
    wrong = [
        found
        for found in inner
        if package_of(found.module) == outer
        and (by := folder_of(found.by))
        and (to := folder_of(found.module))
        and to not in {by, *table[by].split()}
    ]
    assert wrong == []


@pytest.mark.parametrize("arrow", DRAWN)
def test_ui_imports_only_types_of_results(arrow):
    found = [each for each in imports() if (package_of(each.by), package_of(each.module)) == arrow]
    assert found
    assert [each for each in found if not each.name[:1].isupper()] == []


def test_research_is_imported_lazily():
    """Outside research, imports of it are within functions or for types."""
    outside = [module for module in FILES if package_of(module) != "research"]
    wrong = [
        node
        for module in outside
        for node in ast.parse(FILES[module].read_text(encoding="utf-8")).body
        if isinstance(node, ast.Import | ast.ImportFrom) and "research" in ast.unparse(node)
    ]
    assert wrong == []


def test_only_the_terminal_imports_typer_and_rich():
    found = [each for each in imports() if each.module.split(".")[0] in ("typer", "rich")]
    assert {package_of(each.by) for each in found} == ON_THE_TERMINAL


def test_imports_have_no_cycles():
    graph: dict[str, set[str]] = {module: set() for module in FILES}
    for found in imports():
        if found.module in FILES:
            graph[found.by].add(found.module)
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
