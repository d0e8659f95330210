"""Make README.md's links absolute for the package index; pytest imports this.

    python tests/absolute_links.py REPOSITORY REVISION

The release workflow rewrites README.md before it builds the wheel, because relative links do not
work on the index's page. REPOSITORY is an address such as https://github.com/OWNER/NAME, and
REVISION a tag or branch of it.
"""

import re
import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
IMAGES = (".png", ".svg")
# A link or an image of Markdown, or a tag's attribute. Links to headings of the page remain.
_RELATIVE = re.compile(r"""(\]\(|\b(?:href|src|srcset)=")(?!\w+:|#)([^)"\s]+)""")


def relative_links(markdown: str) -> list[str]:
    """Return the targets of all links that need the file's folder."""
    return [target for _, target in _RELATIVE.findall(markdown)]


def absolute(markdown: str, repository: str, revision: str) -> str:
    """Return a page of the repository's root folder with absolute links."""

    def link(found: re.Match[str]) -> str:
        start, target = found.groups()
        kind = "raw" if target.endswith(IMAGES) else "blob"
        return f"{start}{repository.rstrip('/')}/{kind}/{revision}/{target}"

    return _RELATIVE.sub(link, markdown)


def main() -> None:
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        sys.exit(2)
    text = README.read_text(encoding="utf-8")
    README.write_text(absolute(text, *sys.argv[1:]), encoding="utf-8", newline="\n")
    print(f"{len(relative_links(text))} links of {README.name} are absolute now")


if __name__ == "__main__":
    main()
