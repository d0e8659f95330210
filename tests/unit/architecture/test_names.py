"""Check that classes have unique names, few public members, and functions few parameters."""

import ast
from collections import Counter

from support.paths import ROOT

MAX_PARAMETERS = 8
MAX_MEMBERS = 20
# A slot holds a sequence's cells and a KvCache its rows, so both have more members than others.
MAX_MEMBERS_OF = {"PopModel": 15, "KvCache": 28, "Slot": 30, "BatchedSlot": 30}
TREES = {
    path: ast.parse(path.read_text(encoding="utf-8"))
    for folder in ("converter/pop_base", "converter/pop_converter", "pop_local")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
CLASSES = [
    node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)
]


def count_parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the number of parameters without `self` and `cls`."""
    args = function.args
    names = [arg.arg for arg in (*args.posonlyargs, *args.args, *args.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def public_members(node: ast.ClassDef, by_name: dict[str, ast.ClassDef]) -> set[str]:
    """Return public methods, properties and attributes, also those of bases in the package.

    Fields of dataclasses, TypedDicts and request bodies are data and do not count.
    """
    names: set[str] = set()
    for base in node.bases:
        inherited = by_name.get(ast.unparse(base).split("[")[0].split(".")[-1])
        if inherited is not None and inherited is not node:
            names |= public_members(inherited, by_name)
    for member in node.body:
        if not isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        names.add(member.name)
        if member.name == "__init__":
            names |= {
                target.attr
                for target in ast.walk(member)
                if isinstance(target, ast.Attribute)
                and isinstance(target.ctx, ast.Store)
                and ast.unparse(target.value) == "self"
            }
    return {name for name in names if not name.startswith("_")}


def test_class_names_are_unique():
    assert [name for name, n in Counter(node.name for node in CLASSES).items() if n > 1] == []


def test_functions_have_few_parameters():
    """Typer's entry points have a parameter for each option; their file has the command's name."""
    functions = [
        f"{path.relative_to(ROOT)}:{node.name}"
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if not (path.parent.name == "commands" and node.name == path.stem)
        and count_parameters(node) > MAX_PARAMETERS
    ]
    assert functions == []


def test_classes_have_few_public_members():
    by_name = {node.name: node for node in CLASSES}
    assert MAX_MEMBERS_OF.keys() <= by_name.keys()
    sizes = {name: len(public_members(node, by_name)) for name, node in by_name.items()}
    assert [n for n, size in sizes.items() if size > MAX_MEMBERS_OF.get(n, MAX_MEMBERS)] == []
