"""Write and verify converted files and sidecars."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pop_base.errors import FormatError, PlanError, WriteError
from pop_base.output_file import check_output, replacing
from pop_base.progress import Progress, counting
from pop_converter import __version__
from pop_converter.architecture.shape import source_shape
from pop_converter.architecture.work import wide_weights
from pop_converter.fit.least_squares import KvType
from pop_converter.gguf.content import (
    Content,
    NewTensor,
    copy_data,
    read_content,
    same_data,
    with_tensors,
)
from pop_converter.gguf.header import BLOCK_SIZES
from pop_converter.gguf.source import Source, read_source
from pop_converter.popfile.format import (
    PREFIX,
    Binding,
    Calibration,
    Measured,
    PopMeta,
    bind,
    encode_keys,
    encode_sidecar_keys,
    pop_meta,
)
from pop_converter.popfile.pruning_plan import Plan
from pop_converter.projection import Projection

# Placeholder for a sha256 of the same length, so that the size of the header does not change.
UNKNOWN_SHA256 = "0" * 64


@dataclass(frozen=True)
class Fitted:
    """Fitted projections in their stored encoding, and the text used for the fit."""

    calibration: Calibration
    tensors: tuple[NewTensor, ...]
    projection: Projection = Projection.FITTED


# Callback that measures the written file. An exception leaves the target unchanged.
Examine = Callable[[Path], Measured]


@dataclass(frozen=True)
class FileSizes:
    """A conversion's input and output sizes in bytes."""

    source_bytes: int
    output_bytes: int


def measure(plan: Plan, src: Path, kv_type: KvType = KvType.Q8_0) -> FileSizes:
    """Return a conversion's file sizes, excluding padding and the keys that store its quality.

    Raises FormatError for an invalid source.
    """
    source = unconverted(src)
    content = read_content(source, without=PREFIX)
    if plan.projection != Projection.OWN:
        with_tensors(content, ())
    written = content.with_keys(encode_keys(draft_meta(plan, source))).size_bytes
    return FileSizes(source.size_bytes, written + stored_bytes(plan, kv_type))


def stored_bytes(plan: Plan, kind: KvType) -> int:
    """Return the size in bytes of a plan's fitted weights and biases, or 0 if nothing is fitted."""
    if plan.projection == Projection.OWN:
        return 0
    n_rows = sum(map(plan.shape.n_kv, plan.fitted_layers))
    n_wide = wide_weights(plan.shape, plan.boundary, plan.projection)
    n_elements, n_bytes = BLOCK_SIZES[kind.ggml]
    return (n_rows * plan.shape.n_embd + n_wide) // n_elements * n_bytes + 4 * n_rows


def check_target(src: Path, dst: Path, sizes: FileSizes, *, force: bool) -> None:
    """Raise FormatError, OutputExistsError, or WriteError if `convert` cannot write to `dst`."""
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
    binding: Binding | None = None,
) -> PopMeta:
    """Copy `src` (a file or a split model's first part) to `dst` and add the plan's keys.

    The new file is then compared with its source byte for byte. `progress` receives the total
    number of bytes written and compared. `fitted` is required if the plan has fitted projections.
    `examine` measures the new file. If the caller passes `binding` (the identity of `src`), `dst`
    is a sidecar with only the keys and the fitted tensors. Returns the new keys.

    Raises FormatError, PlanError, OutputExistsError, WriteError, and any error that `examine`
    raises. After an error, an existing `dst` is unchanged and no temporary file remains.
    """
    source = unconverted(src)
    if source_shape(source) != plan.shape:
        raise PlanError(f"the plan was made for a model other than {src}")
    if (plan.projection != Projection.OWN) != (fitted is not None):
        raise PlanError("pass `fitted` if and only if the plan has fitted projections")
    content, is_copy = read_content(source, without=PREFIX), binding is None
    base = content if is_copy else Content()
    whole = with_tensors(base, fitted.tensors) if fitted else base
    meta = draft_meta(plan, source, fitted, examine)

    def encode(meta: PopMeta) -> tuple[bytes, ...]:
        return encode_keys(meta) if binding is None else encode_sidecar_keys(meta, binding)

    draft = whole.with_keys(encode(meta))
    check_output(dst, source.paths, draft.size_bytes, force=force)
    ran = counting((1 + is_copy) * content.data_bytes, progress)
    with replacing(dst, force=force) as file:
        written = Path(file.name)
        file.write(draft.header)
        sha256 = copy_data(content, content.header, file.write if is_copy else _drop, ran)
        meta = replace(meta, source_sha256=sha256)
        file.writelines(whole.added)
        file.flush()
        if examine:
            meta = replace(meta, measured=examine(written))
        header = whole.with_keys(encode(meta)).header
        file.seek(0)
        file.write(header)
        file.flush()
        with written.open("rb") as output:
            is_same = output.read(len(header)) == header
        is_same = is_same and same_data(whole, written, len(header), ran if is_copy else _drop)
        if not is_same or (is_copy and pop_meta(read_source(written).first) != meta):
            problem = f"{dst} differs from its source" if is_copy else f"{dst} is damaged"
            raise WriteError(problem, "check the disk, then try again")
        if binding is not None and bind(read_source(src)) != binding:
            raise WriteError(f"{src} changed during the conversion", "try again")
    return meta


def _drop(_: object) -> None:
    """Ignore data and progress reports, which sidecars do not need."""


def draft_meta(
    plan: Plan, source: Source, fitted: Fitted | None = None, examine: Examine | None = None
) -> PopMeta:
    """Return keys with same-size placeholders for the hash and the measured quality."""
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
        tool=tool,
        calibration=fitted.calibration if fitted else None,
        measured=Measured() if examine else None,
    )


def unconverted(src: Path) -> Source:
    """Read an unconverted model. Raises FormatError if the model is already converted."""
    source = read_source(src)
    if pop_meta(source.first) is not None:
        raise FormatError(f"{src} is already converted", "use the original model")
    return source
