"""Try our hooks on another llama-cpp-python release, and list the code to read again.

python try_release.py          try the newest release in pip's package index
python try_release.py VERSION  try a release, such as 0.3.37
python try_release.py PATH     try a source archive or an extracted tree

The command changes no file of the clone. It prints each hunk that does not apply. Then it prints
the checklist items in patches/README.md whose functions or files differ from the pinned release.
The exit status is 0 if all hunks apply, 1 if some do not or the release cannot be read, and 2 for
wrong usage.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
sys.path.insert(0, str(PACKAGE))

from pop_build.apply import fit_hunks, read_patch  # noqa: E402
from pop_build.errors import BuildError  # noqa: E402
from pop_build.fetch import Pin, fetch_or_keep, read_pin  # noqa: E402
from pop_build.tree import Recipe, extract, find_hooks, hook_files  # noqa: E402

LLAMA_CPP = Path("vendor", "llama.cpp")
COMPILED = tuple(
    f"{LLAMA_CPP.as_posix()}/{folder}/"
    for folder in ("common", "ggml", "include", "src", "tools/mtmd")
)
CHECKLIST = "## The next llama.cpp"
_POINT = re.compile(r"^ +- (.+?)(?=^ +- |^\d|^#|\Z)", re.MULTILINE | re.DOTALL)
_NAME = re.compile(r"`([\w.:/*-]+)(?:\(\))?`")
_FILE = re.compile(r"^(?:---|\+\+\+) (?:old|new)/(.+?)\s*$")
_HUNK = re.compile(r"^@@ -\d+(?:,\d+)? \+(\d+)(?:,\d+)? @@ ?(.*)$")
_MAX_PLACES = 8
# Words such as `root` are too common to be found in a diff.
_SPECIFIC = re.compile(r".*(?:_\w|::).*")
_OURS = ("llama_pop", "pop_", "llama-pop")


@dataclass(frozen=True)
class Change:
    """A place where a release differs from the pinned one.

    `line` is a 1-based line number in the new file. `text` contains the enclosing function's first
    line and the changed lines.
    """

    path: str
    line: int
    text: str


@dataclass(frozen=True)
class Point:
    """A point of the checklist: its text, and the functions and files that it names."""

    text: str
    names: tuple[str, ...]


def misfits(hooks: Path, package: Path, tree: Path) -> tuple[int, list[str]]:
    """Apply the hunks that fit, and return the number of hunks and an error for each other hunk.

    Names of our own files that upstream already uses are returned as errors, too.
    """
    errors: list[str] = []
    n_hunks = 0
    llama_cpp = tree / LLAMA_CPP
    for file in hook_files(hooks):
        target = llama_cpp / file.relative_to(hooks)
        if file.parent != hooks and target.exists():
            errors.append(f"{target.relative_to(tree)} exists upstream: rename our file")
    for folder, root in ((package, tree), (hooks, llama_cpp)):
        for patch in sorted(folder.glob("*.patch")):
            patch_set = read_patch(patch)
            for diff in patch_set.items:
                n_hunks += len(diff.hunks)
                errors += [f"{patch.name}: {error}" for error in fit_hunks(diff, root)]
            patch_set.items = [diff for diff in patch_set.items if diff.hunks]
            patch_set.apply(root=root)
    return n_hunks, errors


def points(readme: str) -> list[Point]:
    """Return the points of the checklist in patches/README.md that name code."""
    section = readme.partition(f"{CHECKLIST}\n")[2]
    texts = [" ".join(text.split()) for text in _POINT.findall(section)]
    checklist = []
    for text in texts:
        names = (name for name in _NAME.findall(text) if not name.startswith(_OURS))
        checklist.append(Point(text, tuple(dict.fromkeys(names))))
    return [point for point in checklist if point.names]


def changes(old: Path, new: Path) -> list[Change]:
    """Return the differences between two source trees. Raises BuildError without Git."""
    with tempfile.TemporaryDirectory() as scratch:
        # With this attribute, Git names the enclosing function of each difference.
        attributes = Path(scratch, "attributes")
        attributes.write_text("*.c diff=cpp\n*.cpp diff=cpp\n*.h diff=cpp\n*.py diff=python\n")
        folders = {"old": old, "new": new}
        for name, folder in folders.items():
            Path(scratch, name).symlink_to(folder.resolve(), target_is_directory=True)
        command = ["git", "-c", f"core.attributesFile={attributes}", "diff", "--no-index"]
        command += ["--no-color", "--no-ext-diff", "--no-prefix", "-U0", "old/", "new/"]
        try:
            run = subprocess.run(command, cwd=scratch, capture_output=True, check=False)
        except FileNotFoundError:
            raise BuildError("Git is missing.", "Install Git to compare the releases.") from None
        if run.returncode > 1:  # 1: the releases differ
            raise BuildError(
                "Git cannot compare the releases.", run.stderr.decode(errors="replace")
            )
    differences = _changes(run.stdout.decode(errors="replace"))
    return [change for change in differences if change.path.startswith(COMPILED)]


def _changes(diff: str) -> Iterator[Change]:
    path, line, text = "", 0, ""
    for row in diff.splitlines():
        file, hunk = _FILE.match(row), _HUNK.match(row)
        if not (file or hunk or row.startswith("diff ")):
            text += f"{row[1:]}\n" if text else ""
            continue
        if text:
            yield Change(path, line, text)
        path = file[1] if file else path
        line, text = (int(hunk[1]), f"{hunk[2]}\n") if hunk else (0, "")
    if text:
        yield Change(path, line, text)


def matches(point: Point, differences: list[Change]) -> list[Change]:
    """Return the changes in the functions and files that a point names."""
    files = tuple(f"/{name}" for name in point.names if "." in name)
    names = (name for name in point.names if "." not in name and _SPECIFIC.fullmatch(name))
    words = "|".join(re.escape(name).replace(r"\*", r"\w*") for name in names)
    pattern = re.compile(rf"\b(?:{words})\b") if words else None
    return [
        change
        for change in differences
        if (files and change.path.endswith(files)) or (pattern and pattern.search(change.text))
    ]


def report(n_hunks: int, failed: list[str], point_changes: list[tuple[Point, list[Change]]]) -> str:
    """Return the text that the command prints."""
    lines = [
        f"{n_hunks - len(failed)} of {n_hunks} hunks apply.",
        *(f"\n{error}" for error in failed),
    ]
    again = [(point, differences) for point, differences in point_changes if differences]
    lines += ["", f'Read again {len(again)} of {len(point_changes)} points of "{CHECKLIST[3:]}":']
    for point, differences in again:
        places = [f"{change.path}:{change.line}" for change in differences[:_MAX_PLACES]]
        n_more = len(differences) - _MAX_PLACES
        more = f" and {n_more} more" if n_more > 0 else ""
        lines += [
            "",
            f"- {point.text}",
            f"    {len(differences)} changes: {', '.join(places)}{more}",
        ]
    return "\n".join(lines)


def newest(pin: Pin) -> str:
    """Return the version of the newest release on pip's index. Raises BuildError."""
    output = _pip("index", "versions", pin.name)
    match = re.search(r"\((\S+)\)", output)
    if match is None:
        raise BuildError(f"pip names no version of {pin.name}.", "Pass a version or a path.")
    return match[1]


def download(pin: Pin, version: str, folder: Path) -> Path:
    """Download a release's source distribution. Raises BuildError."""
    _pip(
        "download",
        "--no-deps",
        "--no-binary",
        pin.name,
        "-d",
        str(folder),
        f"{pin.name}=={version}",
    )
    return next(folder.glob("*.tar.gz"))


def _pip(*arguments: str) -> str:
    command = [sys.executable, "-m", "pip", *arguments, "--disable-pip-version-check"]
    run = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if run.returncode != 0:
        reason = run.stderr.strip().splitlines()[-1:] or ["no reason"]
        raise BuildError(
            f"pip {arguments[0]} failed: {reason[0]}", "Check the network and the version."
        )
    return run.stdout


def compare(pin: Pin, source: Path) -> bool:
    """Print how the hooks and the checklist fit a release. Return True if all hunks apply."""
    hooks = find_hooks(PACKAGE)
    with tempfile.TemporaryDirectory() as scratch:
        trees = {"old": fetch_or_keep(pin, Path(scratch, "source")), "new": source}
        for name, archive in trees.items():
            Path(scratch, name).mkdir()
            trees[name] = extract(Recipe(PACKAGE, hooks, archive, ()), Path(scratch, name))
        differences = changes(trees["old"], trees["new"])
        checklist = points((hooks.parent / "README.md").read_text(encoding="utf-8"))
        point_changes = [(point, matches(point, differences)) for point in checklist]
        n_hunks, failed = misfits(hooks, PACKAGE, trees["new"])
    print(report(n_hunks, failed, point_changes))
    return not failed


def main(arguments: list[str]) -> int:
    if len(arguments) > 1 or arguments[:1] in (["-h"], ["--help"]):
        print(__doc__, file=sys.stderr)
        return 2
    try:
        pin = read_pin(PACKAGE / "upstream.txt")
        release = arguments[0] if arguments else newest(pin)
        if release == pin.version and not arguments:
            print(f"The pinned release {pin.version} is the newest on pip's index.")
        if Path(release).exists():
            return 0 if compare(pin, Path(release).resolve()) else 1
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            is_pinned = release == pin.version
            source = fetch_or_keep(pin, folder) if is_pinned else download(pin, release, folder)
            return 0 if compare(pin, source) else 1
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
