"""Distilled fits: whether there can be any here, and the training of one (research.distill)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from pop_converter.architecture.shape import source_shape
from pop_converter.fit import least_squares as fit
from pop_converter.fit.least_squares import KvType
from pop_converter.fit.weights import Weights
from pop_converter.fit.wide import decode_input
from pop_converter.gguf.source import Source
from pop_converter.popfile.plan import Plan
from pop_converter.popfile.rewrite import Fitted
from pop_converter.projection import Projection
from pop_local.base.errors import PopError, UnsupportedArchitectureError
from pop_local.calibration import needs
from pop_local.calibration.options import FitOptions
from pop_local.calibration.texts import N_WINDOW, SEED, Windows
from pop_local.research.hyper import read_hyper
from pop_local.workflows.conversion.refusals import TooLittleMemoryError
from pop_local.workflows.events import Watch
from pop_local.workflows.options import Hardware
from pop_local.workflows.torch_device import TorchDevice, computing, torch_device

if TYPE_CHECKING:
    from pop_local.research.decoder import Decoder
    from pop_local.research.distill import Reference, Start

_HINT = "close other programs, or leave it out"


def require_distillable(
    plan: Plan,
    source: Source,
    options: FitOptions,
    hardware: Hardware,
    read: Reference | None = None,
) -> TorchDevice:
    """Return where the plan's fit can be distilled, with what was `read`. Raises PopError."""
    cannot = "the fit cannot be distilled"
    try:
        hyper = read_hyper(source)
    except UnsupportedArchitectureError as error:
        message = f"{cannot}: {error.message}; {error.hint}"
        raise PopError(message, "take it as it is", cause="not-distilled") from None
    if plan.projection == Projection.OWN:
        raise PopError(
            f"{cannot}: with one skipped layer there is none",
            "take it as it is",
            cause="not-distilled",
        )
    device = torch_device(hardware, cannot)
    from pop_local.research.distill import memory

    n_windows = options.n_distilled(plan.shape.n_embd)
    takes = memory(plan, hyper, n_windows, N_WINDOW, device.matrices)
    main, there = takes.main + (0 if read else takes.reference), takes.device
    if device.name == "cpu":
        main, there = main + there, 0
    for needed, free in ((main, needs.free_bytes()), (there, device.free_bytes)):
        if needed > free:
            raise TooLittleMemoryError(
                "distilling the fit needs", needed, free, _HINT, cause="no-memory-to-distill"
            )
    return device


def prepare(
    source: Source, first: int, windows: Windows, device: TorchDevice, watch: Watch
) -> Reference:
    """Read windows [n_windows, N_WINDOW] in full, for boundaries from `first` on.

    Raises PopError, StoppedError.
    """
    from pop_local.research.distill import read

    stage = watch.stage("Reading text to distil on")
    with _decoding(source, device) as decoder:
        return read(decoder, first, windows, seed=SEED, on_progress=stage)


def distilled(
    plan: Plan,
    source: Source,
    fitted: Fitted,
    kv_type: KvType,
    reference: Reference,
    device: TorchDevice,
    watch: Watch,
) -> Fitted:
    """Train a fit end to end. Raises PopError, StoppedError."""
    from pop_local.research.distill import distill

    start = start_of(plan, source, fitted)
    stage = watch.stage(f"Distilling boundary {plan.boundary}")
    with _decoding(source, device) as decoder:
        trained = distill(decoder, start, reference, seed=SEED, on_progress=stage)
    new = [each for layer, found in trained.items() for each in fit.encode(layer, found, kv_type)]
    names = {tensor.name for tensor in new}
    kept = [tensor for tensor in fitted.tensors if tensor.name not in names]
    calibration = replace(fitted.calibration, n_distilled=int(reference.windows.size))
    return replace(fitted, tensors=(*kept, *new), calibration=calibration)


@contextmanager
def _decoding(source: Source, device: TorchDevice) -> Iterator[Decoder]:
    from pop_local.research.decoder import Decoder

    with computing("distilling", _HINT, cause="no-memory-to-distill"):
        yield Decoder(source, device.name, device.matrices)


def start_of(plan: Plan, source: Source, fitted: Fitted) -> Start:
    """Return what distilling a fit begins with. Raises FormatError."""
    from pop_local.research.distill import Start

    shape, weights = source_shape(source), Weights(source)
    tensors = {tensor.name: tensor for tensor in fitted.tensors}
    projections = {}
    for layer in plan.fitted_layers:
        own = weights.own_projection(layer, shape.n_k[layer], shape.n_v[layer])
        projections[layer] = fit.decode(layer, tensors, own)
    wide = None
    if plan.projection != Projection.FITTED:
        wide = decode_input(shape, weights, plan.boundary, tensors)
    sees_heads = plan.projection == Projection.ATTENTION
    return Start(plan.boundary, plan.sink_tokens, projections, wide, sees_heads)
