"""Random operations on cached rows, and damaged files of the cache."""

import itertools
import json
import logging
import random
import zipfile
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pop_base.errors import PopError, StoppedError
from pop_converter.popfile.format import DeepRows
from pop_local.engine.cache import checkpoints as checkpoints_module
from pop_local.engine.cache.align import MIN_RUN, find_runs, in_order, window_hashes
from pop_local.engine.cache.disk_store import SUFFIX, DiskStore, clear_folder
from pop_local.engine.cache.prompt_cache import PromptCache
from pop_local.engine.llama.interrupt import stopped_by
from pop_local.engine.model import PopModel
from pop_local.engine.prefill import read as read_module
from pop_local.engine.prefill.deep_rows import find_deep_rows
from pop_local.engine.prompt.prompt import Prompt
from support import recipes
from support.calls import NOISE, first_of, opened, prompt, read, set_rule
from support.campaign import SECONDS, campaign
from support.converted import tiny
from support.edit_operations import Operations, randomly_edited
from support.edited_prompts import OLD, pruned
from support.mutants import mutated_bytes, mutated_json
from support.synthetic import make_gguf

pytestmark = pytest.mark.slow

N_OPERATIONS = 8
N_BATCH = 64
SMALL: dict[str, Any] = {"n_layer": 2, "n_embd": 64, "n_ff": 64}
# Every sixth layer of gemma3 has no window.
ARCHS = {"llama": SMALL, "gemma3": SMALL | {"n_layer": 6}}


@pytest.fixture(autouse=True)
def few_warnings(caplog):
    """Drop the warnings about damaged files, of which an hour has a million."""
    with caplog.at_level(logging.ERROR, logger="pop_local"):
        yield


def test_alignment_of_random_edits_is_valid():
    """A few distinct tokens give many repeated runs."""

    def attempt(rng: random.Random) -> None:
        n_distinct = rng.choice((2, 9, 999))
        cached = [rng.randrange(n_distinct) for _ in range(400)]
        expected = cached
        for _ in range(rng.choice((0, 1, 3, 30))):
            expected = randomly_edited(rng, expected)
        if rng.random() < 0.3:
            at = rng.randrange(len(expected))
            expected = expected[at:] + expected[:at]
        ours, theirs = np.asarray(cached, np.int32), np.asarray(expected, np.int32)
        runs = find_runs(ours, theirs, window_hashes(theirs, MIN_RUN))
        ordered = in_order(runs)
        assert set(ordered) <= set(runs) and bool(ordered) == bool(runs)
        for run in runs:
            assert run.n >= MIN_RUN
            assert np.array_equal(
                ours[run.cached : run.cached + run.n], theirs[run.prompt : run.prompt + run.n]
            )
        for first, second in itertools.pairwise(runs):
            assert first.prompt + first.n <= second.prompt
        for first, second in itertools.pairwise(ordered):
            assert first.cached + first.n <= second.cached
        if not runs:
            raise PopError("no common run")

    campaign(attempt)


@pytest.mark.parametrize("arch", ARCHS)
def test_edited_states_equal_fresh_readings(tmp_path, arch):
    """Operations compares every exact cache with a fresh full reading."""
    path = tiny(tmp_path, arch, **ARCHS[arch], boundary=1)
    with pruned(path, prompt_cache=PromptCache(2**24)) as model, pruned(path, full=True) as full:

        def attempt(rng: random.Random) -> None:
            set_rule(model, deep_rows=rng.choice(list(DeepRows)))
            first_of(model).cache.clear()
            operations = Operations(model, full, rng.randrange(2**32))
            operations.run(N_OPERATIONS)
            if operations.n_stopped:
                raise PopError("a read was stopped")

        campaign(attempt)


def test_deep_rows_ignore_tokens_after_separator(tmp_path):
    """Deep rows depend on all tokens' spellings, but not on the tokens after a separator."""
    with opened(tiny(tmp_path, **SMALL, boundary=1)) as model:
        context = model.engine.context
        n_vocab, line = context.vocabulary.n_tokens, context.vocabulary.tokenize("\n")

        def attempt(rng: random.Random) -> None:
            tokens = [rng.randrange(-1, n_vocab) for _ in range(rng.randrange(300))]
            criterion = rng.choice(list(DeepRows))
            deep = find_deep_rows(context, np.asarray(tokens), criterion)
            assert deep.dtype == bool and len(deep) == len(tokens)
            assert not deep[np.asarray(tokens, int) < 0].any()
            longer = np.asarray([*tokens, *line, *prompt(20, rng.randrange(99))])
            assert np.array_equal(find_deep_rows(context, longer, criterion)[: len(tokens)], deep)
            if not deep.any():
                raise PopError("no deep rows")

        campaign(attempt)


def _turns(rng: random.Random, model: PopModel, fresh: PopModel, n_vocab: int) -> int:
    """Read related prompts, compare each with a fresh reading, and return the number of stops."""
    first_of(model).cache.clear()
    tokens, n_stopped = [1], 0
    for _ in range(4):
        new = [rng.randrange(1, n_vocab) for _ in range(rng.randrange(1, 300))]
        tokens = tokens[: rng.choice((len(tokens), rng.randrange(1, len(tokens) + 1)))][:600] + new
        if rng.random() < 0.3:
            n_rows = rng.randrange(len(tokens))
            with suppress(StoppedError), stopped_by(partial(_has_read, model, n_rows)):
                model.read(Prompt(tokens))
            n_stopped += first_of(model).cache.n_tokens < len(tokens)
        logits = _logits_after(model, tokens)
        first_of(fresh).cache.clear()
        expected = _logits_after(fresh, tokens)
        assert np.abs(logits - expected).max() < NOISE * expected.std()
        assert first_of(model).cache.slot.end_position == len(tokens)
    return n_stopped


def _has_read(model: PopModel, n_rows: int) -> bool:
    return first_of(model).cache.n_tokens >= n_rows


def _logits_after(model: PopModel, tokens: list[int]) -> np.ndarray:
    model.read(Prompt(tokens))
    logits: np.ndarray = model.engine.context.logits()[0].copy()
    return logits


@pytest.mark.parametrize("name", ["gemma3", "mamba2", "lfm2"])
def test_checkpoints_equal_fresh_readings(tmp_path, monkeypatch, name):
    if name != "gemma3" and SECONDS <= 1:
        pytest.skip("an attempt takes seconds: make fuzz runs it")
    monkeypatch.setattr(read_module, "EVERY", N_BATCH)
    monkeypatch.setattr(checkpoints_module, "MAX_CHECKPOINTS", 5)
    options: dict[str, Any] = {}
    if name == "gemma3":
        path, options["swa_full"] = make_gguf(tmp_path / "model.gguf", name, **ARCHS[name]), False
    elif name in (recipe_of := {str(name): name for name in recipes.names()}):
        path = recipes.make(recipe_of[name], tmp_path / "model.gguf", ())
    else:
        pytest.skip("the recipes are not built")
    with opened(path, **options) as model, opened(path, **options) as fresh:

        def attempt(rng: random.Random) -> None:
            if _turns(rng, model, fresh, 127):
                raise PopError("a read was stopped")

        campaign(attempt)


def _stored_states(path: Path, folder: Path) -> list[bytes]:
    """Return the files of an exact state, a pruned one, and one with stale rows."""
    prompts = PromptCache(2**24, DiskStore(folder, 2**24))
    with pruned(path, prompt_cache=prompts) as model:
        for tokens in (OLD, OLD[:70] + prompt(10, 5) + OLD[80:]):
            read(model, tokens)
            first_of(model).states.store()
        first_of(model).refiller.refill()
        first_of(model).states.store()
        prompts.close()
    return [each.read_bytes() for each in sorted(folder.glob(f"*{SUFFIX}"))]


def _damaged(rng: random.Random, content: bytes, target: Path, scratch: Path) -> None:
    """Damage the members of a stored state, whose CRCs stay valid, or the file itself."""
    scratch.write_bytes(content)
    with zipfile.ZipFile(scratch) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice(list(members))
    if name == "state.json":
        about = mutated_json(rng, json.loads(members[name]))
        members[name] = json.dumps(about).encode()
    else:
        n_bytes = len(members[name])
        members[name] = mutated_bytes(
            rng, members[name], 0, min(n_bytes, rng.choice((128, n_bytes)))
        )
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for member, data in members.items():
            archive.writestr(zipfile.ZipInfo(member), data)
    if rng.random() < 0.2:
        whole = target.read_bytes()
        target.write_bytes(mutated_bytes(rng, whole, 0, len(whole)))


@pytest.mark.parametrize("arch", ARCHS)
def test_damaged_states_are_removed_or_restored(tmp_path, arch):
    """A damaged state is removed or restored; the model then reads any prompt."""
    path = tiny(tmp_path, arch, **ARCHS[arch], boundary=1)
    contents, folder = _stored_states(path, tmp_path / "made"), tmp_path / "store"
    with pruned(path) as model:

        def attempt(rng: random.Random) -> None:
            store = DiskStore(folder, 2**24)
            target = folder / f"damaged{SUFFIX}"
            _damaged(rng, rng.choice(contents), target, tmp_path / "scratch")
            results = [store._load(entry) for entry in store.stored()]
            assert bool(results and results[0]) == target.exists()
            clear_folder(folder)
            if not results or results[0] is None:
                raise PopError("removed")
            try:
                first_of(model).states.restore(results[0])
                first_of(model).refiller.refill()
            finally:
                model.read(Prompt(OLD[: rng.randrange(1, 700)]))
                cache = first_of(model).cache
                assert cache.slot.end_position == cache.n_tokens

        campaign(attempt)
