"""Random sentences for readers to judge: docstrings, documents and messages. Not a test.

    python tests/bench/draw_sentences.py [--seed 0] [--count 30] [--controls KEY.json]

Docstrings and messages are from the packages, documents from README.md, CONTRIBUTING.md and docs
without the notebook's archive. Fragments of fewer than four words outside placeholders and the
texts of look-up documents are left out. The same seed in the same tree draws the same sentences.

`--controls` mixes in as many sentences of well-known packages of this environment, so that a
reader's marks have a baseline. The sources are written to KEY.json instead of being printed.
"""

import argparse
import json
import random
import re
import site
import sys
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support.paths import ROOT
from support.prose import Sentence, sentences_of

MIN_WORDS = 4
KINDS = ("docstring", "document", "message")
PLACEHOLDER = re.compile(r"\{[^}]*\}")
LOOKUP_TEXTS = ("carrier_layouts.py", "carrier_values.py")
PACKAGES = ("pop_local", "converter/pop_converter", "patches/llama-cpp-python/pop_build")
CONTROLS = [
    "anyio",
    "click",
    "httpcore",
    "httpx",
    "huggingface_hub",
    "jinja2",
    "pip",
    "pydantic",
    "_pytest",
    "rich",
    "starlette",
    "typer",
    "uvicorn",
]
# Field lists, directives, defaults and changelogs are not sentences.
FIELDS = re.compile(
    r"-----|%\(|Args:|:param|:raises|Returns:|optional|versionchanged|deprecated::|#\d{3}|by @|>"
    r"|Default|^[a-z_]+ :|\*\*|http"
)


def sources(kind: str) -> list[Path]:
    if kind != "document":
        found = [path for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py"))]
        return [path for path in found if path.name not in LOOKUP_TEXTS]
    pages = sorted((ROOT / "docs").rglob("*.md"))
    kept = [page for page in pages if "archive" not in page.parts]
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "patches" / "README.md", *kept]


def control_sources(kind: str, folder: Path) -> list[Path]:
    """Return the packages' files, or their READMEs, which are extracted to `folder`."""
    packages = Path(site.getsitepackages()[0])
    if kind != "document":
        found = [path for name in CONTROLS for path in sorted((packages / name).rglob("*.py"))]
        return [path for path in found if "_vendor" not in path.parts]
    pages = []
    for metadata in sorted(packages.glob("*.dist-info/METADATA")):
        head, _, body = metadata.read_text(errors="ignore").partition("\n\n")
        if "text/markdown" in head and "pop" not in metadata.parent.name:
            pages.append(folder / f"{metadata.parent.name}.md")
            pages[-1].write_text(body)
    return pages


def n_literal_words(sentence: Sentence) -> int:
    """Return the number of words outside placeholders."""
    return len(re.findall(r"\w\S*", PLACEHOLDER.sub("", sentence.text)))


def draw(paths: Iterable[Path], kind: str, count: int, seed: int) -> list[Sentence]:
    """Return `count` different sentences of a kind, in the order of their files."""
    found = [
        sentence
        for path in paths
        for sentence in sentences_of(path)
        if sentence.kind == kind and n_literal_words(sentence) >= MIN_WORDS
    ]
    chosen = random.Random(seed).sample(range(len(found)), min(count, len(found)))
    return [found[index] for index in sorted(chosen)]


def draw_controls(kind: str, count: int, seed: int) -> list[Sentence]:
    """Return `count` sentences of other packages, without field lists."""
    with TemporaryDirectory() as folder:
        found = draw(control_sources(kind, Path(folder)), kind, 20 * count, seed)
    prose = [each for each in found if len(each.text) < 400 and not FIELDS.search(each.text)]
    return random.Random(seed).sample(prose, min(count, len(prose)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw sentences at random.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=30, help="sentences of each kind")
    parser.add_argument("--controls", type=Path, help="mix in other packages' sentences; key file")
    options = parser.parse_args()
    key: list[str] = []
    for kind in KINDS:
        print(f"## {kind}s\n")
        drawn = [
            (sentence.text, f"{sentence.path.relative_to(ROOT)}:{sentence.line}")
            for sentence in draw(sources(kind), kind, options.count, options.seed)
        ]
        if options.controls:
            others = draw_controls(kind, options.count, options.seed)
            drawn += [(sentence.text, "control") for sentence in others]
            random.Random(options.seed).shuffle(drawn)
        for text, place in drawn:
            key.append(place)
            print(f"{len(key)}. {text}" if options.controls else f"{len(key)}. {text}\n   {place}")
        print()
    if options.controls:
        options.controls.write_text(json.dumps(key, indent=0))


if __name__ == "__main__":
    main()
