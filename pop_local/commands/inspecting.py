"""What `inspect` says of models and of sidecars alike: tensors, pruning, hashes."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import gguf

from converter.content import copy_data, read_content
from converter.format import OWN, PREFIX, PopMeta
from converter.header import TensorInfo
from converter.rewrite import original
from converter.source import Source
from pop_local.commands.examining import measured_facts
from pop_local.models.names import load_catalog
from pop_local.ui.progress import bytes_progress
from pop_local.ui.tables import Fact, size
from pop_local.ui.views.trials import budget_fact


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


def verified(source: Source, meta: PopMeta | None) -> Verification:
    """Hashes the model without its POP keys, which is what it was converted from."""
    content = original(source, meta) if meta else read_content(source, without=PREFIX)
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


def tensor_groups(tensors: Iterable[TensorInfo]) -> tuple[TensorGroup, ...]:
    counts: Counter[int] = Counter()
    sizes: Counter[int] = Counter()
    for tensor in tensors:
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


def tensors_text(groups: tuple[TensorGroup, ...]) -> str:
    texts = [f"{g.n_tensors} {g.type} ({size(g.size_bytes)})" for g in groups]
    return ", ".join(texts) or "none"


def pruning_facts(meta: PopMeta | None) -> list[Fact]:
    if meta is None:
        return [("Pruning", "none: not converted (see `pop-local convert`)")]
    own = meta.projection == OWN
    return [
        ("Boundary", f"layer {meta.boundary}: context tokens skip the last {_skipped(meta)}"),
        ("Schedule", meta.schedule),
        ("K/V projections", "own: the layers' own weights" if own else meta.projection),
        ("Always in full", f"the first {meta.sink_tokens} and last {meta.tail_tokens} tokens"),
        ("Shortest prompt", f"{meta.min_prompt:,} tokens" if meta.min_prompt else "any"),
        *([budget_fact(meta.budget), ("", meta.budget.tried)] if meta.budget else []),
        *(measured_facts(meta.measured) if meta.measured else []),
        ("Converted from", meta.source_name or "unknown"),
        ("Its sha256", meta.source_sha256 or "unknown"),
        ("Converted by", meta.tool or "unknown"),
    ]


def _skipped(meta: PopMeta) -> str:
    return f"{meta.n_layer - meta.boundary} of {meta.n_layer} layers"


def verification_facts(verification: Verification) -> list[Fact]:
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
