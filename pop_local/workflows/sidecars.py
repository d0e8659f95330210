"""Temporary sidecars: fitted projections that are measured and not kept."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from converter.format import FITTED
from converter.plan import Plan
from converter.rewrite import Fitted, check_target
from converter.sidecar import measure_sidecar, write_sidecar
from converter.source import Source
from pop_local.calibration.options import FitOptions
from pop_local.workflows.events import Watch
from pop_local.workflows.fits import Fitter
from pop_local.workflows.options import Hardware

_PREFIX = "pop-local-"


@contextmanager
def temporary_sidecar(plan: Plan, source: Source, fitted: Fitted | None) -> Iterator[Path]:
    """A sidecar to measure, which is gone afterwards. Raises PopError."""
    with TemporaryDirectory(prefix=_PREFIX) as folder:
        target = Path(folder) / "fitted.gguf"
        write_sidecar(plan, source.first.path, target, fitted=fitted)
        yield target


def fitted_sidecars(
    plans: Sequence[Plan], source: Source, options: FitOptions, hardware: Hardware, watch: Watch
) -> Generator[Path, None, None]:
    """A temporary sidecar for each plan, all fitted in one go; gone when the next is asked for.

    Close the generator to remove the last one. Raises PopError, StoppedError.
    """
    require_room(plans, source, options)
    wanted = [plan for plan in plans if plan.projection == FITTED]
    found = Fitter(source, options, hardware, watch).fit(wanted, None)
    fitted = dict(zip(wanted, found, strict=True))
    for plan in plans:
        with temporary_sidecar(plan, source, fitted.get(plan)) as sidecar:
            yield sidecar


def require_room(plans: Sequence[Plan], source: Source, options: FitOptions) -> None:
    """Raises WriteError when a temporary sidecar would not find the space, before the fit."""
    path = source.first.path
    with TemporaryDirectory(prefix=_PREFIX) as folder:
        for plan in plans:
            sizes = measure_sidecar(plan, path, options.kv_type.value)
            check_target(path, Path(folder) / "fitted.gguf", sizes, force=False)
