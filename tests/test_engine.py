"""PopModel: what is pruned, whose K/V are reused, what llama_cpp offers on top. Tiny models."""

import os
import subprocess
import sys

import numpy as np
import pytest
from converted import converted, tiny
from llama_cpp import Llama, LlamaGrammar, LlamaRAMCache, LogitsProcessorList
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding
from pop_converter.errors import PopError
from synthetic import add_keys, make_gguf

from pop_local.engine import backend
from pop_local.engine.backend import Counters, Mode
from pop_local.engine.model import PopModel, open_model

N_VOCAB = 384
# Of the logits (standard deviation 1): other batch shapes change them by up to 0.002, switching the
# mode by 1.2, and 15 context rows in a prompt's tail by 0.14.
NOISE = 0.01
MODES = [Mode.OFF, Mode.CONTEXT]


@pytest.fixture(scope="module")
def pop_file(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("engine"))


def opened(path, **options) -> PopModel:
    return open_model(
        path, **{"n_ctx": 1024, "n_threads": 1, "n_batch": 64, "n_ubatch": 64} | options
    )


def prompt(n_tokens: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, N_VOCAB, n_tokens).tolist()


def last_logits(model: PopModel) -> np.ndarray:
    row = backend.bindings().llama_get_logits_ith(model.ctx, -1)
    return np.ctypeslib.as_array(row, (N_VOCAB,)).copy()


def read(model: PopModel, tokens: list[int]) -> np.ndarray:
    """Logits after the prompt, its beginning taken from the KV cache if it is there."""
    sampled = model.generate(tokens, temp=0.0)
    next(sampled)
    return last_logits(model)


def evaluated(model: PopModel, tokens: list[int]) -> Counters:
    backend.reset_counters(model.ctx)
    read(model, tokens)
    return backend.get_counters(model.ctx)


def greedy(model: Llama, tokens: list[int], n: int = 12, **options) -> list[int]:
    sampled = model.generate(tokens, temp=0.0, **options)
    return [next(sampled) for _ in range(n)]


# --- what is pruned


def test_a_converted_model_starts_pruning_and_tells_its_boundary(pop_file):
    model = opened(pop_file)
    assert (model.pop_mode, model.boundary) == (Mode.CONTEXT, 4)
    assert model.meta is not None
    assert model.meta.tail_tokens == 16


@pytest.mark.parametrize("n_tokens", [17, 18, 64, 65, 80, 200])
def test_only_sink_and_tail_are_full_whatever_the_batches(pop_file, n_tokens):
    model = opened(pop_file)
    assert evaluated(model, prompt(n_tokens)) == Counters(n_tokens - 17, 17)


def test_in_full_mode_nothing_is_pruned(pop_file):
    model = opened(pop_file)
    model.set_pop(Mode.OFF)
    assert evaluated(model, prompt(200)) == Counters(0, 200)


def test_decoded_tokens_are_full(pop_file):
    model = opened(pop_file)
    backend.reset_counters(model.ctx)
    greedy(model, prompt(100), 10)
    # The tenth token is sampled and not decoded.
    assert backend.get_counters(model.ctx) == Counters(83, 17 + 9)


def test_always_prunes_decoded_tokens_too(pop_file):
    model = opened(pop_file)
    model.set_pop(Mode.ALWAYS)
    backend.reset_counters(model.ctx)
    greedy(model, prompt(100), 10)
    assert backend.get_counters(model.ctx) == Counters(109, 0)


def test_pruning_changes_the_logits(pop_file):
    model = opened(pop_file)
    pruned = read(model, prompt(200))
    model.set_pop(Mode.OFF)
    assert np.abs(read(model, prompt(200)) - pruned).max() > 10 * NOISE


def test_short_prompts_run_full_when_the_file_says_so(tmp_path):
    source = make_gguf(tmp_path / "m.gguf", "llama")
    model = opened(converted(source, tmp_path, boundary=4, min_prompt=50))
    assert evaluated(model, prompt(49)) == Counters(0, 49)
    model.clear()
    assert evaluated(model, prompt(50)) == Counters(33, 17)


def test_another_boundary_prunes_other_layers(pop_file):
    model = opened(pop_file)
    at_four = read(model, prompt(200))
    model.set_boundary(6)
    at_six = read(model, prompt(200))
    assert evaluated(model, prompt(100, seed=1)) == Counters(83, 17)
    model.set_boundary(0)
    assert model.boundary == 4
    assert np.abs(at_six - at_four).max() > 10 * NOISE
    np.testing.assert_array_equal(read(model, prompt(200)), at_four)


@pytest.mark.parametrize("layer", [-1, 8, 100])
def test_a_boundary_outside_the_model_is_refused(pop_file, layer):
    model = opened(pop_file)
    with pytest.raises(PopError, match="boundary"):
        model.set_boundary(layer)
    assert model.boundary == 4


def test_an_unconverted_model_runs_full_and_says_how_to_convert(tmp_path):
    model = opened(make_gguf(tmp_path / "m.gguf", "llama"))
    assert model.pop_mode is Mode.OFF
    assert evaluated(model, prompt(100)) == Counters(0, 100)
    with pytest.raises(PopError) as caught:
        model.set_pop(Mode.CONTEXT)
    assert "pop-local convert" in caught.value.hint


# --- whose K/V are reused


@pytest.mark.parametrize("first", MODES)
def test_switching_never_reuses_the_other_modes_cache(pop_file, first):
    (second,) = (mode for mode in MODES if mode is not first)
    tokens = prompt(200)
    expected = {}
    for mode in MODES:
        fresh = opened(pop_file)
        fresh.set_pop(mode)
        expected[mode] = read(fresh, tokens)
    model = opened(pop_file)
    for mode in (first, second, first):
        model.set_pop(mode)
        np.testing.assert_array_equal(read(model, tokens), expected[mode])
    assert np.abs(expected[Mode.OFF] - expected[Mode.CONTEXT]).max() > 10 * NOISE


def test_switching_to_the_mode_it_has_keeps_the_cache(pop_file):
    model = opened(pop_file)
    read(model, prompt(100))
    model.set_pop(Mode.CONTEXT)
    assert evaluated(model, prompt(100) + prompt(40, seed=1)) == Counters(24, 16)


@pytest.mark.parametrize("mode", MODES)
def test_the_beginning_of_a_prompt_is_reused(pop_file, mode):
    model = opened(pop_file)
    model.set_pop(mode)
    answered = prompt(100) + greedy(model, prompt(100))
    longer = answered + prompt(40, seed=1)
    counters = evaluated(model, longer)
    # The last sampled token was not decoded before.
    assert counters.n_context + counters.n_full == 41
    fresh = opened(pop_file)
    fresh.set_pop(mode)
    if mode is Mode.OFF:
        np.testing.assert_allclose(last_logits(model), read(fresh, longer), atol=NOISE)


def test_a_cached_context_token_does_not_end_up_in_a_prompts_tail(pop_file):
    model = opened(pop_file)
    tokens = prompt(200)
    read(model, tokens)
    shorter = tokens[:150]
    assert evaluated(model, shorter) == Counters(0, 16)
    reused = last_logits(model)
    expected = read(opened(pop_file), shorter)
    np.testing.assert_allclose(reused, expected, atol=NOISE)


def test_the_same_prompt_again_evaluates_nothing(pop_file):
    model = opened(pop_file)
    first = read(model, prompt(100))
    assert evaluated(model, prompt(100)) == Counters(0, 0)
    np.testing.assert_array_equal(last_logits(model), first)


@pytest.mark.parametrize("mode", MODES)
def test_a_saved_state_comes_back(pop_file, mode):
    model = opened(pop_file)
    model.set_pop(mode)
    read(model, prompt(100))
    state = model.save_state()
    expected = greedy(model, prompt(100) + prompt(30, seed=1))
    read(model, prompt(90, seed=2))
    model.load_state(state)
    backend.reset_counters(model.ctx)
    assert greedy(model, prompt(100) + prompt(30, seed=1), 1) == expected[:1]
    counters = backend.get_counters(model.ctx)
    assert counters.n_context + counters.n_full == 30


def test_a_saved_state_of_another_mode_or_boundary_is_refused(pop_file):
    model = opened(pop_file)
    read(model, prompt(100))
    state = model.save_state()
    model.set_pop(Mode.OFF)
    with pytest.raises(PopError, match="OFF"):
        model.load_state(state)
    model.set_pop(Mode.CONTEXT)
    model.set_boundary(6)
    with pytest.raises(PopError, match="boundary 4"):
        model.load_state(state)


def test_a_prompt_cache_finds_only_states_of_its_own_mode(pop_file):
    model = opened(pop_file)
    model.set_cache(LlamaRAMCache())
    tokens = prompt(100)
    expected = {}
    for mode in MODES:
        model.set_pop(mode)
        model.clear()
        expected[mode] = model.create_completion(tokens, max_tokens=8, temperature=0.0)
    for mode in MODES:
        model.set_pop(mode)
        read(model, prompt(50, seed=3))
        backend.reset_counters(model.ctx)
        again = model.create_completion(tokens, max_tokens=8, temperature=0.0)
        counters = backend.get_counters(model.ctx)
        assert again["choices"] == expected[mode]["choices"]
        assert counters.n_context == 0, "the prompt was in the cache"
        assert counters.n_full < 30


# --- what llama_cpp offers on top


def test_all_logits_run_full(pop_file):
    model = opened(pop_file, logits_all=True)
    assert evaluated(model, prompt(100)) == Counters(0, 100)
    plain = opened(pop_file)
    plain.set_pop(Mode.OFF)
    np.testing.assert_allclose(model.scores[99], read(plain, prompt(100)), atol=NOISE)


def test_embeddings_run_full(pop_file):
    model = opened(pop_file, embedding=True)
    backend.reset_counters(model.ctx)
    model.embed("some text to embed", truncate=False)
    counters = backend.get_counters(model.ctx)
    assert counters.n_context == 0
    assert counters.n_full > 0


def test_a_draft_model_runs_full_and_does_not_change_the_tokens(pop_file):
    repeated = prompt(60) * 3
    plain = opened(pop_file)
    plain.set_pop(Mode.OFF)
    drafted = opened(pop_file, draft_model=LlamaPromptLookupDecoding(num_pred_tokens=4))
    backend.reset_counters(drafted.ctx)
    assert greedy(drafted, repeated, 30) == greedy(plain, repeated, 30)
    assert backend.get_counters(drafted.ctx).n_context == 0


def test_greedy_takes_the_token_that_llama_cpps_sampler_takes(pop_file):
    model = opened(pop_file)
    ours = greedy(model, prompt(100), 20)
    model.clear()
    # A processor that changes nothing takes the ordinary chain.
    unchanged = LogitsProcessorList([lambda ids, scores: scores])
    theirs = greedy(model, prompt(100), 20, logits_processor=unchanged)
    assert ours == theirs


def test_grammars_hold(pop_file):
    model = opened(pop_file)
    grammar = LlamaGrammar.from_string('root ::= "a" | "b"', verbose=False)
    answer = model.create_completion(prompt(100), max_tokens=5, temperature=0.0, grammar=grammar)
    assert answer["choices"][0]["text"] in ("a", "b")


def test_completions_are_pruned_as_prompts_are(pop_file):
    model = opened(pop_file)
    backend.reset_counters(model.ctx)
    model.create_completion(prompt(100), max_tokens=1)
    assert backend.get_counters(model.ctx) == Counters(83, 17)


@pytest.mark.parametrize("arch", ["qwen2", "qwen3", "qwen3moe", "gemma2", "gemma3", "phi3"])
def test_every_architecture_reads_and_answers(tmp_path, arch):
    model = opened(tiny(tmp_path, arch))
    assert evaluated(model, prompt(150)) == Counters(133, 17)
    assert len(greedy(model, prompt(150), 5)) == 5


# --- what goes wrong


def test_a_prompt_beyond_the_context_names_the_counts_and_harms_nothing(pop_file):
    model = opened(pop_file, n_ctx=256)
    before = read(model, prompt(100))
    with pytest.raises(PopError, match=r"300 .*256"):
        read(model, prompt(300, seed=1))
    np.testing.assert_allclose(read(model, prompt(100)), before, atol=NOISE)


def test_an_unpatched_library_is_refused_with_the_cure(pop_file, unpatched_lib):
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


def test_an_architecture_without_the_hook_is_named(tmp_path):
    plain = make_gguf(tmp_path / "olmo2.gguf", "olmo2")
    keys = {"pop__version": 1, "pop__schedule": "FFFFSSSS", "pop__projection": "own"}
    with pytest.raises(PopError, match="olmo2"):
        opened(add_keys(plain, tmp_path / "olmo2.pop.gguf", **keys))


def test_a_file_cut_short_is_an_error_with_a_reason(pop_file, tmp_path):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(pop_file.read_bytes()[:-100_000])
    with pytest.raises(PopError) as caught:
        opened(cut)
    assert str(cut) in caught.value.message


def test_a_context_that_cannot_be_had_is_an_error_with_llama_cpps_reason(pop_file):
    with pytest.raises(PopError, match="V cache"):
        opened(pop_file, type_v=8)


def test_opening_and_answering_write_nothing(pop_file, capfd):
    greedy(opened(pop_file), prompt(100))
    assert capfd.readouterr() == ("", "")


def test_the_backend_describes_itself():
    info = backend.describe_backend()
    assert info.abi == backend.ABI
    assert info.library_path.is_file()
    assert info.devices[-1].name == "CPU"
    assert info.n_threads >= 1
