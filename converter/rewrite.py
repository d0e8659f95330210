"""Writes converted files, and turns them back: streaming, atomic, and proved by reading back."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .content import Advance, Content, copy_data, read_content, same_data
from .errors import FormatError, PlanError, WriteError
from .format import PREFIX, PopMeta, encode_keys, pop_meta
from .output import check_output, replacing
from .plan import Plan
from .shape import source_shape
from .source import Source, read_source

Progress = Callable[[int, int], object]
# As long as a real one, so that the header keeps its size.
_UNKNOWN_SHA256 = "0" * 64


def _nothing(done_bytes: int, total_bytes: int) -> None:
    return


@dataclass(frozen=True)
class Sizes:
    """What a conversion reads and what it writes."""

    source_bytes: int
    output_bytes: int


def measure(plan: Plan, src: Path) -> Sizes:
    """The sizes of a conversion, without doing it. Raises as `convert` does for a bad source."""
    source = _unconverted(src)
    content = read_content(source, without=PREFIX)
    meta = plan.meta(source.name, _UNKNOWN_SHA256, _tool())
    return Sizes(source.size_bytes, content.with_keys(encode_keys(meta)).size_bytes)


def convert(
    plan: Plan,
    src: Path,
    dst: Path,
    *,
    progress: Progress = _nothing,
    force: bool = False,
) -> PopMeta:
    """Write `src`, one file or the first of several parts, to `dst` with the keys of `plan`.

    Then read both again and compare every byte. `progress` gets the bytes done and those in total,
    of both passes. Raises FormatError, PlanError,
    OutputExistsError, WriteError; an earlier `dst` stays then, and nothing new is left.
    """
    source = _unconverted(src)
    if source_shape(source) != plan.shape:
        raise PlanError(f"the plan was made for another model than {src}")
    original = read_content(source, without=PREFIX)
    draft = original.with_keys(encode_keys(plan.meta(source.name, _UNKNOWN_SHA256, _tool())))
    check_output(dst, _paths(source), draft.size_bytes, force=force)
    meter = _Meter(progress, 2 * original.data_bytes)
    with replacing(dst, force=force) as file:
        file.write(draft.header)
        sha256 = copy_data(original, original.header, file.write, meter.add)
        meta = plan.meta(source.name, sha256, _tool())
        file.seek(0)
        file.write(original.with_keys(encode_keys(meta)).header)
        file.flush()
        if not _verify(Path(file.name), original, meta, meter.add):
            raise WriteError(
                f"what was written to {dst} is not what was read", "check the disk, then try again"
            )
    return meta


def strip(src: Path, dst: Path, *, progress: Progress = _nothing, force: bool = False) -> PopMeta:
    """Write to `dst` the file that `src` was converted from, byte for byte (parts as one file).

    The bytes written must hash to `pop.source.sha256`. Raises FormatError, OutputExistsError,
    WriteError; an earlier `dst` stays then, and nothing new is left.
    """
    source = read_source(src)
    meta = pop_meta(source.first)
    if meta is None:
        raise FormatError(f"{src} has no POP keys: there is nothing to strip")
    original = read_content(source, without=PREFIX)
    check_output(dst, _paths(source), original.size_bytes, force=force)
    meter = _Meter(progress, original.data_bytes)
    with replacing(dst, force=force) as file:
        file.write(original.header)
        sha256 = copy_data(original, original.header, file.write, meter.add)
        if sha256 != meta.source_sha256:
            raise FormatError(
                f"{src} was changed after its conversion: the original cannot be restored from it",
                "take the original file, or download it again",
            )
    return meta


def _verify(written: Path, original: Content, meta: PopMeta, advance: Advance) -> bool:
    """Whether what lies on disk is the original, byte for byte, and the keys of `meta`."""
    source = read_source(written)
    content = read_content(source, without=PREFIX)
    return (
        pop_meta(source.first) == meta
        and content.header == original.header
        and same_data(original, written, source.first.data_start, advance)
    )


def _unconverted(src: Path) -> Source:
    source = read_source(src)
    if pop_meta(source.first) is not None:
        raise FormatError(
            f"{src} is converted already", "get the original back first: pop-local strip"
        )
    return source


def _paths(source: Source) -> tuple[Path, ...]:
    return tuple(part.path for part in source.parts)


def _tool() -> str:
    try:
        return f"pop-local {version('pop-local')}"
    except PackageNotFoundError:
        return "pop-local"


class _Meter:
    """Adds up the bytes done."""

    def __init__(self, progress: Progress, total_bytes: int) -> None:
        self._progress = progress
        self._total_bytes = total_bytes
        self._done_bytes = 0

    def add(self, n_bytes: int) -> None:
        self._done_bytes += n_bytes
        self._progress(self._done_bytes, self._total_bytes)
