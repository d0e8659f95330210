"""Hooks of MkDocs: add pages from outside docs, fit their links, and append the glossary."""

import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# Pages of the site that are files outside docs, by their path in the site.
OUTSIDE = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "internals/hooks.md": "patches/README.md",
    "internals/benchmarks.md": "tests/bench/README.md",
}
GLOSSARY = ROOT / "docs" / "how-it-works.md"
_LINK = re.compile(
    r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!https?:|mailto:|#)([^)\s#]+)(#[^)\s]*)?\)"
)
_CODE = re.compile(r"((?s:^```.*?^```$)|(?<=\n\n)(?: {4}.*\n+)+)", re.M)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages from outside docs."""
    from mkdocs.structure.files import File

    for uri, name in OUTSIDE.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, uri, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Fit the links of a page, and append the glossary."""
    text = fitted(markdown, page.file.src_uri, config.repo_url or "")
    return f"{text}\n\n{glossary(GLOSSARY.read_text(encoding='utf-8'))}"


def fitted(markdown: str, uri: str, repository: str) -> str:
    """Return a page whose links lead to the site's pages, or to files of the repository.

    Without a repository, a link to a file that the site lacks becomes plain text.
    """
    source = ROOT / OUTSIDE.get(uri, f"docs/{uri}")

    def link(found: re.Match[str]) -> str:
        mark, text, name, anchor = found.groups()
        target = Path(os.path.normpath(source.parent / name))
        if (page := page_of(target)) is not None:
            relative = os.path.relpath(page, Path(uri).parent)
            return f"{mark}[{text}]({Path(relative).as_posix()}{anchor or ''})"
        if not repository:
            return text
        path = target.relative_to(ROOT).as_posix()
        return f"[{text}]({repository.rstrip('/')}/blob/main/{path}{anchor or ''})"

    # Code keeps its brackets.
    parts = _CODE.split(markdown)
    return "".join(part if at % 2 else _LINK.sub(link, part) for at, part in enumerate(parts))


def page_of(target: Path) -> str | None:
    """Return a file's path in the site, or None if the site does not contain the file."""
    name = target.relative_to(ROOT).as_posix()
    for uri, outside in OUTSIDE.items():
        if name == outside:
            return uri
    inside = name.removeprefix("docs/")
    is_page = target.is_file() and not inside.startswith(("results/", "site/"))
    return inside if name.startswith("docs/") and is_page else None


def glossary(text: str) -> str:
    """Return the glossary of how-it-works.md as abbreviations, which are shown as tooltips."""
    table = text.split("\n## Glossary\n")[1].split("\n## ")[0]
    lines = []
    for row in re.findall(r"^\| (.+?) \| (.+?) \|$", table, re.M)[1:]:
        words, meanings = row[0].split(", "), row[1].split("; ")
        if len(words) != len(meanings):
            meanings = [row[1]] * len(words)
        for word, meaning in zip(words, meanings, strict=True):
            plain = re.sub(r"[*`]", "", meaning)
            names = {word.partition(" (")[0]}
            names |= {name[:1].upper() + name[1:] for name in names}
            lines += [f"*[{name}]: {plain}" for name in sorted(names)]
    return "\n".join(lines)
