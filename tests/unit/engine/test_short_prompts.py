"""The minimum length of pruned prompts, and the reports about short ones."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pop_converter.popfile.pruning_plan import make_plan
from pop_local.cli import app
from pop_local.engine.chat_messages import Message
from pop_local.engine.llama import backend
from pop_local.engine.llama.backend import Counters, Mode
from pop_local.engine.model import PopModel
from pop_local.ui.views.stats import stats_line
from pop_local.workflows.conversion.conversion_plan import Boundary, ConvertOptions
from pop_local.workflows.conversion.convert_model import convert
from pop_local.workflows.hardware import Hardware
from support.calls import first_of, opened
from support.converted import converted
from support.shapes import read_pop_meta, read_shape
from support.synthetic import make_gguf


def min_prompt_of(path: Path) -> int:
    meta = read_pop_meta(path)
    assert meta is not None
    return meta.min_prompt


# --- the default of convert


def test_convert_writes_twice_the_full_rows_by_default(tmp_path):
    source = make_gguf(tmp_path / "m.gguf", "llama")
    convert(source, tmp_path / "a.gguf", ConvertOptions(Boundary(5), None, hardware=Hardware(1)))
    assert min_prompt_of(tmp_path / "a.gguf") == make_plan(read_shape(source)).min_prompt == 66


# --- reports about short prompts


@pytest.fixture(scope="module")
def picky(tmp_path_factory) -> PopModel:
    """Return a model that does not prune prompts of less than 120 tokens."""
    folder = tmp_path_factory.mktemp("picky")
    source = make_gguf(folder / "m.gguf", "llama")
    return opened(converted(source, folder, boundary=4, min_prompt=120), n_ctx=512)


@pytest.mark.parametrize(
    ("mode", "n_words", "reading"),
    [
        (Mode.CONTEXT, 200, "pruned"),
        (Mode.CONTEXT, 3, "short"),
        (Mode.OFF, 200, "full"),
        (Mode.OFF, 3, "full"),
    ],
)
def test_stats_report_the_prefill_kind(picky, mode, n_words, reading):
    picky.engine.set_mode(mode)
    first_of(picky).cache.clear()
    message = Message("user", "a " * n_words)
    *_, last = picky.ask([message], max_tokens=2, temperature=0.0)
    rows = backend.get_counters(picky.engine.context.ctx)
    assert last.stats.reading == reading
    assert (rows.n_context > 0) is (reading == "pruned")
    assert last.stats.n_pruned == rows.n_context
    assert ("too short for fast reading" in stats_line(last.stats)) is (reading == "short")


def test_question_after_cached_document_counts_as_short(picky):
    picky.engine.set_mode(Mode.CONTEXT)
    first_of(picky).cache.clear()
    document = [Message("user", "a " * 200)]
    *_, first = picky.ask(document, max_tokens=1, temperature=0.0)
    backend.reset_counters(picky.engine.context.ctx)
    more = [*document, Message("assistant", "b"), Message("user", "c")]
    *_, second = picky.ask(more, max_tokens=1, temperature=0.0)
    assert (first.stats.reading, second.stats.reading) == ("pruned", "short")
    assert second.stats.n_cached > 100
    assert backend.get_counters(picky.engine.context.ctx) == Counters(0, second.stats.n_full)


def test_run_reports_the_prefill_kind_in_json(tmp_path):
    source = make_gguf(tmp_path / "m.gguf", "llama")
    target = converted(source, tmp_path, boundary=4, min_prompt=120)
    done = CliRunner().invoke(
        app, ["run", str(target), "Hello", "--json", "--max-tokens", "2", "--threads", "1"]
    )
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert (report["full"], report["reading"], report["stats"]["n_pruned"]) == (False, "short", 0)
