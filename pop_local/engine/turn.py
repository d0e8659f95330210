"""What goes into a turn of a conversation and what comes out: pieces of text, then the figures."""

from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "user", "assistant"]
FinishReason = Literal["stop", "length", "interrupted"]


@dataclass(frozen=True)
class Message:
    """One message of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True)
class TurnStats:
    """The figures of one answer; n_prompt = n_cached + n_pruned + n_full.

    n_cached: prompt tokens whose K/V were still there. n_pruned: prompt tokens that stopped at the
    boundary. n_full: prompt tokens that ran all layers. n_decoded: sampled tokens, the one that
    ended the answer included. ttft_s: from the question to the first token, templating and
    tokenising included. prefill_s: reading the prompt. decode_s: from the first to the last
    sampled token, the reader's own time left out.
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

    @property
    def prefill_tokens_per_s(self) -> float:
        """Of the tokens that were evaluated; 0 when none was."""
        return _rate(self.n_pruned + self.n_full, self.prefill_s)

    @property
    def decode_tokens_per_s(self) -> float:
        """The first token belongs to the prefill; 0 when there is no second one."""
        return _rate(self.n_decoded - 1, self.decode_s)


@dataclass(frozen=True)
class Likely:
    """A token that might have come, and its natural log probability."""

    text: bytes
    logprob: float


@dataclass(frozen=True)
class TokenLogprob:
    """A token that did come; `top`: the likeliest ones in its place, best first."""

    text: bytes
    logprob: float | None
    top: tuple[Likely, ...] = ()


@dataclass(frozen=True)
class Chunk:
    """A piece of the answer; the last one carries the figures, and perhaps no text.

    `logprobs`: of the piece's tokens, where they were asked for.
    """

    text: str
    stats: TurnStats | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


def _rate(n_tokens: int, seconds: float) -> float:
    return n_tokens / seconds if n_tokens > 0 and seconds > 0 else 0.0
