"""Compare base and sidecar with the single converted file, bit for bit."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pop_base.errors import PopError, WriteError
from pop_converter.gguf.header import read_header
from pop_converter.gguf.source import read_source
from pop_converter.popfile.format import Measured, PopMeta, pop_meta
from pop_converter.popfile.pruning_plan import make_plan
from pop_converter.popfile.sidecar import measure_sidecar, read_sidecar, write_sidecar
from pop_converter.projection import Projection
from pop_local.engine.cache.cache_keys import conversion
from pop_local.engine.cache.prompt_cache import PromptCache
from pop_local.engine.engine_options import EngineOptions
from pop_local.engine.llama import backend
from pop_local.engine.llama.backend import Mode
from pop_local.engine.model import PopModel
from pop_local.engine.prompt.prompt import Prompt
from pop_local.measure.budget import BALANCED
from support.calls import first_of, opened, prompt, read
from support.converted import Pair, made_up, paired
from support.oracle import random_tokens
from support.raw import Job, run
from support.shapes import read_shape
from support.sidecars import outcome, require_same
from support.synthetic import make_gguf, make_split

PROJECTIONS = [Projection.OWN, Projection.FITTED, Projection.WIDE]


@pytest.fixture(scope="module", params=PROJECTIONS)
def pair(request, tmp_path_factory) -> Pair:
    folder = tmp_path_factory.mktemp(request.param)
    return paired(make_gguf(folder / "tiny.gguf", "llama"), folder, request.param, boundary=4)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory) -> Pair:
    folder = tmp_path_factory.mktemp("fitted")
    return paired(make_gguf(folder / "tiny.gguf", "llama"), folder, "fitted", boundary=4)


# --- Equality with a single file


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_sliding_windows_equal_the_single_file(projection, mmap, tmp_path):
    base = make_gguf(tmp_path / "gemma.gguf", "gemma3")
    forms = paired(base, tmp_path, projection, boundary=4)
    require_same(forms, tmp_path, random_tokens(200, 380), mmap=mmap)


def test_fitted_tensors_change_the_result(fitted, tmp_path):
    """Without this, the tests of equality would also pass with an ignored sidecar."""
    other = paired(fitted.base, tmp_path, "fitted", seed=1, boundary=4)
    tokens = random_tokens(100, 380)
    logits = [
        outcome(fitted.base, tmp_path / "state", tokens, *further)[0]
        for further in ((fitted.sidecar,), (other.sidecar,))
    ]
    assert not np.array_equal(*logits)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_split_model_equals_the_single_file(projection, tmp_path):
    whole = make_gguf(tmp_path / "model.gguf", "llama")
    parts = make_split(tmp_path / "model.gguf", "llama", max_tensors=30)
    assert len(parts) > 1
    forms = paired(whole, tmp_path, projection, boundary=4)
    sidecar = tmp_path / "parts.pop-sidecar.gguf"
    plan = make_plan(read_shape(parts[0]), projection=projection, boundary=4, tail_tokens=16)
    made_fit = None if projection == "own" else made_up(plan)
    write_sidecar(plan, parts[0], sidecar, fitted=made_fit)
    model = PopModel(EngineOptions.of(parts[0], sidecar=sidecar, n_ctx=512, n_threads=1))
    want = read(opened(forms.single, n_ctx=512, n_batch=512, n_ubatch=512), prompt(100))
    np.testing.assert_array_equal(read(model, prompt(100)), want)


def test_unpatched_library_opens_base_model(pair, unpatched_lib):
    run(Job(str(pair.base), steps=(), lib=str(unpatched_lib)))


def test_engine_equals_the_single_file(pair):
    tokens = prompt(200)
    single, both = opened(pair.single), opened(pair.base, sidecar=pair.sidecar)
    assert first_of(both).settings.boundary == 4 and first_of(both).settings.mode is Mode.CONTEXT
    assert first_of(both).rule == first_of(single).rule
    np.testing.assert_array_equal(read(both, tokens), read(single, tokens))


def test_sidecar_applies_only_to_the_model_opened_with_it(pair):
    opened(pair.base, sidecar=pair.sidecar)
    assert first_of(opened(pair.base)).settings.boundary == 0
    again = opened(pair.base, sidecar=pair.sidecar, keep_states=True)
    assert (first_of(again).settings.boundary, first_of(again).refiller.is_on) == (4, True)


def test_library_that_ignores_the_sidecar_is_noticed(pair, monkeypatch):
    api = backend.bindings()

    def load(paths, n_paths, params):
        return api.llama_model_load_from_file(paths[0], params)

    monkeypatch.setattr(api, "llama_model_load_from_splits", load)
    with pytest.raises(PopError, match="layer 0, but the file's boundary is 4"):
        opened(pair.base, sidecar=pair.sidecar)


# --- States of two conversions


def test_state_of_another_conversion_is_refused(fitted, tmp_path):
    other = paired(fitted.base, tmp_path, "fitted", seed=1, boundary=4)
    folder = tmp_path / "own"
    folder.mkdir()
    own = paired(fitted.base, folder, "own", boundary=4)
    model = opened(fitted.base, sidecar=fitted.sidecar)
    read(model, prompt(100))
    state = first_of(model).states.save()
    for sidecar in (other.sidecar, own.sidecar):
        with pytest.raises(PopError, match="computed in mode CONTEXT, boundary 4, fitted"):
            first_of(opened(fitted.base, sidecar=sidecar)).states.restore(state)
    single = opened(fitted.single)
    first_of(single).states.restore(state)
    assert first_of(single).cache.n_tokens == 100


def test_search_results_do_not_change_the_conversion_key(fitted):
    source = read_source(fitted.single)
    meta = pop_meta(source.first)
    assert meta is not None
    figures = replace(Measured(), lookups_n=200)
    decided = replace(meta, budget=replace(BALANCED, tried="4 inside"), measured=figures)
    assert conversion(decided, source, None) == conversion(meta, source, None)
    assert conversion(replace(meta, schedule="FFFFFSSS"), source, None) != conversion(
        meta, source, None
    )


def test_prompt_cache_does_not_mix_conversions(fitted, tmp_path):
    other = paired(fitted.base, tmp_path, "fitted", seed=1, boundary=4)
    cache, tokens = PromptCache(2**24), Prompt(prompt(100))
    models = [
        opened(fitted.base, sidecar=sidecar)
        for sidecar in (fitted.sidecar, other.sidecar, fitted.sidecar)
    ]
    for model in models:
        first_of(model).states.prompts = cache
    first, another, again = models
    first.read(tokens)
    first.read(Prompt(prompt(100, seed=1)))
    assert (another.read(tokens).n_cached, again.read(tokens).n_cached) == (0, 99)


def test_full_states_are_shared(pair):
    full = opened(pair.base)
    read(full, prompt(100))
    both = opened(pair.base, sidecar=pair.sidecar)
    both.engine.set_mode(Mode.OFF)
    first_of(both).states.restore(first_of(full).states.save())
    assert first_of(both).cache.n_tokens == 100


# --- Writing


def meta_of(path: Path) -> PopMeta:
    meta = pop_meta(read_header(path))
    assert meta is not None
    return meta


def test_written_sidecar_has_expected_keys_and_tensors(pair):
    header, source = read_header(pair.sidecar), read_source(pair.base)
    meta, single = read_sidecar(pair.sidecar, source), meta_of(pair.single)
    assert meta.source_sha256 == hashlib.sha256(pair.base.read_bytes()).hexdigest()
    assert meta.source_sha256 == single.source_sha256
    assert (meta.schedule, meta.projection) == (single.schedule, single.projection)
    assert {name.split(".")[0] for name in header.keys} == {"general", "pop"}
    assert all(".pop_" in tensor.name for tensor in header.tensors)
    assert len(header.tensors) == {"own": 0, "fitted": 12, "fitted-wide": 21}[meta.projection]
    assert header.size_bytes < pair.base.stat().st_size / 4


def test_predicted_size_equals_file_size(pair):
    projection = meta_of(pair.sidecar).projection
    plan = make_plan(read_shape(pair.base), boundary=4, projection=projection)
    sizes = measure_sidecar(plan, pair.base)
    assert abs(sizes.output_bytes - pair.sidecar.stat().st_size) < 2048


def test_measured_quality_is_stored_and_the_complete_file_is_examined(tmp_path):
    base = make_gguf(tmp_path / "tiny.gguf", "llama")
    seen = []

    def examine(written: Path) -> Measured:
        seen.append(read_sidecar(written, read_source(base)).measured)
        return Measured(kl_mean=0.5)

    target = tmp_path / "tiny.pop-sidecar.gguf"
    write_sidecar(make_plan(read_shape(base)), base, target, examine=examine)
    assert seen == [Measured()]
    assert meta_of(target).measured == Measured(kl_mean=0.5)


@pytest.mark.parametrize("error", [PopError("cannot copy"), KeyboardInterrupt()])
def test_sidecar_that_fails_its_examination_is_removed(error, tmp_path):
    base = make_gguf(tmp_path / "tiny.gguf", "llama")

    def examine(written: Path) -> Measured:
        assert written.parent == tmp_path
        raise error

    target = tmp_path / "x.gguf"
    plan = make_plan(read_shape(base))
    with pytest.raises(type(error)):
        write_sidecar(plan, base, target, examine=examine)
    assert [path.name for path in tmp_path.iterdir()] == [base.name]
    target.write_text("mine")
    with pytest.raises(type(error)):
        write_sidecar(plan, base, target, examine=examine, force=True)
    assert target.read_text() == "mine"


def test_model_that_changes_during_writing_gets_no_sidecar(tmp_path):
    base = make_gguf(tmp_path / "tiny.gguf", "llama")

    def change(done_bytes: int, total_bytes: int) -> None:
        make_gguf(base, "llama", n_ctx_train=2048)

    with pytest.raises(WriteError, match="changed during the conversion"):
        write_sidecar(make_plan(read_shape(base)), base, tmp_path / "x.gguf", progress=change)
    assert [path.name for path in tmp_path.iterdir()] == [base.name]
