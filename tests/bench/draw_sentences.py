"""Random sentences for readers to judge: docstrings, documents and messages. Not a test.

    python tests/bench/draw_sentences.py [--seed 0] [--count 30]

Docstrings and messages are from the packages, documents from README.md, CONTRIBUTING.md and docs
without the notebook's archive. The same seed in the same tree draws the same sentences.
"""

import argparse
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support.paths import ROOT
from support.prose import Sentence, sentences_of

MIN_WORDS = 4
PACKAGES = ("pop_local", "converter/pop_converter", "patches/llama-cpp-python/pop_build")


def sources(kind: str) -> list[Path]:
    if kind != "document":
        return [path for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py"))]
    pages = sorted((ROOT / "docs").rglob("*.md"))
    kept = [page for page in pages if "archive" not in page.parts]
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "patches" / "README.md", *kept]


def draw(kind: str, count: int, seed: int) -> list[Sentence]:
    """Return `count` different sentences of a kind, in the order of their files."""
    found = [
        sentence
        for path in sources(kind)
        for sentence in sentences_of(path)
        if sentence.kind == kind and sentence.n_words >= MIN_WORDS
    ]
    chosen = random.Random(seed).sample(range(len(found)), min(count, len(found)))
    return [found[index] for index in sorted(chosen)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw sentences at random.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=30, help="sentences of each kind")
    options = parser.parse_args()
    for kind in ("docstring", "document", "message"):
        print(f"## {kind}s\n")
        for number, sentence in enumerate(draw(kind, options.count, options.seed), 1):
            print(f"{number}. {sentence.text}")
            print(f"   {sentence.path.relative_to(ROOT)}:{sentence.line}")
        print()


if __name__ == "__main__":
    main()
