"""Build the table of docs/architectures.md from one model header of each architecture.

`python -m support.architecture_table FOLDER` rewrites the table from the models in FOLDER, which
support.recipes builds.
"""

import sys
from collections.abc import Iterable
from pathlib import Path

from pop_converter.architecture.arch_names import REFUSED
from pop_converter.architecture.shape import ModelShape
from pop_converter.architecture.skipping import skipping_of
from pop_converter.base.errors import UnsupportedArchitectureError
from support.paths import ROOT
from support.shapes import read_shape

DOCUMENT = ROOT / "docs" / "architectures.md"
_BEGIN, _END = "<!-- table -->\n", "<!-- end -->\n"
HEAD = """\
| architecture | layers that may be skipped | left in a skipped layer | projections | refilling |
|---|---|---|---|---|
"""


def row(shape: ModelShape) -> str:
    """Return an architecture's row, which leaves out what varies between its models."""
    found = skipping_of(shape)
    layers = "all but the first" + (f" {found.first}" if found.first > 1 else "")
    if found.exact:
        layers += "; those that share K/V exactly"
    kinds = "fitted or own" if found.fits_from is not None else f"own: {found.no_fit}"
    if found.fits_from is not None and found.fits_from > found.first:
        kinds = "fitted in the last layers, own elsewhere"
    refill = f"no: {found.no_refill}" if found.no_refill else "yes"
    measured = "**" if found.is_measured else ""
    left = ", ".join(found.left) or "nothing"
    return f"| {measured}{shape.arch}{measured} | {layers} | {left} | {kinds} | {refill} |\n"


def table(paths: Iterable[Path]) -> str:
    """Return the table of all supported architectures, followed by the refused ones."""
    rows = set()
    for path in paths:
        try:
            rows.add(row(read_shape(path)))
        except UnsupportedArchitectureError:
            continue
    refused = "".join(f"| {name} | {why} |\n" for name, why in sorted(REFUSED.items()))
    lines = "".join(sorted(rows, key=lambda line: line.replace("*", "")))
    return f"{HEAD}{lines}\n| refused | because it is |\n|---|---|\n{refused}"


def written(text: str) -> str:
    """Return the document's table."""
    return text.split(_BEGIN)[1].split(_END)[0]


if __name__ == "__main__":
    before, rest = DOCUMENT.read_text(encoding="utf-8").split(_BEGIN)
    made = table(sorted(Path(sys.argv[1]).glob("*.gguf")))
    after = rest.split(_END)[1]
    DOCUMENT.write_text(f"{before}{_BEGIN}{made}{_END}{after}", encoding="utf-8")
