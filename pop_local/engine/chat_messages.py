"""Conversation messages, answer chunks, and statistics."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal

from pop_local.engine.images.pictures import Picture

Role = Literal["system", "user", "assistant", "tool"]
FinishReason = Literal["stop", "length", "interrupted"]
PrefillKind = Literal["pruned", "exact", "short", "full"]


@dataclass(frozen=True)
class ToolCall:
    """A function call that the model requested. `arguments`: JSON text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Message:
    """One message of a conversation.

    `pictures`: (offset, image) pairs in ascending order. Each image precedes the character at its
    offset in `content`. `calls`: an assistant message's function calls. `call_id`: the ID of the
    call that a tool message answers.
    """

    role: Role
    content: str
    pictures: tuple[tuple[int, Picture], ...] = ()
    calls: tuple[ToolCall, ...] = ()
    call_id: str = ""


@dataclass(frozen=True)
class TurnStats:
    """Statistics for one answer. n_prompt = n_cached + n_pruned + n_skipped_exact + n_full.

    n_cached: prompt tokens already in the cache. n_stale: cached tokens whose K/V are approximate
    because an earlier part of the prompt changed. n_pruned: prompt tokens that stopped at the
    boundary layer. n_skipped_exact: prompt tokens that skipped the layers from exact_layer onward,
    without loss. n_full: prompt tokens that ran through all layers, including n_deep deep rows.
    n_exact: prompt tokens whose K/V match the full model's. n_refilled: cached tokens refilled
    since the previous answer. n_image: image rows in the prompt, including cached ones. n_decoded:
    sampled tokens, including the last one.

    ttft_s: seconds to the first token, including templating and tokenization. encode_s: seconds
    spent encoding images. prefill_s: seconds spent reading the prompt, excluding encode_s.
    decode_s: seconds from the first to the last sampled token, excluding time spent in the caller.

    is_short: whether pruning was on but the uncached part of the prompt was too short to prune.
    fit: the source of the pruned tokens' projections, or "". stop: the stop string that ended the
    answer, or "". is_repeating: whether the answer ended because it repeated itself.
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
    n_stale: int = 0
    n_image: int = 0
    encode_s: float = 0.0
    fit: str = ""
    stop: str = ""
    is_repeating: bool = False

    @property
    def reading(self) -> PrefillKind:
        """The prefill mode, or "short" if the prompt was too short to prune."""
        if self.n_pruned:
            return "pruned"
        if self.n_skipped_exact:
            return "exact"
        return "short" if self.is_short else "full"

    @property
    def left(self) -> str:
        """A summary of how pop-local read the prompt's tokens."""
        stale = f" ({self.n_stale:,} stale)" if self.n_stale else ""
        counts = [f"{self.n_cached:,} cached{stale}"] if self.n_cached else []
        if self.n_skipped_exact:
            skipped = f"{self.n_skipped_exact:,} read losslessly by skipping layers"
            return ", ".join([*counts, f"{skipped} {self.exact_layer} and up"])
        if self.n_pruned:
            counts.append(f"{self.n_pruned:,} with fast reading")
        short = ["too short for fast reading"] if self.reading == "short" else []
        return ", ".join([*counts, f"{self.n_full:,} in full", *short])

    @property
    def n_evaluated(self) -> int:
        return self.n_pruned + self.n_skipped_exact + self.n_full

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens evaluated per second (0 if all tokens were cached)."""
        return _rate(self.n_evaluated, self.prefill_s)

    @property
    def decode_tokens_per_s(self) -> float:
        """Decoded tokens per second, excluding the first token, which counts toward TTFT."""
        return _rate(self.n_decoded - 1, self.decode_s)


@dataclass(frozen=True)
class SessionStats:
    """Totals for a conversation (see TurnStats). n_answers: answers with at least one token."""

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


@dataclass(frozen=True)
class TokenLogprob:
    """A token and its log probability (base e). `top`: the most likely tokens, best first."""

    id: int
    text: bytes
    logprob: float
    top: "tuple[TokenLogprob, ...]" = ()


@dataclass(frozen=True)
class Chunk:
    """A piece of an answer. The last chunk contains the statistics, and its text may be empty.

    `logprobs`: log probabilities, if requested. `embedding`: the embedding, if requested instead of
    an answer. `progress`: token counts and elapsed time during prefill, as in llama-server's
    `prompt_progress`.
    """

    text: str
    stats: TurnStats | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    embedding: tuple[float, ...] = ()
    progress: Mapping[str, int] | None = None


def _rate(n_tokens: int, seconds: float) -> float:
    return n_tokens / seconds if n_tokens > 0 and seconds > 0 else 0.0
