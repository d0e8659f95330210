"""`pop-local inspect FILE`: what is in a model file."""

from collections import Counter
from dataclasses import dataclass
from typing import Annotated

import gguf
import typer
from pop_converter.content import copy_data, read_content
from pop_converter.errors import FormatError
from pop_converter.format import OWN, PREFIX, PopMeta, pop_meta
from pop_converter.shape import ARCHITECTURES
from pop_converter.source import Source, read_source

from pop_local.models import load_catalog, resolve
from pop_local.ui.progress import bytes_progress
from pop_local.ui.tables import Fact, print_facts, print_json, size

POP_TENSOR = ".pop_"


@dataclass(frozen=True)
class TensorGroup:
    """All tensors of one type."""

    type: str
    n_tensors: int
    size_bytes: int


@dataclass(frozen=True)
class Verification:
    """Of the file as it was before its conversion.

    `unchanged`: whether it is what the conversion read, None when the file does not say.
    `catalog_name`: the model of the catalog that it is.
    """

    sha256: str
    unchanged: bool | None
    catalog_name: str | None


@dataclass(frozen=True)
class Inspection:
    """What `--json` prints."""

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
    opens_in_stock_llama_cpp: bool
    verification: Verification | None


def inspect(
    model: Annotated[
        str, typer.Argument(metavar="FILE", help="A GGUF file, or a name of the catalog.")
    ],
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="Read all of it and compare with the hash of the file it came from."
        ),
    ] = False,
) -> None:
    """Show a model's architecture, layers, boundary, sizes and where it comes from."""
    source = read_source(resolve(model))
    meta = pop_meta(source.first)
    verification = verified(source, meta) if verify else None
    inspection = inspected(source, meta, verification)
    if json:
        print_json(inspection)
    else:
        print_facts(facts(inspection))
    if verification is not None and verification.unchanged is False:
        raise FormatError(
            f"{source.first.path} does not hold the model that it was converted from",
            "convert the model again",
        )


def inspected(
    source: Source, meta: PopMeta | None, verification: Verification | None
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
        n_layer=_number(source, f"{architecture}.block_count"),
        n_embd=_number(source, f"{architecture}.embedding_length"),
        n_ctx_train=_number(source, f"{architecture}.context_length"),
        has_chat_template=first.get("tokenizer.chat_template") is not None,
        tensors=_tensor_groups(source),
        boundary=meta.boundary if meta else None,
        n_skipped=meta.n_layer - meta.boundary if meta else None,
        pop=meta,
        opens_in_stock_llama_cpp=not any(POP_TENSOR in tensor.name for tensor in source.tensors),
        verification=verification,
    )


def verified(source: Source, meta: PopMeta | None) -> Verification:
    """Hashes the model without its POP keys, which is what it was converted from."""
    content = read_content(source, without=PREFIX)
    done_bytes = 0
    with bytes_progress("Reading all of it") as show:

        def advance(n_bytes: int) -> None:
            nonlocal done_bytes
            done_bytes += n_bytes
            show(done_bytes, content.size_bytes)

        sha256 = copy_data(content, content.header, lambda chunk: None, advance)
    return Verification(
        sha256=sha256,
        unchanged=sha256 == meta.source_sha256 if meta and meta.source_sha256 else None,
        catalog_name=next((known.name for known in load_catalog() if known.sha256 == sha256), None),
    )


def _number(source: Source, key: str) -> int:
    value = source.first.get(key)
    return value if isinstance(value, int) else 0


def _tensor_groups(source: Source) -> tuple[TensorGroup, ...]:
    counts: Counter[int] = Counter()
    sizes: Counter[int] = Counter()
    for tensor in source.tensors:
        counts[tensor.type] += 1
        sizes[tensor.type] += tensor.size_bytes
    return tuple(
        TensorGroup(_type_name(kind), counts[kind], n_bytes)
        for kind, n_bytes in sizes.most_common()
    )


def _type_name(kind: int) -> str:
    try:
        return gguf.GGMLQuantizationType(kind).name
    except ValueError:  # newer than the gguf package
        return f"type {kind}"


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
        ("Tensors", ", ".join(_group_text(group) for group in found.tensors)),
        *_pruning_facts(found.pop),
        ("Stock llama.cpp", _stock_text(found)),
    ]
    if found.verification is not None:
        lines += _verification_facts(found.verification)
    return lines


def _group_text(group: TensorGroup) -> str:
    return f"{group.n_tensors} {group.type} ({size(group.size_bytes)})"


def _stock_text(found: Inspection) -> str:
    if not found.opens_in_stock_llama_cpp:
        return "refuses it: it does not know the fitted projections"
    return "opens it, and runs it in full" if found.pop else "opens it as before"


def _pruning_facts(meta: PopMeta | None) -> list[Fact]:
    if meta is None:
        return [("Pruning", "none: not converted (see `pop-local convert`)")]
    own = meta.projection == OWN
    return [
        ("Boundary", f"layer {meta.boundary}: context tokens skip the last {_skipped(meta)}"),
        ("Schedule", meta.schedule),
        ("K/V projections", "own: the layers' own weights" if own else meta.projection),
        ("Always in full", f"the first {meta.sink_tokens} and last {meta.tail_tokens} tokens"),
        ("Shortest prompt", f"{meta.min_prompt:,} tokens" if meta.min_prompt else "any"),
        ("Converted from", meta.source_name or "unknown"),
        ("Its sha256", meta.source_sha256 or "unknown"),
        ("Converted by", meta.tool or "unknown"),
    ]


def _skipped(meta: PopMeta) -> str:
    return f"{meta.n_layer - meta.boundary} of {meta.n_layer} layers"


def _verification_facts(verification: Verification) -> list[Fact]:
    verdict = {
        None: "nothing to compare with",
        True: "unchanged: stripping gives back the file it was converted from",
        False: "CHANGED: not the file it was converted from",
    }
    name = verification.catalog_name
    return [
        ("sha256", verification.sha256),
        ("Verified", f"the catalog's {name}" if name else verdict[verification.unchanged]),
    ]
