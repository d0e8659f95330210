"""Parse unified diffs."""

import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from .errors import BuildError

_HUNK = re.compile(r"^@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")
_UNSUPPORTED = ("rename from ", "copy from ", "Binary files ", "GIT binary patch", "old mode ")
_NO_NEWLINE = "\\ No newline"


@dataclass(frozen=True)
class Hunk:
    """A hunk's lines before and after the change, without line terminators.

    `old_start` is a 1-based line number. `after_open` is true if the new file ends without a
    newline.
    """

    header: str
    old_start: int
    before: tuple[str, ...]
    after: tuple[str, ...]
    after_open: bool


@dataclass(frozen=True)
class FileDiff:
    """A diff's hunks for one file. `creates` is true if the old path is /dev/null."""

    path: str
    creates: bool
    hunks: tuple[Hunk, ...]


def parse(text: str, name: str) -> tuple[FileDiff, ...]:
    """Parse a diff with a/ and b/ path prefixes, and ignore any text outside the hunks."""
    return _Reader(text.replace("\r\n", "\n").split("\n"), name).files()


class _Reader:
    def __init__(self, lines: list[str], name: str) -> None:
        self.lines = lines
        self.name = name
        self.at = 0

    def files(self) -> tuple[FileDiff, ...]:
        found: list[FileDiff] = []
        while self.at < len(self.lines):
            if self.lines[self.at].startswith(_UNSUPPORTED):
                raise self._error(f"the patch contains an unsupported line: {self._here()!r}")
            if self._at_file():
                found.append(self._file())
            elif _HUNK.match(self._here()):
                raise self._error("a hunk has no file header")
            else:
                self.at += 1
        if not found:
            raise self._error("the patch contains no diff")
        paths = [file.path for file in found]
        if len(set(paths)) < len(paths):
            raise self._error("the patch names the same file twice")
        return tuple(found)

    def _here(self) -> str:
        return self.lines[self.at] if self.at < len(self.lines) else ""

    def _at_file(self) -> bool:
        here, following = self.lines[self.at : self.at + 1], self.lines[self.at + 1 : self.at + 2]
        return bool(following) and here[0].startswith("--- ") and following[0].startswith("+++ ")

    def _file(self) -> FileDiff:
        old, new = (line[4:].split("\t")[0].strip() for line in self.lines[self.at : self.at + 2])
        if new == "/dev/null":
            raise self._error(f"the patch deletes {old}, but deleting files is not supported")
        self.at += 2
        hunks: list[Hunk] = []
        while match := _HUNK.match(self._here()):
            hunks.append(self._hunk(match))
        if not hunks:
            raise self._error(f"the patch does not change {new}")
        if old == "/dev/null" and (len(hunks) > 1 or hunks[0].before):
            raise self._error(f"the patch creates {new}, but its hunks change existing lines")
        return FileDiff(self._path(new), old == "/dev/null", tuple(hunks))

    def _path(self, new: str) -> str:
        path = PurePosixPath(new)
        if len(path.parts) < 2 or path.parts[0] != "b" or ".." in path.parts:
            raise self._error(f"the patch names a file outside the tree: {new}")
        return str(PurePosixPath(*path.parts[1:]))

    def _hunk(self, match: re.Match[str]) -> Hunk:
        old_start, old_left, new_left = (int(match[i] or 1) for i in (1, 2, 4))
        header = match[0]
        self.at += 1
        before: list[str] = []
        after: list[str] = []
        after_open = False
        previous = ""
        while old_left > 0 or new_left > 0 or self._here().startswith(_NO_NEWLINE):
            # Some editors remove the space of an empty context line.
            sign, line = (self._here() or " ")[0], self._here()[1:]
            if self.at >= len(self.lines) or sign not in " +-\\":
                raise self._error(f"the patch ends in the middle of hunk {header}")
            if sign == "\\":
                after_open |= previous in " +"
            if sign in " -":
                before.append(line)
                old_left -= 1
            if sign in " +":
                after.append(line)
                new_left -= 1
            previous = sign
            self.at += 1
        if old_left or new_left:
            raise self._error(f"the hunk does not match the line counts in its header ({header})")
        return Hunk(header, old_start, tuple(before), tuple(after), after_open)

    def _error(self, problem: str) -> BuildError:
        return BuildError(
            f"{self.name}, line {self.at + 1}: {problem}.",
            "Recreate the patch with `diff -u` or `git diff`, as described in patches/README.md.",
        )
