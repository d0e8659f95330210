"""Inspect model files and sidecars."""

from dataclasses import dataclass
from pathlib import Path

from pop_base.errors import FormatError, PopError
from pop_converter.architecture.arch_keys import trained_ctx
from pop_converter.architecture.shape import source_shape
from pop_converter.architecture.skipping import SkippableLayers, skipping_of
from pop_converter.gguf.source import Source, read_source
from pop_converter.popfile.format import PopMeta
from pop_converter.popfile.sidecar import pop_of
from pop_converter.projection import TENSOR_MARK
from pop_local.models.mmproj_files import ARCHITECTURE, find_mmproj
from pop_local.models.model_names import resolve
from pop_local.models.sidecars import sidecar_of


@dataclass(frozen=True)
class Inspection:
    """The contents of a model. `pop` contains the POP keys of the model or its sidecar.

    `mmproj` is the image encoder in the model's folder. `skipping` describes the layers that can be
    skipped. If the model cannot be pruned, `skipping` is None, and `refused` states the reason.
    """

    file: str
    n_files: int
    size_bytes: int
    name: str
    architecture: str
    skipping: SkippableLayers | None
    refused: str
    n_layer: int
    n_embd: int
    n_ctx_train: int
    has_chat_template: bool
    boundary: int | None
    n_skipped: int | None
    pop: PopMeta | None
    sidecar: str | None
    mmproj: str | None
    opens_in_stock_llama_cpp: bool


def inspect(model: str, sidecar: Path | None = None) -> Inspection:
    """Inspect a model and its sidecar, given the model's path or name. Raises PopError."""
    source = read_source(resolve(model))
    sidecar = sidecar or sidecar_of(source)
    return _of_model(source, sidecar, pop_of(source, sidecar))


def _of_model(source: Source, sidecar: Path | None, meta: PopMeta | None) -> Inspection:
    first = source.first
    architecture = first.get("general.architecture")
    if not isinstance(architecture, str):
        raise FormatError(f"{first.path} does not specify an architecture", "use a language model")
    name = first.get("general.name")
    mmproj = None if architecture == ARCHITECTURE else find_mmproj(first.path)
    skipping, refused = None, ""
    try:
        skipping = skipping_of(source_shape(source))
    except PopError as error:
        refused = error.message
    return Inspection(
        file=str(first.path),
        n_files=len(source.parts),
        size_bytes=source.size_bytes,
        name=name if isinstance(name, str) else "",
        architecture=architecture,
        skipping=skipping,
        refused=refused,
        n_layer=_number(source, "block_count"),
        n_embd=_number(source, "embedding_length"),
        n_ctx_train=trained_ctx(first) or 0,
        has_chat_template=first.get("tokenizer.chat_template") is not None,
        boundary=meta.boundary if meta else None,
        n_skipped=meta.n_layer - meta.boundary if meta else None,
        pop=meta,
        sidecar=str(sidecar) if sidecar else None,
        mmproj=str(mmproj) if mmproj else None,
        opens_in_stock_llama_cpp=not any(TENSOR_MARK in tensor.name for tensor in source.tensors),
    )


def _number(source: Source, name: str) -> int:
    value = source.first.of_arch(name)
    return value if isinstance(value, int) else 0
