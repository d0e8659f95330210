"""Samplers that restrict the tokens of an answer."""

from contextlib import closing
from typing import Any

import numpy as np
import pytest

from pop_local.engine.model import PopModel
from pop_local.engine.prompt.prompt import Prompt
from pop_local.engine.turn_options import TurnOptions
from support.calls import opened, prompt
from support.converted import tiny

# Without other samplers, the random model's tokens are almost equally likely.
ALL: dict[str, Any] = {"temperature": 10.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
N_SEEDS = 100


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> PopModel:
    return opened(tiny(tmp_path_factory.mktemp("samplers")))


def sampled(model: PopModel, **options: Any) -> set[int]:
    """Return the first tokens that are sampled after a prompt with each seed."""
    tokens: set[int] = set()
    for seed in range(N_SEEDS):
        with closing(model.engine.sampled(TurnOptions(**ALL | options, seed=seed))) as answer:
            tokens.add(next(answer))
    return tokens


def logits_of(model: PopModel) -> np.ndarray:
    model.read(Prompt(prompt(40)))
    return np.array(model.engine.sequences[0].cache.slot.logits[-1], np.float64)


@pytest.mark.parametrize("n", [0.5, 1.5])
def test_top_n_sigma_keeps_tokens_near_the_largest_logit(model, n):
    logits = logits_of(model)
    near = set(np.flatnonzero(logits >= logits.max() - n * logits.std()))
    assert sampled(model, top_n_sigma=n) <= near
    assert not sampled(model) <= near


@pytest.mark.parametrize("threshold", [0.2, 0.6])
def test_typical_p_keeps_tokens_of_typical_information(model, threshold):
    logits = logits_of(model)
    log_p = logits - np.log(np.exp(logits).sum())
    p = np.exp(log_p)
    distances = np.abs(-log_p + (p * log_p).sum())
    order = np.argsort(distances)
    n_typical = 1 + np.searchsorted(np.cumsum(p[order]), threshold, side="right")
    typical = set(order[:n_typical])
    assert sampled(model, typical_p=threshold) <= typical
    assert not sampled(model) <= typical
