"""A conversation on a screen: sends questions to a ChatSession and shows its answers."""

import re
from collections.abc import Callable, Mapping
from functools import partial
from itertools import chain
from typing import Any

from pop_converter.base.errors import PopError
from pop_local.engine.chat_messages import TurnStats
from pop_local.engine.context_full import ContextFullError
from pop_local.engine.images.pictures import Picture
from pop_local.engine.learning.learned_fit import Fitter, LearnedFit
from pop_local.engine.model import PopModel
from pop_local.engine.sessions.chat_session import ChatSession, Stream
from pop_local.measure.full_cost import FullCosts
from pop_local.texts.document_readers import Document
from pop_local.ui.chat.overflow import ask_for_room, least_answer
from pop_local.ui.chat.screen import Screen
from pop_local.ui.ctrl_c import CtrlC, deferred_interrupt
from pop_local.ui.views.stats import stats_line

WARN_SHARE = 0.8
# Values whose spelling matters: four characters or more with a digit, e-mail addresses, paths.
_EXACT_STRING = re.compile(r"\d[\w.,:/-]{3,}|\w{3,}\d|\w@\w|/\w+/\w")
_OFFER = "A pruned prompt may misspell numbers, names and paths: /full on reads all tokens in full."


# Opens a model by name (None: the current one) with a context in tokens (None: the option's).
ModelOpener = Callable[[str | None, int | None], PopModel]
# Returns the calibration of a model, None if it does not learn.
MakeTeacher = Callable[[PopModel], Fitter | None]
# ChatSession's stream, retry or edit, which take the options of an answer.
Ask = Callable[..., Stream]


class Dialogue:
    """A session with its sampling options and the attachments of the next question."""

    def __init__(
        self,
        model: PopModel,
        open_model: ModelOpener,
        screen: Screen,
        *,
        system: str = "",
        sampling: Mapping[str, Any],
        refill: str = "off",
        teach: MakeTeacher = lambda model: None,
    ) -> None:
        """`refill`: one of ui.chat.refill.MODES."""
        self.model = model
        self.session: ChatSession = model.session(system=system)
        self.costs = _costs(model)
        self._teach = teach
        self.teacher = teach(model)
        self.screen = screen
        self._refill = refill
        self.sampling = dict(sampling)
        self.documents: list[Document] = []
        self.pictures: list[Picture] = []
        self.has_failed = False
        # The name of the saved session, which /save replaces without confirmation, or "".
        self.saved_as = ""
        self._open_model = open_model
        self._name: str | None = None
        self._is_warned = self._is_offered = False

    # The model

    @property
    def refill(self) -> str:
        """When cached rows are refilled, one of ui.chat.refill.MODES."""
        return self._refill

    @refill.setter
    def refill(self, mode: str) -> None:
        self._refill = mode
        self._keep_states()

    def _keep_states(self) -> None:
        self.model.engine.set_refill(self._refill != "off")

    def reopen(self, name: str | None, n_ctx: int | None) -> None:
        """Continue with another model or context. Raises PopError and changes nothing then."""
        name = name or self._name
        opened = self._open_model(name, n_ctx)
        self._name = name
        before, self.model, self.costs = self.model, opened, _costs(opened)
        self.session.model = opened
        self.teacher = self._teach(opened)
        # A model that cannot be pruned is always off, which is not the user's choice.
        if before.engine.pruning.can_switch and self.model.engine.pruning.can_switch:
            self.model.engine.set_mode(before.engine.pruning.mode)
        before.close()
        self._keep_states()
        self._is_warned = False

    def swap_sidecar(self, lesson: LearnedFit) -> None:
        """Prune by a learned fit from now on, and report it."""
        try:
            self.model.swap_sidecar(lesson.sidecar)
        except PopError as error:
            self.screen.note(f"{lesson} It takes effect at the next start: {error.message}.")
            return
        self.costs = _costs(self.model)
        self._keep_states()
        self.screen.note(f"{lesson} /full on disables it.")

    def enlarge(self, n_ctx: int) -> bool:
        """Reopen the model with a larger context. Return False if that fails."""
        try:
            self.reopen(None, n_ctx)
        except PopError as error:
            self.fail(error)
            return False
        self.screen.note(f"The context now has {self.model.engine.context.n_ctx:,} tokens.")
        return True

    # The conversation

    def resume(self, session: ChatSession, saved_as: str) -> None:
        self.forget()
        self.session, self.saved_as = session, saved_as

    def forget(self) -> None:
        self.session.forget()
        self.documents.clear()
        self.pictures.clear()
        self.saved_as = ""
        self._is_warned = False

    def ask(self, question: str) -> None:
        documents, self.documents = self.documents, []
        pictures, self.pictures = self.pictures, []
        ask = partial(self.session.stream, question, documents=documents, images=pictures)
        self.answer(ask)

    def answer(self, ask: Ask) -> None:
        """Show an answer, of which Ctrl-C or a failure keeps the first part.

        Raises KeyboardInterrupt for Ctrl-C if the lines are piped.
        """
        interrupt = CtrlC()
        try:
            with deferred_interrupt() as interrupt:
                self._show(ask, interrupt)
        except KeyboardInterrupt:
            interrupt.asked = True
            self.screen.note("Stopped.")
        except ContextFullError as error:
            if self._make_room(error):
                self.answer(self.session.retry)
                return
            self.has_failed = True
        except PopError as error:
            self.fail(error)
        if self.session.dropped is None:
            self._warn_when_full()
        else:
            self.screen.note("The question was dropped; /retry asks it again.")
        if interrupt.asked and not self.screen.is_typed:
            raise KeyboardInterrupt

    def fail(self, error: PopError) -> None:
        self.has_failed = True
        self.screen.error(error)

    def refuse(self, line: str) -> None:
        """Show why a command has no effect."""
        self.has_failed = True
        self.screen.note(line)

    def _show(self, ask: Ask, interrupt: CtrlC) -> None:
        with self.screen.reading() as advance:
            stream = ask(
                on_prefill=advance,
                should_stop=lambda: interrupt.asked,
                min_answer=least_answer(
                    self.sampling.get("max_tokens"), self.model.engine.context.n_ctx
                ),
                ends_repeats=True,
                **self.sampling,
            )
            first = next(stream, "")
        try:
            for piece in filter(None, chain([first], stream)):
                self.screen.text(piece)
        finally:
            if stream.text:
                self.screen.end_answer()
        stats = stream.stats
        if stats is None:
            return
        if stats.n_decoded > 0:
            self.costs.record(stats)
        self.screen.note(stats_line(stats))
        self._offer_full(stream.text, stats)

    def _offer_full(self, answer: str, stats: TurnStats) -> None:
        """Offer /full once, after an exact string from a cache that is not exact.

        A file whose look-ups were measured without a loss needs no offer.
        """
        meta = self.model.engine.context.meta
        found = meta and meta.measured
        is_lossless = bool(found and found.lookups_n and not found.lookups_lost)
        is_exact = not self.model.engine.pruning.boundary or stats.n_exact >= stats.n_prompt
        if not (is_exact or is_lossless or self._is_offered) and _EXACT_STRING.search(answer):
            self._is_offered = True
            self.screen.note(_OFFER)

    def _make_room(self, error: ContextFullError) -> bool:
        n_dropped, n_ctx = ask_for_room(self.screen, self.session, error)
        if n_ctx:
            return self.enlarge(n_ctx)
        if n_dropped:
            self.session.forget_oldest(n_dropped)
            self.saved_as = ""
        return n_dropped > 0

    def _warn_when_full(self) -> None:
        if not self.session.answer_stats:
            return
        last, n_ctx = self.session.answer_stats[-1], self.model.engine.context.n_ctx
        n_used = last.n_prompt + last.n_decoded
        is_full = n_used >= WARN_SHARE * n_ctx
        if is_full and not self._is_warned:
            self.screen.warn(
                f"The context is {n_used / n_ctx:.0%} full ({n_used:,} of {n_ctx:,} tokens):"
                " /clear starts over, /undo drops the last turn, --ctx sets a larger context."
            )
        self._is_warned = is_full


def _costs(model: PopModel) -> FullCosts:
    pruning = model.engine.pruning
    return FullCosts(model.engine.context.macs, pruning.boundary or pruning.exact or None)
