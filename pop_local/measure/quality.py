"""Measure the loss from pruning by comparing the pruned model's scores with the full model's.

A window consists of a context and a continuation. The context is read with or without pruning.
With teacher forcing, the continuation then runs through all layers and attends to the context's
K/V. For each continuation token, the two models' predicted distributions are compared. The
context's last token predicts the continuation's first token.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from pop_base.progress import Progress, Ran, counting
from pop_local.engine.model import PopModel
from pop_local.measure import probes
from pop_local.measure.divergence import (
    Divergence,
    Floats,
    Likelihood,
    Predictions,
    divergence,
    likelihood,
    predictions,
    to_half,
)
from pop_local.measure.estimate import Estimate, exp_mean, mean, quantile, ratio
from pop_local.measure.forced import FULL, Forced, Pruning, forced
from pop_local.measure.heldout import TextTokens, spread_windows
from pop_local.measure.probes import (
    Repeated,
    copied,
    measure_induction,
    pick_passage,
    read_repeated,
    require_passage,
)

# If the full model's gain is less than this share of the first occurrence's NLL, the full model
# cannot copy.
_LEAST_INDUCTION = 0.1


@dataclass(frozen=True)
class QualitySettings:
    """Settings for a measurement: numbers of windows and draws, and window lengths in tokens.

    `n_draws`: the number of random token sequences for the induction probe.
    """

    n_windows: int = 32
    n_context: int = 512
    n_continuation: int = 128
    seed: int = 0
    n_draws: int = field(default_factory=lambda: probes.N_DRAWS)


@dataclass(frozen=True)
class Quality:
    """The loss from pruning at one boundary, relative to the full model.

    kl_*: KL(full || pruned) in nats over the continuation's tokens (kl_first: over the first token
    only). ppl_*: the continuations' perplexity. top1_agreement: the fraction of tokens for which
    both models have the same top prediction. copy_*: results for copying a passage from the
    context. copy_top1: the fraction of the repeated tokens that the model ranks first.
    induction_*: results for repeated random tokens. delta_nll: the increase in the repetition's
    NLL due to pruning. retention: the pruned model's gain from the repetition, divided by the full
    model's gain (None if the full model shows no gain). n_pruned: the number of context tokens
    that stopped at the boundary, counted by the backend over all windows.
    """

    boundary: int
    n_windows: int
    n_context: int
    n_continuation: int
    n_pruned: int
    kl_mean: Estimate
    kl_median: Estimate
    kl_p99: Estimate
    kl_first: Estimate
    ppl_full: Estimate
    ppl_pruned: Estimate
    ppl_ratio: Estimate
    top1_agreement: Estimate
    copy_ppl_ratio: Estimate
    copy_top1: Estimate
    copy_top1_full: Estimate
    induction_delta_nll: Estimate
    induction_retention: Estimate | None


@dataclass(frozen=True)
class Window:
    """A window's tokens. `passage` is the part of the context that the copy probe repeats."""

    context: Sequence[int]
    continuation: Sequence[int]
    passage: Sequence[int]


@dataclass(frozen=True)
class FullScores:
    """The full model's scores for a window.

    `predicted`: the model's predictions for the continuation's tokens.
    """

    predicted: Predictions
    continuation: Likelihood
    passage: Likelihood


@dataclass(frozen=True)
class Scores:
    """The pruned model's scores for a window, together with the full model's."""

    divergence: Divergence
    full: Likelihood
    pruned: Likelihood
    copy_full: Likelihood
    copy_pruned: Likelihood
    n_pruned: int


@dataclass(frozen=True)
class QualityReference:
    """The full model's scores for windows of text and for repeated random tokens.

    A reference takes up 2 * n_windows * n_continuation * n_vocab bytes of memory.
    """

    settings: QualitySettings
    windows: Sequence[Window]
    full: Iterable[FullScores]
    repeated: Repeated


def measure_pruning(
    model: PopModel,
    text_tokens: TextTokens,
    settings: QualitySettings,
    pruning: Pruning,
    on_progress: Progress,
) -> Quality:
    """Measure the loss from pruning relative to the full model.

    Fitted projections in the file are used only if `pruning.boundary` is the file's boundary.
    `text_tokens`: one token sequence per part of the text, without BOS. `on_progress` is called
    after each window and each draw. The measurement needs 8 * n_continuation * n_vocab bytes of
    memory. Raises PopError if the text is too short, if no token would be pruned, or if the
    backend's counters differ from the plan.
    """
    with forced(model) as reader:
        windows = choose_windows(reader, text_tokens, settings)
        ran = counting(2 * (len(windows) + settings.n_draws), on_progress)
        repeated = read_repeated(reader, settings.n_draws, settings.seed, ran)
        reference = QualityReference(settings, windows, _read_full(reader, windows, ran), repeated)
        return _measure(reader, reference, pruning, ran, [])


def read_reference(
    model: PopModel,
    text_tokens: TextTokens,
    settings: QualitySettings,
    on_progress: Progress,
) -> QualityReference:
    """Run the full model on windows of text and on sequences of random tokens.

    `on_progress` is called after each window and each draw. Raises PopError if the text is too
    short, or if no token would be pruned.
    """
    with forced(model) as reader:
        windows = choose_windows(reader, text_tokens, settings)
        ran = counting(len(windows) + settings.n_draws, on_progress)
        repeated = read_repeated(reader, settings.n_draws, settings.seed, ran)
        full = [
            replace(scores, predicted=to_half(scores.predicted))
            for scores in _read_full(reader, windows, ran)
        ]
        return QualityReference(settings, windows, full, repeated)


def measure_against(
    reference: QualityReference,
    model: PopModel,
    pruning: Pruning,
    on_progress: Progress,
    scores: list[Scores] | None = None,
) -> Quality:
    """Measure the loss from pruning an open model, relative to the full model's scores.

    Appends each window's scores to `scores`. Progress is reported in windows and random draws.
    Raises the same errors as `measure_pruning`.
    """
    with forced(model) as reader:
        n_steps = len(reference.windows) + reference.settings.n_draws
        ran = counting(n_steps, on_progress)
        return _measure(reader, reference, pruning, ran, [] if scores is None else scores)


def _measure(
    reader: Forced, reference: QualityReference, pruning: Pruning, ran: Ran, scores: list[Scores]
) -> Quality:
    for window, full in zip(reference.windows, reference.full, strict=True):
        reader.read(window.context, pruning)
        predicted = predictions(reader.predict(window.continuation))
        scores.append(
            Scores(
                divergence=divergence(full.predicted, predicted),
                full=full.continuation,
                pruned=likelihood(predicted, np.asarray(window.continuation)),
                copy_full=full.passage,
                copy_pruned=copied(reader, window.passage),
                n_pruned=reader.n_pruned,
            )
        )
        ran(1)
    nll = measure_induction(reader, reference.repeated, pruning, ran)
    return _summarize(pruning, reference, scores, nll)


def _read_full(reader: Forced, windows: Sequence[Window], ran: Ran) -> Iterator[FullScores]:
    for window in windows:
        reader.read(window.context, FULL)
        predicted = predictions(reader.predict(window.continuation))
        targets = np.asarray(window.continuation)
        full = FullScores(predicted, likelihood(predicted, targets), copied(reader, window.passage))
        ran(1)
        yield full


def choose_windows(
    reader: Forced, text_tokens: TextTokens, settings: QualitySettings
) -> tuple[Window, ...]:
    """Choose windows from the text. Raises PopError if the text or the context is too short."""
    require_passage(settings.n_context, reader.rule)
    start = reader.model.engine.context.vocabulary.bos
    n_text = settings.n_context - len(start)
    rng = np.random.default_rng(settings.seed)
    windows = []
    for text in spread_windows(text_tokens, settings.n_windows, n_text + settings.n_continuation):
        context = [*start, *text[:n_text]]
        passage = pick_passage(context, settings.n_continuation, reader.rule, rng)
        windows.append(Window(context, text[n_text:], passage))
    return tuple(windows)


def _summarize(
    pruning: Pruning, reference: QualityReference, scores: Sequence[Scores], repeated_nll: Floats
) -> Quality:
    """Summarize all windows' scores. `repeated_nll` [n_draws]: see `measure_induction`."""
    settings, repeated = reference.settings, reference.repeated
    kl = np.stack([score.divergence.kl for score in scores])
    full, pruned = _nll(s.full for s in scores), _nll(s.pruned for s in scores)
    copy_full, copy = _nll(s.copy_full for s in scores), _nll(s.copy_pruned for s in scores)
    return Quality(
        boundary=pruning.boundary,
        n_windows=len(scores),
        n_context=settings.n_context,
        n_continuation=settings.n_continuation,
        n_pruned=sum(score.n_pruned for score in scores),
        kl_mean=mean(kl),
        kl_median=quantile(kl, 0.5),
        kl_p99=quantile(kl, 0.99),
        kl_first=mean(kl[:, 0]),
        ppl_full=exp_mean(full),
        ppl_pruned=exp_mean(pruned),
        ppl_ratio=exp_mean(pruned - full),
        top1_agreement=mean(np.stack([s.divergence.same_top1 for s in scores])),
        copy_ppl_ratio=exp_mean(copy - copy_full),
        copy_top1=mean(np.stack([s.copy_pruned.is_top1 for s in scores])),
        copy_top1_full=mean(np.stack([s.copy_full.is_top1 for s in scores])),
        induction_delta_nll=mean(repeated_nll - repeated.full),
        induction_retention=retention(repeated, repeated_nll),
    )


def _nll(scores: Iterable[Likelihood]) -> Floats:
    return np.stack([score.nll for score in scores])


def retention(repeated: Repeated, pruned: Floats) -> Estimate | None:
    """Return the pruned model's gain from the repetition, divided by the full model's gain.

    Returns None if the full model's gain is tiny. `pruned`: the pruned model's NLL [n_draws].
    """
    gain = repeated.first - repeated.full
    if gain.mean() < _LEAST_INDUCTION * repeated.first.mean():
        return None
    return ratio(repeated.first - pruned, gain)
