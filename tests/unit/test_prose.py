"""How the documents read: short sentences, and none that begins with a noun clause.

`python tests/unit/test_prose.py` prints the mean of each document and its longest sentences.
"""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "patches/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
MEAN_WORDS = 20
# A question may begin with "What".
BEGINNING = re.compile(r"(What|Of|Whose|So many)\b")

# Code, tables, headings, comments and pictures.
_LEFT_OUT = re.compile(
    r"(?s:^```.*?^```$|^<!--.*?-->$)|(?<=\n\n)(?: {4}.*\n+)+|^ *\|.*$|^#.*$|^!\[.*$", re.M
)
_ITEM = re.compile(r"^\s*(?:[-*]|\d+\.) +(.*)", re.S)
_LINK = re.compile(r"\[([^]]*)\]\([^)]*\)")
_END = re.compile(r"(?<=[.!?])[*_\"')]*\s+")


def sentences(text: str) -> list[str]:
    """Return the sentences of a Markdown text; a list's item ends one."""
    text = _LEFT_OUT.sub("", text.replace("\r", ""))
    found = []
    for block in re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )", text):
        item = _ITEM.match(block)
        prose = re.sub(r"`[^`]*`", "`code`", _LINK.sub(r"\1", item[1] if item else block))
        found += [" ".join(part.split()) for part in _END.split(prose) if re.search(r"\w\w", part)]
    return found


def n_words(sentence: str) -> int:
    return len([word for word in sentence.split() if re.search(r"\w", word)])


def begins_badly(sentence: str) -> bool:
    if sentence.endswith("?"):
        return False
    return BEGINNING.match(sentence.lstrip("*_(\"'")) is not None


def comments_and_docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and text of each docstring and each block of comments of a Python file."""
    source = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring is not None:
                yield node.body[0].lineno, docstring
    before = block = 0
    lines: list[str] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        if token.start[0] != before + 1 and lines:
            yield block, "\n".join(lines)
            lines = []
        block = token.start[0] if not lines else block
        before = token.start[0]
        lines.append(token.string.lstrip("# "))
    if lines:
        yield block, "\n".join(lines)


def offenders(folders: list[Path]) -> list[str]:
    """Return the places in Python code where a docstring or comment begins a sentence badly."""
    return [
        f"{path}:{line}: {sentence}"
        for folder in folders
        for path in sorted(folder.rglob("*.py"))
        for line, text in comments_and_docstrings(path)
        for sentence in sentences(text)
        if begins_badly(sentence)
    ]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_have_short_sentences(path: Path) -> None:
    found = sentences(path.read_text(encoding="utf-8"))
    longest = sorted(found, key=n_words, reverse=True)[:5]
    assert mean(map(n_words, found)) <= MEAN_WORDS, "\n".join(longest)
    assert not [sentence for sentence in found if begins_badly(sentence)]


def test_sentences_leave_out_code_and_tables() -> None:
    text = "# A\n\nOne `a. B` two.\nThree [four](x.md).\n\n    code here\n\n| a | b |\n"
    text += "\n- Five six\n- Of x."
    assert sentences(text) == ["One `code` two.", "Three four.", "Five six", "Of x."]
    assert [n_words(sentence) for sentence in sentences(text)] == [3, 2, 2, 2]
    assert [begins_badly(sentence) for sentence in sentences(text)] == [False] * 3 + [True]
    assert not begins_badly("What is it?") and begins_badly("*What* it is.")


def test_offenders_are_found_in_docstrings_and_comments(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text('"""One. What two."""\n\n# Of three\n# four.\nx = 1  # Whose.\n')
    assert [place.rpartition(":")[2] for place in offenders([tmp_path])] == [
        " What two.",
        " Of three four.",
        " Whose.",
    ]


if __name__ == "__main__":
    for document in DOCUMENTS:
        words = sorted(
            ((n_words(s), s) for s in sentences(document.read_text("utf-8"))), reverse=True
        )
        print(f"{mean(n for n, _ in words):5.1f} {len(words):4} {document.relative_to(ROOT)}")
        for n, sentence in words[: 3 if len(sys.argv) == 1 else int(sys.argv[1])]:
            print(f"      {n:3} {sentence}")
        for _, sentence in words:
            if begins_badly(sentence):
                print(f"      bad {sentence}")
