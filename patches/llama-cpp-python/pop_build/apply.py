"""Apply patches with patch-ng, which runs on machines without Git or `patch`."""

from pathlib import Path
from typing import TYPE_CHECKING

from .errors import BuildError

if TYPE_CHECKING:
    from patch_ng import Patch, PatchSet

_HINT = (
    "Use an unpatched source tree of the pinned version. To port the patch to another version, see"
    " patches/README.md."
)


def apply_patch(patch: Path, tree: Path) -> None:
    """Apply a patch. Raises BuildError, and changes no file, if a hunk does not apply."""
    patch_set = read_patch(patch)
    errors = [error for diff in patch_set.items for error in fit_hunks(diff, tree)]
    if errors or not patch_set.apply(root=tree):
        details = "".join(f"\n     {error}" for error in errors)
        raise BuildError(f"{patch.name} does not apply.{details}", _HINT)


def read_patch(patch: Path) -> "PatchSet":
    # The build key is computed before patch-ng is installed.
    import patch_ng

    patch_set = patch_ng.fromfile(patch)
    if not patch_set:
        raise BuildError(
            f"{patch.name} is not a valid patch.",
            "Recreate the patch with `git diff`, as described in patches/README.md.",
        )
    return patch_set


def fit_hunks(diff: "Patch", tree: Path) -> list[str]:
    """Move the hunks of a file's diff to the lines that they match.

    patch-ng requires exact line numbers. Hunks that do not match are removed from the diff, and
    an error is returned for each of them.
    """
    path = diff.source.decode().removeprefix("a/")
    if not (tree / path).is_file():
        diff.hunks = []
        return [f"{path} does not exist."]
    with (tree / path).open("rb") as file:
        lines = [line.rstrip(b"\r\n") for line in file]
    errors = []
    fitting = []
    start = 0
    for number, hunk in enumerate(diff.hunks, 1):
        before, after = _side(hunk.text, b" -"), _side(hunk.text, b" +")
        matches = _find(before, lines, start)
        if hunk.startsrc - 1 in matches:
            matches = [hunk.startsrc - 1]
        # The old lines of an applied hunk without trailing context still match.
        matches = [at for at in matches if at not in _find(after, lines, start)]
        if len(matches) == 1:
            hunk.startsrc = matches[0] + 1
            start = matches[0] + len(before)
            fitting.append(hunk)
        else:
            places = ", ".join(str(match + 1) for match in matches) or "none"
            errors.append(f"{path}, hunk {number} of {len(diff.hunks)}: matching lines: {places}")
    diff.hunks = fitting
    return errors


def _side(text: list[bytes], signs: bytes) -> list[bytes]:
    return [line[1:].rstrip(b"\r\n") for line in text if line[0] in signs]


def _find(part: list[bytes], lines: list[bytes], start: int) -> list[int]:
    last = len(lines) - len(part)
    return [at for at in range(start, last + 1) if lines[at : at + len(part)] == part]
