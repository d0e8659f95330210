"""Make seven kinds of text, each with a half to fit on and a half to measure on. Not a test.

    pip download --no-deps --dest FOLDER gensim==4.4.0 Django==5.2.19 psutil==7.2.2
        chatterbot-corpus==1.3.3 vega-datasets==0.9.0 statsmodels==0.15.0
        --no-binary gensim,Django,psutil,chatterbot-corpus,vega-datasets
    (cd FOLDER; apt-get download debian-faq-{de,fr} debian-reference-{de,fr})   # of Debian 13
    python tests/bench/make_texts.py FOLDER OUT

Writes OUT/KIND.fit.txt and OUT/KIND.held.txt, up to 190,000 characters each. Documents alternate
between the halves, after a seeded shuffle. `make sidecars` fits on the first half.
"""

import argparse
import bz2
import html
import random
import re
import shutil
import subprocess
import zipfile
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path

import yaml

N_CHARS, LEAST_CHARS = 190_000, 400


def unpack(folder: Path) -> Path:
    """Unpack all archives of a folder into one below it."""
    root = folder / "unpacked"
    if not root.exists():
        new = folder / "unpacking"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        for file in sorted(folder.iterdir()):
            if file.name.endswith(".tar.gz"):
                shutil.unpack_archive(file, new, filter="data")
            elif file.suffix == ".whl":
                zipfile.ZipFile(file).extractall(new / "wheel")
            elif file.suffix == ".deb":
                subprocess.run(["dpkg-deb", "-x", file, new / "deb"], check=True)
        new.rename(root)
    return root


def halves(documents: Iterable[str], most: int) -> Iterator[tuple[str, str]]:
    """Yield a name and a text for each half of documents, up to `most` characters of each."""
    kept = [each[:most] for each in documents if len(each[:most].strip()) > LEAST_CHARS]
    random.Random(7).shuffle(kept)
    for name, half in (("fit", kept[0::2]), ("held", kept[1::2])):
        text = ""
        for document in half:
            if len(text) <= N_CHARS:
                text += document.strip() + "\n\n"
        yield name, text


def articles(root: Path) -> list[str]:
    """Return the longer pages of gensim's test data, with their markup."""
    [dump] = root.glob("gensim-*/gensim/test/test_data/enwiki-latest*.bz2")
    pages = re.findall(r"<page>.*?</page>", bz2.decompress(dump.read_bytes()).decode(), re.S)
    return [page for page in pages if "#REDIRECT" not in page.upper() and len(page) > 4000]


def plain(page: str) -> str:
    """Return an article's sentences, without markup."""
    found = re.search(r"<text[^>]*>(.*)</text>", page, re.S)
    text = html.unescape(html.unescape(found[1] if found else ""))
    hidden = r"<!--.*?-->|<ref[^>/]*/>|<ref.*?</ref>|<math>.*?</math>|<gallery.*?</gallery>"
    text = re.sub(hidden, "", text, flags=re.S)
    for _ in range(6):  # they are nested
        text = re.sub(r"\{\{[^{}]*\}\}|\{\|(?:(?!\{\|).)*?\|\}", "", text, flags=re.S)
    text = re.sub(r"\[\[(?:File|Image|Category):(?:[^\[\]]|\[\[[^\]]*\]\])*\]\]", "", text)
    text = re.sub(r"\[\[(?:[^|\]]*\|)?([^\]]*)\]\]", r"\1", text)
    text = re.sub(r"\[https?://\S+ ?([^\]]*)\]|<[^>]+>|'{2,}", r"\1", text)
    text = re.sub(r"^=+ *(.*?) *=+$", r"\1", text, flags=re.M)
    lines = [line for line in text.split("\n") if not re.match(r"[*#:;|{}!]", line)]
    text = re.split(r"\n(?:See also|References|External links|Notes)\n", "\n".join(lines))[0]
    return re.sub(r"\n{2,}", "\n\n", text)


def documentation(root: Path) -> list[str]:
    [django] = root.glob("django-*/docs")
    files = sorted(django.rglob("*.txt"))
    return [file.read_text(encoding="utf-8") for file in files if "releases" not in file.parts]


def code(root: Path) -> list[str]:
    [django], [psutil] = root.glob("django-*/django"), root.glob("psutil-*/")
    python = [
        file
        for file in sorted(django.rglob("*.py"))
        if not {"locale", "migrations"} & set(file.parts)
    ]
    random.Random(3).shuffle(python)
    script = [file for file in sorted(django.rglob("*.js")) if "vendor" not in file.parts]
    files = [*python[:80], *script, *sorted(psutil.rglob("*.[ch]"))]
    return [
        file.read_text(encoding="utf-8", errors="replace")
        for file in files
        if file.stat().st_size > 1500
    ]


def tables(root: Path) -> list[str]:
    vega = sorted(root.glob("vega*/vega_datasets/_data/*.csv"))
    statsmodels = sorted(root.glob("wheel/statsmodels/**/datasets/**/*.csv"))
    return [file.read_text(encoding="utf-8", errors="replace") for file in [*vega, *statsmodels]]


def dialogue(root: Path) -> Iterator[str]:
    """Yield conversations, twelve per document, each once."""
    seen: set[str] = set()
    for file in sorted(root.glob("chatterbot*/chatterbot_corpus/data/english/*.yml")):
        every = yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]
        new = {str(talk): talk for talk in every if str(talk) not in seen}
        seen.update(new)
        for group in zip_longest(*[iter(new.values())] * 12):
            talks = ["\n".join(map(said, enumerate(talk))) for talk in group if talk]
            yield "\n\n".join(talks)


def said(turn: tuple[int, object]) -> str:
    number, text = turn
    return f"{'AB'[number % 2]}: {text}"


def german_and_french(root: Path) -> Iterator[str]:
    doc = root / "deb/usr/share/doc/debian/FAQ"
    for language in ("de", "fr"):
        reference = (root / "deb/usr/share/debian-reference").glob(f"*.{language}.html")
        for file in [*sorted((doc / language).glob("*.html")), *sorted(reference)]:
            text = file.read_text(encoding="utf-8", errors="replace")
            text = re.sub(r"<(head|script|style).*?</\1>", "", text, flags=re.S)
            text = html.unescape(re.sub(r"<[^>]+>", "", text))
            yield re.sub(r"\n\s*\n+", "\n\n", text)[300:]  # behind what leads to other pages


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("packages", type=Path, metavar="FOLDER")
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    root, out = unpack(options.packages), options.out
    pages = articles(root)
    kinds = {
        "encyclopaedia": halves(map(plain, pages[0::2]), 9000),
        "markup": halves((page[page.index("<text") :][200:] for page in pages[1::2]), 9000),
        "documentation": halves(documentation(root), 9000),
        "code": halves(code(root), 9000),
        "tables": halves(tables(root), 9000),
        "dialogue": halves(dialogue(root), 9000),
        "german-french": halves(german_and_french(root), 12_000),
    }
    out.mkdir(parents=True, exist_ok=True)
    for kind, texts in kinds.items():
        for half, text in texts:
            (out / f"{kind}.{half}.txt").write_text(text, encoding="utf-8")
            print(f"{kind}.{half}.txt: {len(text):,} characters")


if __name__ == "__main__":
    main()
