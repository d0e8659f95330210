"""Can the model still copy from what it has read? Two probes that see what the KL of prose hides.

*Copy*: a passage of the context follows the context again. *Induction*: random token ids, twice.
It needs no text, and the first occurrence has the loss of not copying at all. Both score only
tokens whose first occurrence was pruned (all of the random ones if none was).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pop_converter.base.errors import PopError
from pop_converter.base.progress import Ran
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
    """Random tokens, and the mean NLL [n_draws] in nats that the full model gives them.

    `first` is that of the first occurrence, `full` that of the second.
    """

    draws: tuple[Sequence[int], ...]
    first: Floats
    full: Floats


def require_passage(n_context: int, rule: RowRule) -> None:
    """Raise PopError for a context that is too short for `pick_passage`."""
    least = max(1, rule.sink_tokens) + rule.tail_tokens + 2
    if n_context < least:
        raise PopError(
            f"of {n_context} context tokens the first {rule.sink_tokens} and the last"
            f" {rule.tail_tokens} are full: too few are left to measure",
            f"give a longer context: {least} tokens or more",
            cause="context-too-short",
            n_least=least,
        )


def pick_passage(
    context: Sequence[int], n_tokens: int, rule: RowRule, rng: np.random.Generator
) -> Sequence[int]:
    """Pick consecutive pruned tokens of the context, `n_tokens` if it has as many.

    They come from anywhere in it. Raises PopError when it has too few.
    """
    require_passage(len(context), rule)
    start, end = max(1, rule.sink_tokens), len(context) - rule.tail_tokens
    n_tokens = min(n_tokens, end - start)
    first = int(rng.integers(start, end - n_tokens + 1))
    return context[first : first + n_tokens]


def copied(reader: Forced, passage: Sequence[int]) -> Likelihood:
    """Score the passage except for its first token, which nothing announces."""
    targets = np.asarray(passage)[1:]
    return likelihood(predictions(reader.predict(passage)[1:]), targets)


def read_repeated(reader: Forced, n_draws: int, seed: int, ran: Ran) -> Repeated:
    """Draw random tokens and score them by the full model; `ran` counts the draws."""
    rng = np.random.default_rng(seed)
    draws, first, full = [], np.empty(n_draws), np.empty(n_draws)
    for draw in range(n_draws):
        draws.append(tokens := random_tokens(reader.model, N_REPEATED, rng))
        first[draw] = _first_nll(reader, tokens)
        full[draw] = _second_nll(reader, tokens, FULL)
        ran(1)
    return Repeated(tuple(draws), first, full)


def measure_induction(
    reader: Forced, repeated: Repeated, prunings: Sequence[Pruning], ran: Ran
) -> Floats:
    """Return the mean NLL [n_prunings, n_draws] in nats of the second occurrence when pruned.

    `ran` counts them.
    """
    pruned = np.empty((len(prunings), len(repeated.draws)))
    for i, pruning in enumerate(prunings):
        for draw, tokens in enumerate(repeated.draws):
            pruned[i, draw] = _second_nll(reader, tokens, pruning)
            ran(1)
    return pruned


def _first_nll(reader: Forced, tokens: Sequence[int]) -> float:
    start, end = _scored(reader)
    context = [*reader.model.engine.context.bos, *tokens[:end]]
    reader.read(context[:1], FULL)
    predicted = predictions(reader.predict(context[1:]))
    nll = likelihood(predicted, np.asarray(context)[1:]).nll
    return float(nll[start - end :].mean())


def _second_nll(reader: Forced, tokens: Sequence[int], pruning: Pruning) -> float:
    start, end = _scored(reader)
    reader.read([*reader.model.engine.context.bos, *tokens], pruning)
    return float(copied(reader, tokens[:end]).nll[start - 1 :].mean())


def _scored(reader: Forced) -> tuple[int, int]:
    """Return start and end of the tokens that are pruned when read first; all where none is.

    The first token, which nothing announces, is never among them.
    """
    start = max(1, reader.rule.sink_tokens - len(reader.model.engine.context.bos))
    end = N_REPEATED - reader.rule.tail_tokens
    return (start, end) if start < end else (1, N_REPEATED)


def random_tokens(model: PopModel, n_tokens: int, rng: np.random.Generator) -> list[int]:
    """Draw ordinary tokens evenly; control tokens are treated by models in their own way."""
    vocab, attribute = model.engine.context.vocab, backend.bindings().llama_vocab_get_attr
    tokens: list[int] = []
    while len(tokens) < n_tokens:
        token = int(rng.integers(model.engine.context.n_vocab))
        if attribute(vocab, token) & _NORMAL:
            tokens.append(token)
    return tokens
