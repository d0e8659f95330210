"""From which length on pruning gains, by a scripted clock; what short prompts are called."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pop_converter.popfile.format import read_pop_meta
from pop_converter.popfile.plan import make_plan
from pop_local.base.errors import PopError
from pop_local.cli import app
from pop_local.engine.llama import backend
from pop_local.engine.llama.backend import Counters, Mode
from pop_local.engine.model import PopModel
from pop_local.engine.turn import Message
from pop_local.measure.forced import use_rule
from pop_local.research.break_even import measure_break_even, search, wins
from pop_local.ui.views.stats import stats_line
from support.converted import converted
from support.shapes import read_shape
from support.synthetic import make_gguf

FULL_ROW_S, CONTEXT_ROW_S = 1.0, 0.75


@pytest.fixture
def model(pop_file) -> PopModel:
    return PopModel(pop_file, n_ctx=512, n_threads=1)


def min_prompt_of(path: Path) -> int:
    meta = read_pop_meta(path)
    assert meta is not None
    return meta.min_prompt


class ScriptedClock:
    """Rows take the time that they are said to take, and a pruned prefill `overhead_s` more."""

    def __init__(self, model: PopModel, overhead_s: float) -> None:
        self._ctx = model.context.ctx
        self._overhead_s = overhead_s
        self._now_s = 0.0

    def __call__(self) -> float:
        rows = backend.get_counters(self._ctx)
        backend.reset_counters(self._ctx)
        overhead_s = self._overhead_s if rows.n_context else 0.0
        self._now_s += rows.n_full * FULL_ROW_S + rows.n_context * CONTEXT_ROW_S + overhead_s
        return self._now_s


# --- the search


@pytest.mark.parametrize("threshold", [18, 19, 40, 67, 100, 255, 400])
def test_the_shortest_length_that_is_won_is_found_to_an_eighth(threshold):
    asked: list[int] = []

    def is_won(n: int) -> bool:
        asked.append(n)
        return n >= threshold

    found = search(is_won, 18, 400)
    assert found is not None
    assert threshold <= found <= threshold + max(1, threshold // 7)
    assert len(asked) < 12


def test_nothing_is_found_where_nothing_is_won():
    assert search(lambda n: False, 18, 400) is None


def test_one_stroke_of_luck_does_not_end_the_search():
    assert search(lambda n: n == 36 or n >= 200, 18, 400) in range(200, 226)


def test_a_median_above_one_must_exceed_the_spread():
    assert wins([1.10, 1.11, 1.12, 1.11, 1.09])
    assert not wins([0.95, 1.25, 1.10, 1.00, 1.20])
    assert not wins([1.0, 1.0, 1.0])
    assert not wins([0.90, 0.91])


@pytest.mark.parametrize("overhead_s", [4.0, 12.5, 1000.0])
def test_break_even_is_where_the_rows_saved_pay_for_the_overhead(model, overhead_s):
    """Each context row saves a quarter of a second, so 17 + 4 * overhead rows are even."""
    seen: list[int] = []
    clock = ScriptedClock(model, overhead_s)
    n_prompt, tried = measure_break_even(model, 2, 200, seen.append, clock)
    even = 17 + int(4 * overhead_s)
    if even > 200:
        assert n_prompt is None
    else:
        assert n_prompt is not None
        assert even < n_prompt <= even + even // 7
    assert seen == list(range(1, len(tried) + 1))
    assert list(tried) == sorted(tried, key=lambda one: one.n_prompt)
    assert all(one.n_pruned == one.n_prompt - 17 for one in tried)
    assert all(one.iqr == 0 and one.wins == (one.n_prompt > even) for one in tried)


def test_what_the_file_calls_short_is_measured_all_the_same_and_stays(model):
    rule = replace(model.rule, min_prompt=100)
    use_rule(model, rule)
    found, _ = measure_break_even(model, 2, 40, lambda n: None, ScriptedClock(model, 0.0))
    assert found == 18
    assert model.rule == rule


def test_prompts_of_full_rows_only_are_an_error(model):
    with pytest.raises(PopError, match="of 17 tokens none"):
        measure_break_even(model, 2, 17, lambda n: None)


# --- bench --find-break-even


def bench(*arguments: object):
    given = ["bench", *map(str, arguments), "--find-break-even", "--threads", "1"]
    return CliRunner().invoke(app, given)


def test_json_says_what_was_found_and_what_the_file_says(pop_file):
    done = bench(pop_file, "--prompt", "20,40", "--repeat", 2, "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert set(report) == {
        *("model", "sidecar", "backend", "kernels", "boundary", "n_layer", "is_exact"),
        *("min_prompt", "break_even", "tried"),
    }
    assert (report["boundary"], report["min_prompt"]) == (4, min_prompt_of(pop_file))
    lengths = [one["n_prompt"] for one in report["tried"]]
    assert lengths == sorted(lengths)
    assert {18, 36} <= set(lengths)
    assert all(18 <= n <= 40 for n in lengths)
    assert report["break_even"] in (None, *lengths)


def test_people_get_a_table_and_what_follows(pop_file):
    done = bench(pop_file, "--prompt", "40", "--repeat", 2)
    assert "| Gains" in done.stdout
    assert "the file prunes from 34 tokens on" in done.stdout.splitlines()[-1]


def test_one_pair_has_no_spread(pop_file):
    assert bench(pop_file, "--repeat", 1).exit_code == 2


# --- the default of convert


def test_convert_writes_twice_the_full_rows_unless_told(tmp_path, monkeypatch):
    source = make_gguf(tmp_path / "m.gguf", "llama")
    runner = CliRunner()
    for options, name in (([], "a.gguf"), (["--min-prompt", "7"], "b.gguf")):
        given = ["convert", str(source), str(tmp_path / name), "--skip", "1/3", *options]
        given += ["--projection", "own", "--threads", "1"]
        assert runner.invoke(app, given).exit_code == 0
    plan = make_plan(read_shape(source))
    assert min_prompt_of(tmp_path / "a.gguf") == plan.min_prompt == 66
    assert min_prompt_of(tmp_path / "b.gguf") == 7


# --- what short prompts are called


@pytest.fixture(scope="module")
def picky(tmp_path_factory) -> PopModel:
    """Prompts of less than 120 tokens are short."""
    folder = tmp_path_factory.mktemp("picky")
    source = make_gguf(folder / "m.gguf", "llama")
    return PopModel(converted(source, folder, boundary=4, min_prompt=120), n_ctx=512, n_threads=1)


@pytest.mark.parametrize(
    ("mode", "n_words", "reading"),
    [
        (Mode.CONTEXT, 200, "pruned"),
        (Mode.CONTEXT, 3, "short"),
        (Mode.OFF, 200, "full"),
        (Mode.OFF, 3, "full"),
    ],
)
def test_figures_say_how_the_prompt_was_read_and_why(picky, mode, n_words, reading):
    picky.set_mode(mode)
    picky.cache.clear()
    message = Message("user", "a " * n_words)
    *_, last = picky.chat_turn([message], max_tokens=2, temperature=0.0)
    rows = backend.get_counters(picky.context.ctx)
    assert last.stats.reading == reading
    assert (rows.n_context > 0) is (reading == "pruned")
    assert last.stats.n_pruned == rows.n_context
    assert ("pruned: short" in stats_line(last.stats)) is (reading == "short")


def test_a_short_question_after_a_cached_document_is_short(picky):
    picky.set_mode(Mode.CONTEXT)
    picky.cache.clear()
    document = [Message("user", "a " * 200)]
    *_, first = picky.chat_turn(document, max_tokens=1, temperature=0.0)
    backend.reset_counters(picky.context.ctx)
    more = [*document, Message("assistant", "b"), Message("user", "c")]
    *_, second = picky.chat_turn(more, max_tokens=1, temperature=0.0)
    assert (first.stats.reading, second.stats.reading) == ("pruned", "short")
    assert second.stats.n_cached > 100
    assert backend.get_counters(picky.context.ctx) == Counters(0, second.stats.n_full)


def test_run_says_it_in_json(tmp_path):
    source = make_gguf(tmp_path / "m.gguf", "llama")
    target = converted(source, tmp_path, boundary=4, min_prompt=120)
    done = CliRunner().invoke(
        app, ["run", str(target), "Hello", "--json", "--max-tokens", "2", "--threads", "1"]
    )
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert (report["full"], report["reading"], report["stats"]["n_pruned"]) == (False, "short", 0)
