"""Options for one answer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

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
    """The keyword arguments for one answer (defaults: the file's recommended values).

    `sampling`: all sampling options. Its unset fields have the defaults of SamplerOptions instead
    of the file's recommended values. The other arguments override it.
    """

    sampling: SamplerOptions
    temperature: float
    top_p: float
    seed: int | None
    max_tokens: int | None
    min_answer: int
    stops: tuple[str, ...]
    grammar: str | Grammar | None
    repeatable: bool
    ends_repeats: bool
    on_prefill: Callable[[int, int], None] | None
    should_stop: Callable[[], bool] | None


def turn_options(recommended: Mapping[str, float], options: Mapping[str, Any]) -> TurnOptions:
    """Return the options for an answer. `options`: AnswerOptions, or fields of TurnOptions."""
    others = dict(options)
    sampling = others.pop("sampling", None)
    base = recommended if sampling is None else vars(sampling)
    return TurnOptions(**{**base, **others})
