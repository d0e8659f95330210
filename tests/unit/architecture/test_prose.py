"""Check the language of docstrings, comments, messages and documents (CONTRIBUTING.md).

    python tests/unit/architecture/test_prose.py pop_local/server README.md

prints the findings in those files and folders (default: the repository).
"""

import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from support.paths import ROOT
from support.prose import Sentence, sentences_of

PROSE_FOLDERS = ("pop_local", "converter", "patches", "tests", "docs")
PROSE_SUFFIXES = {".py", ".md", ".cpp", ".h", ".patch"}
# Built and vendored files, and data that models read.
EXCLUDED = ("patches/llama-cpp-python/build", "pop_local/data")
# Models read the string literals of these files, so new words would need new measurements.
MODEL_TEXTS = {
    ROOT / "pop_local/engine/tools/text_form.py",
    ROOT / "pop_local/texts/carrier_layouts.py",
}
MEAN_WORDS = 20

# A docstring starts with an imperative or a noun phrase.
DOCSTRING_STARTS = re.compile(
    r"(What|Whose|Of|That|Those|Whether|How|Who|Whoever|Nobody|One(?! \w+ of)|Where|As)\b"
)
# Sentences with these starts lack a subject, or have a clause instead of one.
SENTENCE_STARTS = re.compile(
    r"(What|Whose|Of(?! course\b)|Those|Whether|Who|Whoever|Nobody|So many|As many|As asked)\b"
)
# Patterns and their replacements. All are nearly always wrong; readers judge the rest.
BANNED = {
    r"whoever|nobody|somebody|anybody|who else": "name the actor",
    r"so many|as many( as|(?=[.,;:)]|$))|that many|for so long": "N, up to N",
    r"as asked( for)?|asks? for (it|them)|(is|are|was|were) asked for": "requested",
    r"as (it is|they are|it was|they were)(?=[.,;:)]|$)": "unchanged",
    r"(where|as|than|that|what|so far as) there (is|are|was|were)": "exists, is in, contains",
    r"where (none|nothing|one) (is|are)|if there is none": "if no ... exists",
    r"li(es|e) (in|at|on|behind|before|beside|between|above|below|here|there)": "is in",
    r"stands? (in|at|before|behind|beside|between|there|here|above|below)": "is in, comes first",
    r"begins|go(es)? on(?! (sale|to))|going on|gone on with|went on|for ever": "starts, continues",
    r"(?<!there )(is|are|was|were) no (?!longer\b|more\b|less\b|\w+er\b)\w+": "is not a ...",
    r"made of|comes? of|came of": "built from, computed from",
    r"(is|are|was|were|be|being|been) told|tells? (the|a) \w+ (that|what|how|whether)": "notify",
    r"says|hears?|heard|heeds?|heeded": "report, check, return",
    r"by (itself|themselves)|of (its|their|his|one's|your) own|one's own": "automatically, its",
    r"beside": "next to",
    r"behind (it|them|that|this|those|each|every|all|(a|the) prompt|a pruned|a full|the token)": (
        "after, following"
    ),
    r"in the place of|in (its|their) place": "instead of",
    r"what (is|was|has been|are|were|had been) ((not|never|already|then|still) )?"
    r"(\w+ed|read|kept|made|sent|shown|written|left|done|drawn|held|said|told|known|given|run"
    r"|built|found|lost|put|cut|meant|taken|seen|heard)": "name it: the prompt, the cached rows",
    r"to be had|to be seen": "available, visible",
    r"of today|by now|meanwhile|in the meanwhile": "current, already, in the meantime",
    r"at the same time as": "during, while",
    r"in the midst of|anew": "during, again",
    r"hangs? up|hung up": "disconnect",
    r"(?<!room )doors?": "API",
    r"the house": "the architecture",
    r"but for|all else": "except, the other ones",
    r"(model|file|template|kernel|code|fit|layer|library|backend)s? (wants?|knows?|asks?|tells?)": (
        "objects do not act like people: needs, has, reads, returns"
    ),
    r"gives? way|puts? (aside|off)|further on|and the like|come what may": "use a plain verb",
    r"where (it|they) (is|are|has|have) (none|some|one)": "if ... exists",
    r"facts? found": "look-ups answered",
    r"at (most|least)\b[^.;:]*\bat (most|least)": "up to, maximum, minimum",
}
_BANNED = re.compile(
    "|".join(rf"(?P<b{n}>\b(?:{pattern})(?!\w))" for n, pattern in enumerate(BANNED)), re.I
)


@dataclass(frozen=True)
class Finding:
    sentence: Sentence
    found: str
    advice: str

    def __str__(self) -> str:
        where = (
            self.sentence.path.relative_to(ROOT)
            if self.sentence.path.is_relative_to(ROOT)
            else self.sentence.path
        )
        return f"{where}:{self.sentence.line}: {self.found!r} ({self.advice}): {self.sentence.text}"


def findings_in(sentence: Sentence) -> Iterator[Finding]:
    """Yield a sentence's banned starts and words."""
    text = sentence.prose.lstrip("*_(\"'")
    if sentence.kind != "message" and not text.endswith("?"):
        starts = SENTENCE_STARTS
        if sentence.kind == "docstring" and sentence.is_first:
            starts = DOCSTRING_STARTS
        if match := starts.match(text):
            yield Finding(sentence, match[0], "start with a verb or a noun")
    for match in _BANNED.finditer(text):
        number = int((match.lastgroup or "b0").removeprefix("b"))
        yield Finding(sentence, match[0], list(BANNED.values())[number])


def files_under(path: Path) -> Iterator[Path]:
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        name = file.relative_to(ROOT).as_posix() if file.is_relative_to(ROOT) else file.name
        if file.is_file() and file.suffix in PROSE_SUFFIXES and not name.startswith(EXCLUDED):
            yield file


def findings_under(paths: Iterable[Path]) -> list[Finding]:
    return [
        finding
        for path in paths
        for file in files_under(path)
        if file != Path(__file__).resolve()
        for sentence in sentences_of(file)
        if sentence.kind != "message" or not ("tests" in file.parts or file in MODEL_TEXTS)
        for finding in findings_in(sentence)
    ]


def everything() -> list[Path]:
    return [*sorted(ROOT.glob("*.md")), *(ROOT / name for name in PROSE_FOLDERS)]


def documents() -> list[Path]:
    return [path for root in everything() for path in files_under(root) if path.suffix == ".md"]


def test_prose_has_no_banned_words() -> None:
    findings = findings_under(everything())
    assert not findings, "\n" + "\n".join(map(str, findings))


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_have_short_sentences(path: Path) -> None:
    lengths = {s.text: s.n_words for s in sentences_of(path) if s.n_words > 2}
    longest = sorted(lengths, key=lengths.__getitem__, reverse=True)[:5]
    assert mean(lengths.values()) <= MEAN_WORDS, "\n".join(longest)


if __name__ == "__main__":
    roots = [Path(name).resolve() for name in sys.argv[1:]] or everything()
    total = findings_under(roots)
    print(*total, sep="\n")
    sys.exit(f"{len(total)} findings" if total else 0)
