"""Facts on the layers that can be skipped."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pop_converter.architecture.work import LIMIT_PROMPT
from pop_local.ui.tables import Fact

if TYPE_CHECKING:
    from pop_converter.architecture.skipping import SkippableLayers
    from pop_local.workflows.inspect_file import SkippingGain


def skipping_facts(found: SkippableLayers, work: SkippingGain | None = None) -> list[Fact]:
    """Return the layers that prompt tokens can skip, and the work that is left in them."""
    exact = f"; layers {found.exact} and up exactly, without loss" if found.exact else ""
    left = " and ".join(found.left) or "nothing"
    if work is not None:
        share = f", {work.left_share:.1%} of their work" if work.left_share is not None else ""
        limit = f"up to {work.speedup_limit:.2f}x for {LIMIT_PROMPT:,} tokens"
        left += f"{share}; {limit} from layer {work.boundary} on"
    projections = f"own only: {found.no_fit}"
    if found.fits_from is not None:
        later = f" from boundary {found.fits_from} on" if found.fits_from > found.first else ""
        projections = f"fitted{later}, or own"
    measured = "real models" if found.is_measured else "random models only"
    return [
        ("Can be skipped", f"layers {found.first} to {found.last}{exact}"),
        ("Left in them", left),
        ("Projections", projections),
        ("Catching up", f"no: {found.no_refill}" if found.no_refill else "yes"),
        ("Measured on", measured),
    ]
