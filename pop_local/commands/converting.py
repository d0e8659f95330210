"""Conversions with a fit: as `convert` runs one, and at several depths for `eval`."""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from converter.errors import WriteError
from converter.format import FITTED, Measured, PopMeta
from converter.plan import Plan
from converter.rewrite import Examine, Fitted, Sizes, check_target
from converter.sidecar import measure_sidecar, write_sidecar
from converter.source import Source
from pop_local.commands.examining import CopyingBrokenError, Examiner, measure_own
from pop_local.commands.fitting import FitOptions, fit
from pop_local.commands.forms import COPY, Form
from pop_local.ui.progress import pausable_progress
from pop_local.ui.theme import note

TEMPORARY = "pop-local-"


@dataclass(frozen=True)
class Job:
    """What is converted, into what, and with what."""

    source: Source
    target: Path
    form: Form = COPY
    options: FitOptions = field(default_factory=FitOptions)
    n_threads: int | None = None
    n_gpu_layers: int = -1
    force: bool = False

    @property
    def path(self) -> Path:
        return self.source.first.path

    def measure(self, plan: Plan) -> Sizes:
        """Of what `plan` reads and writes."""
        return self.form.measure(plan, self.path, self.options.stored_type.value)

    def check_target(self, sizes: Sizes) -> None:
        """Raises OutputExistsError, WriteError."""
        check_target(self.path, self.target, sizes, force=self.force)

    def fit(self, plans: Sequence[Plan]) -> tuple[Fitted, ...]:
        return fit(
            plans,
            self.source,
            self.options,
            n_threads=self.n_threads,
            n_gpu_layers=self.n_gpu_layers,
        )

    def write(self, plan: Plan, fitted: Fitted | None, examine: Examine | None) -> PopMeta:
        """Raises PopError."""
        with pausable_progress(self.form.progress) as (advance, pause):
            return self.form.write(
                plan,
                self.path,
                self.target,
                fitted=fitted,
                examine=examine and _after(pause, examine),
                progress=advance,
                force=self.force,
            )


def _after(pause: Callable[[], None], examine: Examine) -> Examine:
    def paused(written: Path) -> Measured:
        pause()
        return examine(written)

    return paused


@contextmanager
def resumable(options: FitOptions) -> Iterator[None]:
    """Around a conversion: what it fitted is kept when it is stopped or cannot be written."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, WriteError):
        if kept := ", ".join(map(str, options.kept())):
            note(f"What was read is kept in {kept}: the same command goes on from there.")
        raise
    except CopyingBrokenError:
        _forget(options)
        raise
    _forget(options)


def _forget(options: FitOptions) -> None:
    for path in options.kept():
        path.unlink(missing_ok=True)


def fit_and_write(plan: Plan, job: Job, *, allow_broken_copy: bool = False) -> PopMeta:
    """At the depth of `plan`, after measuring it. Raises CopyingBrokenError, PopError."""
    if plan.projection != FITTED:
        found = measure_own(plan, job.path, n_threads=job.n_threads, n_gpu_layers=job.n_gpu_layers)
        if found is None:
            return job.write(plan, None, None)
        return job.write(plan, None, lambda written: found)
    examine = Examiner(
        plan,
        job.path,
        job.form.files,
        n_threads=job.n_threads,
        n_gpu_layers=job.n_gpu_layers,
        allow_broken_copy=allow_broken_copy,
    )
    examine.before_fit()
    with resumable(job.options):
        [fitted] = job.fit((plan,))
        return job.write(plan, fitted, examine)


@contextmanager
def temporary_sidecar(plan: Plan, source: Source, fitted: Fitted | None) -> Iterator[Path]:
    """A sidecar to measure, gone afterwards. Raises PopError."""
    path = source.first.path
    with TemporaryDirectory(prefix=TEMPORARY) as folder:
        target = Path(folder) / "fitted.gguf"
        write_sidecar(plan, path, target, fitted=fitted)
        yield target


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
    require_room(plans, source, options)
    wanted = [plan for plan in plans if plan.projection == FITTED]
    found = fit(wanted, source, options, n_threads=n_threads, n_gpu_layers=n_gpu_layers)
    fitted = dict(zip(wanted, found, strict=True))
    for plan in plans:
        with temporary_sidecar(plan, source, fitted.get(plan)) as sidecar:
            yield sidecar


def require_room(plans: Sequence[Plan], source: Source, options: FitOptions) -> None:
    """Raises WriteError when a temporary sidecar would not find the space, before the fit."""
    path = source.first.path
    with TemporaryDirectory(prefix=TEMPORARY) as folder:
        for plan in plans:
            sizes = measure_sidecar(plan, path, options.stored_type.value)
            check_target(path, Path(folder) / "fitted.gguf", sizes, force=False)
