"""Check that the guides name real commands, options and messages."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import typer

from pop_local.cli import app
from support.paths import ROOT
from support.prose import literal_text

GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GUIDE = (ROOT / "docs" / "getting-started.md").read_text(encoding="utf-8")
# A command in a code block or in inline code, up to a comment, a pipe or a semicolon.
_COMMAND = re.compile(r"(?:^ {4}(?:\$ )?(?:[^|\n#`]*\| )?|`)pop-local ([^`\n|#;]+)", re.M)
# Options in inline code that have their command next to them: `serve --strict-model`.
_SHORT = re.compile(r"`((?:chat|run|serve|convert|bench|eval|inspect|cache|config) [^`]+)`")
_QUOTED_MESSAGE = re.compile(r"^- \*\*`([^`]+)`\*\*", re.M)
_OPTION = re.compile(r"(?<=\s)(--[a-z][\w-]*|-[a-z])(?=[\s=,)]|$)")


def unknown_parts(command: str) -> list[str]:
    """Return the words of a documented command that the program does not accept.

    A word in capitals is a placeholder, which ends the names of commands. The words after -- are
    another program's.
    """
    words = re.sub(r'"[^"]*"', "TEXT", command.split(" -- ")[0]).split()
    group: Any = typer.main.get_command(app)
    context = group.context_class(group, resilient_parsing=True)
    while hasattr(group, "resolve_command") and words and words[0].islower():
        if words[0].startswith("-"):
            break
        _, subcommand, _ = group.resolve_command(context, words)
        if subcommand is None:
            return [words[0]]
        group, words = subcommand, words[1:]
    allowed = {option for parameter in group.get_params(context) for option in parameter.opts}
    return [option for option in _OPTION.findall(" " + " ".join(words)) if option not in allowed]


def commands_in(text: str) -> list[str]:
    """Return the documented commands, without `pop-local`."""
    return [*_COMMAND.findall(text), *_SHORT.findall(text)]


def messages() -> list[str]:
    """Return all string literals of the package, with `{value}` for each value."""
    files = (ROOT / "pop_local").rglob("*.py")
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in files)
    nodes = (node for tree in trees for node in ast.walk(tree))
    return [literal_text(node) for node in nodes if isinstance(node, ast.Constant | ast.JoinedStr)]


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.name)
def test_documented_commands_and_options_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    unknown = {command: unknown_parts(command) for command in commands_in(text)}
    assert not {command: parts for command, parts in unknown.items() if parts}


def test_quoted_messages_exist() -> None:
    texts = messages()
    quoted = _QUOTED_MESSAGE.findall(GUIDE)
    assert len(quoted) >= 10
    for message in quoted:
        pattern = re.compile(".*".join(map(re.escape, message.split("..."))), re.S)
        assert any(pattern.search(text) for text in texts), message


def test_readme_is_short_and_the_verdict_needs_no_glossary() -> None:
    readme, quality = (GUIDES[0], ROOT / "docs" / "quality.md")
    assert len(readme.read_text(encoding="utf-8").splitlines()) <= 90
    verdict = quality.read_text(encoding="utf-8").split("\n## ")[0]
    terms = r"KL|PPL|[Pp]erplexity|[Ss]idecar|[Pp]rojection|[Bb]oundary|[Pp]run|[Pp]refill|TTFT"
    assert not re.search(rf"\b(?:{terms})", verdict)
