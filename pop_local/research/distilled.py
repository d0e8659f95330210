"""Distillation during a conversion: check the requirements, read the text, and train the fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pop_base.errors import PopError, UnsupportedArchitectureError
from pop_base.progress import Watch
from pop_converter.architecture.shape import source_shape
from pop_converter.fit import least_squares as fit
from pop_converter.fit.weights import Weights
from pop_converter.fit.wide import decode_input
from pop_converter.gguf.source import Source
from pop_converter.popfile.pruning_plan import Plan
from pop_converter.popfile.rewrite import Fitted
from pop_converter.projection import Projection
from pop_local.calibration import needs
from pop_local.calibration.activations import loaded
from pop_local.calibration.fit_options import FitOptions
from pop_local.calibration.texts import N_WINDOW, SEED, CalibrationText, DistillText, distill_text
from pop_local.engine.llama.devices import default_threads
from pop_local.research.hyper import read_hyper
from pop_local.workflows.hardware import Hardware

if TYPE_CHECKING:
    import torch

    from pop_local.research.distill import InitialFit, TeacherStates

_HINT = "close other programs or convert without distilling"


@dataclass(frozen=True)
class Distiller:
    """A distiller for one model's fits (see pop_local.workflows.conversion.fits)."""

    source: Source
    options: FitOptions
    hardware: Hardware
    watch: Watch

    def require(self, plan: Plan) -> torch.dtype:
        """Return the matrices' data type. Raises PopError if the plan's fit cannot be trained."""
        cannot, why = "the fit cannot be distilled", ""
        try:
            hyper = read_hyper(self.source)
        except UnsupportedArchitectureError as error:
            why = f"{error.message}; {error.hint}"
        if plan.projection == Projection.OWN:
            why = "no projections are fitted if only one layer is skipped"
        if why:
            raise PopError(f"{cannot}: {why}", "convert without distilling", cause="not-distilled")
        matrices = _matrix_type(self.hardware, cannot)
        from pop_local.research.distill import memory

        n_windows = self.options.n_distilled(plan.shape.n_embd)
        needed = memory(plan, hyper, n_windows, N_WINDOW, matrices)
        needs.require_memory("distilling the fit", needed, _HINT, cause="no-memory-to-distill")
        return matrices

    def train(self, plan: Plan, fitted: Fitted, text: CalibrationText) -> Fitted:
        """Train the fit on `text` and return the trained fit. Raises PopError or StoppedError."""
        matrices = self.require(plan)
        n_windows = self.options.n_distilled(plan.shape.n_embd)
        with loaded(self.source.first.path, **vars(self.hardware)) as context:
            windows = distill_text(context, text, self.options.texts, n_windows)
        return self.trained(plan, fitted, self.read(plan.boundary, windows, matrices), matrices)

    def read(self, boundary: int, text: DistillText, matrices: torch.dtype) -> TeacherStates:
        """Run the full model on the text's windows to distill the fit at a boundary."""
        from pop_local.research.decoder import Decoder
        from pop_local.research.distill import read

        stage = self.watch.stage("Reading text for distillation")
        with computing("distilling", _HINT, cause="no-memory-to-distill"):
            decoder = Decoder(self.source, matrices)
            return read(decoder, boundary, text, seed=SEED, on_progress=stage)

    def trained(
        self, plan: Plan, fitted: Fitted, reference: TeacherStates, matrices: torch.dtype
    ) -> Fitted:
        from pop_local.research.decoder import Decoder
        from pop_local.research.distill import distill

        start, kv_type = start_of(plan, self.source, fitted), self.options.kv_type
        stage = self.watch.stage(f"Distilling boundary {plan.boundary}")
        with computing("distilling", _HINT, cause="no-memory-to-distill"):
            decoder = Decoder(self.source, matrices)
            projections = distill(decoder, start, reference, seed=SEED, on_progress=stage)
        new = [
            tensor
            for layer, projection in projections.items()
            for tensor in fit.encode(layer, projection, kv_type)
        ]
        names = {tensor.name for tensor in new}
        kept = [tensor for tensor in fitted.tensors if tensor.name not in names]
        calibration = replace(fitted.calibration, n_distilled=int(reference.text.windows.size))
        return replace(fitted, tensors=(*kept, *new), calibration=calibration)


def _matrix_type(hardware: Hardware, what: str) -> torch.dtype:
    """Set torch's thread count, and return the fastest data type for matrix products.

    Raises PopError if torch is missing. `what`: the start of the error message.
    """
    try:
        import torch
    except ImportError:
        raise PopError(
            f"{what} because torch is not installed", "install torch", cause="missing-torch"
        ) from None
    torch.set_num_threads(hardware.n_threads or default_threads())
    # On CPUs without AVX-512 BF16, bfloat16 is slower than float32.
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return torch.bfloat16 if capabilities.get("avx512_bf16") is True else torch.float32


@contextmanager
def computing(what: str, hint: str, *, cause: str) -> Iterator[None]:
    """Convert torch's out-of-memory errors in the `with` block to PopError.

    `what`: the computation's name in the error message.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        said = ("not enough memory", "allocate memory")
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in said):
            raise
        raise PopError(f"there is not enough memory for {what}", hint, cause=cause) from error


def start_of(plan: Plan, source: Source, fitted: Fitted) -> InitialFit:
    """Return a fit's projections in the format that `distill` expects. Raises FormatError."""
    from pop_local.research.distill import InitialFit

    shape, weights = source_shape(source), Weights(source)
    tensors = {tensor.name: tensor for tensor in fitted.tensors}
    projections = {}
    for layer in plan.fitted_layers:
        own = weights.own_projection(layer, shape.n_k[layer], shape.n_v[layer])
        projections[layer] = fit.decode(layer, tensors, own)
    wide = None
    if plan.projection != Projection.FITTED:
        wide = decode_input(shape, weights, plan.boundary, tensors)
    return InitialFit(plan.boundary, plan.sink_tokens, projections, wide)
