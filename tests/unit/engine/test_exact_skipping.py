"""Exact skipping: models whose last layers share the K/V of earlier ones."""

import json
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType
from typer.testing import CliRunner

from pop_base.errors import PopError, UnsupportedArchitectureError
from pop_converter.popfile.pruning_plan import make_plan
from pop_converter.projection import Projection
from pop_local.cli import app
from pop_local.engine.cache.saved_state import FULL
from pop_local.engine.llama import backend
from pop_local.engine.llama.backend import Counters, Mode
from pop_local.server.request_bodies import CompletionBody
from pop_local.server.task_factory import TaskFactory
from support.calls import continued, evaluated, first_of, greedy, opened, prompt
from support.scripted_chat import ScriptedModel, figures, talk
from support.shapes import read_shape
from support.shared_kv import make_shared

OWN, FITTED, WIDE = Projection


@pytest.fixture(scope="module", params=["gemma3n", "gemma4"])
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # F32 weights have the same kernels on all processors (support.cpu.has_amx).
    folder = tmp_path_factory.mktemp(request.param)
    return make_shared(folder / "model.gguf", request.param, type=GGMLQuantizationType.F32)


# --- shapes and refusals


def test_reads_shape_of_gemma4(tmp_path: Path) -> None:
    """Layers 3 and 7 have no window and larger heads; layers 4 to 7 share K/V."""
    shape = read_shape(make_shared(tmp_path / "m.gguf", "gemma4"))
    n_q, n_kv = 4 * 64, 64
    assert shape.exact == 4
    assert shape.windows == (16, 16, 16, 0) * 2
    assert shape.n_q == shape.n_heads_out == tuple(n_q * n for n in (1, 1, 1, 2) * 2)
    assert shape.n_k == shape.n_v == (*(n_kv * n for n in (1, 1, 1, 2)), 0, 0, 0, 0)


def test_reads_shape_of_gemma3n(tmp_path: Path) -> None:
    shape = read_shape(make_shared(tmp_path / "m.gguf", "gemma3n"))
    assert shape.exact == 20
    assert [layer for layer in range(25) if not shape.windows[layer]] == [4, 9, 14, 19, 24]
    assert shape.n_k == (64,) * 20 + (0,) * 5


@pytest.mark.parametrize("part", [{"fused_qkv": True}, {"k_as_v": True}, {"n_expert": 4}])
def test_parts_of_gemma4_keep_its_kv_sizes(part: dict, tmp_path: Path) -> None:
    plain = read_shape(make_shared(tmp_path / "plain.gguf", "gemma4"))
    other = read_shape(make_shared(tmp_path / "other.gguf", "gemma4", **part))
    assert (other.n_k, other.n_v) == (plain.n_k, plain.n_v)


def test_gemma4_can_be_pruned_before_sharing_layers(tmp_path: Path) -> None:
    shape = read_shape(make_shared(tmp_path / "m.gguf", "gemma4"))
    assert make_plan(shape, boundary=2, projection=FITTED).projection == OWN
    with pytest.raises(UnsupportedArchitectureError, match="without any loss") as raised:
        make_plan(shape, boundary=3)
    assert "a boundary from 1 to 2" in raised.value.hint
    alone = read_shape(make_shared(tmp_path / "alone.gguf", "gemma4", n_shared=0))
    assert alone.exact == 0
    assert make_plan(alone, projection=FITTED).projection == OWN


@pytest.mark.parametrize("command", ["convert", "analyze", "eval", "demo"])
def test_commands_that_prune_report_that_no_conversion_is_needed(
    command: str, shared: Path
) -> None:
    done = CliRunner().invoke(app, [command, str(shared)])
    assert done.exit_code == 1
    assert "needs no conversion" in done.stderr.replace("\n", " ")
    assert len(list(shared.parent.iterdir())) == 1


def test_inspect_reports_the_skipped_layers(shared: Path) -> None:
    report = json.loads(CliRunner().invoke(app, ["inspect", str(shared), "--json"]).stdout)
    shape = read_shape(shared)
    assert (report["skipping"]["exact"], report["pop"]) == (shape.exact, None)
    text = " ".join(CliRunner().invoke(app, ["inspect", str(shared)]).stdout.split())
    exact = f"(skipping layers {shape.exact} and up causes no loss)"
    assert f"layers 1 to {shape.n_layer - 1} {exact}" in text
    assert "not converted" not in text


# --- reading


def test_all_rows_except_the_last_skip_exactly(shared: Path) -> None:
    model = opened(shared)
    assert first_of(model).settings.exact == read_shape(shared).exact
    assert (first_of(model).settings.mode, first_of(model).settings.boundary) == (Mode.CONTEXT, 0)
    assert first_of(model).states.key == FULL
    assert evaluated(model, prompt(200)) == Counters(0, 1, 199)
    model.engine.set_mode(Mode.OFF)
    first_of(model).cache.clear()
    assert evaluated(model, prompt(200)) == Counters(0, 200)


def test_switching_modes_keeps_the_cache(shared: Path) -> None:
    model = opened(shared)
    greedy(model, prompt(100), 5)
    # Both modes now read the last token alone: equal shapes give equal bits.
    reused = greedy(model, prompt(100), 5)
    model.engine.set_mode(Mode.OFF)
    assert (first_of(model).cache.n_tokens, first_of(model).states.key) == (104, FULL)
    backend.reset_counters(model.engine.context.ctx)
    assert greedy(model, prompt(100), 5) == reused
    assert backend.get_counters(model.engine.context.ctx).n_rows == 1 + 4


@pytest.mark.parametrize("mode", [Mode.OFF, Mode.CONTEXT])
def test_state_of_either_mode_loads_in_the_other(mode: Mode, shared: Path) -> None:
    model = opened(shared)
    model.engine.set_mode(mode)
    first = greedy(model, prompt(100), 5)
    state = first_of(model).states.save()
    other = opened(shared)
    other.engine.set_mode(Mode.CONTEXT if mode is Mode.OFF else Mode.OFF)
    first_of(other).states.restore(state)
    assert first_of(other).cache.n_tokens == 104
    assert greedy(other, prompt(100), 5) == first


def test_stats_count_exactly_skipped_tokens(shared: Path) -> None:
    model = opened(shared)
    *_, last = continued(model, "a b c d e f g h", max_tokens=3, temperature=0.0)
    stats = last.stats
    assert stats is not None
    assert (stats.n_pruned, stats.n_full, stats.reading) == (0, 1, "exact")
    assert stats.n_skipped_exact == stats.n_prompt - 1 > 3
    assert stats.prefill_tokens_per_s == pytest.approx(stats.n_prompt / stats.prefill_s)


def test_boundary_in_the_sharing_layers_is_refused(shared: Path) -> None:
    model = opened(shared)
    with pytest.raises(PopError, match="store no K/V"):
        model.engine.sequences[0].set_boundary(first_of(model).settings.exact)
    with pytest.raises(PopError, match="no boundary"):
        model.engine.set_mode(Mode.ALWAYS)


# --- reports


def test_chat_reports_the_exact_layer_and_keeps_its_turns() -> None:
    model = ScriptedModel(["One.", figures(n_pruned=0, n_skipped_exact=983, exact_layer=15)])
    model.settings.boundary, model.settings.exact = 0, 15
    lines = talk(model, "/full", "hello", "/stats", "/full on", "/full")
    on = "# Exact skipping is on: prompt tokens skip layers 15 and up. The answers stay the same."
    off = "# Exact skipping is off: prompts run through all layers. The answers stay the same."
    assert lines[1] == on
    assert any("983 read losslessly by skipping layers 15 and up) · TTFT" in line for line in lines)
    read = "# Prompt tokens: pop-local read 983 without layers 15 and up (lossless), read "
    assert any(line.startswith(read) for line in lines)
    assert [line for line in lines if "skipping is off" in line] == [off, off]


@pytest.mark.parametrize("pop", [None, True, False])
def test_server_skips_exactly_by_default(pop: bool | None, shared: Path) -> None:
    tasks = TaskFactory(opened(shared))
    body = CompletionBody.model_validate({"model": "m", "prompt": "a b c", "pop": pop})
    is_full = tasks.completions(body)[0].reason is not None
    assert is_full == (pop is False)
