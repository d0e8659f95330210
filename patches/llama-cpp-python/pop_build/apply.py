"""Apply unified diffs to files with LF or CRLF line endings.

Context lines must match exactly, but their line numbers may differ from those in the patch.
Windows has no `patch` command, and `git apply` silently does nothing inside another repository.
"""

from dataclasses import dataclass
from pathlib import Path

from .diff import FileDiff, Hunk, parse
from .errors import BuildError

_HINT = "patches/README.md explains how to port a hook to another version of llama.cpp."


@dataclass(frozen=True)
class _Text:
    """A file's lines. `ends` holds each line's terminator, and the last one may be empty."""

    lines: tuple[str, ...]
    ends: tuple[str, ...]

    @property
    def end(self) -> str:
        """The file's most common line terminator."""
        return "\r\n" if self.ends.count("\r\n") > len(self.ends) / 2 else "\n"


def apply_patch(patch: Path, tree: Path) -> tuple[str, ...]:
    """Apply the whole patch or none of it, and return the paths of the changed files.

    Raises BuildError if the patch does not apply or has already been applied. The error names the
    file and the hunk.
    """
    diffs = parse(_read(patch), patch.name)
    texts = {diff.path: _patched(diff, tree, patch.name) for diff in diffs}
    for path, text in texts.items():
        target = tree / path
        target.parent.mkdir(parents=True, exist_ok=True)
        _write(target, text)
    for diff in diffs:
        if not _is_applied(diff, tree):
            raise BuildError(f"{diff.path} lacks some of the changes in {patch.name}.", _HINT)
    return tuple(texts)


def _patched(diff: FileDiff, tree: Path, name: str) -> _Text:
    target = tree / diff.path
    if _is_applied(diff, tree):
        raise BuildError(
            f"{name} has already been applied to {diff.path}.",
            "Extract the source distribution again and patch the new tree.",
        )
    if diff.creates:
        if target.exists():
            raise BuildError(f"{name} creates {diff.path}, but {diff.path} already exists.", _HINT)
        text = _Text((), ())
    elif not target.is_file():
        raise BuildError(f"{name} changes {diff.path}, but {diff.path} does not exist.", _HINT)
    else:
        text = _split(_read(target))
    floor = shift = 0
    for number, hunk in enumerate(diff.hunks, 1):
        expected = max(hunk.old_start - 1, 0) + shift
        at = _locate(text, hunk.before, expected, floor)
        if at is None:
            where = f"hunk {number} of {len(diff.hunks)} ({hunk.header})"
            raise BuildError(_misfit(name, diff, where, text, hunk, expected, floor), _HINT)
        text = _replace(text, hunk, at)
        floor = at + len(hunk.after)
        shift += at - expected + len(hunk.after) - len(hunk.before)
    return text


def _is_applied(diff: FileDiff, tree: Path) -> bool:
    """Return True if the file contains the new lines of all hunks in order."""
    target = tree / diff.path
    if not target.is_file():
        return False
    text = _split(_read(target))
    if diff.creates:
        return text.lines == diff.hunks[0].after
    floor = 0
    for hunk in diff.hunks:
        found = _matches(text, hunk.after, floor)
        if not found:
            return False
        floor = found[0] + len(hunk.after)
    return True


def _matches(text: _Text, lines: tuple[str, ...], floor: int) -> list[int]:
    last = len(text.lines) - len(lines)
    return [at for at in range(floor, last + 1) if text.lines[at : at + len(lines)] == lines]


def _locate(text: _Text, lines: tuple[str, ...], expected: int, floor: int) -> int | None:
    """Return the index at which `lines` match, searching from `floor` onward.

    If the lines match at `expected`, returns `expected`. Otherwise, returns the only match, or None
    if no match or several matches exist. If `lines` is empty, returns 0 for an empty file and None
    for any other file.
    """
    if not lines:
        return 0 if not text.lines else None
    places = _matches(text, lines, floor)
    if expected in places:
        return expected
    return places[0] if len(places) == 1 else None


def _replace(text: _Text, hunk: Hunk, at: int) -> _Text:
    stop = at + len(hunk.before)
    ends = [text.end] * len(hunk.after)
    # Unchanged lines keep their terminator, even in a file that mixes LF and CRLF.
    old = list(zip(hunk.before, text.ends[at:stop], strict=True))
    for i, line in enumerate(hunk.after):
        for j, (kept, end) in enumerate(old):
            if kept == line:
                ends[i] = end or text.end
                del old[: j + 1]
                break
    lines = text.lines[:at] + hunk.after + text.lines[stop:]
    all_ends = text.ends[:at] + tuple(ends) + text.ends[stop:]
    if stop == len(text.lines) and hunk.after_open:
        all_ends = (*all_ends[:-1], "")
    return _Text(lines, all_ends)


def _misfit(
    name: str, diff: FileDiff, where: str, text: _Text, hunk: Hunk, expected: int, floor: int
) -> str:
    head = f"{name} does not apply to {diff.path}: {where}"
    if not hunk.before:
        return f"{head} has no context lines, so its position is unknown."
    places = _matches(text, hunk.before, floor)
    if len(places) > 1:
        lines = ", ".join(str(at + 1) for at in places)
        return f"{head} matches at lines {lines}, but not at the expected line {expected + 1}."
    at = max(
        range(max(len(text.lines), 1)),
        key=lambda at: (_agreement(text, hunk, at), -abs(at - expected)),
    )
    for i, expected_line in enumerate(hunk.before):
        found = text.lines[at + i] if at + i < len(text.lines) else None
        if found != expected_line:
            seen = "the file ends" if found is None else f"found    {found!r}"
            return f"{head}, line {at + i + 1}:\n     expected {expected_line!r}\n     {seen}"
    return f"{head} matches only at line {at + 1}, which is before the preceding hunk."


def _agreement(text: _Text, hunk: Hunk, at: int) -> int:
    window = text.lines[at : at + len(hunk.before)]
    return sum(a == b for a, b in zip(window, hunk.before, strict=False))


def _read(path: Path) -> str:
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        return file.read()


def _write(path: Path, text: _Text) -> None:
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        file.write("".join(a + b for a, b in zip(text.lines, text.ends, strict=True)))


def _split(text: str) -> _Text:
    # splitlines() would also split at form feeds, which C++ lines may contain.
    lines = text.split("\n")
    ends = ["\n"] * (len(lines) - 1) + [""]
    if lines[-1] == "":
        del lines[-1], ends[-1]
    for i, line in enumerate(lines):
        if line.endswith("\r") and ends[i]:
            lines[i], ends[i] = line[:-1], "\r\n"
    return _Text(tuple(lines), tuple(ends))
