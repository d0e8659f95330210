"""Models whose last layers share the K/V of earlier ones: what they cost, how they are opened."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType
from typer.testing import CliRunner

from converter.errors import PopError, UnsupportedArchitectureError
from converter.macs import exact_limit, exact_macs, prefill_macs
from converter.plan import make_plan
from converter.shape import ModelShape, read_shape
from pop_local.cli import app
from pop_local.engine.llama import backend
from pop_local.engine.llama.backend import Counters, Mode
from pop_local.engine.prefill.kv_state import FULL
from pop_local.engine.sessions.conversation import Conversation, Turn
from pop_local.engine.sessions.session_file import Sessions
from pop_local.server.bodies import CompletionBody
from pop_local.server.tasks import Tasks
from pop_local.ui.chat.dialogue import _costs
from support.calls import evaluated, greedy, opened, prompt
from support.scripted import ScriptedModel, figures, talk
from support.shared_kv import make_shared
from support.synthetic import TEMPLATE


@pytest.fixture(scope="module", params=["gemma3n", "gemma4"])
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Of F32 weights, whose kernels are the same on all processors: support.cpu.has_amx.
    folder = tmp_path_factory.mktemp(request.param)
    return make_shared(folder / "model.gguf", request.param, type=GGMLQuantizationType.F32)


# --- what they cost


def test_the_shape_of_gemma4(tmp_path: Path) -> None:
    """Layers 3 and 7 have no window, and heads of twice the size; 4 to 7 share K/V."""
    shape = read_shape(make_shared(tmp_path / "m.gguf", "gemma4"))
    n_embd, n_q, n_kv = 128, 4 * 64, 64
    assert shape.exact == 4
    assert shape.swa_window == (16, 16, 16, 0) * 2
    assert shape.attn_proj_macs == tuple(2 * n_embd * n_q * n for n in (1, 1, 1, 2) * 2)
    assert shape.kv_macs == (*(2 * n_embd * n_kv * n for n in (1, 1, 1, 2)), 0, 0, 0, 0)
    assert shape.ffn_macs == (3 * n_embd * 192 + 2 * n_embd * 32,) * 8
    assert shape.attn_dim == tuple(2 * n_q * n for n in (1, 1, 1, 2) * 2)
    assert (shape.input_macs, shape.output_macs) == (n_embd * 32 * 8, 0)


def test_the_shape_of_gemma3n(tmp_path: Path) -> None:
    shape = read_shape(make_shared(tmp_path / "m.gguf", "gemma3n"))
    n_embd, altup, laurel = 128, 4 * 128 + 4 * 16, 2 * 128 * 64
    assert shape.exact == 20
    assert [layer for layer in range(25) if not shape.swa_window[layer]] == [4, 9, 14, 19, 24]
    assert shape.kv_macs == (2 * n_embd * 64,) * 20 + (0,) * 5
    assert shape.ffn_macs == (3 * n_embd * 192 + 2 * n_embd * 256 + altup + laurel,) * 25
    assert shape.input_macs == n_embd * 256 * 25 + 3 * n_embd**2
    assert shape.output_macs == 3 * n_embd**2


@pytest.mark.parametrize("part", [{"fused_qkv": True}, {"k_as_v": True}, {"n_expert": 4}])
def test_other_parts_of_gemma4(part: dict, tmp_path: Path) -> None:
    plain = read_shape(make_shared(tmp_path / "plain.gguf", "gemma4"))
    other = read_shape(make_shared(tmp_path / "other.gguf", "gemma4", **part))
    if "k_as_v" in part:
        assert other.kv_macs == (*plain.kv_macs[:3], plain.kv_macs[3] // 2, 0, 0, 0, 0)
    else:
        assert other.kv_macs == plain.kv_macs
    if "fused_qkv" in part:  # one product: where K and V are another layer's they are made in vain
        assert other.attn_proj_macs[:4] == plain.attn_proj_macs[:4]
    elif "n_expert" in part:
        experts = 2 * 3 * 128 * 192 + 4 * 128
        assert other.ffn_macs == tuple(n + experts for n in plain.ffn_macs)


def test_a_gemma4_that_shares_nothing_has_no_exact_layer(tmp_path: Path) -> None:
    path = make_shared(tmp_path / "m.gguf", "gemma4", n_shared=0)
    assert read_shape(path).exact == 0
    with pytest.raises(UnsupportedArchitectureError, match="cannot be pruned"):
        make_plan(read_shape(path))


def counted(model: ModelShape, n_prompt: int, exact: bool) -> int:
    """Row by row, position by position."""
    total = model.head_macs
    for row in range(n_prompt):
        is_full = not exact or row == n_prompt - 1
        total += model.input_macs + is_full * model.output_macs
        for layer in range(model.n_layer):
            total += model.kv_macs[layer]
            if not is_full and layer >= model.exact - 1:
                continue
            window = model.swa_window[layer] or n_prompt
            seen = [p for p in range(row + 1) if row - p < window]
            total += model.attn_proj_macs[layer] + model.ffn_macs[layer]
            total += len(seen) * model.attn_dim[layer]
    return total


@pytest.mark.parametrize("n_prompt", [1, 2, 40])
def test_macs_are_those_of_a_row_by_row_count(n_prompt: int, shared: Path) -> None:
    shape = read_shape(shared)
    # Numbers that differ between layers, so that none can stand in for another.
    shape = replace(shape, ffn_macs=tuple(n + i for i, n in enumerate(shape.ffn_macs)))
    full, exact = prefill_macs(shape, n_prompt, None, 1), exact_macs(shape, n_prompt)
    assert full == counted(shape, n_prompt, exact=False)
    assert exact == counted(shape, n_prompt, exact=True)
    assert exact_limit(shape, n_prompt) == full / exact


@pytest.mark.parametrize("command", ["convert", "analyze", "eval", "demo"])
def test_what_prunes_says_that_nothing_need_be_converted(command: str, shared: Path) -> None:
    done = CliRunner().invoke(app, [command, str(shared)])
    assert done.exit_code == 1
    assert "already reads fast, and exactly" in done.stderr.replace("\n", " ")
    assert len(list(shared.parent.iterdir())) == 1


def test_inspect_says_what_context_tokens_skip(shared: Path) -> None:
    found = json.loads(CliRunner().invoke(app, ["inspect", str(shared), "--json"]).stdout)
    shape = read_shape(shared)
    assert (found["exact"], found["pop"]) == (shape.exact, None)
    told = " ".join(CliRunner().invoke(app, ["inspect", str(shared)]).stdout.split())
    assert f"(needs no pruning) Layers {shape.n_layer}" in told
    assert f"context tokens skip layers {shape.exact} to {shape.n_layer - 1}" in told
    assert "not converted" not in told


# --- how they are opened


def test_all_rows_but_the_last_leave_exactly(shared: Path) -> None:
    model = opened(shared)
    assert model.exact == read_shape(shared).exact
    assert (model.pop_mode, model.boundary, model.kv_key) == (Mode.CONTEXT, 0, FULL)
    assert evaluated(model, prompt(200)) == Counters(0, 1, 199)
    model.set_pop(Mode.OFF)
    model.clear()
    assert evaluated(model, prompt(200)) == Counters(0, 200)


def test_a_switch_keeps_the_cache(shared: Path) -> None:
    model = opened(shared)
    greedy(model, prompt(100), 5)
    # From now on the last token is read alone, in both modes: the same shapes, the same bits.
    reused = greedy(model, prompt(100), 5)
    model.set_pop(Mode.OFF)
    assert (model.n_tokens, model.kv_key) == (104, FULL)
    backend.reset_counters(model.ctx)
    assert greedy(model, prompt(100), 5) == reused
    assert backend.get_counters(model.ctx).n_rows == 1 + 4


@pytest.mark.parametrize("mode", [Mode.OFF, Mode.CONTEXT])
def test_a_state_of_either_mode_loads_in_the_other(mode: Mode, shared: Path) -> None:
    model = opened(shared)
    model.set_pop(mode)
    first = greedy(model, prompt(100), 5)
    state = model.save_state()
    other = opened(shared)
    other.set_pop(Mode.CONTEXT if mode is Mode.OFF else Mode.OFF)
    other.load_state(state)
    assert other.n_tokens == 104
    assert greedy(other, prompt(100), 5) == first


def test_the_figures_of_an_answer(shared: Path) -> None:
    model = opened(shared)
    *_, last = model.continue_text("a b c d e f g h", max_tokens=3, temperature=0.0)
    stats = last.stats
    assert stats is not None
    assert (stats.n_pruned, stats.n_full, stats.reading) == (0, 1, "exact")
    assert stats.n_skipped_exact == stats.n_prompt - 1 > 3
    assert stats.prefill_tokens_per_s == pytest.approx(stats.n_prompt / stats.prefill_s)


def test_there_is_no_boundary_to_set(shared: Path) -> None:
    model = opened(shared)
    with pytest.raises(PopError, match="does not support"):
        model.set_boundary(3)
    with pytest.raises(PopError, match="no boundary"):
        model.set_pop(Mode.ALWAYS)


# --- what is said of them


def test_the_chat_says_where_tokens_leave_and_keeps_its_turns() -> None:
    model = ScriptedModel(["One.", figures(n_pruned=0, n_skipped_exact=983, exact_layer=15)])
    model.boundary, model.exact = 0, 15
    said = talk(model, "/pop", "hello", "/stats", "/pop off", "/pop")
    on = (
        "# Exact skipping is on: context tokens leave at layer 15, past which nothing reads them."
        " Answers are those of the full model."
    )
    off = "# Exact skipping is off: prompts are read in full, with the same result."
    assert said[1] == on
    assert any("983 left at layer 15, exactly) · TTFT" in line for line in said)
    assert any(line.startswith("# Prompt tokens: 983 left at layer 15, exactly, ") for line in said)
    assert [line for line in said if "skipping is off" in line] == [off, off]


def test_what_a_full_reading_would_take_is_known(shared: Path) -> None:
    shape = read_shape(shared)
    stats = figures(n_prompt=1000, n_cached=0, n_pruned=0, n_full=1, n_skipped_exact=999)
    cost = _costs(opened(shared)).of(stats)
    assert cost.seconds == pytest.approx(stats.prefill_s * exact_limit(shape, 1000))
    assert not cost.is_measured
    later = replace(stats, n_cached=400, n_skipped_exact=599)
    assert _costs(opened(shared)).of(later).seconds > later.prefill_s


@pytest.mark.parametrize("mode", [Mode.OFF, Mode.CONTEXT])
def test_a_session_is_loaded_with_its_mode_and_its_cache(mode: Mode, tmp_path: Path) -> None:
    path = make_shared(tmp_path / "m.gguf", "gemma4", chat_template=TEMPLATE)
    sessions, asked = Sessions(tmp_path / "sessions"), Conversation("", (Turn("a b c d e f"),))
    model = opened(path)
    model.set_pop(mode)
    chunks = model.chat_turn(asked.messages, temperature=0.0, max_tokens=8)
    answer = "".join(chunk.text for chunk in chunks)
    said = asked.without_last().plus(replace(asked.turns[-1], answer=answer))
    sessions.save("talk", model, said)
    other = opened(path)
    restored = sessions.load("talk", other)
    assert (restored.reread, other.pop_mode, other.kv_key) == ("", mode, FULL)
    assert other.n_tokens > 10


@pytest.mark.parametrize("pop", [None, True, False])
def test_the_server_reads_exactly_unless_asked_not_to(pop: bool | None, shared: Path) -> None:
    tasks = Tasks(opened(shared))
    body = CompletionBody.model_validate({"model": "m", "prompt": "a b c", "pop": pop})
    assert tasks.completion(body).mode is (Mode.OFF if pop is False else Mode.CONTEXT)
