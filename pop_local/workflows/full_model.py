"""What the full model makes of held-out text and of facts: read when first asked for, then kept."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from converter.plan import Plan
from pop_local.measure.heldout import room
from pop_local.measure.quality import QualitySettings, Reference, read_reference
from pop_local.measure.recall import RecallReference, RecallSettings
from pop_local.models.stored import ModelFiles
from pop_local.workflows.events import Watch
from pop_local.workflows.measuring import opened_to_measure
from pop_local.workflows.options import Hardware


@dataclass(frozen=True)
class FullModel:
    """The model at `path`; sink and tail are those of `plan`, its boundary does not matter.

    `settings` say how much is read, fewer windows where the text has no more; `n_documents` are
    asked for facts. Both raise PopError and StoppedError where they are read, the first time.
    """

    path: Path
    plan: Plan
    settings: QualitySettings
    hardware: Hardware
    watch: Watch
    n_documents: int

    @cached_property
    def reference(self) -> Reference:
        """What it says of the held-out text."""
        self.watch.on_note("Reading held-out text in full")
        files, settings = ModelFiles(self.path), self.settings
        with opened_to_measure(files, self.plan, self.hardware, self.watch) as (model, tokens):
            n_found = room(tokens, settings.n_context + settings.n_continuation)
            settings = replace(settings, n_windows=min(settings.n_windows, max(1, n_found)))
            return read_reference(model, tokens, settings, self.watch.stage("Reading in full"))

    @cached_property
    def recall(self) -> RecallReference:
        """How often it finds facts."""
        files = ModelFiles(self.path)
        with opened_to_measure(files, self.plan, self.hardware, self.watch) as (model, _):
            advance = self.watch.stage("Asking for facts in full")
            return RecallReference.read(model, RecallSettings(self.n_documents), advance)
