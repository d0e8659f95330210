"""The conversation under way: asks the model, shows what it says, keeps what was said.

It knows neither the terminal nor llama.cpp: answers come from a ChatModel, and what is to be seen
goes to a Screen.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from converter.errors import PopError
from pop_local.engine.llama.backend import Mode
from pop_local.engine.sessions.conversation import Conversation, Document, Turn
from pop_local.engine.turn import Chunk, ContextFullError, Message, TurnStats
from pop_local.measure.full_cost import FullCosts
from pop_local.ui.chat.overflow import make_room
from pop_local.ui.chat.screen import Screen, showing_prefill
from pop_local.ui.interrupt import Interrupt, deferred_interrupt
from pop_local.ui.progress import Advance
from pop_local.ui.views.stats import stats_line, unread_line

# A prompt that leaves less room for its answer does not fit.
ANSWER_TOKENS = 128
WARN_SHARE = 0.8


class ChatModel(Protocol):
    """What a conversation needs of an engine's model."""

    @property
    def boundary(self) -> int: ...

    @property
    def recommended(self) -> dict[str, float]: ...

    model_path: str
    metadata: dict[str, str]
    pop_mode: Mode

    def set_pop(self, mode: Mode) -> None: ...

    def n_ctx(self) -> int: ...

    def chat_turn(self, messages: Sequence[Message], **options: Any) -> Iterator[Chunk]: ...

    def count_prompt(self, messages: Sequence[Message]) -> int: ...

    def tokenize(self, text: bytes, add_bos: bool, special: bool) -> list[int]: ...

    def detokenize(self, tokens: list[int]) -> bytes: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Opened:
    """A model, and what is known of the cost of reading with it."""

    model: Any
    costs: FullCosts


# By name (None: the first one) and context in tokens (None: by default).
OpenModel = Callable[[str | None, int | None], Opened]


def least_answer(max_tokens: int | None, n_ctx: int) -> int:
    """The room that an answer needs at least, in tokens."""
    return min(max_tokens or ANSWER_TOKENS, ANSWER_TOKENS, max(1, n_ctx // 8))


class Chat:
    """What was said, what is attached, how it is sampled."""

    def __init__(
        self,
        opened: Opened,
        screen: Screen,
        *,
        system: str = "",
        sampling: Mapping[str, Any],
        open_model: OpenModel,
    ) -> None:
        self.model: ChatModel = opened.model
        self.costs = opened.costs
        self.screen = screen
        self.sampling = dict(sampling)
        self.conversation = Conversation(system)
        self.documents: list[Document] = []
        self.dropped: Turn | None = None
        self.stats: list[TurnStats] = []
        self.has_failed = False
        self.session = ""
        self._open_model = open_model
        self._name: str | None = None
        self._is_warned = False

    # The model

    def pop_state(self) -> str:
        """Whether prompts are pruned, in a sentence."""
        if not self.model.boundary:
            return "Pruning is not possible: this model is not converted."
        if self.model.pop_mode is Mode.OFF:
            return "Pruning is off: prompts are read in full."
        return f"Pruning is on: context tokens skip the layers from {self.model.boundary} on."

    def reopen(self, name: str | None, n_ctx: int | None) -> None:
        """Another model or context; the conversation stays. Raises PopError, nothing changed."""
        name = name or self._name
        opened = self._open_model(name, n_ctx)
        self._name = name
        before, self.model, self.costs = self.model, opened.model, opened.costs
        # Off by choice, not for want of anything to prune by.
        if before.boundary and before.pop_mode is Mode.OFF and self.model.boundary:
            self.model.set_pop(Mode.OFF)
        before.close()
        self._is_warned = False

    def warn_of_base(self) -> None:
        """If it is a model that was never taught to answer."""
        if "tokenizer.chat_template" not in self.model.metadata:
            self.screen.warn(
                "This is a base model without a chat template:"
                " it continues text rather than answers."
            )

    def count_tokens(self, text: str) -> int:
        return len(self.model.tokenize(text.encode(), add_bos=False, special=False))

    @property
    def n_used(self) -> int:
        """Tokens of the conversation and of what is attached to the next question."""
        n_said = self.model.count_prompt(self.conversation.messages) if self.has_messages else 0
        return n_said + sum(self.count_tokens(document.text) for document in self.documents)

    @property
    def has_messages(self) -> bool:
        return bool(self.conversation.messages)

    @property
    def n_answer(self) -> int:
        """The room that an answer needs at least."""
        return least_answer(self.sampling.get("max_tokens"), self.model.n_ctx())

    # The conversation

    def forget(self) -> None:
        self.conversation = replace(self.conversation, turns=())
        self.documents.clear()
        self.stats.clear()
        self.dropped = None
        self.session = ""
        self._is_warned = False

    def ask(self, question: str) -> None:
        turn = Turn(question, tuple(self.documents))
        self.documents.clear()
        self.answer(turn)

    def answer(self, turn: Turn) -> None:
        """Answers a turn after those before it; one that gets no answer is kept for /retry."""
        self.dropped = turn  # also when something unforeseen ends this
        said = ""
        try:
            said = self._said(turn)
        except ContextFullError as error:
            if make_room(self, turn, error):
                self.answer(turn)
                return
            self.has_failed = True
        except PopError as error:
            self.fail(error)
        # What was said before Ctrl-C stays said, and its KV cache stays useful.
        if said:
            self.dropped = None
            self.conversation = self.conversation.plus(replace(turn, answer=said))
            self._warn_when_full()
        else:
            self.screen.note("The question is dropped; /retry asks it again.")

    def fail(self, error: PopError) -> None:
        self.has_failed = True
        self.screen.error(error)

    def _said(self, turn: Turn) -> str:
        """The answer, whatever ended it."""
        said: list[str] = []
        try:
            with deferred_interrupt() as interrupt:
                self._show(self.conversation.plus(turn).messages, said, interrupt)
        except KeyboardInterrupt:
            self.screen.note("Stopped.")
        except ContextFullError:
            raise
        except PopError as error:
            if not said:
                raise
            self.fail(error)
        return "".join(said)

    def _show(self, messages: Sequence[Message], said: list[str], interrupt: Interrupt) -> None:
        def start(advance: Advance) -> Iterator[Chunk]:
            return self.model.chat_turn(
                messages,
                on_prefill=advance,
                should_stop=lambda: interrupt.asked,
                min_answer=self.n_answer,
                **self.sampling,
            )

        stats: TurnStats | None = None
        try:
            for chunk in showing_prefill(self.screen, start):
                stats = chunk.stats
                if chunk.text:
                    said.append(chunk.text)
                    self.screen.text(chunk.text)
        finally:
            if said:
                self.screen.end_answer()
        if stats is not None:
            self._finish(stats)

    def _finish(self, stats: TurnStats) -> None:
        if stats.n_decoded == 0:
            self.screen.note(unread_line(stats))
            return
        self.costs.record(stats)
        self.stats.append(stats)
        self.screen.note(stats_line(stats))

    def _warn_when_full(self) -> None:
        """Once, until it is emptier again."""
        if not self.stats:
            return
        n_used, n_ctx = self.stats[-1].n_prompt + self.stats[-1].n_decoded, self.model.n_ctx()
        is_full = n_used >= WARN_SHARE * n_ctx
        if is_full and not self._is_warned:
            self.screen.warn(
                f"The context is {n_used / n_ctx:.0%} full ({n_used:,} of {n_ctx:,} tokens):"
                " /clear starts anew, /undo drops the last turn, --ctx gives a larger one."
            )
        self._is_warned = is_full
