"""Plan which layers context tokens skip and which tokens run through all layers."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from pop_base.errors import PlanError, UnsupportedArchitectureError
from pop_converter.architecture.shape import ModelShape
from pop_converter.architecture.skipping import skipping_of
from pop_converter.architecture.work import LIMIT_PROMPT, Macs, fit_macs, speedup_limit, uncounted
from pop_converter.popfile.format import MAX_TOKENS, Budget, DeepRows, PopMeta
from pop_converter.projection import Projection

# With 32 tokens instead of 16, a prompt takes 0.5% longer to read, but the error at the first
# answer token drops by a factor of 1.4 (docs/notebook/deep-rows-by-token.md).
TAIL_TOKENS = 32


@dataclass(frozen=True)
class Plan:
    """A planned conversion in which context tokens skip layer `boundary` and all later layers.

    `deep_rows` selects the context rows that run through all layers. `deep_share` is the fraction
    of rows that `deep_rows` selects in ordinary text, or 0 if unknown. `budget` holds the search's
    quality limits, or is None if the user chose the boundary. `is_distilled` is true if the fit was
    also trained end to end. `macs` counts the model's multiply-accumulates.
    """

    shape: ModelShape
    boundary: int
    projection: Projection
    sink_tokens: int
    tail_tokens: int
    min_prompt: int
    deep_rows: DeepRows = DeepRows.NONE
    deep_share: float = 0.0
    budget: Budget | None = None
    is_distilled: bool = False
    macs: Macs = field(default=uncounted, compare=False, repr=False)

    @property
    def schedule(self) -> str:
        """A string with one letter per layer: F for a full layer, S for a skipped layer."""
        return "F" * self.boundary + "S" * self.n_skipped

    @property
    def n_skipped(self) -> int:
        return self.shape.n_layer - self.boundary

    @property
    def speedup_limit(self) -> float:
        """The speedup limit for a prompt of LIMIT_PROMPT tokens. Propagates errors from `macs`."""
        n_ends = self.sink_tokens + self.tail_tokens
        n_full = n_ends + round(self.deep_share * (LIMIT_PROMPT - n_ends))
        more = fit_macs(self.shape, self.boundary, self.projection, LIMIT_PROMPT)
        return speedup_limit(self.macs, LIMIT_PROMPT, self.boundary, n_full, more)

    @property
    def fitted_layers(self) -> range:
        """The layers with fitted K/V projections. The boundary layer does not need a fit."""
        first = self.shape.n_layer if self.projection == Projection.OWN else self.boundary + 1
        return range(first, self.shape.n_layer)


def make_plan(
    shape: ModelShape,
    *,
    boundary: int | None = None,
    sink_tokens: int = PopMeta.sink_tokens,
    tail_tokens: int = TAIL_TOKENS,
    min_prompt: int | None = None,
    projection: Projection = Projection.OWN,
    deep_rows: DeepRows = DeepRows.NONE,
    macs: Macs = uncounted,
) -> Plan:
    """Plan a conversion in which context tokens skip layer `boundary` and all later layers.

    The default boundary skips the last third of the layers. `min_prompt` is the length in tokens of
    the shortest prompt to prune. The default is twice the number of full rows, so at least half of
    a pruned prompt's rows are context rows. The plan uses OWN instead of `projection` if a skipped
    layer cannot be fitted. The plan also uses OWN if only one layer is skipped, because the first
    skipped layer's own projections are exact.

    Raises PlanError for an invalid boundary or token count. Raises UnsupportedArchitectureError if
    context tokens already skip these layers without loss.
    """
    if boundary is None:
        boundary = shape.n_layer - max(1, round(shape.n_layer / 3))
    if not 0 < boundary < shape.n_layer:
        raise PlanError(
            f"boundary {boundary} is invalid for a model with {shape.n_layer} layers",
            f"choose a boundary from 1 to {shape.n_layer - 1}",
        )
    if shape.exact and boundary > shape.exact - 2:
        require_prunable(shape)
    if boundary < shape.n_deepstack:
        raise PlanError(
            f"boundary {boundary} is too low: the first {shape.n_deepstack} layers add image"
            " features",
            f"choose a boundary from {shape.n_deepstack} to {shape.n_layer - 1}",
        )
    tokens = {"sink": sink_tokens, "tail": tail_tokens, "min_prompt": min_prompt or 0}
    for name, value in tokens.items():
        if not 0 <= value <= MAX_TOKENS:
            raise PlanError(f"{name}={value} is out of range", f"choose 0 to {MAX_TOKENS:,} tokens")
    if min_prompt is None:
        min_prompt = 2 * (sink_tokens + tail_tokens)
    if not shape.fits(boundary):
        projection = Projection.OWN
    return Plan(
        shape, boundary, projection, sink_tokens, tail_tokens, min_prompt, deep_rows, macs=macs
    )


def require_prunable(shape: ModelShape) -> None:
    """Raise UnsupportedArchitectureError if context tokens already skip layers without loss."""
    if shape.exact:
        hint = "use this file without converting it"
        if shape.exact > 2:
            hint = f"{hint}, or choose a boundary from 1 to {shape.exact - 2}"
        raise UnsupportedArchitectureError(
            f"this {shape.arch} model needs no conversion: the last"
            f" {shape.n_layer - shape.exact} of its {shape.n_layer} layers reuse the K/V of earlier"
            " layers, so context tokens already skip these layers without any loss",
            hint,
        )


def require_fit(plans: Sequence[Plan]) -> None:
    """Raise PlanError if the plans need fitted projections but none can be fitted."""
    if all(plan.projection == Projection.OWN for plan in plans) and any(
        plan.n_skipped > 1 for plan in plans
    ):
        skipping = skipping_of(plans[0].shape)
        why = skipping.no_fit or f"a fit requires boundary {skipping.fits_from} or higher"
        raise PlanError(
            f"no projections can be fitted for this {plans[0].shape.arch} model: {why}",
            "use the layers' own projections",
            cause="no-fit",
        )
