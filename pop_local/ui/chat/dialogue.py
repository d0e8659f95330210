"""A chat in the terminal: the conversation, its model, attachments, and streamed answers."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from itertools import chain
from typing import Any

from pop_base.errors import PopError
from pop_local.engine.answer import ContextFullError
from pop_local.engine.images.pictures import Picture
from pop_local.engine.llama.backend import Mode
from pop_local.engine.model import PopModel
from pop_local.engine.sessions.chat_session import ChatSession, Stream
from pop_local.texts.document_readers import Document
from pop_local.ui.chat.overflow import answer_reserve, larger_ctx
from pop_local.ui.chat.screen import Screen
from pop_local.ui.ctrl_c import CtrlC, deferred_interrupt
from pop_local.ui.views.stats import stats_line

# Opens a model by name (None: the current model) with a context in tokens (None: the default).
ModelOpener = Callable[[str | None, int | None], PopModel]
# ChatSession's stream, retry or edit, which are called with an answer's options.
Ask = Callable[..., Stream]


class Dialogue:
    """A session with its sampling options and the attachments for the next question.

    If `refill` is "idle", pruned rows are completed while the user types (default: "off"). /save
    overwrites the session named `saved_as` without confirmation.
    """

    def __init__(
        self,
        model: PopModel,
        open_model: ModelOpener,
        screen: Screen,
        *,
        system: str = "",
        sampling: Mapping[str, Any],
        refill: str = "off",
    ) -> None:
        self.model = model
        self.session: ChatSession = model.session(system=system)
        self.screen = screen
        self.refill = refill
        self.sampling = dict(sampling)
        self.documents: list[Document] = []
        self.pictures: list[Picture] = []
        self.has_failed = False
        self.saved_as = ""
        self._open_model = open_model
        self._name: str | None = None

    # The model

    def reopen(self, name: str | None, n_ctx: int | None) -> None:
        """Replace the model. If `name` is None, replace only the context and keep the cache.

        If opening fails, the current model stays open.
        """
        state = None
        if name is None and self.model.engine.sequences[0].cache.n_tokens:
            with suppress(PopError):  # the recurrent state is ahead of the tokens
                state = self.model.engine.sequences[0].states.save()
        name = name or self._name
        opened = self._open_model(name, n_ctx)
        self._name = name
        before, self.model = self.model, opened
        self.session.engine = opened.engine
        # A model that cannot be pruned is always in mode OFF, regardless of the user's choice.
        settings = before.engine.sequences[0].settings
        if settings.can_switch and opened.engine.sequences[0].settings.can_switch:
            opened.engine.set_mode(settings.mode)
        if state is not None:
            with suppress(PopError):  # the prompt is then read again with the next question
                opened.engine.sequences[0].states.restore(state)
        before.close()
        self.model.engine.set_refill(self.refill != "off")

    def enlarge(self, n_ctx: int) -> bool:
        """Reopen the model with a larger context. Return False if the model cannot be reopened."""
        try:
            self.reopen(None, n_ctx)
        except PopError as error:
            self.fail(error)
            return False
        self.screen.note(f"The context length is now {self.model.engine.context.n_ctx:,} tokens.")
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

    def ask(self, question: str) -> None:
        documents, self.documents = self.documents, []
        pictures, self.pictures = self.pictures, []
        ask = partial(self.session.stream, question, documents=documents, images=pictures)
        self.answer(ask)

    def answer(self, ask: Ask) -> None:
        """Show an answer. After Ctrl-C or a failure, the conversation keeps the text shown so far.

        Raises KeyboardInterrupt after Ctrl-C if the input is piped.
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
        if self.session.dropped is not None:
            self.screen.note(
                "The question and its attachments were dropped. To ask again, type /retry."
            )
        if interrupt.asked and not self.screen.is_typed:
            raise KeyboardInterrupt

    def fail(self, error: PopError) -> None:
        self.has_failed = True
        self.screen.error(error)

    def refuse(self, line: str) -> None:
        """Show why a slash command was refused."""
        self.has_failed = True
        self.screen.note(line)

    def _show(self, ask: Ask, interrupt: CtrlC) -> None:
        n_ctx = self.model.engine.context.n_ctx
        with self.screen.reading() as advance:
            stream = ask(
                on_prefill=advance,
                should_stop=lambda: interrupt.asked,
                min_answer=answer_reserve(self.sampling.get("max_tokens"), n_ctx),
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
        if stream.stats is not None:
            self.screen.note(stats_line(stream.stats))

    def _make_room(self, error: ContextFullError) -> bool:
        """Let the user choose how to make room for the prompt. Return False if nothing changed."""
        n_turns = len(self.session.conversation.turns)
        n_drop = next((n for n in range(1, n_turns + 1) if self._fits(n, error)), 0)
        n_larger = larger_ctx(self.model.engine, error.n_prompt + error.n_answer)
        choices = {}
        if n_drop:
            choices["d"] = f"drop the oldest {'turn' if n_drop == 1 else f'{n_drop} turns'}"
        if n_larger:
            choices["l"] = f"use a larger context (--ctx {n_larger})"
        choices["x"] = "drop this question"
        choice = self.screen.choose(
            f"The context is {error.n_short:,} tokens too small: the prompt has"
            f" {error.n_prompt:,} tokens, an answer needs {error.n_answer:,} or more, and the"
            f" context has {error.n_ctx:,}.",
            choices,
        )
        if choice == "l" and n_larger:
            return self.enlarge(n_larger)
        if choice == "d":
            self.session.forget_oldest(n_drop)
            self.saved_as = ""
        return choice == "d"

    def _fits(self, n_dropped: int, error: ContextFullError) -> bool:
        """Return True if the prompt fits without the oldest `n_dropped` turns."""
        shorter = self.session.conversation.without_oldest(n_dropped)
        question = [] if self.session.dropped is None else self.session.dropped.messages
        n_prompt = len(self.model.engine.prompter.conversation([*shorter.messages, *question]))
        return n_prompt + error.n_answer <= error.n_ctx


def pruning_state(model: PopModel) -> str:
    """Return a sentence that states whether prompt tokens skip layers."""
    pruning = model.engine.sequences[0].settings
    is_off = pruning.mode is Mode.OFF
    if pruning.exact and is_off:
        return "Exact skipping is off: prompts run through all layers. The answers stay the same."
    if pruning.exact:
        return (
            f"Exact skipping is on: prompt tokens skip layers {pruning.exact} and up. The answers"
            " stay the same."
        )
    if not pruning.boundary:
        return "Fast reading is not available because this model has not been converted."
    if is_off:
        return "Fast reading is off: no layers are skipped. To use fast reading, type /full off."
    n_layer = model.engine.context.files.shape.n_layer
    return (
        f"Fast reading is on: it skips {n_layer - pruning.boundary} of {n_layer} layers with a"
        " small quality loss. To read prompts in full, type /full on."
    )


def warn_of_base_model(screen: Screen, model: PopModel) -> None:
    if not model.engine.prompter.has_template:
        screen.warn(
            "This base model has no chat template, so it continues your text instead of answering."
        )


def warn_of_hidden_pictures(chat: Dialogue) -> None:
    if chat.session.conversation.pictures and not chat.model.engine.prompter.can_see:
        chat.screen.warn(
            "This model has no mmproj, so it cannot read the conversation's images. To remove the"
            " images, type /undo or /clear."
        )
