"""How the documents read: short sentences, and none that begins with a noun clause.

`python tests/unit/house/test_prose.py` prints the mean of each document and its longest sentences.
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

ROOT = Path(__file__).resolve().parents[3]
DOCUMENTS = [
    *(
        ROOT / name
        for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "patches/README.md")
    ),
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
    """Return the sentences of a Markdown text; a list's item ends one, and labels are none."""
    text = _LEFT_OUT.sub("", text.replace("\r", ""))
    found = []
    for block in re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )", text):
        item = _ITEM.match(block)
        prose = re.sub(r"`[^`]*`", "`code`", _LINK.sub(r"\1", item[1] if item else block))
        found += [" ".join(part.split()) for part in _END.split(prose)]
    return [sentence for sentence in found if n_words(sentence) > 2]


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


def test_docstrings_and_comments_begin_well() -> None:
    folders = ("pop_local", "converter", "patches/llama-cpp-python/pop_build", "tests")
    assert offenders([ROOT / name for name in folders]) == []


def test_links_lead_somewhere() -> None:
    anchor = re.compile(r"[^\w\- ]")
    for document in DOCUMENTS:
        for target in re.findall(r"\]\((?!https?:)([^)]*)\)", document.read_text("utf-8")):
            name, _, section = target.partition("#")
            path = document.parent / name if name else document
            assert path.exists(), f"{document}: {target}"
            if section:
                headings = re.findall(r"^#+ (.*)$", path.read_text("utf-8"), re.M)
                names = [anchor.sub("", title.lower()).replace(" ", "-") for title in headings]
                assert section in names, f"{document}: {target}"


def test_sentences_leave_out_code_and_tables() -> None:
    text = "# A\n\nOne `a. B` two.\nAnd three [four](x.md).\n\n    code here\n\n| a | b |\n"
    text += "\n- **Label.** Five six seven\n- Of x and y."
    expected = ["One `code` two.", "And three four.", "Five six seven", "Of x and y."]
    assert sentences(text) == expected
    assert [n_words(sentence) for sentence in expected] == [3, 3, 3, 4]
    assert [begins_badly(sentence) for sentence in sentences(text)] == [False] * 3 + [True]
    assert not begins_badly("What is it?") and begins_badly("*What* it is.")


def test_offenders_are_found_in_docstrings_and_comments(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        '"""One. What two is."""\n\n# Of three\n# four.\nx = 1  # Whose x is.\n'
    )
    assert [place.rpartition(":")[2] for place in offenders([tmp_path])] == [
        " What two is.",
        " Of three four.",
        " Whose x is.",
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
