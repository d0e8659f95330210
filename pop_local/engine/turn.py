"""A turn of a conversation: its messages and options, pieces of text, then the figures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Literal, TypedDict

from pop_local.engine.decode.grammar import Grammar
from pop_local.engine.images.pictures import Picture
from pop_local.engine.tools.form import CallForm

Role = Literal["system", "user", "assistant", "tool"]
FinishReason = Literal["stop", "length", "interrupted"]
Reading = Literal["pruned", "exact", "short", "full"]


@dataclass(frozen=True)
class ToolCall:
    """A function that the model wants called; `arguments` is a JSON text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Message:
    """One message of a conversation.

    `pictures`: (offset, picture) pairs in order: each stands before that character of `content`.
    `calls`: what an assistant called. `call_id`, of a tool's message: the call that it answers.
    """

    role: Role
    content: str
    pictures: tuple[tuple[int, Picture], ...] = ()
    calls: tuple[ToolCall, ...] = ()
    call_id: str = ""


@dataclass(frozen=True)
class TurnOptions:
    """How to answer. `max_tokens`: None for as many as the context holds. `seed`: None for chance.
    `min_answer`: a prompt that leaves less room than this in the context is a ContextFullError.

    `on_prefill(done, total)` counts the prompt tokens that are not cached, once per batch.
    `should_stop` is asked during the prefill and after each token; an answer that it ends is
    "interrupted" and has its figures all the same. While a long text is split into tokens it raises
    StoppedError. `stops` end the answer and are not part of it.
    `grammar`: a text is GBNF. `calls`: how the answer may call tools, in the place of a grammar.
    `ends_repeats`: an answer that comes to repeat one block ends, where it has no such form.
    `n_top_logprobs`: None for no log probabilities at all; `has_end_logprob`: whether the token
    that ends the answer has one, too. `repeatable`: the prompt is read as if it were new, and
    nothing is refilled meanwhile, so that the same options with a seed, or at temperature 0, give
    the same answer whatever was asked before.
    """

    max_tokens: int | None = None
    min_answer: int = 1
    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    stops: tuple[str, ...] = ()
    grammar: str | Grammar | None = None
    n_top_logprobs: int | None = None
    has_end_logprob: bool = False
    calls: CallForm | None = None
    repeatable: bool = False
    ends_repeats: bool = False
    on_prefill: Callable[[int, int], None] | None = None
    should_stop: Callable[[], bool] | None = None


class AnswerOptions(TypedDict, total=False):
    """The fields of TurnOptions that callers may give; others are as the file recommends."""

    max_tokens: int | None
    min_answer: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repeat_penalty: float
    frequency_penalty: float
    presence_penalty: float
    seed: int | None
    stops: tuple[str, ...]
    grammar: str | Grammar | None
    repeatable: bool
    ends_repeats: bool
    on_prefill: Callable[[int, int], None] | None
    should_stop: Callable[[], bool] | None


@dataclass(frozen=True)
class TurnStats:
    """The figures of one answer; n_prompt = n_cached + n_pruned + n_skipped_exact + n_full.

    n_cached: prompt tokens whose K/V were still there. n_pruned: prompt tokens that stopped at the
    boundary. n_deep: prompt tokens, counted in n_full, that ran all layers because of their
    spelling. n_refilled: cached tokens that were given their depth since the answer
    before. n_image: tokens of the prompt, cached ones among them, that are rows of pictures.
    n_exact: tokens of the prompt whose K/V are the full model's own. n_skipped_exact: prompt tokens
    that left, exactly, at exact_layer, since the layers from it on share the K/V of earlier ones.
    n_full: prompt tokens that ran all layers. n_decoded: sampled tokens, the one that ended the
    answer included. ttft_s: from the question to the first token, templating and tokenising
    included. encode_s: making rows of pictures, which pruning does not touch. prefill_s: reading
    the prompt, without that. decode_s: from the first to the last sampled token, the reader's own
    time left out. is_short: pruning is on, and the prompt (what was not cached of it) too short to
    be pruned. fit: what the projections were fitted on that pruned tokens took, "" for none.
    stop: the stop string that ended the answer, "" for none. is_repeating: it was ended since it
    only repeated itself.
    """

    n_prompt: int
    n_cached: int
    n_pruned: int
    n_full: int
    ttft_s: float
    prefill_s: float
    n_decoded: int
    decode_s: float
    finish_reason: FinishReason
    is_short: bool = False
    n_skipped_exact: int = 0
    exact_layer: int = 0
    n_deep: int = 0
    n_refilled: int = 0
    n_exact: int = 0
    n_image: int = 0
    encode_s: float = 0.0
    fit: str = ""
    stop: str = ""
    is_repeating: bool = False

    @property
    def reading(self) -> Reading:
        """How the prompt was read: with context tokens pruned, or leaving exactly, or in full;
        "short" says why."""
        if self.n_pruned:
            return "pruned"
        if self.n_skipped_exact:
            return "exact"
        return "short" if self.is_short else "full"

    @property
    def left(self) -> str:
        """In words: how many prompt tokens were not read, or did not run all layers."""
        cached = f"{self.n_cached:,} cached, " if self.n_cached else ""
        if self.n_skipped_exact:
            return f"{cached}{self.n_skipped_exact:,} left at layer {self.exact_layer}, exactly"
        deep = f", {self.n_deep:,} deep" if self.n_deep else ""
        short = ": short" if self.reading == "short" else ""
        return f"{cached}{self.n_pruned:,} pruned{deep}{short}"

    @property
    def n_evaluated(self) -> int:
        return self.n_pruned + self.n_skipped_exact + self.n_full

    @property
    def prefill_tokens_per_s(self) -> float:
        """Only the tokens that were evaluated count; it is 0 when none was."""
        return _rate(self.n_evaluated, self.prefill_s)

    @property
    def decode_tokens_per_s(self) -> float:
        """The first token belongs to the prefill; it is 0 when there is no second one."""
        return _rate(self.n_decoded - 1, self.decode_s)


@dataclass(frozen=True)
class SessionStats:
    """The sums over a conversation; fields as in TurnStats. An answer has a token at least."""

    n_answers: int
    n_prompt: int
    n_cached: int
    n_pruned: int
    n_full: int
    n_decoded: int
    prefill_s: float
    decode_s: float
    n_skipped_exact: int = 0
    n_deep: int = 0
    n_refilled: int = 0
    n_image: int = 0
    encode_s: float = 0.0

    @classmethod
    def of(cls, turns: Sequence[TurnStats]) -> "SessionStats":
        summed = [field.name for field in fields(cls) if field.name != "n_answers"]
        return cls(
            n_answers=sum(turn.n_decoded > 0 for turn in turns),
            **{name: sum(getattr(turn, name) for turn in turns) for name in summed},
        )

    @property
    def prefill_tokens_per_s(self) -> float:
        return _rate(self.n_pruned + self.n_skipped_exact + self.n_full, self.prefill_s)

    @property
    def decode_tokens_per_s(self) -> float:
        """The first token of each answer belongs to its prefill."""
        return _rate(self.n_decoded - self.n_answers, self.decode_s)


@dataclass(frozen=True)
class TokenLogprob:
    """A token and its natural log probability; `top`: the likeliest in its place, best first."""

    text: bytes
    logprob: float | None
    top: "tuple[TokenLogprob, ...]" = ()


@dataclass(frozen=True)
class Chunk:
    """A piece of the answer; the last one carries the figures, and perhaps no text.

    `logprobs`: of the piece's tokens, where they were asked for. `embedding`: of the prompt, in the
    place of an answer.
    """

    text: str
    stats: TurnStats | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    embedding: tuple[float, ...] = ()


def _rate(n_tokens: int, seconds: float) -> float:
    return n_tokens / seconds if n_tokens > 0 and seconds > 0 else 0.0
