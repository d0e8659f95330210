"""Applies unified diffs to a tree of files: exact context, any offset, either line end.

Pure Python, since Windows has no `patch`, and `git apply` inside another repository does nothing
and says nothing.
"""

from dataclasses import dataclass
from pathlib import Path

from .diff import FileDiff, Hunk, parse
from .errors import BuildError

_HINT = "patches/README.md tells how to carry a hook over to another version of llama.cpp."


@dataclass(frozen=True)
class _Text:
    """A file as lines; `ends` holds each line's own line end ("" at an open last line)."""

    lines: tuple[str, ...]
    ends: tuple[str, ...]

    @property
    def end(self) -> str:
        """The line end that most lines have."""
        return "\r\n" if self.ends.count("\r\n") > len(self.ends) / 2 else "\n"


def apply_patch(patch: Path, tree: Path) -> tuple[str, ...]:
    """Applies the patch to the tree, all of it or nothing; returns the paths it changed.

    Raises BuildError naming file and hunk when it does not fit or is in the tree already.
    """
    diffs = parse(_read(patch), patch.name)
    texts = {diff.path: _patched(diff, tree, patch.name) for diff in diffs}
    for path, text in texts.items():
        target = tree / path
        target.parent.mkdir(parents=True, exist_ok=True)
        _write(target, text)
    for diff in diffs:
        if not _is_applied(diff, tree):
            raise BuildError(f"{patch.name} did not arrive in {diff.path}.", _HINT)
    return tuple(texts)


def _patched(diff: FileDiff, tree: Path, name: str) -> _Text:
    target = tree / diff.path
    if _is_applied(diff, tree):
        raise BuildError(
            f"{name} is in {diff.path} already.",
            "Start from an unpatched tree: hooks are applied once, to a fresh extraction.",
        )
    if diff.creates:
        if target.exists():
            raise BuildError(f"{name} would create {diff.path}, which exists.", _HINT)
        text = _Text((), ())
    elif not target.is_file():
        raise BuildError(f"{name} changes {diff.path}, which this tree does not have.", _HINT)
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
    """Whether the new side of every hunk is in the file, in order."""
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


def _matches(text: _Text, wanted: tuple[str, ...], floor: int) -> list[int]:
    last = len(text.lines) - len(wanted)
    return [at for at in range(floor, last + 1) if text.lines[at : at + len(wanted)] == wanted]


def _locate(text: _Text, wanted: tuple[str, ...], expected: int, floor: int) -> int | None:
    """Where the lines stand: at the expected place, or at the only other one; None otherwise."""
    if not wanted:
        return 0 if not text.lines else None
    places = _matches(text, wanted, floor)
    if expected in places:
        return expected
    return places[0] if len(places) == 1 else None


def _replace(text: _Text, hunk: Hunk, at: int) -> _Text:
    stop = at + len(hunk.before)
    ends = [text.end] * len(hunk.after)
    # Lines that stay keep their own line end, also in a file that mixes them.
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
    head = f"{name} does not fit {diff.path}: {where}"
    if not hunk.before:
        return f"{head} has no context lines to find its place by."
    places = _matches(text, hunk.before, floor)
    if len(places) > 1:
        lines = ", ".join(str(at + 1) for at in places)
        return f"{head} fits at several places (lines {lines}), none of them line {expected + 1}."
    at = max(
        range(max(len(text.lines), 1)),
        key=lambda at: (_agreement(text, hunk, at), -abs(at - expected)),
    )
    for i, wanted in enumerate(hunk.before):
        found = text.lines[at + i] if at + i < len(text.lines) else None
        if found != wanted:
            seen = "the file ends" if found is None else f"found    {found!r}"
            return f"{head}, line {at + i + 1}:\n     expected {wanted!r}\n     {seen}"
    return f"{head} fits only before the hunk above it (line {at + 1})."


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
    # Not splitlines(): form feeds and the like are part of a line of C++.
    lines = text.split("\n")
    ends = ["\n"] * (len(lines) - 1) + [""]
    if lines[-1] == "":
        del lines[-1], ends[-1]
    for i, line in enumerate(lines):
        if line.endswith("\r") and ends[i]:
            lines[i], ends[i] = line[:-1], "\r\n"
    return _Text(tuple(lines), tuple(ends))
