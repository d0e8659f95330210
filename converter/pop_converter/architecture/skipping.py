"""Find the layers that context tokens can skip, and the work that skipped layers still do."""

from dataclasses import dataclass

from pop_converter.architecture.arch_names import MEASURED, UNFITTED
from pop_converter.architecture.shape import ModelShape

_KV, _LATENT, _STATE = "K and V", "compressed K/V", "recurrent state"


@dataclass(frozen=True)
class SkippableLayers:
    """The range of layers that context tokens can skip, from `first` to `last`.

    `left` lists what the skipped layers still compute for context tokens. `fits_from` is the lowest
    boundary for fitted projections. If no fit is possible, `fits_from` is None and `no_fit` is the
    reason. Layers from `exact` onward can be skipped without loss. If `exact` is 0, no layer can.
    `no_refill` is the reason why skipped layers cannot process context tokens later, or "" if they
    can. `is_measured` is true if pruning was measured on real models of this architecture.
    """

    first: int
    last: int
    left: tuple[str, ...]
    fits_from: int | None
    no_fit: str
    exact: int
    no_refill: str
    is_measured: bool


def skipping_of(shape: ModelShape) -> SkippableLayers:
    first = max(1, shape.n_deepstack)
    fits = [boundary for boundary in range(first, shape.n_layer) if shape.fits(boundary)]
    left: dict[str, None] = {}
    for layer in range(first, shape.n_layer):
        if shape.n_k[layer]:
            left[_KV if shape.n_v[layer] else _LATENT] = None
        if shape.is_recurrent[layer]:
            left[_STATE] = None
    return SkippableLayers(
        first=first,
        last=shape.n_layer - 1,
        left=tuple(left),
        fits_from=min(fits, default=None),
        no_fit="" if fits else _no_fit(shape),
        exact=shape.exact,
        no_refill=shape.no_refill,
        is_measured=shape.arch in MEASURED,
    )


def _no_fit(shape: ModelShape) -> str:
    if shape.arch in UNFITTED:
        return UNFITTED[shape.arch]
    if any(shape.is_recurrent):
        return "recurrent layers have no K and V"
    if not any(shape.n_v):
        return "K and V are compressed"
    return "K and V are not computed from a bias-free RMS norm"
