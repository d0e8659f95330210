"""Stream a model to a converted file atomically, verify the file, and restore the original."""

from collections.abc import Callable
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
from pop_converter.gguf.header import BLOCK_SIZES
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

# Placeholder of the final length, so that the size of the header does not change.
UNKNOWN_SHA256 = "0" * 64


@dataclass(frozen=True)
class Fitted:
    """Encoded fitted projections and their calibration."""

    calibration: Calibration
    tensors: tuple[NewTensor, ...]
    projection: Projection = Projection.FITTED


# Measures the written file before it replaces the target. An exception leaves the target unchanged.
Examine = Callable[[Path], Measured]


@dataclass(frozen=True)
class FileSizes:
    """Sizes in bytes of a conversion's input and output."""

    source_bytes: int
    output_bytes: int


def measure(plan: Plan, src: Path, kv_type: KvType = KvType.Q8_0) -> FileSizes:
    """Return a conversion's sizes, excluding padding and the keys for measured quality.

    Raises FormatError for an invalid source.
    """
    source = unconverted(src)
    content = read_content(source, without=PREFIX)
    if plan.projection != Projection.OWN:
        with_tensors(content, ())
    written = content.with_keys(encode_keys(draft_meta(plan, source))).size_bytes
    return FileSizes(source.size_bytes, written + stored_bytes(plan, kv_type))


def stored_bytes(plan: Plan, kind: KvType) -> int:
    """Return the size of a plan's fitted weights and biases in bytes, or 0 if it has no fit."""
    if plan.projection == Projection.OWN:
        return 0
    n_rows = sum(map(plan.shape.n_kv, plan.fitted_layers))
    n_wide = wide_weights(plan.shape, plan.boundary, plan.projection)
    n_elements, n_bytes = BLOCK_SIZES[kind.ggml]
    return (n_rows * plan.shape.n_embd + n_wide) // n_elements * n_bytes + 4 * n_rows


def check_target(src: Path, dst: Path, sizes: FileSizes, *, force: bool) -> None:
    """Raise FormatError, OutputExistsError or WriteError if `convert` cannot write to `dst`."""
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
    """Write `src`, a file or a split model's first part, to `dst` with the keys of `plan`.

    The written file is then compared with its source byte for byte. `progress` counts the bytes
    written and compared. `fitted` is required if the plan has fitted projections. `examine`
    measures the written file. Return the written keys.

    Raises FormatError, PlanError, OutputExistsError, WriteError, and any error that `examine`
    raises. After an error, an existing `dst` is unchanged and no temporary file remains.
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
                f"the written file {dst} differs from its source", "check the disk, then try again"
            )
    return meta


def finish(
    file: BinaryIO,
    whole: Content,
    meta: PopMeta,
    examine: Examine | None,
    encode: Callable[[PopMeta], tuple[bytes, ...]],
) -> PopMeta:
    """Append the added tensors, measure the file, and write the measurement to the header."""
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
    """Write the original of the converted file `src` to `dst`, with split parts joined.

    Return the keys of `src`. Raises FormatError if the restored file's hash differs from
    `pop.source.sha256`, or OutputExistsError or WriteError if `dst` cannot be written. After an
    error, an existing `dst` is unchanged and no temporary file remains.
    """
    source = read_source(src)
    meta = pop_meta(source.first)
    if meta is None:
        raise FormatError(f"{src} is not a converted file", "pass a converted file")
    restored = original(source, meta)
    check_output(dst, source.paths, restored.size_bytes, force=force)
    ran = counting(restored.data_bytes, progress)
    with replacing(dst, force=force) as file:
        file.write(restored.header)
        sha256 = copy_data(restored, restored.header, file.write, ran)
        if sha256 != meta.source_sha256:
            raise FormatError(
                f"the original cannot be restored: {src} was changed after its conversion",
                "use the original file, or download the file again",
            )
    return meta


def original(source: Source, meta: PopMeta) -> Content:
    """Return the original content of a converted file. Raises FormatError."""
    content = read_content(source, without=PREFIX)
    added = [tensor for tensor in source.tensors if TENSOR_MARK in tensor.name]
    return without_last(content, added, meta.source_bytes) if added else content


def _verify(written: Path, content: Content, whole: Content, meta: PopMeta, advance: Ran) -> bool:
    """Return True if the file contains `meta`, the original's bytes and the added tensors."""
    source = read_source(written)
    return (
        pop_meta(source.first) == meta
        and original(source, meta).header == content.header
        and same_data(whole, written, source.first.data_start, advance)
    )


def planned_source(plan: Plan, src: Path, fitted: Fitted | None) -> Source:
    """Read the model to convert. Raises FormatError, and PlanError if the plan does not match."""
    source = unconverted(src)
    if source_shape(source) != plan.shape:
        raise PlanError(f"the plan is for a different model than {src}")
    if (plan.projection != Projection.OWN) != (fitted is not None):
        raise PlanError("pass `fitted` if and only if the plan has fitted projections")
    return source


def draft_meta(
    plan: Plan,
    source: Source,
    fitted: Fitted | None = None,
    examine: Examine | None = None,
    *,
    source_bytes: int = 0,
) -> PopMeta:
    """Return keys of the final length, with placeholders for the hash and the measurement."""
    try:
        tool = f"pop-local {version('pop-local')}"
    except PackageNotFoundError:
        tool = f"pop-converter {__version__}"
    return PopMeta(
        schedule=plan.schedule,
        projection=fitted.projection if fitted else plan.projection,
        sink_tokens=plan.sink_tokens,
        tail_tokens=plan.tail_tokens,
        min_prompt=plan.min_prompt,
        deep_rows=plan.deep_rows,
        budget=plan.budget,
        source_name=source.name,
        source_sha256=UNKNOWN_SHA256,
        source_bytes=source_bytes,
        tool=tool,
        calibration=fitted.calibration if fitted else None,
        measured=Measured() if examine else None,
    )


def unconverted(src: Path) -> Source:
    """Read an unconverted model. Raises FormatError if the model is already converted."""
    source = read_source(src)
    if pop_meta(source.first) is not None:
        raise FormatError(
            f"{src} is already converted",
            "first restore the original with strip",
            cause="converted-already",
        )
    return source
