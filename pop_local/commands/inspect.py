"""`pop-local inspect FILE`: what is in a model file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from converter.errors import FormatError
from converter.format import TENSOR_MARK, PopMeta
from converter.header import Header, read_header
from converter.shape import ARCHITECTURES, trained_ctx
from converter.sidecar import base_path, pop_of, sidecar_beside, sidecar_meta
from converter.source import Source, is_sidecar, read_source
from pop_local.commands.inspecting import (
    TensorGroup,
    Verification,
    pruning_facts,
    tensor_groups,
    tensors_text,
    verification_facts,
    verified,
)
from pop_local.commands.options import Pop
from pop_local.models.names import resolve
from pop_local.ui.tables import Fact, print_facts, print_json, size


@dataclass(frozen=True)
class Inspection:
    """What `--json` prints of a model; `pop` is what the sidecar says if there is one."""

    file: str
    n_files: int
    size_bytes: int
    name: str
    architecture: str
    architecture_supported: bool
    n_layer: int
    n_embd: int
    n_ctx_train: int
    has_chat_template: bool
    tensors: tuple[TensorGroup, ...]
    boundary: int | None
    n_skipped: int | None
    pop: PopMeta | None
    sidecar: str | None
    opens_in_stock_llama_cpp: bool
    verification: Verification | None


@dataclass(frozen=True)
class SidecarInspection:
    """What `--json` prints of a sidecar; `model` None when it does not lie beside it."""

    file: str
    size_bytes: int
    model: str | None
    tensors: tuple[TensorGroup, ...]
    boundary: int
    n_skipped: int
    pop: PopMeta
    verification: Verification | None


def inspect(
    model: Annotated[
        str, typer.Argument(metavar="FILE", help="A GGUF file, or a name of the catalog.")
    ],
    pop: Pop = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="Read all of it and compare with the hash of the file it came from."
        ),
    ] = False,
) -> None:
    """Show a model's architecture, layers, boundary, sizes and where it comes from."""
    path = resolve(model)
    header = read_header(path)
    if is_sidecar(header) and pop is None:
        _inspect_sidecar(header, verify=verify, json=json)
        return
    source = read_source(path)
    sidecar = pop or sidecar_beside(source)
    meta = pop_of(source, sidecar)
    verification = verified(source, meta) if verify else None
    inspection = inspected(source, sidecar, meta, verification)
    if json:
        print_json(inspection)
    else:
        print_facts(facts(inspection))
    _require_unchanged(path, verification)


def _inspect_sidecar(header: Header, *, verify: bool, json: bool) -> None:
    """With the model beside it, if it is there: it must be the right one then."""
    meta = sidecar_meta(header)
    path = base_path(header.path, meta.source_name)
    source = read_source(path) if path else None
    if source is not None:
        pop_of(source, header.path)
    if verify and source is None:
        raise FormatError(
            f"the model {meta.source_name} does not lie beside {header.path}",
            f"say where it is: pop-local inspect MODEL --pop {header.path} --verify",
        )
    verification = verified(source, meta) if verify and source else None
    found = SidecarInspection(
        file=str(header.path),
        size_bytes=header.size_bytes,
        model=str(path) if path else None,
        tensors=tensor_groups(header.tensors),
        boundary=meta.boundary,
        n_skipped=meta.n_layer - meta.boundary,
        pop=meta,
        verification=verification,
    )
    if json:
        print_json(found)
    else:
        print_facts(sidecar_facts(found))
    _require_unchanged(path or header.path, verification)


def _require_unchanged(path: Path, verification: Verification | None) -> None:
    if verification is not None and verification.unchanged is False:
        raise FormatError(
            f"{path} does not hold the model that was converted", "convert the model again"
        )


def inspected(
    source: Source,
    sidecar: Path | None,
    meta: PopMeta | None,
    verification: Verification | None,
) -> Inspection:
    first = source.first
    architecture = first.get("general.architecture")
    if not isinstance(architecture, str):
        raise FormatError(f"{first.path} names no architecture", "give a language model")
    name = first.get("general.name")
    return Inspection(
        file=str(first.path),
        n_files=len(source.parts),
        size_bytes=source.size_bytes,
        name=name if isinstance(name, str) else "",
        architecture=architecture,
        architecture_supported=architecture in ARCHITECTURES,
        n_layer=_number(source, "block_count"),
        n_embd=_number(source, "embedding_length"),
        n_ctx_train=trained_ctx(first) or 0,
        has_chat_template=first.get("tokenizer.chat_template") is not None,
        tensors=tensor_groups(source.tensors),
        boundary=meta.boundary if meta else None,
        n_skipped=meta.n_layer - meta.boundary if meta else None,
        pop=meta,
        sidecar=str(sidecar) if sidecar else None,
        opens_in_stock_llama_cpp=not any(TENSOR_MARK in tensor.name for tensor in source.tensors),
        verification=verification,
    )


def _number(source: Source, name: str) -> int:
    value = source.first.of_arch(name)
    return value if isinstance(value, int) else 0


def facts(found: Inspection) -> list[Fact]:
    """The inspection for people."""
    files = f", in {found.n_files} files" if found.n_files > 1 else ""
    supported = "can be pruned" if found.architecture_supported else "cannot be pruned"
    lines = [
        ("File", found.file),
        ("Size", f"{size(found.size_bytes)}{files}"),
        ("Name", found.name or "none given"),
        ("Architecture", f"{found.architecture} ({supported})"),
        ("Layers", f"{found.n_layer}, width {found.n_embd}"),
        ("Trained context", f"{found.n_ctx_train:,} tokens"),
        ("Chat template", "yes" if found.has_chat_template else "no: a base model"),
        ("Tensors", tensors_text(found.tensors)),
        *([("Sidecar", found.sidecar)] if found.sidecar else []),
        *pruning_facts(found.pop),
        ("Stock llama.cpp", _stock_text(found)),
    ]
    if found.verification is not None:
        lines += verification_facts(found.verification)
    return lines


def _stock_text(found: Inspection) -> str:
    if not found.opens_in_stock_llama_cpp:
        return "refuses it: it does not know the fitted projections"
    is_marked = found.pop is not None and found.sidecar is None
    return "opens it, and runs it in full" if is_marked else "opens it as before"


def sidecar_facts(found: SidecarInspection) -> list[Fact]:
    lines = [
        ("File", found.file),
        ("Size", size(found.size_bytes)),
        ("Sidecar of", found.model or f"{found.pop.source_name}, which does not lie beside it"),
        ("Tensors", tensors_text(found.tensors)),
        *pruning_facts(found.pop),
    ]
    if found.verification is not None:
        lines += verification_facts(found.verification)
    return lines
