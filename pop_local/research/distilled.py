"""Distillation during a conversion: check the requirements, read the text, and train the fit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pop_converter.architecture.shape import source_shape
from pop_converter.base.errors import PopError, UnsupportedArchitectureError
from pop_converter.base.progress import Watch
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
from pop_local.research.hyper import read_hyper
from pop_local.research.torch_device import TorchDevice, computing, torch_device
from pop_local.workflows.hardware import Hardware

if TYPE_CHECKING:
    from pop_local.research.distill import InitialFit, TeacherStates

_HINT = "close other programs or convert without distilling"


@dataclass
class Distiller:
    """A distiller for one model's fits (see pop_local.workflows.conversion.fits).

    `reference`: the full model's states for the text, kept for later fits (0.5 GB if n_embd is
    500).
    """

    source: Source
    options: FitOptions
    hardware: Hardware
    watch: Watch
    reference: TeacherStates | None = None

    def require(self, plan: Plan) -> TorchDevice:
        """Return the device to distill on. Raises PopError if the plan's fit cannot be trained."""
        cannot, why = "the fit cannot be distilled", ""
        try:
            hyper = read_hyper(self.source)
        except UnsupportedArchitectureError as error:
            why = f"{error.message}; {error.hint}"
        if plan.projection == Projection.OWN:
            why = "with only one skipped layer, there are no fitted projections"
        if why:
            raise PopError(f"{cannot}: {why}", "convert without distilling", cause="not-distilled")
        device = torch_device(self.hardware, cannot)
        from pop_local.research.distill import memory

        n_windows = self.options.n_distilled(plan.shape.n_embd)
        reference_bytes, needed, device_bytes = memory(
            plan, hyper, n_windows, N_WINDOW, device.matrices
        )
        if self.reference is None or self.reference.first > plan.boundary:
            needed += reference_bytes
        if device.name == "cpu":  # torch reports a lack of GPU memory
            needed += device_bytes
        needs.require_memory(
            "distilling the fit needs", needed, _HINT, cause="no-memory-to-distill"
        )
        return device

    def train(self, plan: Plan, fitted: Fitted, text: CalibrationText, n_deeper: int) -> Fitted:
        """Train the fit on `text` and return the trained fit. Raises PopError or StoppedError.

        The full model first reads the text, unless an earlier call already read the text for this
        boundary. `n_deeper`: the number of deeper boundaries whose fits need the same states.
        """
        device = self.require(plan)
        reference = self.reference
        if reference is None or plan.boundary < reference.first:
            n_windows = self.options.n_distilled(plan.shape.n_embd)
            if reference:
                chosen = reference.text
            else:
                with loaded(self.source.first.path, **vars(self.hardware)) as context:
                    chosen = distill_text(context, text, self.options.texts, n_windows)
            self.reference = reference = None  # memory has room for only one reference
            reference = self.read(max(plan.boundary - n_deeper, 0), chosen, device)
        self.reference = reference if n_deeper else None
        return self.trained(plan, fitted, reference, device)

    def read(self, first: int, text: DistillText, device: TorchDevice) -> TeacherStates:
        """Run the full model on the text's windows to distill fits at boundaries `first` and up."""
        from pop_local.research.decoder import Decoder
        from pop_local.research.distill import read

        stage = self.watch.stage("Reading text for distillation")
        with computing("distilling", _HINT, cause="no-memory-to-distill"):
            decoder = Decoder(self.source, device.name, device.matrices)
            return read(decoder, first, text, seed=SEED, on_progress=stage)

    def trained(
        self, plan: Plan, fitted: Fitted, reference: TeacherStates, device: TorchDevice
    ) -> Fitted:
        from pop_local.research.decoder import Decoder
        from pop_local.research.distill import distill

        start, kv_type = start_of(plan, self.source, fitted), self.options.kv_type
        stage = self.watch.stage(f"Distilling boundary {plan.boundary}")
        with computing("distilling", _HINT, cause="no-memory-to-distill"):
            decoder = Decoder(self.source, device.name, device.matrices)
            found = distill(decoder, start, reference, seed=SEED, on_progress=stage)
        new = [each for layer, made in found.items() for each in fit.encode(layer, made, kv_type)]
        names = {tensor.name for tensor in new}
        kept = [tensor for tensor in fitted.tensors if tensor.name not in names]
        calibration = replace(fitted.calibration, n_distilled=int(reference.text.windows.size))
        return replace(fitted, tensors=(*kept, *new), calibration=calibration)


def start_of(plan: Plan, source: Source, fitted: Fitted) -> InitialFit:
    """Return a fit's projections in the form that `distill` expects. Raises FormatError."""
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
