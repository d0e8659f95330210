"""Messages of a conversation, chunks of an answer, and its figures."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

from pop_local.engine.images.pictures import Picture

Role = Literal["system", "user", "assistant", "tool"]
FinishReason = Literal["stop", "length", "interrupted"]
PrefillKind = Literal["pruned", "exact", "short", "full"]


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
    def reading(self) -> PrefillKind:
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
