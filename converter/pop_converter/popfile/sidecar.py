"""Read and write sidecars, which are small files that contain a model's POP keys and added tensors.

The model is neither copied nor changed. When a sidecar is opened, only the model's size and the
hash of its headers are checked. Hashing the whole model (`pop.source.sha256`) would take too long.
"""

from pathlib import Path
from typing import Any

from pop_base.errors import FormatError
from pop_base.output_file import replacing
from pop_converter.fit.least_squares import KvType
from pop_converter.gguf.content import Content, with_tensors
from pop_converter.gguf.header import Header, read_header
from pop_converter.gguf.source import Source, is_sidecar
from pop_converter.popfile.format import (
    CONVERT_AGAIN,
    Binding,
    PopMeta,
    bind,
    encode_sidecar_keys,
    pop_meta,
    read_binding,
)
from pop_converter.popfile.pruning_plan import Plan
from pop_converter.popfile.rewrite import (
    UNKNOWN_SHA256,
    FileSizes,
    Fitted,
    convert,
    draft_meta,
    stored_bytes,
    unconverted,
)
from pop_converter.projection import Projection

SUFFIX = ".pop-sidecar.gguf"
_EMPTY = Content()


def sidecar_path(base: Source) -> Path:
    """Return the default path of a model's sidecar."""
    return base.first.path.with_name(Path(base.name).stem + SUFFIX)


def existing_sidecar(base: Source) -> Path | None:
    """Return `sidecar_path(base)`, or None if the file does not exist or `base` is converted."""
    path = sidecar_path(base)
    return path if path.is_file() and pop_meta(base.first) is None else None


def read_sidecar(path: Path, base: Source) -> PopMeta:
    """Read the POP keys of the sidecar at `path`, which must belong to the model `base`.

    Raises FormatError if the sidecar does not match the model, or if `base` is a converted model.
    """
    header = read_header(path)
    meta = sidecar_meta(header)
    if pop_meta(base.first) is not None:
        raise FormatError(
            f"{base.first.path} is a converted model, which cannot have a sidecar",
            "open the converted model without a sidecar, or pass the original model",
            cause="sidecar-for-converted",
        )
    binding = read_binding(header)
    if binding != bind(base):
        raise FormatError(
            f"{path} was created for {meta.source_name} (size: {binding.base_bytes:,} bytes),"
            f" not for {base.first.path}",
            "create a sidecar for this model",
            cause="foreign-sidecar",
            model=base.first.path,
        )
    _check_tensors(header, meta)
    return meta


def sidecar_meta(header: Header) -> PopMeta:
    """Return a sidecar's POP keys without checking its model. Raises FormatError."""
    meta = pop_meta(header)
    if meta is None:
        raise FormatError(
            f"{header.path} is not a sidecar",
            "create a sidecar for the model",
            cause="not-a-sidecar",
        )
    if not is_sidecar(header):
        raise FormatError(
            f"{header.path} is a converted model, not a sidecar",
            "pass this file as the model, without a sidecar",
        )
    return meta


def pop_of(base: Source, sidecar: Path | None) -> PopMeta | None:
    """Return the sidecar's POP keys, or the model's if `sidecar` is None. Raises FormatError."""
    return pop_meta(base.first) if sidecar is None else read_sidecar(sidecar, base)


def _check_tensors(header: Header, meta: PopMeta) -> None:
    """Check the tensors' names. llama.cpp checks shapes and types when it loads the tensors."""
    layers = range(meta.boundary + 1, meta.n_layer) if meta.is_fitted else ()
    is_wide = meta.projection == Projection.WIDE
    kinds = (".weight", ".bias", *(("_wide.weight",) if is_wide else ()))
    expected = {
        f"blk.{layer}.pop_attn_{part}{kind}"
        for layer in layers
        for part in ("k", "v")
        for kind in kinds
    }
    names = {tensor.name for tensor in header.tensors}
    if is_wide:
        inputs = f"blk.{meta.boundary}.pop_"
        expected.add(f"{inputs}prev.weight")
        neurons = {f"{inputs}ffn_{part}.weight" for part in ("gate", "up")}
        expected |= neurons if neurons & names else set()
    if missing := sorted(expected - names):
        raise FormatError(f"{header.path} has no tensor {missing[0]}", CONVERT_AGAIN)
    if unknown := sorted(names - expected):
        raise FormatError(
            f"{header.path} contains an unexpected tensor: {unknown[0]}", CONVERT_AGAIN
        )


def measure_sidecar(plan: Plan, src: Path, kv_type: KvType = KvType.Q8_0) -> FileSizes:
    """Return the model's size and its sidecar's estimated size."""
    source = unconverted(src)
    binding = Binding(source.size_bytes, UNKNOWN_SHA256)
    header = _EMPTY.with_keys(encode_sidecar_keys(draft_meta(plan, source), binding)).header
    return FileSizes(source.size_bytes, len(header) + stored_bytes(plan, kv_type))


def write_sidecar(plan: Plan, src: Path, dst: Path, **options: Any) -> PopMeta:
    """Write a sidecar for `src`. Options and errors are the same as in `rewrite.convert`.

    `src` is read once to compute its hash. `progress` receives the number of bytes read.
    """
    return convert(plan, src, dst, binding=bind(unconverted(src)), **options)


def write_trial(
    plan: Plan, source: Source, dst: Path, binding: Binding, fitted: Fitted | None
) -> None:
    """Write a temporary sidecar that lacks the model's hash. Raises WriteError."""
    whole = with_tensors(_EMPTY, fitted.tensors) if fitted else _EMPTY
    written = whole.with_keys(encode_sidecar_keys(draft_meta(plan, source, fitted), binding))
    with replacing(dst, force=False) as file:
        file.write(written.header)
        file.writelines(written.added)
