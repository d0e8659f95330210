"""Two probes that measure copying from the prompt. KL on prose does not reveal failures to copy.

The *copy* probe repeats part of the context at its end. The *induction* probe repeats random
tokens. If a model cannot copy, the repetition does not reduce the loss. Both probes score only
tokens whose first occurrence was pruned. If no random token was pruned, the induction probe scores
all tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pop_base.errors import PopError
from pop_base.progress import Ran
from pop_local.engine.llama import backend
from pop_local.engine.model import PopModel
from pop_local.engine.prefill.plan import RowRule
from pop_local.measure.divergence import Floats, Likelihood, likelihood, predictions
from pop_local.measure.forced import FULL, Forced, Pruning

N_REPEATED = 128
N_DRAWS = 8
_NORMAL = 1 << 2  # LLAMA_TOKEN_ATTR_NORMAL


@dataclass(frozen=True)
class Repeated:
    """Repeated random tokens, and the full model's mean NLL in nats for each copy [n_draws]."""

    draws: tuple[Sequence[int], ...]
    first: Floats
    full: Floats


def require_passage(n_context: int, rule: RowRule) -> None:
    """Raise PopError if a context is too short for `pick_passage`."""
    least = max(1, rule.sink_tokens) + rule.tail_tokens + 2
    if n_context < least:
        raise PopError(
            f"a context of {n_context} tokens is too short: the first {rule.sink_tokens} and the"
            f" last {rule.tail_tokens} tokens always run through all layers",
            f"use a context of {least} tokens or more",
            cause="context-too-short",
            n_least=least,
        )


def pick_passage(
    context: Sequence[int], n_tokens: int, rule: RowRule, rng: np.random.Generator
) -> Sequence[int]:
    """Choose up to `n_tokens` consecutive pruned tokens. Raises PopError if no token is pruned."""
    require_passage(len(context), rule)
    start, end = max(1, rule.sink_tokens), len(context) - rule.tail_tokens
    n_tokens = min(n_tokens, end - start)
    first = int(rng.integers(start, end - n_tokens + 1))
    return context[first : first + n_tokens]


def copied(reader: Forced, passage: Sequence[int]) -> Likelihood:
    """Score all tokens in the passage except the first, which has no prediction."""
    targets = np.asarray(passage)[1:]
    return likelihood(predictions(reader.predict(passage)[1:]), targets)


def read_repeated(reader: Forced, n_draws: int, seed: int, ran: Ran) -> Repeated:
    """Draw random tokens and score them with the full model. `ran` is called after each draw."""
    rng = np.random.default_rng(seed)
    draws, first, full = [], np.empty(n_draws), np.empty(n_draws)
    for draw in range(n_draws):
        draws.append(tokens := random_tokens(reader.model, N_REPEATED, rng))
        first[draw] = _first_nll(reader, tokens)
        full[draw] = _second_nll(reader, tokens, FULL)
        ran(1)
    return Repeated(tuple(draws), first, full)


def measure_induction(reader: Forced, repeated: Repeated, pruning: Pruning, ran: Ran) -> Floats:
    """Return the repeated tokens' mean NLL [n_draws] in nats. Calls `ran` after each draw."""
    pruned = np.empty(len(repeated.draws))
    for draw, tokens in enumerate(repeated.draws):
        pruned[draw] = _second_nll(reader, tokens, pruning)
        ran(1)
    return pruned


def _first_nll(reader: Forced, tokens: Sequence[int]) -> float:
    start, end = _scored(reader)
    context = [*reader.model.engine.context.vocabulary.bos, *tokens[:end]]
    reader.read(context[:1], FULL)
    predicted = predictions(reader.predict(context[1:]))
    nll = likelihood(predicted, np.asarray(context)[1:]).nll
    return float(nll[start - end :].mean())


def _second_nll(reader: Forced, tokens: Sequence[int], pruning: Pruning) -> float:
    start, end = _scored(reader)
    reader.read([*reader.model.engine.context.vocabulary.bos, *tokens], pruning)
    return float(copied(reader, tokens[:end]).nll[start - 1 :].mean())


def _scored(reader: Forced) -> tuple[int, int]:
    """Return the range of tokens to score: the pruned tokens or, if none is pruned, all tokens.

    The first token is excluded, because it has no prediction.
    """
    start = max(1, reader.rule.sink_tokens - len(reader.model.engine.context.vocabulary.bos))
    end = N_REPEATED - reader.rule.tail_tokens
    return (start, end) if start < end else (1, N_REPEATED)


def random_tokens(model: PopModel, n_tokens: int, rng: np.random.Generator) -> list[int]:
    """Draw random tokens, excluding control tokens, which models treat specially."""
    vocabulary, attribute = model.engine.context.vocabulary, backend.bindings().llama_vocab_get_attr
    tokens: list[int] = []
    while len(tokens) < n_tokens:
        token = int(rng.integers(vocabulary.n_tokens))
        if attribute(vocabulary.pointer, token) & _NORMAL:
            tokens.append(token)
    return tokens
