"""What `analyze` measures by pruning: where copying is lost, then what each boundary costs."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from converter.errors import PopError
from converter.format import FITTED, Calibration
from converter.macs import LIMIT_PROMPT
from converter.plan import Plan, make_plan
from converter.shape import ModelShape
from converter.sidecar import pop_of
from converter.source import Source
from pop_local.commands.converting import fitted_sidecars
from pop_local.commands.fitting import FitOptions, fit_needs, free_bytes
from pop_local.ui.progress import Advance, token_progress
from pop_local.ui.tables import size
from pop_local.ui.theme import note, warn

if TYPE_CHECKING:
    from pop_local.engine.model import PopModel
    from pop_local.measure.depth import Depth
    from pop_local.measure.heldout import Text
    from pop_local.measure.quality import Quality
    from pop_local.measure.reference import Reference

# Of random tokens: these give the retention to some percent.
_N_DRAWS = 2
# Of the tokens that `convert` fits on: enough to compare depths.
_FIT_SHARE = 4

Windows = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Run:
    """What is measured, and with what; `n_probed` windows for the probes, `n_gated` the gates.

    `fit_tokens`: to fit on, None for the default.
    """

    source: Source
    shape: ModelShape
    text: "Text"
    n_context: int
    n_answer: int
    n_probed: int
    n_gated: int
    fit_tokens: int | None
    seed: int
    threads: int | None
    gpu_layers: int

    @property
    def n_window(self) -> int:
        return self.n_context + self.n_answer


@dataclass(frozen=True)
class Probed:
    """How much of copying each boundary keeps, the full model's half, the windows for the gates."""

    depths: "tuple[Depth, ...]"
    reference: "Reference"
    windows: Windows

    @property
    def worth_measuring(self) -> tuple[int, ...]:
        from pop_local.measure.depth import worth_measuring

        return worth_measuring(self.depths)


@dataclass(frozen=True)
class Fits:
    """What the boundaries cost with a fit; `calibration` None where there is none."""

    qualities: "Mapping[int, Quality]" = field(default_factory=dict)
    calibration: Calibration | None = None


def probed(run: Run) -> Probed:
    """Read the full model's half, then random tokens at each boundary. Raises PopError."""
    from pop_local.measure.depth import measure_cliff
    from pop_local.measure.heldout import tokenize
    from pop_local.measure.quality import QualitySettings
    from pop_local.measure.reference import read_reference

    settings = QualitySettings(
        run.n_probed, run.n_context, run.n_answer, seed=run.seed, n_draws=_N_DRAWS
    )
    with _opened_as_planned(run) as model:
        tokens = tokenize(model, run.text)
        windows = _windows(model, tokens, run)
        with token_progress("Reading in full") as advance:
            reference = read_reference(model, tokens, settings, advance)
        with token_progress("Looking for the cliff") as advance:
            depths = measure_cliff(model, run.shape, reference, LIMIT_PROMPT, advance)
    return Probed(depths, reference, windows)


def require_own_projections(source: Source) -> None:
    """Raises PopError for a file whose projections are fitted to one boundary."""
    meta = pop_of(source, None)
    if meta is not None and meta.projection == FITTED:
        path = source.first.path
        raise PopError(
            f"{path} has projections that fit its boundary {meta.boundary} only",
            f"analyze the model that it was made of; pop-local strip {path} gives it back",
        )


def require_long_enough(run: Run) -> None:
    """Raises PopError for a context of which a conversion would prune too little to measure."""
    from pop_local.engine.prefill.plan import RowRule
    from pop_local.measure.probes import require_passage

    plan = _plan(run, run.shape.n_layer - 1)
    require_passage(run.n_context, RowRule(plan.sink_tokens, plan.tail_tokens))


def fit_is_possible(run: Run) -> bool:
    """False for a converted file, after saying so.

    Raises PopError when memory does not do for the projections of even one layer.
    """
    if pop_of(run.source, None) is not None:
        warn(f"The fit is left out: {run.source.first.path} is converted already")
        return False
    if run.shape.n_layer > 2:
        _affordable([_plan(run, run.shape.n_layer - 2)], run)
    return True


def fitted(run: Run, found: Probed) -> Fits:
    """Fit the boundaries that are worth it in one pass, and measure each. Raises PopError."""
    n_layer = run.shape.n_layer
    # The last layer alone has nothing to fit.
    plans = [_plan(run, b) for b in found.worth_measuring if b < n_layer - 1]
    if not plans:
        return Fits()
    plans = _affordable(plans, run)
    sidecars = fitted_sidecars(
        plans, run.source, _options(run), n_threads=run.threads, n_gpu_layers=run.gpu_layers
    )
    qualities: dict[int, Quality] = {}
    calibration: Calibration | None = None
    with closing(sidecars):
        for number, (plan, sidecar) in enumerate(zip(plans, sidecars, strict=True), 1):
            meta = pop_of(run.source, sidecar)
            calibration = None if meta is None else meta.calibration
            with token_progress(f"Measuring fits, {number} of {len(plans)}") as advance:
                quality = _measured(run, sidecar, plan.boundary, found.reference, advance)
            qualities[plan.boundary] = quality
    return Fits(qualities, calibration)


def unfitted(run: Run, found: Probed, fits: Fits) -> "dict[int, Quality]":
    """Measure the boundaries that are worth it and have no fit."""
    from pop_local.measure.reference import measure_against

    wanted = [b for b in found.worth_measuring if b not in fits.qualities]
    if not wanted:
        return {}
    with (
        _opened_as_planned(run) as model,
        token_progress("Measuring with own projections") as advance,
    ):
        qualities = measure_against(found.reference, model, wanted, advance)
    return {quality.boundary: quality for quality in qualities}


def _measured(
    run: Run, sidecar: Path, boundary: int, reference: "Reference", advance: Advance
) -> "Quality":
    from pop_local.measure.reference import measure_against

    with closing(_opened(run, sidecar)) as model:
        [quality] = measure_against(reference, model, (boundary,), advance)
    return quality


def _plan(run: Run, boundary: int) -> Plan:
    return make_plan(run.shape, boundary=boundary, projection=FITTED)


def _options(run: Run) -> FitOptions:
    from pop_local.calibration.texts import default_tokens

    return FitOptions(run.fit_tokens or default_tokens(run.shape.n_embd) // _FIT_SHARE)


def _affordable(plans: list[Plan], run: Run) -> list[Plan]:
    """As many of the first as one pass over the text has memory for. Raises PopError for none."""
    free = free_bytes()
    for n in range(len(plans), 0, -1):
        needs = fit_needs(plans[:n], run.source, _options(run))
        if needs.total_bytes <= free and (n == 1 or len(needs.groups) == 1):
            if n < len(plans):
                note(
                    f"There is memory to fit {n} of {len(plans)} boundaries in one pass; the others"
                    " are measured with own projections"
                )
            return plans[:n]
    raise PopError(
        f"the fit needs {size(needs.total_bytes)} of memory, {size(free)} are free",
        "lower --tokens, close other programs, or leave it out: --no-fit",
    )


def _windows(model: "PopModel", tokens: Windows, run: Run) -> Windows:
    from pop_local.measure.heldout import spread_windows
    from pop_local.measure.probes import bos

    start = bos(model)
    texts = spread_windows(tokens, run.n_gated, run.n_window - len(start))
    return [[*start, *text] for text in texts]


@contextmanager
def _opened_as_planned(run: Run) -> "Iterator[PopModel]":
    """With own projections, and the rows in full that a conversion has, whatever the file says."""
    from pop_local.measure.bracket import as_planned

    with closing(_opened(run, None)) as model:
        as_planned(model, _plan(run, run.shape.n_layer - 1))
        yield model


def _opened(run: Run, sidecar: Path | None) -> "PopModel":
    from pop_local.engine.model import PopModel
    from pop_local.measure.probes import N_REPEATED

    return PopModel(
        run.source.first.path,
        sidecar=sidecar,
        n_ctx=max(run.n_window, 2 * N_REPEATED + 1),
        n_threads=run.threads,
        n_gpu_layers=run.gpu_layers,
    )
