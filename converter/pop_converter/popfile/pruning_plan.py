"""Which layers context tokens skip, and which tokens run in full."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from pop_converter.architecture.shape import ModelShape
from pop_converter.architecture.skipping import skipping_of
from pop_converter.architecture.work import LIMIT_PROMPT, Macs, fit_macs, speedup_limit, uncounted
from pop_converter.base.errors import PlanError, UnsupportedArchitectureError
from pop_converter.deep_rows import DeepRows
from pop_converter.popfile.format import MAX_TOKENS, Budget, PopMeta
from pop_converter.projection import Projection

# The paper's middle setting: most of the speed for little of the quality.
DEFAULT_SKIP = Fraction(1, 3)
# 16 leave the first answer token 1.4 times as wrong (docs/notebook), and win 0.5 % of time.
TAIL_TOKENS = 32

# A fraction of a model's layers, or a number of layers.
Share = Fraction | int


@dataclass(frozen=True)
class Plan:
    """A decided conversion; layers from `boundary` on are skipped by context tokens.

    `budget` decided the boundary; None if the user did. `is_distilled`: whether the fit is also
    trained end to end. `macs` counts the model's work.
    """

    shape: ModelShape
    boundary: int
    projection: Projection
    sink_tokens: int
    tail_tokens: int
    min_prompt: int
    deep_rows: DeepRows = DeepRows.NONE
    budget: Budget | None = None
    is_distilled: bool = False
    macs: Macs = field(default=uncounted, compare=False, repr=False)

    @property
    def schedule(self) -> str:
        """F's for the layers below the boundary, then S's."""
        return "F" * self.boundary + "S" * self.n_skipped

    @property
    def n_skipped(self) -> int:
        return self.shape.n_layer - self.boundary

    @property
    def speedup_limit(self) -> float:
        """The speed-up at most of a prompt of LIMIT_PROMPT tokens. Raises PopError, see `macs`."""
        n_full = self.sink_tokens + self.tail_tokens
        more = fit_macs(self.shape, self.boundary, self.projection, LIMIT_PROMPT)
        return speedup_limit(self.macs, LIMIT_PROMPT, self.boundary, n_full, more)

    @property
    def fitted_layers(self) -> range:
        """The layers whose K/V projections are fitted; the boundary's own are exact."""
        first = self.shape.n_layer if self.projection == Projection.OWN else self.boundary + 1
        return range(first, self.shape.n_layer)

    @property
    def meta(self) -> PopMeta:
        """The keys of the file that this plan makes, but for those of source and fit."""
        return PopMeta(
            schedule=self.schedule,
            projection=self.projection,
            sink_tokens=self.sink_tokens,
            tail_tokens=self.tail_tokens,
            min_prompt=self.min_prompt,
            deep_rows=self.deep_rows,
            budget=self.budget,
        )


def parse_skip(text: str) -> Share:
    """Parse what to skip: '1/3' and '0.33' are shares of the layers, '10' is their number.

    Raises PlanError.
    """
    try:
        skip: Share = int(text) if text.strip().isdecimal() else Fraction(text)
    except (ValueError, ZeroDivisionError):
        skip = 0
    if skip <= 0 or (isinstance(skip, Fraction) and skip >= 1):
        raise PlanError(
            f"{text!r} says neither a share of the layers nor how many",
            "give a fraction (1/3), a decimal below one (0.33) or a number of layers (10)",
        )
    return skip


def make_plan(
    shape: ModelShape,
    *,
    skip: Share = DEFAULT_SKIP,
    boundary: int | None = None,
    sink_tokens: int = PopMeta.sink_tokens,
    tail_tokens: int = TAIL_TOKENS,
    min_prompt: int | None = None,
    projection: Projection = Projection.OWN,
    deep_rows: DeepRows = DeepRows.NONE,
    macs: Macs = uncounted,
) -> Plan:
    """Decide a conversion; the boundary is as given, else it follows from `skip`.

    A fraction is rounded to whole layers, but never to none. `min_prompt`: the shortest prompt in
    tokens that is pruned; None takes twice the full rows, which saves half as much as a long one.
    `projection` is "own" where there is nothing to fit: with one skipped layer, whose own
    projections are exact, and where a skipped layer takes no others.

    Raises PlanError when nothing would be kept or skipped, or a token count does not fit. Raises
    UnsupportedArchitectureError where context tokens leave the model earlier than that, exactly.
    """
    if boundary is None:
        if isinstance(skip, Fraction):
            skip = max(1, int(shape.n_layer * skip + Fraction(1, 2)))
        boundary = shape.n_layer - skip
        if boundary < 1:
            raise PlanError(
                f"{shape.n_layer - boundary} of {shape.n_layer} layers cannot be skipped: at least "
                "one must be kept",
                f"skip {shape.n_layer - 1} at most" if shape.n_layer > 1 else "",
            )
    if not 0 < boundary < shape.n_layer:
        raise PlanError(
            f"of {shape.n_layer} layers at least one must be kept and one skipped: boundary "
            f"{boundary} does not",
            f"choose a boundary from 1 to {shape.n_layer - 1}",
        )
    if shape.exact and boundary > shape.exact - 2:
        require_prunable(shape)
    if boundary < shape.n_deepstack:
        raise PlanError(
            f"the first {shape.n_deepstack} layers take features of images: boundary {boundary}"
            " would skip some of them",
            f"choose a boundary from {shape.n_deepstack} to {shape.n_layer - 1}",
        )
    tokens = {"sink": sink_tokens, "tail": tail_tokens, "min_prompt": min_prompt or 0}
    for name, value in tokens.items():
        if not 0 <= value <= MAX_TOKENS:
            raise PlanError(
                f"{name} {value} is not a number of tokens", f"give 0 to {MAX_TOKENS:,}"
            )
    if min_prompt is None:
        min_prompt = 2 * (sink_tokens + tail_tokens)
    if not shape.fits(boundary):
        projection = Projection.OWN
    return Plan(
        shape, boundary, projection, sink_tokens, tail_tokens, min_prompt, deep_rows, macs=macs
    )


def require_prunable(shape: ModelShape) -> None:
    """Raises UnsupportedArchitectureError where nothing need be converted."""
    if shape.exact:
        earlier = f", or choose a boundary from 1 to {shape.exact - 2}" if shape.exact > 2 else ""
        raise UnsupportedArchitectureError(
            f"this {shape.arch} model already reads fast, and exactly: context tokens leave it at"
            f" layer {shape.exact} of {shape.n_layer}, since the layers from there on share the K/V"
            " of earlier ones; there is nothing to convert",
            f"use the file as it is{earlier}",
        )


def require_fit(plans: Sequence[Plan]) -> None:
    """Raises PlanError where none of the plans has projections to fit, but for a last layer's."""
    if all(plan.projection == Projection.OWN for plan in plans) and any(
        plan.n_skipped > 1 for plan in plans
    ):
        found = skipping_of(plans[0].shape)
        why = found.no_fit or f"it can be fitted from boundary {found.fits_from} on"
        raise PlanError(
            f"no projections can be fitted there for this {plans[0].shape.arch} model: {why}",
            "leave the skipped layers their own",
            cause="no-fit",
        )
