"""What the full model makes of held-out text and of facts: read when first asked for, then kept."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from pop_converter.popfile.plan import Plan
from pop_local.measure.heldout import room
from pop_local.measure.quality import QualitySettings, Reference, read_reference
from pop_local.measure.recall import RecallReference, RecallSettings
from pop_local.models.stored import ModelFiles
from pop_local.workflows.events import Watch
from pop_local.workflows.measuring import opened_to_measure
from pop_local.workflows.options import Hardware

_NONE = RecallReference(RecallSettings())


@dataclass(frozen=True)
class FullModel:
    """The model at `path`; sink and tail are those of `plan`, its boundary does not matter.

    `settings` say how much is read, fewer windows where the text has no more. What is read for the
    first time may raise PopError and StoppedError.
    """

    path: Path
    plan: Plan
    settings: QualitySettings
    hardware: Hardware
    watch: Watch
    _recalls: dict[int, RecallReference] = field(default_factory=dict)

    @cached_property
    def reference(self) -> Reference:
        """What it says of the held-out text."""
        self.watch.on_note("Reading held-out text in full")
        files, settings = ModelFiles(self.path), self.settings
        with opened_to_measure(files, self.plan, self.hardware, self.watch) as (model, tokens):
            n_found = room(tokens, settings.n_context + settings.n_continuation)
            settings = replace(settings, n_windows=min(settings.n_windows, max(1, n_found)))
            return read_reference(model, tokens, settings, self.watch.stage("Reading in full"))

    def recall(self, n_documents: int) -> RecallReference:
        """How often it finds facts in so many documents; it is asked once about each."""
        if not (found := self._recalls.get(n_documents)):
            fewer = [each for each in self._recalls.values() if len(each.asked) < n_documents]
            before = max(fewer, key=lambda each: len(each.asked), default=_NONE)
            files = ModelFiles(self.path)
            with opened_to_measure(files, self.plan, self.hardware, self.watch) as (model, _):
                advance = self.watch.stage("Asking for facts in full")
                found = self._recalls[n_documents] = before.more(model, n_documents, advance)
        return found
