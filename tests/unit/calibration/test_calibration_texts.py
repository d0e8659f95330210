"""Test calibration texts: accepted and refused files, and samples of the model."""

from pathlib import Path

import numpy as np
import pytest

from pop_base.errors import PopError
from pop_base.progress import Watch
from pop_local.calibration import texts
from pop_local.calibration.activations import loaded
from pop_local.calibration.fit_options import FitOptions
from pop_local.calibration.samples import draw, sample_windows
from pop_local.calibration.texts import (
    CalibrationError,
    default_tokens,
    distill_text,
    given_text,
    own_text,
)
from pop_local.engine.prompt.prompter import Prompter
from support.calibrating import fitted, settings
from support.synthetic import make_gguf


def test_default_tokens_grow_with_the_model():
    assert [default_tokens(n) for n in (576, 640, 2048, 4096)] == [16384, 16384, 49152, 98304]


def test_short_text_is_refused_with_the_required_length(llama: Path, tmp_path: Path):
    path = tmp_path / "short.txt"
    path.write_text("too short " * 20)
    with pytest.raises(PopError, match="needs at least 2,048"):
        fitted(llama, settings(path))
    with pytest.raises(CalibrationError, match="needs 2,048"):
        FitOptions(tokens=100).n_tokens(128)


def test_repetitive_text_is_refused(llama: Path, tmp_path: Path):
    path = tmp_path / "same.txt"
    path.write_text("a" * 20_000)
    with pytest.raises(PopError, match="distinct tokens"):
        fitted(llama, settings(path))


def test_files_have_equal_shares(llama: Path, tmp_path: Path):
    """Expect longer files to make up for a file that is too short."""
    paths = []
    for name, n_words in (("short", 1500), ("long", 9000), ("other", 6000)):
        paths.append(tmp_path / f"{name}.txt")
        paths[-1].write_text(" ".join(f"{name}{word}" for word in range(n_words)))
    with loaded(llama, n_threads=1) as context:
        text = given_text(context, paths, 16, 128)
        rows = [context.vocabulary.detokenize(row) for row in text.windows[4:].tolist()]
    n_short, n_long, n_other = (sum(path.stem in row for row in rows) for path in paths)
    assert text.name == "short.txt, long.txt, other.txt" and len(text.windows) == 16
    assert 0 < n_short < 4 and n_other == (12 - n_short) // 2
    assert n_short + n_other + n_long == 12


def test_distilling_text_has_distinct_windows(llama: Path, tmp_path: Path):
    path = tmp_path / "words.txt"
    path.write_text(" ".join(f"w{number}" for number in range(3000)))
    with loaded(llama, n_threads=1) as context:
        text = given_text(context, (path,), 4, 128)
        windows = distill_text(context, text, (path,), 128).windows
        few = distill_text(context, text, (path,), 6).windows
    assert windows[:4].tolist() == text.windows.tolist()
    assert 8 < len(windows) == len(np.unique(windows, axis=0)) < 128
    assert few[:4].tolist() == text.windows.tolist() and len(few) == 6


def test_number_of_distilled_windows_follows_options():
    assert FitOptions().n_distilled(576) == 128
    assert FitOptions(tokens=200 * 512).n_distilled(576) == 200


def test_samples_are_repeatable_and_keep_their_prefix(llama: Path):
    starts, silent = [[1], [5, 6, 7], [9]], Watch().on_progress
    with loaded(llama, n_threads=1) as context:
        first, again, other = (
            sample_windows(context, starts, 32, seed=seed, on_progress=silent) for seed in (0, 0, 1)
        )
    assert first[:, 0].tolist() == other[:, 0].tolist() == [1, 5, 9]
    assert first[1, :3].tolist() == other[1, :3].tolist() == [5, 6, 7]
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other) and len({tuple(row) for row in first.tolist()}) == 3


@pytest.mark.parametrize("template", ["<s>user: {{ messages[0]['content'] }}\nassistant:", ""])
def test_default_text_contains_documentation_code_and_samples(template, tmp_path):
    path = make_gguf(tmp_path / "chat.gguf", "llama", chat_template=template)
    with loaded(path, n_threads=1) as context:
        before = context.vocabulary.tokenize("<s>user: ", special=True)
        text = own_text(context, 8, Watch().on_progress)
        topics, code = (
            texts._cut(context, whole, 1) for whole in (texts._topics(), texts._library_code())
        )
        first = texts.first_token(context)
    np.testing.assert_array_equal(text.windows[2:4], [*topics, *code])
    n_chat = 2 if template else 0
    begun = [row[: len(before)].tolist() == before for row in text.windows[4:]]
    assert begun == [True] * n_chat + [False] * (4 - n_chat)
    assert (text.windows[4 + n_chat :, 0] == first).all()


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no') }}", "{{ 1/0 }}", "{{ 'a' | center(2000000000) }}"]
)
def test_template_that_renders_no_question_gives_no_chat(template, tmp_path):
    path = make_gguf(tmp_path / "odd.gguf", "llama", chat_template=template)
    with loaded(path, n_threads=1) as context:
        assert Prompter(context).before_question() == ""


def test_draws_follow_the_probabilities():
    logits = np.log(np.arange(1, 1001, dtype=np.float32))
    chances = (np.arange(20_000) + 0.5) / 20_000
    drawn = np.bincount([draw(logits, chance) for chance in chances], minlength=1000)
    expected = 20_000 * np.arange(1, 1001) / np.arange(1, 1001).sum()
    assert np.abs(drawn - expected).max() <= 1.5
