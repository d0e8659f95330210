"""Conversions with a fit: as `convert` runs one, and at several depths for `eval`."""

from collections.abc import Generator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from pop_converter.format import FITTED, PopMeta
from pop_converter.plan import Plan
from pop_converter.rewrite import check_target
from pop_converter.sidecar import measure_sidecar, write_sidecar
from pop_converter.source import Source

from pop_local.commands.examining import Examiner
from pop_local.commands.fitting import FitOptions, fit
from pop_local.commands.forms import COPY, Form
from pop_local.ui.progress import bytes_progress


def fit_and_write(
    plan: Plan,
    source: Source,
    target: Path,
    options: FitOptions,
    *,
    form: Form = COPY,
    n_threads: int | None = None,
    n_gpu_layers: int = -1,
    allow_broken_copy: bool = False,
    force: bool = False,
) -> PopMeta:
    """Write `target`; own projections are neither fitted nor measured. Raises PopError."""
    path = source.first.path
    fitted = examine = None
    if plan.projection == FITTED:
        [fitted] = fit((plan,), source, options, n_threads=n_threads, n_gpu_layers=n_gpu_layers)
        examine = Examiner(
            plan,
            path,
            form.files,
            n_threads=n_threads,
            n_gpu_layers=n_gpu_layers,
            allow_broken_copy=allow_broken_copy,
        )
    with bytes_progress(form.progress) as advance:
        return form.write(
            plan, path, target, fitted=fitted, examine=examine, progress=advance, force=force
        )


def fitted_sidecars(
    plans: Sequence[Plan],
    source: Source,
    options: FitOptions,
    *,
    n_threads: int | None,
    n_gpu_layers: int,
) -> Generator[Path, None, None]:
    """A temporary sidecar for each plan, all fitted in one go; gone when the next is asked for.

    Close it to remove the last one. Raises PopError.
    """
    path = source.first.path
    with TemporaryDirectory(prefix="pop-local-") as folder:
        target = Path(folder) / "fitted.gguf"
        for plan in plans:
            sizes = measure_sidecar(plan, path, options.stored_type.value)
            check_target(path, target, sizes, force=False)
        wanted = [plan for plan in plans if plan.projection == FITTED]
        found = fit(wanted, source, options, n_threads=n_threads, n_gpu_layers=n_gpu_layers)
        fitted = dict(zip(wanted, found, strict=True))
        for plan in plans:
            write_sidecar(plan, path, target, fitted=fitted.get(plan))
            yield target
            target.unlink()
