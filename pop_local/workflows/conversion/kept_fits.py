"""Store a stopped conversion's text and fits so that the next run can reuse them."""

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pop_converter.base.errors import FormatError
from pop_converter.popfile.format import Calibration
from pop_converter.popfile.pruning_plan import Plan
from pop_converter.popfile.rewrite import Fitted
from pop_converter.popfile.sidecar import fitted_tensors, read_sidecar, write_trial
from pop_local.calibration.fit_options import FitOptions
from pop_local.calibration.texts import DEFAULT_NAME, CalibrationText
from pop_local.workflows.conversion.trial_runner import TrialRunner


@dataclass(frozen=True)
class KeptFits:
    """A folder of fits next to a conversion's output. The folder need not exist yet.

    The text file's name contains the model's hash. Each fit is stored as a sidecar.
    """

    folder: Path
    runner: TrialRunner
    options: FitOptions

    @property
    def _text(self) -> Path:
        return self.folder / f"{self.runner.binding.header_sha256[:16]}.npy"

    def _file(self, plan: Plan) -> Path:
        return self.folder / f"{plan.boundary}-{plan.projection}-{self.options.kv_type.value}.fit"

    def text(self, n_tokens: int) -> CalibrationText | None:
        """Return the saved text if it contains `n_tokens` tokens, or None otherwise."""
        with suppress(OSError, ValueError):
            windows = np.load(self._text, allow_pickle=False)
            if windows.size == n_tokens and not self.options.texts:
                sha256 = hashlib.sha256(windows.tobytes()).hexdigest()
                return CalibrationText(DEFAULT_NAME, sha256, windows)
        return None

    def fits(self, plans: Sequence[Plan], text: CalibrationText) -> dict[Plan, Fitted]:
        """Return the saved fits that were computed from `text`."""
        wanted = Calibration(text.name, text.sha256, text.n_tokens, self.options.ridge)
        found = {}
        for plan in plans:
            with suppress(FormatError, OSError):
                meta = read_sidecar(self._file(plan), self.runner.source)
                if meta.calibration == wanted:
                    tensors = tuple(fitted_tensors(self._file(plan)).values())
                    found[plan] = Fitted(wanted, tensors, meta.projection)
        return found

    def save(self, text: CalibrationText, fits: Mapping[Plan, Fitted]) -> None:
        """Save the fits, and the text if the model generated it. Raises OSError or WriteError."""
        self.remove()
        self.folder.mkdir(parents=True)
        if not self.options.texts:
            np.save(self._text, text.windows)
        for plan, fitted in fits.items():
            write_trial(plan, self.runner.source, self._file(plan), self.runner.binding, fitted)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
