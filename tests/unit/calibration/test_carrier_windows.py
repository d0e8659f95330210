"""Test windows of synthetic look-ups for fits and distilling."""

import numpy as np
import pytest

from pop_local.calibration.activations import loaded
from pop_local.calibration.carrier_windows import SHARE, carrier_windows
from pop_local.calibration.texts import N_WINDOW, distill_text, given_text
from pop_local.engine.llama.vocabulary import Pieces
from pop_local.measure.heldout import shipped_part


@pytest.fixture(scope="module")
def context(smollm2):
    with loaded(smollm2, n_threads=1) as opened:
        yield opened


def spelled(context, tokens):
    pieces = Pieces(context.vocabulary)
    return b"".join(pieces[int(token)] for token in tokens).decode()


def test_answers_are_strings_of_the_document(context):
    carriers = carrier_windows(context, 3, N_WINDOW, shipped_part("prose"), seed=0)
    assert carriers.windows.shape == carriers.answers.shape == (3, N_WINDOW)
    for window, answers in zip(carriers.windows, carriers.answers, strict=True):
        text = spelled(context, window)
        edges = np.flatnonzero(np.diff(answers.astype(int), prepend=0, append=0))
        values = [spelled(context, window[a:b]).strip() for a, b in edges.reshape(-1, 2)]
        assert len(values) >= 3
        assert all(text.count(value) == 2 for value in values)


def test_same_seed_writes_the_same_windows(context):
    prose = shipped_part("prose")
    first, again, other = (carrier_windows(context, 1, N_WINDOW, prose, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.windows, again.windows)
    assert (first.windows != other.windows).any()


def test_quarter_of_the_windows_are_look_ups_and_answers_count_more(context, tmp_path):
    path = tmp_path / "prose.txt"
    path.write_text(shipped_part("prose"))
    text = given_text(context, (path,), 16, 576)
    n_asked = sum("Question:" in spelled(context, window) for window in text.windows)
    assert (len(text.windows), n_asked) == (16, 16 // SHARE)
    distilled = distill_text(context, text, (path,), 32)
    assert distilled.windows.shape == distilled.weights.shape
    heavier = (distilled.weights > 1).any(axis=1)
    assert heavier.sum() == 32 // SHARE
    assert 0.05 < (distilled.weights[heavier] > 1).mean() < 0.5


def test_vocabulary_of_single_bytes_has_no_room_for_a_document(pop_file):
    with loaded(pop_file, n_threads=1) as tiny:
        assert not len(carrier_windows(tiny, 2, 128, shipped_part("prose"), seed=0).windows)
