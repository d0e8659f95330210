"""Prose of the repository: docstrings, comments, messages and Markdown, by sentence and line."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Code, comments and pictures, of docstrings and Markdown.
_CODE = re.compile(
    r"(?s:^```.*?^```$|^<!--.*?-->$|^<picture>.*?</picture>$)|(?<=\n\n)(?: {4}.*\n+)+", re.M
)
# Comments inside a line, which mark a generated figure.
_MARK = re.compile(r"<!--[^\n]*?-->")
_NO_PROSE = re.compile(r"^ *\|.*$|^#.*$|^!\[.*$", re.M)
_LINK = re.compile(r"\[([^]]*)\]\([^)]*\)")
_INLINE_CODE = re.compile(r"`[^`]*`|\{[^{}]*\}")
_ITEM = re.compile(r"\s*(?:[-*]|\d+\.) +")
_BLOCK_END = re.compile(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )")
_SENTENCE_END = re.compile(r"(?<=[.!?])[*_\"')]*\s+")
_CPP_COMMENT = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*(?:\n[ \t]*//[^\n]*)*|/\*.*?\*/', re.S)
_MIN_WORDS = 3


@dataclass(frozen=True)
class Sentence:
    """One sentence of a file; `prose` is `text` with its code blanked.

    `kind` is "docstring", "comment", "message" or "document". `is_first`: the text starts with it.
    """

    path: Path
    line: int
    kind: str
    text: str
    prose: str
    is_first: bool

    @property
    def n_words(self) -> int:
        return len([word for word in self.prose.split() if re.search(r"\w", word)])


def sentences_of(path: Path) -> list[Sentence]:
    """Return a file's sentences: of Python, C++ (and patches to it) or Markdown."""
    source = path.read_text(encoding="utf-8").replace("\r", "")
    if path.suffix == ".py":
        texts = _python_texts(source)
    elif path.suffix == ".md":
        texts = iter([(1, "document", _NO_PROSE.sub("", source))])
    else:
        texts = _cpp_texts(_added(source) if path.suffix == ".patch" else source)
    return [
        Sentence(path, first_line + offset, kind, text, prose, number == 0)
        for first_line, kind, whole in texts
        for number, (offset, text, prose) in enumerate(_split(whole))
    ]


def _split(text: str) -> Iterator[tuple[int, str, str]]:
    """Yield each sentence's line offset, its text and its prose; a list item ends one."""
    text = _CODE.sub(lambda match: "\n" * match[0].count("\n"), text)
    text = _MARK.sub("", text)
    text = _LINK.sub(lambda match: match[1] + "\n" * match[0][len(match[1]) :].count("\n"), text)
    # Masks keep the length, so offsets agree.
    prose = _INLINE_CODE.sub(lambda match: re.sub(r"[^\n`]", "_", match[0]), text)
    for block_start, block in _pieces(prose, _BLOCK_END):
        item = _ITEM.match(block)
        block_start += item.end() if item else 0
        for offset, sentence in _pieces(block[item.end() if item else 0 :], _SENTENCE_END):
            if sentence.strip():
                start = block_start + offset + len(sentence) - len(sentence.lstrip())
                original = text[start : block_start + offset + len(sentence)]
                yield text.count("\n", 0, start), _joined(original), _joined(sentence)


def _joined(lines: str) -> str:
    return " ".join(lines.split())


def _pieces(text: str, end: re.Pattern[str]) -> Iterator[tuple[int, str]]:
    start = 0
    for match in end.finditer(text):
        yield start, text[start : match.start()]
        start = match.end()
    yield start, text[start:]


def _python_texts(source: str) -> Iterator[tuple[int, str, str]]:
    tree = ast.parse(source)
    docstrings = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring is not None:
                docstrings.add(node.body[0].value)  # type: ignore[attr-defined]
                yield node.body[0].lineno, "docstring", docstring
    yield from _comments(source)
    yield from _messages(tree, docstrings)


def _comments(source: str) -> Iterator[tuple[int, str, str]]:
    """Yield comments, those on consecutive lines as one."""
    block: list[str] = []
    first = last = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        if block and token.start[0] != last + 1:
            yield first, "comment", "\n".join(block)
            block = []
        first = first if block else token.start[0]
        last = token.start[0]
        block.append(token.string.lstrip("# "))
    if block:
        yield first, "comment", "\n".join(block)


def _messages(node: ast.AST, left_out: set[ast.AST]) -> Iterator[tuple[int, str, str]]:
    """Yield string literals of three words and more."""
    for child in ast.iter_child_nodes(node):
        if child in left_out:
            continue
        if isinstance(child, ast.Constant | ast.JoinedStr):
            text = literal_text(child)
            if len(re.findall(r"[A-Za-z]{2,}", text)) >= _MIN_WORDS and " " in text.strip():
                # Escaped newlines in a literal are not lines of the file.
                yield child.lineno, "message", text.replace("\n", " ")
        else:
            yield from _messages(child, left_out)


def literal_text(node: ast.Constant | ast.JoinedStr) -> str:
    """Return a string literal's text, with `{value}` for each value of an f-string."""
    if isinstance(node, ast.JoinedStr):
        texts = (
            literal_text(part) if isinstance(part, ast.Constant) else "" for part in node.values
        )
        return "".join(text or "{value}" for text in texts)
    return node.value if isinstance(node.value, str) else ""


def _added(patch: str) -> str:
    """Return a patch's added lines, with the other lines empty."""
    lines = [line[1:] if re.match(r"\+(?!\+\+ )", line) else "" for line in patch.split("\n")]
    return "\n".join(lines)


def _cpp_texts(source: str) -> Iterator[tuple[int, str, str]]:
    for match in _CPP_COMMENT.finditer(source):
        if not match[0].startswith('"'):
            text = re.sub(r"^[ \t]*(//+|/?\*+/?) ?", "", match[0], flags=re.M).removesuffix("*/")
            yield source.count("\n", 0, match.start()) + 1, "comment", text
