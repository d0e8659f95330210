"""Cued recall by boundary and selection: the curve of docs/depth.md. Not a test.

    python tests/bench/measure_recall.py MODEL.gguf --boundaries 10,12,15,20 [--shares 0,0.1,0.2]
        [--documents 24] [--tokens 512] [--tail 32] [--sidecars FOLDER] [--plot OUT.png]

Fits each boundary with convert's defaults, or takes bN.pop-sidecar.gguf of a folder, and asks for
facts as `pop-local eval --recall` does. The full model is asked once. Prints a Markdown table and,
last, one JSON object; --plot draws recall over the limit of the speed-up at 1,024 tokens.
"""

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path

from pop_converter.architecture.shape import source_shape
from pop_converter.architecture.work import speedup_limit
from pop_converter.gguf.source import read_source
from pop_converter.popfile.plan import Plan, make_plan
from pop_converter.projection import Projection
from pop_local.calibration.options import FitOptions
from pop_local.engine.llama.backend import Mode
from pop_local.engine.model import PopModel
from pop_local.measure.forced import Pruning, use_rule
from pop_local.measure.recall import N_AROUND, Recall, RecallReference, RecallSettings
from pop_local.workflows.conversion.fits import measure_fits
from pop_local.workflows.events import Watch
from pop_local.workflows.options import Hardware

N_LIMIT = 1024


@dataclass(frozen=True)
class Point:
    boundary: int
    share: float
    limit: float
    recall: Recall


def points(model: PopModel, reference: RecallReference, shares: list[float]) -> list[Point]:
    """All shares of one boundary."""
    n_ends = model.rule.sink_tokens + model.rule.tail_tokens
    found = []
    for share in shares:
        pruning = Pruning(model.boundary, Mode.CONTEXT, select=share)
        n_full = n_ends + round(share * (N_LIMIT - n_ends))
        limit = speedup_limit(model.macs, N_LIMIT, model.boundary, n_full)
        recall = reference.measure(model, pruning, lambda done, total: None)
        found.append(Point(model.boundary, share, limit, recall))
        exact, full = recall.exact_pruned, recall.exact_full
        print(
            f"| {model.boundary} | {share:.0%} | {limit:.2f}x"
            f" | {exact.value:.0%} ± {exact.se or 0:.0%} | {full.value:.0%} | ",
            flush=True,
        )
    return found


def plot(name: str, found: list[Point], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    for share in sorted({point.share for point in found}):
        of_share = sorted((p for p in found if p.share == share), key=lambda p: p.limit)
        label = f"{share:.0%} selected" if share else "nothing selected"
        axes.errorbar(
            [p.limit for p in of_share],
            [100 * p.recall.exact_pruned.value for p in of_share],
            [100 * (p.recall.exact_pruned.se or 0) for p in of_share],
            marker="o",
            capsize=3,
            label=label,
        )
        for p in of_share:
            at = (p.limit, 100 * p.recall.exact_pruned.value)
            axes.annotate(str(p.boundary), at, (4, 4), textcoords="offset points")
    full = 100 * found[0].recall.exact_full.value
    axes.axhline(full, color="grey", linestyle=":", label="full model")
    axes.set(xlabel=f"speed-up at most, {N_LIMIT:,} tokens", ylabel="facts found (%)", title=name)
    axes.set_ylim(-4, 108)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--boundaries", required=True)
    parser.add_argument("--shares", default="0,0.1,0.2")
    parser.add_argument("--documents", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--tail", type=int)
    parser.add_argument("--sidecars", type=Path)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    boundaries = [int(part) for part in given.boundaries.split(",")]
    shares = [float(part) for part in given.shares.split(",")]
    shape = source_shape(read_source(given.model))
    settings = RecallSettings(given.documents, given.tokens)

    def opened(sidecar: Path | None) -> PopModel:
        n_ctx = given.tokens + N_AROUND
        return PopModel(given.model, sidecar=sidecar, n_ctx=n_ctx, n_threads=1)

    with opened(None) as model:
        reference = RecallReference.read(model, settings, lambda done, total: None)
    print("| boundary | selected | limit | found | in full |\n|---:|---:|---:|---:|---:|")

    def measure(plan: Plan, sidecar: Path) -> list[Point]:
        with opened(sidecar) as model:
            if given.tail is not None:
                use_rule(model, replace(model.rule, tail_tokens=given.tail))
            return points(model, reference, shares)

    plans = [make_plan(shape, boundary=each, projection=Projection.FITTED) for each in boundaries]
    if given.sidecars is None:
        source, hardware = read_source(given.model), Hardware(n_threads=1)
        parts = measure_fits(plans, source, FitOptions(), hardware, Watch(), measure)
    else:
        parts = [measure(p, given.sidecars / f"b{p.boundary}.pop-sidecar.gguf") for p in plans]
    found = [point for part in parts for point in part]
    if given.plot is not None:
        plot(given.model.stem, found, given.plot)
    print(
        json.dumps(
            [
                {
                    "boundary": point.boundary,
                    "share": point.share,
                    "limit": point.limit,
                    "found": point.recall.exact_pruned.value,
                    "found_se": point.recall.exact_pruned.se,
                    "nll": point.recall.nll_pruned.value,
                }
                for point in found
            ]
        )
    )


if __name__ == "__main__":
    main()
