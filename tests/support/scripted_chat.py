"""A model with scripted answers, and a screen that records its output."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

from pop_base.errors import PopError
from pop_local.engine.answer import ContextFullError
from pop_local.engine.chat_messages import Chunk, Message, TurnStats
from pop_local.engine.llama.backend import Mode
from pop_local.engine.sessions.chat_session import ChatSession
from pop_local.engine.sessions.conversation import Conversation
from pop_local.engine.turn_options import TurnOptions
from pop_local.ui.chat.dialogue import Dialogue
from pop_local.ui.chat.repl import converse
from pop_local.ui.chat.screen import Screen
from pop_local.ui.hints import hint_of

STATS = TurnStats(
    n_prompt=1200,
    n_cached=200,
    n_pruned=983,
    n_full=17,
    ttft_s=0.5,
    prefill_s=0.25,
    n_decoded=11,
    decode_s=0.5,
    finish_reason="stop",
)
STATS_LINE = (
    "# prompt 1,200 tokens (200 cached, 983 with fast reading, 17 in full)"
    " · TTFT 0.50 s · prefill 4,000 tokens/s · decode 20.0 tokens/s"
)


Step = str | TurnStats | BaseException


class ScriptedModel:
    """Yields scripted answers; a step is text, statistics, or an exception to raise.

    Each word is one token. Prompts that do not fit are refused, as in the engine.
    """

    def __init__(self, *answers: Sequence[Step], n_ctx: int = 4096) -> None:
        self.answers = list(answers)
        self.asked: list[list[Message]] = []
        self.options = TurnOptions()
        self.is_closed = False
        names = {"general.architecture": "llama", "general.name": "Scripted"}
        self.settings = SimpleNamespace(mode=Mode.CONTEXT, boundary=20, exact=0, can_switch=True)
        self.engine = SimpleNamespace(
            sequences=[
                SimpleNamespace(
                    cache=SimpleNamespace(n_tokens=0),
                    refiller=SimpleNamespace(n_refilled=0),
                    settings=self.settings,
                )
            ],
            context=SimpleNamespace(
                n_ctx=n_ctx,
                files=SimpleNamespace(
                    header=names,
                    path="model.gguf",
                    n_ctx_train=8192,
                    no_refill="",
                    meta=None,
                    shape=SimpleNamespace(n_layer=30),
                    macs=lambda n_prompt, boundary, n_full: 1,
                ),
                vocabulary=SimpleNamespace(
                    tokenize=self._tokenize,
                    detokenize=lambda tokens: " ".join(self._words[token] for token in tokens),
                ),
            ),
            prompter=SimpleNamespace(
                has_template=True,
                can_see=False,
                conversation=ScriptedPrompt,
                count_picture=len,
            ),
            options=SimpleNamespace(mmproj=None),
            recommended={},
            set_mode=self._set_mode,
            set_refill=lambda is_on: None,
            answer=self._answer,
        )

    def convert(self, *, boundary: int) -> None:
        """Make it a model with another boundary, or without one (0)."""
        settings = self.settings
        settings.boundary, settings.can_switch = boundary, bool(boundary or settings.exact)
        settings.mode = Mode.CONTEXT if settings.can_switch else Mode.OFF

    def _set_mode(self, mode: Mode, *, keeps_exact: bool = False) -> None:
        if not self.settings.can_switch:
            raise PopError("model.gguf has no pruning keys", "convert it first")
        self.settings.mode = mode

    def _answer(
        self, render: Callable[[], "ScriptedPrompt"], options: TurnOptions
    ) -> Iterator[Chunk]:
        prompt, n_ctx = render(), self.engine.context.n_ctx
        if len(prompt) + options.min_answer > n_ctx:
            raise ContextFullError(len(prompt), options.min_answer, n_ctx)
        self.asked.append(prompt.messages)
        self.options = options
        assert options.on_prefill is not None
        options.on_prefill(512, 1000)
        for step in self.answers.pop(0):
            if isinstance(step, BaseException):
                raise step
            yield Chunk("", step) if isinstance(step, TurnStats) else Chunk(step)

    def _tokenize(self, text: str) -> list[int]:
        self._words = text.split()
        return list(range(len(self._words)))

    def session(self, system: str = "") -> ChatSession:
        return ChatSession(cast(Any, self.engine), Conversation(system))

    def close(self) -> None:
        self.is_closed = True


class ScriptedPrompt:
    """A conversation whose tokens are its words."""

    def __init__(self, messages: Sequence[Message]) -> None:
        self.messages = list(messages)

    def __len__(self) -> int:
        return sum(len(message.content.split()) for message in self.messages)


class Transcript(Screen):
    """A Screen and a line reader in one; `#` marks lines outside the answer.

    `?` marks a question of the program, which the next line answers.
    """

    is_typed = True

    def __init__(self, *lines: str | BaseException) -> None:
        self.lines = list(lines)
        self.shown = ""

    def read_line(self) -> str:
        if not self.lines:
            raise EOFError
        line = self.lines.pop(0)
        if isinstance(line, BaseException):
            raise line
        self.shown += f"> {line}\n"
        return line

    def text(self, piece: str) -> None:
        self.shown += piece

    def end_answer(self) -> None:
        self.shown += "\n"

    def note(self, line: str) -> None:
        self.shown += f"# {line}\n"

    def warn(self, line: str) -> None:
        self.shown += f"* {line}\n"

    def error(self, error: PopError) -> None:
        self.shown += f"! {error.message}; {hint_of(error)}\n"

    def choose(self, question: str, choices: Mapping[str, str]) -> str | None:
        self.shown += f"? {question}\n"
        self.shown += "".join(f"?   {key}  {words}\n" for key, words in choices.items())
        return self.read_line() if self.lines else None

    @contextmanager
    def reading(self) -> Iterator[Any]:
        yield lambda done, total: self.note(f"reading {done} of {total}")


def scripted_chat(
    model: ScriptedModel,
    screen: Any,
    *,
    system: str = "",
    sampling: Mapping[str, Any] | None = None,
    others: Mapping[str | int, ScriptedModel] | None = None,
) -> Dialogue:
    """Return a chat; `others` are further models that it can open, by name or by context."""

    def open_model(name: str | None, n_ctx: int | None) -> Any:
        result = (others or {}).get(name or n_ctx or 0)
        if result is None:
            raise PopError(f"there is no model {name or n_ctx}")
        return result

    return Dialogue(
        cast(Any, model),
        open_model,
        screen,
        system=system,
        sampling={"seed": 123456789} if sampling is None else sampling,
    )


def talk(model: ScriptedModel, *lines: str | BaseException, **options: Any) -> list[str]:
    """Return a conversation's transcript; `options` are passed to scripted_chat."""
    transcript = Transcript(*lines)
    converse(scripted_chat(model, transcript, **options), transcript.read_line)
    return transcript.shown.splitlines()


def figures(**changed: Any) -> TurnStats:
    """Return STATS with the changed values."""
    return replace(STATS, **changed)
