"""Writes converted files, and turns them back: streaming, atomic, and proved by reading back."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import BinaryIO

from pop_converter import __version__
from pop_converter.architecture.shape import source_shape
from pop_converter.architecture.work import wide_weights
from pop_converter.base.errors import FormatError, PlanError, WriteError
from pop_converter.base.output_file import check_output, replacing
from pop_converter.base.progress import Progress, Ran, counting
from pop_converter.fit.least_squares import KvType
from pop_converter.gguf.content import (
    Content,
    NewTensor,
    copy_data,
    read_content,
    same_data,
    with_tensors,
    without_last,
)
from pop_converter.gguf.header import BLOCK_SIZES, TensorInfo
from pop_converter.gguf.source import Source, read_source
from pop_converter.popfile.format import (
    PREFIX,
    Calibration,
    Measured,
    PopMeta,
    encode_keys,
    pop_meta,
)
from pop_converter.popfile.pruning_plan import Plan
from pop_converter.projection import TENSOR_MARK, Projection

# As long as a real one, so that the header keeps its size.
UNKNOWN_SHA256 = "0" * 64


@dataclass(frozen=True)
class Fitted:
    """Fitted projections as they go into the file, with what they were fitted on.

    `image_rows`: rows of pictures, besides the tokens of the calibration. `projection`: which
    kind of fit (pop_converter.popfile.format).
    """

    calibration: Calibration
    tensors: tuple[NewTensor, ...]
    image_rows: int = 0
    projection: Projection = Projection.FITTED


# Called with the written file before it takes its place; raising keeps it from doing so.
Examine = Callable[[Path], Measured]


@dataclass(frozen=True)
class FileSizes:
    """The bytes that a conversion reads and writes."""

    source_bytes: int
    output_bytes: int


def measure(plan: Plan, src: Path, kv_type: KvType = KvType.Q8_0) -> FileSizes:
    """Return the sizes of a conversion without doing it (padding and measured quality aside).

    Raises FormatError as `convert` does for a bad source.
    """
    source = unconverted(src)
    content = read_content(source, without=PREFIX)
    if plan.projection != Projection.OWN:
        with_tensors(content, ())
    written = content.with_keys(encode_keys(draft_meta(plan, source))).size_bytes
    return FileSizes(source.size_bytes, written + stored_bytes(plan, kv_type))


def stored_bytes(plan: Plan, kind: KvType) -> int:
    """Return the bytes that a plan's fitted weights and biases take in a file, 0 for none."""
    if plan.projection == Projection.OWN:
        return 0
    n_rows = sum(map(plan.shape.n_kv, plan.fitted_layers))
    n_wide = wide_weights(plan.shape, plan.boundary, plan.projection)
    n_elements, n_bytes = BLOCK_SIZES[kind.ggml]
    return (n_rows * plan.shape.n_embd + n_wide) // n_elements * n_bytes + 4 * n_rows


def stored_type(tensors: Iterable[TensorInfo]) -> KvType | None:
    """Return the type of a file's fitted weights; None when it has none, or of another type."""
    kinds = {
        tensor.type
        for tensor in tensors
        if TENSOR_MARK in tensor.name and tensor.name.endswith(".weight")
    }
    return next((kind for kind in KvType if {kind.ggml} == kinds), None)


def check_target(src: Path, dst: Path, sizes: FileSizes, *, force: bool) -> None:
    """Refuse an output beforehand, as `convert` would.

    Raises FormatError, OutputExistsError, WriteError.
    """
    check_output(dst, unconverted(src).paths, sizes.output_bytes, force=force)


def convert(
    plan: Plan,
    src: Path,
    dst: Path,
    *,
    fitted: Fitted | None = None,
    examine: Examine | None = None,
    progress: Progress = lambda done, total: None,
    force: bool = False,
) -> PopMeta:
    """Write `src`, one file or the first of several parts, to `dst` with the keys of `plan`.

    Both are then read again, and every byte is compared. `progress` gets the bytes done and those
    in total, of both passes. `fitted` belongs to a plan with fitted projections; `examine` measures
    the written file. Returns the keys as written. Raises FormatError, PlanError, OutputExistsError,
    WriteError, and what `examine` raises; an earlier `dst` stays then, and nothing new is left.
    """
    source = planned_source(plan, src, fitted)
    content = read_content(source, without=PREFIX)
    meta = draft_meta(
        plan, source, fitted, examine, source_bytes=content.size_bytes if fitted else 0
    )
    whole = with_tensors(content, fitted.tensors) if fitted else content
    draft = whole.with_keys(encode_keys(meta))
    check_output(dst, source.paths, draft.size_bytes, force=force)
    ran = counting(2 * content.data_bytes, progress)
    with replacing(dst, force=force) as file:
        file.write(draft.header)
        sha256 = copy_data(content, content.header, file.write, ran)
        meta = finish(file, whole, replace(meta, source_sha256=sha256), examine, encode_keys)
        if not _verify(Path(file.name), content, whole, meta, ran):
            raise WriteError(
                f"what was written to {dst} is not what was read", "check the disk, then try again"
            )
    return meta


def finish(
    file: BinaryIO,
    whole: Content,
    meta: PopMeta,
    examine: Examine | None,
    encode: Callable[[PopMeta], tuple[bytes, ...]],
) -> PopMeta:
    """Write what is added after the data, measure the file, and write its header anew with that."""
    file.writelines(whole.added)
    file.flush()
    if examine:
        meta = replace(meta, measured=examine(Path(file.name)))
    file.seek(0)
    file.write(whole.with_keys(encode(meta)).header)
    file.flush()
    return meta


def strip(
    src: Path, dst: Path, *, progress: Progress = lambda done, total: None, force: bool = False
) -> PopMeta:
    """Write to `dst` the file that `src` was converted from, byte for byte (parts as one file).

    The bytes written must hash to `pop.source.sha256`. Returns the keys of `src`. Raises
    FormatError, OutputExistsError, WriteError; an earlier `dst` stays then, and nothing new is
    left.
    """
    source = read_source(src)
    meta = pop_meta(source.first)
    if meta is None:
        raise FormatError(f"{src} is not a converted file: there is nothing to strip")
    restored = original(source, meta)
    check_output(dst, source.paths, restored.size_bytes, force=force)
    ran = counting(restored.data_bytes, progress)
    with replacing(dst, force=force) as file:
        file.write(restored.header)
        sha256 = copy_data(restored, restored.header, file.write, ran)
        if sha256 != meta.source_sha256:
            raise FormatError(
                f"{src} was changed after its conversion: the original cannot be restored from it",
                "take the original file, or download it again",
            )
    return meta


def original(source: Source, meta: PopMeta) -> Content:
    """Return the content that a converted file was made from. Raises FormatError."""
    content = read_content(source, without=PREFIX)
    added = [tensor for tensor in source.tensors if TENSOR_MARK in tensor.name]
    return without_last(content, added, meta.source_bytes) if added else content


def _verify(written: Path, content: Content, whole: Content, meta: PopMeta, advance: Ran) -> bool:
    """Tell whether the original, byte for byte, the added tensors, and `meta` are on disk."""
    source = read_source(written)
    return (
        pop_meta(source.first) == meta
        and original(source, meta).header == content.header
        and same_data(whole, written, source.first.data_start, advance)
    )


def planned_source(plan: Plan, src: Path, fitted: Fitted | None) -> Source:
    """Read the source that `plan` and `fitted` were made for. Raises FormatError, PlanError."""
    source = unconverted(src)
    if source_shape(source) != plan.shape:
        raise PlanError(f"the plan was made for another model than {src}")
    if (plan.projection != Projection.OWN) != (fitted is not None):
        raise PlanError("the plan is for fitted projections, and there are none (or the reverse)")
    return source


def draft_meta(
    plan: Plan,
    source: Source,
    fitted: Fitted | None = None,
    examine: Examine | None = None,
    *,
    source_bytes: int = 0,
) -> PopMeta:
    """Return the keys before the source is hashed and the output measured, and just as long."""
    return replace(
        plan.meta,
        projection=fitted.projection if fitted else plan.projection,
        source_name=source.name,
        source_sha256=UNKNOWN_SHA256,
        tool=tool_name(),
        source_bytes=source_bytes,
        image_rows=fitted.image_rows if fitted else 0,
        calibration=fitted.calibration if fitted else None,
        measured=Measured() if examine else None,
    )


def unconverted(src: Path) -> Source:
    """Read a source that is to be converted. Raises FormatError when it is already."""
    source = read_source(src)
    if pop_meta(source.first) is not None:
        raise FormatError(
            f"{src} is converted already",
            "get the original back first: strip",
            cause="converted-already",
        )
    return source


def tool_name() -> str:
    """Return the value of `pop.tool`: the installed package's name and version."""
    try:
        return f"pop-local {version('pop-local')}"
    except PackageNotFoundError:
        return f"pop-converter {__version__}"
