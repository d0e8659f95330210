"""The output of `inspect` for models and sidecars."""

from pop_base.numbers import size
from pop_converter.popfile.format import PopMeta
from pop_converter.projection import Projection
from pop_local.measure.budget import FAST
from pop_local.models.mmproj_files import ARCHITECTURE
from pop_local.ui.tables import Fact
from pop_local.ui.views.convert import budget_fact, full_fact, measured_facts, skipping_facts
from pop_local.workflows.inspect import Inspection


def summary_facts(inspection: Inspection) -> list[Fact]:
    """Return the facts that users need most, in five lines or fewer."""
    files = f", in {inspection.n_files} files" if inspection.n_files > 1 else ""
    facts = [("File", inspection.file), ("Size", f"{size(inspection.size_bytes)}{files}")]
    if inspection.architecture == ARCHITECTURE:
        return [*facts, ("Kind", "multimodal projector for images (--mmproj)")]
    kind = "chat model" if inspection.has_chat_template else "base model (it has no chat template)"
    stock = "opens this file"
    if not inspection.opens_in_stock_llama_cpp:
        stock = "cannot open this file, because it contains fitted projections"
    elif inspection.pop is not None and inspection.sidecar is None:
        stock = "opens this file, but without fast reading"
    return [
        *facts,
        ("Kind", f"{kind}, trained on contexts of up to {inspection.n_ctx_train:,} tokens"),
        ("Fast reading", _fast_reading(inspection)),
        ("Stock llama.cpp", stock),
    ]


def _fast_reading(inspection: Inspection) -> str:
    if inspection.refused:
        return f"not available: {inspection.refused}"
    if (meta := inspection.pop) is not None:
        skipped = f"skips {meta.n_layer - meta.boundary} of {meta.n_layer} layers"
        if meta.budget is None:
            return skipped
        met = f"{skipped} and meets the '{meta.budget.quality}' quality limits"
        is_fast = meta.budget.quality == FAST.quality
        return f"{met}, which allow more loss than the default limits" if is_fast else met
    if inspection.skipping is not None and inspection.skipping.exact:
        return f"skips layers {inspection.skipping.exact} and up without any loss"
    return "not available until the model is converted (`pop-local convert`)"


def inspection_facts(inspection: Inspection) -> list[Fact]:
    """Return the details that follow the summary."""
    if inspection.architecture == ARCHITECTURE:
        return [("Name", inspection.name or "none")]
    return [
        ("Name", inspection.name or "none"),
        ("Architecture", inspection.architecture),
        ("Layers", f"{inspection.n_layer}, width {inspection.n_embd}"),
        *([("Sidecar", inspection.sidecar)] if inspection.sidecar else []),
        *([("Reads images with", inspection.mmproj)] if inspection.mmproj else []),
        *(skipping_facts(inspection.skipping) if inspection.skipping else []),
        *(_pruning_facts(inspection.pop) if inspection.pop else []),
    ]


def _pruning_facts(meta: PopMeta) -> list[Fact]:
    skipped = f"{meta.n_layer - meta.boundary} of {meta.n_layer} layers"
    projections = str(meta.projection)
    if meta.projection == Projection.OWN:
        projections += " (the skipped layers' weights)"
    elif meta.calibration is not None and meta.calibration.n_distilled > 0:
        projections += ", distilled"
    return [
        ("Boundary", f"Prompt tokens skip layer {meta.boundary} and all later layers ({skipped})."),
        ("K/V projections", projections),
        full_fact(meta),
        ("Shortest prompt", f"{meta.min_prompt:,} tokens" if meta.min_prompt else "any"),
        *([budget_fact(meta.budget)] if meta.budget else []),
        *measured_facts(meta),
        ("Converted from", meta.source_name or "unknown"),
        ("Original sha256", meta.source_sha256 or "unknown"),
    ]
