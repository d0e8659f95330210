"""Results of compare, analyze and convert with made-up figures, for recorded screens."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from pop_converter.popfile.format import Calibration, Measured
from pop_converter.popfile.rewrite import draft_meta
from pop_converter.projection import Projection
from pop_local.calibration.texts import DEFAULT_NAME
from pop_local.measure.budget import BALANCED
from pop_local.measure.compare import Answered, Compared, Comparison, PromptFile
from pop_local.measure.estimate import Estimate
from pop_local.measure.lookups import Lookups
from pop_local.measure.quality import Quality
from pop_local.research.analyze import Analysis, DepthCost
from pop_local.workflows.conversion.conversion_plan import (
    Conversion,
    Converted,
    ConvertOptions,
    Trial,
    plan_conversion,
)

CALIBRATION = Calibration(DEFAULT_NAME, "0" * 64, 16_384, 1e-3)


def quality(boundary: int, kl: float) -> Quality:
    """Return a loss of `kl` nats; the other figures follow from it."""
    ratios = ("ppl_ratio", "copy_ppl_ratio", "copy_top1", "top1_agreement")
    overrides: dict[str, Any] = {
        "boundary": boundary,
        "n_windows": 16,
        "n_context": 512,
        "n_continuation": 128,
    }
    values: dict[str, Any] = {
        field.name: Estimate(1 + kl if field.name in ratios else kl, kl / 10)
        for field in fields(Quality)
        if field.name not in overrides
    }
    return Quality(**(values | overrides | {"n_pruned": 7_000}))


def comparison() -> Comparison:
    def answered(text: str, ttft_s: float) -> Answered:
        return Answered(text, 2_000, 0, 1_950, ttft_s, 1.0, "stop")

    full = "The rule above the door of the lamp room was: the light is never late."
    pruned = "The rule above the door of the lamp room reads: 'The light is never late.'"
    same = Compared(1, answered("42", 5.2), answered("42", 3.9), True, True, None)
    other = Compared(2, answered(full, 5.1), answered(pruned, 4.0), True, False, 10)
    return Comparison(PromptFile("prompts.jsonl", ()), (same, other))


def analysis() -> Analysis:
    depths = tuple(
        DepthCost(at, 30 - at, 30 / at, Estimate(0.9, 0.1), quality(at, kl), Projection.FITTED)
        for at, kl in ((26, 0.011), (23, 0.041), (20, 0.213))
    )
    unmeasured = DepthCost(16, 14, 1.9, Estimate(-0.001, 0.1))
    every = (*depths, unmeasured)
    return Analysis(Path("model.gguf"), every, CALIBRATION, BALANCED, depths[1])


def conversion(model: Path) -> Conversion:
    return plan_conversion(model, None, ConvertOptions())


def converted(planned: Conversion) -> Converted:
    middle = planned.plans[3]
    plan = replace(middle, projection=Projection.FITTED, deep_share=0.12)
    kinds = {field.name: 0.031 for field in fields(Measured) if field.type in (float, "float")}
    shares = {"top1_agreement": 0.953, "copy_top1": 0.981, "ppl_ratio": 1.012}
    counts = {"lookups_n": 200, "lookups_full": 171, "lookups_pruned": 170}
    figures = kinds | shares | counts | {"copy_ppl_ratio": 1.034, "lookups_lost": 2}
    meta = draft_meta(plan, planned.source)
    meta = replace(meta, measured=Measured(**{**figures, "lookups_gained": 1}))  # type: ignore[arg-type]
    loss = Estimate(0.01, 0.005)
    lookups = Lookups(200, 171, 170, 2, 1, 10, 1_024, 1.0, loss, loss)
    trials = (
        Trial(plan, quality(plan.boundary, 0.031), True, lookups),
        Trial(planned.plans[4], quality(planned.plans[4].boundary, 0.11), False),
    )
    return Converted(planned.target, plan, meta, planned.sizes, trials, ())
