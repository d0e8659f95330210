"""`pop-local analyze MODEL`: which layers context tokens can do without, and where copying ends."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from converter.errors import PopError, UnsupportedArchitectureError
from converter.output import check_output
from converter.shape import source_shape
from converter.source import read_source
from pop_local.commands.analyzing import (
    Fits,
    Run,
    Windows,
    fit_is_possible,
    fitted,
    probed,
    require_long_enough,
    require_own_projections,
    unfitted,
)
from pop_local.commands.fitting import free_bytes
from pop_local.commands.options import GpuLayers, Threads
from pop_local.models.names import resolve_base
from pop_local.ui.progress import token_progress
from pop_local.ui.tables import print_json, size
from pop_local.ui.theme import note, warn
from pop_local.ui.views.analysis import Analysis, as_json, show
from pop_local.ui.views.analysis_plot import plot
from pop_local.ui.views.quality import require_matplotlib

if TYPE_CHECKING:
    from pop_local.measure.importance import Importance

INSTALL_TORCH = "install it with: pip install 'pop-local[analyze]'"
# More at a time are not faster on a CPU.
_MAX_BATCH = 4


def analyze(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A GGUF file, or a name.")],
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text to measure on. Default: our prose.")
    ] = None,
    context: Annotated[int, typer.Option(min=32, help="Context tokens in each window.")] = 192,
    continuation: Annotated[int, typer.Option(min=2, help="Answer tokens after them.")] = 64,
    windows: Annotated[int, typer.Option(min=2, help="Windows for the gates.")] = 20,
    probe_windows: Annotated[int, typer.Option(min=1, help="Windows for the probes.")] = 3,
    no_gates: Annotated[
        bool, typer.Option("--no-gates", help="Only the probes: no torch, less time.")
    ] = False,
    no_fit: Annotated[
        bool, typer.Option("--no-fit", help="Only the layers' own projections: less time.")
    ] = False,
    tokens: Annotated[
        int | None,
        typer.Option("--tokens", min=1, help="To fit on. Default: a quarter of convert's."),
    ] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", metavar="OUT.png", help="Draw it.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace an existing plot.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of targets, passages, random tokens.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    threads: Threads = None,
    gpu_layers: GpuLayers = -1,
) -> None:
    """Measure which layers matter for reading and for answering, and how deep pruning may go."""
    if no_fit and tokens is not None:
        raise typer.BadParameter("--tokens are for the fit: leave it out, or --no-fit")
    source = read_source(resolve_base(model))
    require_own_projections(source)
    if plot_file is not None:
        require_matplotlib()
        check_output(plot_file, (source.first.path,), 0, force=force)
    from pop_local.measure.budget import BALANCED
    from pop_local.measure.depth import deepest_within, with_qualities
    from pop_local.measure.heldout import Text, given_text, shipped_part

    run = Run(
        source=source,
        shape=source_shape(source),
        text=Text("prose of pop-local", (shipped_part("prose"),))
        if text is None
        else given_text(text),
        n_context=context,
        n_answer=continuation,
        n_probed=probe_windows,
        n_gated=windows,
        fit_tokens=tokens,
        seed=seed,
        threads=threads,
        gpu_layers=gpu_layers,
    )
    require_long_enough(run)
    can_fit = not no_fit and fit_is_possible(run)
    gates = None if no_gates else _gates(run)
    found = probed(run if gates else replace(run, n_gated=0))
    fits = fitted(run, found) if can_fit else Fits()
    depths = with_qualities(found.depths, unfitted(run, found, fits), fits.qualities)
    analysis = Analysis(
        model=source.first.path,
        text=run.text,
        seed=seed,
        importance=None if gates is None else _importance(run, gates, found.windows),
        depths=depths,
        calibration=fits.calibration,
        budget=BALANCED,
        chosen=deepest_within(BALANCED, depths),
    )
    if plot_file is not None:
        plot(analysis, plot_file, force=force)
        note(f"Drawn: {plot_file}")
    print_json(as_json(analysis)) if json else show(analysis)


@dataclass(frozen=True)
class Gates:
    """Where torch computes, and how many windows at a time."""

    device: str
    n_batch: int


def _gates(run: Run) -> Gates | None:
    """None where they cannot be had, after saying why. Raises PopError for too little memory."""
    from converter.hyper import read_hyper

    try:
        import torch

        from converter.gates import needed_bytes

        hyper = read_hyper(run.source)
    except ImportError:
        warn(f"The gates are left out: they need torch; {INSTALL_TORCH}")
        return None
    except UnsupportedArchitectureError as error:
        warn(f"The gates are left out: {error.message}; {error.hint}")
        return None
    on_gpu = run.gpu_layers != 0 and torch.cuda.is_available()
    free = torch.cuda.mem_get_info()[0] if on_gpu else free_bytes()
    for n_batch in range(min(_MAX_BATCH, run.n_gated), 0, -1):
        needed = needed_bytes(run.shape, hyper, run.n_window, run.n_answer, n_batch)
        if needed <= free:
            return Gates("cuda" if on_gpu else "cpu", n_batch)
    raise PopError(
        f"the gates need {size(needed)} of memory, {size(free)} are free",
        "lower --context and --continuation, close other programs, or leave them out: --no-gates",
    )


def _importance(run: Run, gates: Gates, windows: Windows) -> "Importance":
    import torch

    from converter.decoder import Decoder
    from pop_local.engine.llama.backend import default_threads
    from pop_local.measure.importance import measure_importance

    torch.set_num_threads(run.threads or default_threads())
    try:
        decoder = Decoder(run.source, gates.device)
        with token_progress("Virtual gates") as advance:
            return measure_importance(
                decoder,
                windows,
                run.n_context,
                n_batch=gates.n_batch,
                seed=run.seed,
                on_progress=advance,
            )
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        raise PopError(
            "there is not enough memory for the gates",
            "lower --context and --continuation, or leave them out: --no-gates",
        ) from error
