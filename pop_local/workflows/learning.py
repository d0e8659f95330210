"""Create sidecars from sums computed over the user's prompts, and measure each sidecar's loss."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from pop_converter.base.errors import PopError, StoppedError
from pop_converter.base.progress import Watch
from pop_converter.fit.wide import encode_input
from pop_converter.gguf.content import NewTensor
from pop_converter.popfile.format import Budget, Calibration
from pop_converter.popfile.pruning_plan import Plan, make_plan
from pop_converter.popfile.rewrite import Fitted
from pop_converter.popfile.sidecar import SUFFIX, write_sidecar
from pop_converter.projection import Projection
from pop_local.calibration.activations import WindowReader, loaded
from pop_local.calibration.carrier_windows import SHARE
from pop_local.calibration.fit_options import FitOptions
from pop_local.calibration.needs import MAX_WIDE_COST, fit_cost
from pop_local.calibration.texts import own_carriers
from pop_local.engine.learning.online_calibrator import N_WINDOW, LearnedFit, OnlineCalibrator
from pop_local.engine.learning.sums import Sums
from pop_local.engine.llama.graph_macs import GraphMacs
from pop_local.engine.llama.interrupt import stopped_by
from pop_local.engine.model import PopModel
from pop_local.measure.budget import BALANCED, is_inside
from pop_local.measure.forced import Pruning
from pop_local.measure.quality import Quality, QualitySettings, measure_against
from pop_local.models.model_files import ModelFiles
from pop_local.models.sidecars import LearnedFiles
from pop_local.workflows.conversion.conversion_plan import OverBudgetError, RowOptions
from pop_local.workflows.conversion.fits import PlanFitter
from pop_local.workflows.conversion.full_model import FullModel
from pop_local.workflows.conversion.search import Candidate, Search
from pop_local.workflows.conversion.trial_runner import TrialRunner
from pop_local.workflows.hardware import Hardware
from pop_local.workflows.measuring import measured

_NAME = "prompts from this machine"
# Minimum number of held-out windows for a measurement.
LEAST_WINDOWS = 6
# How much the number of rows must grow before the next attempt.
_GROWTH = 1.5
_N_CONTINUATION = 128
_N_DRAWS = 4


@dataclass(kw_only=True)
class _LearnedFitter(PlanFitter):
    """A fitter that computes fits from learned sums instead of calibration text."""

    learner: OnlineCalibrator
    sums: Sums

    def fit(self, plans: Sequence[Plan]) -> tuple[Fitted, ...]:
        return tuple(map(self._solved, plans))

    def _solved(self, plan: Plan) -> Fitted:
        options, summing, boundary = self.options, self.learner.summing, plan.boundary
        gram, stored = self.sums.grams[boundary], options.kv_type
        tensors: list[NewTensor] = []
        if plan.projection == Projection.WIDE:
            tensors += encode_input(boundary, self.sums.wides[boundary], stored)
        for layer in plan.fitted_layers:
            tensors += summing.solve(gram, boundary, layer, plan.projection, options.ridge, stored)
            self.runner.watch.check_stop()
        calibration = Calibration(
            _NAME, hashlib.sha256(gram.xx.tobytes()).hexdigest(), gram.n_rows, options.ridge
        )
        return Fitted(calibration, tuple(tensors), plan.projection)


@dataclass
class _LookupSums:
    """Learned sums to which look-up windows are added.

    The user's prompts might not contain look-ups. `is_saved` is true if the file contains the sums.
    `n_done` is the number of windows added so far.
    """

    sums: Sums
    is_saved: bool = False
    n_done: int = 0

    def add(self, learner: OnlineCalibrator, runner: TrialRunner) -> Sums:
        """Add the remaining windows and return the sums. Raises PopError or StoppedError.

        The windows are weighted so that at least one in every SHARE rows comes from look-ups. The
        windows do not count toward a Gram matrix's `n_rows`.
        """
        summing, grams, wides = learner.summing, self.sums.grams, self.sums.wides
        boundaries = grams.keys() & set(learner.boundaries)
        if not boundaries:
            return self.sums
        n_windows = -(-learner.n_wanted // ((SHARE - 1) * N_WINDOW))
        should_stop = runner.watch.should_stop
        with loaded(runner.path, **vars(runner.hardware)) as context, stopped_by(should_stop):
            windows = own_carriers(context, n_windows)
            reader = WindowReader(context, summing.wanted(boundaries))
            for window in windows[self.n_done :]:
                tapped = reader.window(window.tolist())
                for boundary in boundaries:
                    gram = grams[boundary]
                    n_rows, n_wanted = gram.n_rows, gram.n_rows / (SHARE - 1)
                    scale = np.float32(max(1.0, n_wanted / windows.size))
                    of_boundary = Sums(wides, {boundary: gram})
                    summing.add(of_boundary, tapped, np.full(tapped.n_rows, scale))
                    gram.n_rows = n_rows
                self.n_done += 1
        return self.sums


class OnlineCalibration:
    """A fitter that creates sidecars from an open model's learned sums while the model is idle.

    `quality` is the current fit's quality on the newest held-out windows (None until measured).
    """

    def __init__(self, model: PopModel, budget: Budget = BALANCED) -> None:
        if model.engine.calibrator is None:
            raise PopError("learning is off for this model", "call the model's learn() method")
        self.quality: Quality | None = None
        self.budget = budget
        self._model, self._learner = model, model.engine.calibrator
        self._should_stop: Callable[[], bool] = lambda: False
        watch = Watch(should_stop=lambda: self._should_stop())
        context = model.engine.context
        hardware = Hardware(context.n_threads, context.options.n_gpu_layers)
        self._runner = TrialRunner(context.files.source, hardware, watch)
        self._search: Search | None = None
        self._sums: _LookupSums | None = None
        self._folder = TemporaryDirectory(prefix="pop-local-")
        self._is_temporary = False  # whether the current sidecar is in this folder
        self._next_rows = float(model.engine.calibrator.n_wanted)
        meta = model.engine.context.files.meta
        if meta and meta.calibration and meta.calibration.name == _NAME:
            self._next_rows = max(self._next_rows, _GROWTH * meta.calibration.n_tokens)

    @property
    def has_work(self) -> bool:
        """Return True if `idle` has work to do."""
        return self._learner.has_work or self._is_due

    @property
    def _is_due(self) -> bool:
        learner = self._learner
        can_save = self._is_temporary and learner.is_saved
        is_enough = can_save or learner.n_fittable >= self._next_rows
        return self._sums is not None or (is_enough and len(learner.held_out) >= LEAST_WINDOWS)

    def idle(self, should_stop: Callable[[], bool]) -> LearnedFit | None:
        """Add queued rows to the sums. Once the sums contain enough rows, create a sidecar.

        Returns the written sidecar if the new fit is better than the current one, or None
        otherwise. The next call resumes an interrupted fit. Raises PopError.
        """
        self._should_stop = should_stop
        self._learner.work(should_stop)
        if should_stop() or not self._is_due:
            return None
        try:
            found = self._tried()
        except StoppedError:
            return None
        except OverBudgetError:
            found = None
        self._is_temporary &= not (self._sums and self._sums.is_saved)
        self._search = self._sums = None
        self._next_rows = max(self._learner.n_wanted, _GROWTH * self._learner.n_fittable)
        return found

    def _tried(self) -> LearnedFit | None:
        search = self._search = self._search or self._begun()
        if search is None:  # another process or the user has deleted the sums
            return None
        if self._model.engine.pruning.boundary and self.quality is None:
            self.quality = self._measured_in_use(search.full)
        chosen, sums = search.run(), self._sums
        assert sums is not None
        if not (self._is_temporary and sums.is_saved) and not self._is_better(chosen):
            return None
        target = LearnedFiles.of(self._runner.source).sidecar
        if not sums.is_saved:
            # The sidecar in use must not be replaced, so each one has its own name.
            target = Path(self._folder.name) / f"{self._learner.n_fittable}{SUFFIX}"
        self._is_temporary = not sums.is_saved
        assert chosen.fitted is not None and chosen.fitted.calibration is not None
        found = measured(chosen.quality, chosen.lookups)
        write_sidecar(
            chosen.plan,
            self._runner.path,
            target,
            fitted=chosen.fitted,
            examine=lambda _: found,
            progress=self._runner.watch.stage("Writing"),
            force=True,
        )
        self.quality = chosen.quality
        plan, n_rows = chosen.plan, chosen.fitted.calibration.n_tokens
        return LearnedFit(target, plan.boundary, plan.speedup_limit, n_rows)

    def _begun(self) -> Search | None:
        learner, shape = self._learner, self._model.engine.context.files.shape
        self._sums = self._sums or _LookupSums(learner.sums(), learner.is_saved)
        macs, sums = GraphMacs(self._runner.path), self._sums.add(learner, self._runner)
        plans = []
        for boundary in sorted(sums.grams.keys() & set(learner.boundaries), reverse=True):
            plan = make_plan(
                shape,
                boundary=boundary,
                projection=Projection.FITTED,
                deep_rows=RowOptions.deep_rows,
                macs=macs,
            )
            plain, *wider = learner.summing.projections[boundary]
            kinds = [plain, *(kind for kind in wider if fit_cost(plan, kind) <= MAX_WIDE_COST)]
            plans.append(replace(plan, projection=kinds[-1]))
        if not plans:
            return None
        self.quality = None
        settings = QualitySettings(
            len(learner.held_out), N_WINDOW - _N_CONTINUATION, _N_CONTINUATION, n_draws=_N_DRAWS
        )
        texts = tuple(tuple(chunk.tokens.tolist()) for chunk in learner.held_out)
        full = FullModel(self._runner, plans[0], settings, texts)
        options = FitOptions(projection=plans[0].projection)
        fitter = _LearnedFitter(self._runner, options, learner=learner, sums=sums)
        return Search(self._runner, self.budget, fitter, full, plans)

    def _measured_in_use(self, full: FullModel) -> Quality:
        model, runner = self._model, self._runner
        reference, pruning = full.reference, Pruning(model.engine.pruning.boundary)
        files = ModelFiles(model.engine.context.files.path, model.engine.context.files.sidecar)
        plan = replace(full.plan, deep_rows=model.engine.rule.deep_rows)
        with runner.opened(plan, files) as opened:
            return measure_against(reference, opened, pruning, runner.watch.stage(""))

    def _is_better(self, chosen: Candidate) -> bool:
        before = self.quality
        if before is None or not is_inside(self.budget, before):
            return True
        in_use = self._model.engine.pruning.boundary
        if chosen.plan.boundary != in_use:
            return chosen.plan.boundary < in_use
        return chosen.quality.kl_mean.value < before.kl_mean.value
