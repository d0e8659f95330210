"""Pruning, sampling and errors of PopModel, on tiny models."""

import os
import subprocess
import sys
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest

from pop_base.errors import PopError
from pop_local.engine.llama import backend, devices
from pop_local.engine.llama.backend import Counters, Mode
from pop_local.engine.prompt.prompt import Prompt
from pop_local.engine.turn_options import TurnOptions
from pop_local.ui.hints import hint_of
from support.calls import NOISE, evaluated, first_of, greedy, opened, prompt, read
from support.converted import converted
from support.shapes import read_shape
from support.synthetic import add_keys, make_gguf, renamed

# --- pruning


@pytest.mark.parametrize("n_tokens", [17, 18, 64, 65, 80, 200])
def test_only_sink_and_tail_are_full_in_any_batch(tmp_path, n_tokens):
    source = make_gguf(tmp_path / "m.gguf", "llama")
    model = opened(converted(source, tmp_path, boundary=4, min_prompt=0))
    assert evaluated(model, prompt(n_tokens)) == Counters(n_tokens - 17, 17)


@pytest.mark.parametrize(
    ("mode", "counters"),
    [
        (Mode.OFF, Counters(0, 109)),
        (Mode.CONTEXT, Counters(83, 26)),
        (Mode.ALWAYS, Counters(109, 0)),
    ],
)
def test_mode_selects_pruned_rows(pop_file, mode, counters):
    """Ten tokens are sampled, but the last one is not decoded."""
    model = opened(pop_file)
    model.engine.set_mode(mode)
    backend.reset_counters(model.engine.context.ctx)
    greedy(model, prompt(100), 10)
    assert backend.get_counters(model.engine.context.ctx) == counters


def test_prompts_below_the_files_minimum_run_full(tmp_path):
    source = make_gguf(tmp_path / "m.gguf", "llama")
    model = opened(converted(source, tmp_path, boundary=4, min_prompt=50))
    assert evaluated(model, prompt(49)) == Counters(0, 49)
    first_of(model).cache.clear()
    assert evaluated(model, prompt(50)) == Counters(33, 17)


def test_another_boundary_prunes_other_layers(pop_file):
    model = opened(pop_file)
    at_four = read(model, prompt(200))
    model.engine.sequences[0].set_boundary(6)
    at_six = read(model, prompt(200))
    assert evaluated(model, prompt(100, seed=1)) == Counters(83, 17)
    model.engine.sequences[0].set_boundary(0)
    assert first_of(model).settings.boundary == 4
    assert np.abs(at_six - at_four).max() > 10 * NOISE
    np.testing.assert_array_equal(read(model, prompt(200)), at_four)


@pytest.mark.parametrize("layer", [-1, 8, 100])
def test_boundary_outside_the_model_is_refused(pop_file, layer):
    model = opened(pop_file)
    with pytest.raises(PopError, match="boundary"):
        model.engine.sequences[0].set_boundary(layer)
    assert first_of(model).settings.boundary == 4


def test_unconverted_model_runs_full_and_suggests_convert(tmp_path):
    model = opened(make_gguf(tmp_path / "m.gguf", "llama"))
    assert first_of(model).settings.mode is Mode.OFF
    assert evaluated(model, prompt(100)) == Counters(0, 100)
    with pytest.raises(PopError) as caught:
        model.engine.set_mode(Mode.CONTEXT)
    assert "convert it first" in caught.value.hint


# --- sampling


def test_greedy_selects_same_token_as_llama_cpp(pop_file):
    model = opened(pop_file)
    ours = greedy(model, prompt(100), 20)
    # Mirostat runs in llama.cpp. With top_k=1 the chain is greedy.
    for options in ({"top_k": 1, "seed": 3}, {"temperature": 0.0, "repeat_penalty": 1.0001}):
        first_of(model).cache.clear()
        model.read(Prompt(prompt(100)))
        expected = list(islice(model.engine.sampled(TurnOptions(**options)), 20))
        assert ours == expected


# --- errors


def test_oversized_prompt_reports_counts_without_side_effects(pop_file):
    model = opened(pop_file, n_ctx=256)
    before = read(model, prompt(100))
    with pytest.raises(PopError, match=r"300 .*256"):
        read(model, prompt(300, seed=1))
    np.testing.assert_allclose(read(model, prompt(100)), before, atol=NOISE)


@pytest.fixture
def set_free_memory(monkeypatch):
    """Return a function that sets the number of free bytes."""

    def set_free_memory(n_bytes: int) -> None:
        memory = SimpleNamespace(total=10**12, available=n_bytes, free=0)
        for name in ("virtual_memory", "swap_memory"):
            monkeypatch.setattr(f"pop_local.engine.llama.loading.psutil.{name}", lambda: memory)

    return set_free_memory


def test_context_must_fit_free_memory(pop_file, set_free_memory):
    """Otherwise the system would kill the process."""
    set_free_memory(2_000_000)
    opened(pop_file, n_ctx=512)
    with pytest.raises(PopError, match=r"a context of 1,024 tokens needs .* is free") as refused:
        opened(pop_file, n_ctx=1024)
    n_fits = refused.value.fields["n_fits"]
    assert isinstance(n_fits, int) and 512 <= n_fits < 1024
    assert f"n_ctx={n_fits}" in refused.value.hint
    assert f"--ctx {n_fits}" in hint_of(refused.value)
    opened(pop_file, n_ctx=n_fits)


def test_window_saves_memory_only_without_swa_full(tmp_path, set_free_memory):
    path = make_gguf(tmp_path / "model.gguf", "gemma3")
    set_free_memory(1 << 20)
    opened(path, n_ctx=1024, swa_full=False)
    with pytest.raises(PopError, match="is free"):
        opened(path, n_ctx=1024)


def test_unpatched_library_is_refused_with_hint(pop_file, unpatched_lib):
    done = subprocess.run(
        [sys.executable, "-m", "pop_local", "run", str(pop_file), "hello"],
        env=os.environ | {"LLAMA_CPP_LIB_PATH": str(unpatched_lib)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "unpatched" in done.stderr
    assert "pip install ./patches/llama-cpp-python" in done.stderr
    assert "Traceback" not in done.stderr


def test_error_contains_unsupported_architecture(tmp_path):
    plain = renamed(make_gguf(tmp_path / "model.gguf", "qwen2"), tmp_path, "dream")
    keyed = tmp_path / "dream.pop.gguf"
    add_keys(plain, keyed, pop__version=1, pop__schedule="FFFFSSSS", pop__projection="own")
    with pytest.raises(PopError, match="'dream' is an encoder, a diffusion model or a draft"):
        opened(keyed)


def test_truncated_file_is_reported_with_reason(pop_file, tmp_path):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(pop_file.read_bytes()[:-100_000])
    with pytest.raises(PopError) as caught:
        opened(cut)
    assert str(cut) in caught.value.message


def test_failed_context_reports_llama_cpps_reason(pop_file):
    with pytest.raises(PopError, match="V cache"):
        opened(pop_file, type_v=8, flash_attn=False)


def test_opening_and_answering_print_nothing(pop_file, capfd):
    greedy(opened(pop_file), prompt(100))
    assert capfd.readouterr() == ("", "")


def test_backend_description_lists_features():
    info = devices.describe_backend()
    assert info.abi == backend.ABI
    assert dict(info.built_in)["CPU"] == 1
    assert info.library_path.is_file()
    assert info.devices[-1].name == "CPU"
    assert info.n_threads >= 1


def test_memory_check_includes_saved_states(pop_file, tmp_path, set_free_memory):
    shape = read_shape(pop_file)
    n_cells = 4096
    kv_bytes = 2 * n_cells * sum(shape.n_k + shape.n_v)
    set_free_memory(kv_bytes)
    opened(pop_file, n_ctx=n_cells)
    with pytest.raises(PopError, match="is free"):
        opened(pop_file, n_ctx=n_cells, keep_states=True)
    opened(make_gguf(tmp_path / "plain.gguf", "llama"), n_ctx=n_cells, keep_states=True)


def test_unknown_option_is_an_error(pop_file):
    with pytest.raises(TypeError, match="'threads'"):
        opened(pop_file, threads=1)
