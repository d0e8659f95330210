"""Options for one answer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypedDict

from pop_local.config.sampler_options import SamplerOptions
from pop_local.engine.decode.grammar import Grammar
from pop_local.engine.tools.call_form import CallForm


@dataclass(frozen=True)
class TurnOptions(SamplerOptions):
    """Options for one answer.

    `max_tokens`: maximum answer length in tokens (default: the rest of the context). `min_answer`:
    tokens to reserve for the answer. ContextFullError is raised if the prompt does not leave this
    many tokens. `stops`: strings that end the answer and are removed from it. `grammar`: a Grammar,
    or GBNF text. `calls`: the format of tool calls (overrides `grammar`). `n_top_logprobs`: the
    number of alternatives per token (None: no log probabilities). `has_end_logprob`: whether to
    report the log probability of the token that ends the answer. `repeatable`: whether to ignore
    cached rows, so that a fixed seed or a temperature of 0 always gives the same answer.
    `ends_repeats`: whether to end an answer that keeps repeating a block (ignored with a grammar).

    `on_prefill(done, total)` is called before the first batch and after each batch. `done` and
    `total` count uncached tokens. `should_stop` is called during prefill and after each token. If
    it returns True, the answer ends with the reason "interrupted". During tokenization,
    StoppedError is raised instead.
    """

    max_tokens: int | None = None
    min_answer: int = 1
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
    """The fields of TurnOptions that callers may set (defaults: the file's recommended values)."""

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
    logit_bias: tuple[tuple[int, float], ...]
    stops: tuple[str, ...]
    grammar: str | Grammar | None
    repeatable: bool
    ends_repeats: bool
    on_prefill: Callable[[int, int], None] | None
    should_stop: Callable[[], bool] | None
