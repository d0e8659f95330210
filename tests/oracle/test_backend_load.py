"""Files that the patched library loads or refuses, with the refusals' reasons."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from support.oracle import random_tokens
from support.pop_files import OWN, Keys, add_to, own_as_fitted
from support.raw import Job, Step, run
from support.synthetic import make_gguf

FITTED: Keys = {**OWN, "pop.projection": "fitted"}
LAST = Step("decode", "last", tokens=random_tokens(300, 380))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_gguf(tmp_path_factory.mktemp("llama") / "model.gguf", "llama", type=Type.Q8_0)


REFUSED = {
    "version": ({"pop.version": 2}, "pop.version is 2"),
    "version of another type": ({"pop.version": "1"}, "key pop.version has type str, expected u32"),
    "length of the schedule": ({"pop.schedule": "FFFSSS"}, "one letter for each of the 8 layers"),
    "later letter": ({"pop.schedule": "FFFFSASS"}, "'FFFFSASS'"),
    "F after S": ({"pop.schedule": "FFFSFSSS"}, "'FFFSFSSS'"),
    "nothing kept": ({"pop.schedule": "SSSSSSSS"}, "'SSSSSSSS'"),
    "nothing skipped": ({"pop.schedule": "FFFFFFFF"}, "'FFFFFFFF'"),
    "projection": ({"pop.projection": "guessed"}, "'guessed'"),
    "projection with attention": ({"pop.projection": "fitted-attention"}, "'fitted-attention'"),
    "fitted without tensors": ({"pop.projection": "fitted"}, "blk.6.pop_attn_k.weight"),
}


@pytest.mark.parametrize("keys, reason", REFUSED.values(), ids=REFUSED)
def test_wrong_keys_are_refused(keys: Keys, reason: str, llama: Path, tmp_path: Path) -> None:
    model = add_to(llama, tmp_path / "wrong.gguf", {**OWN, **keys})
    with pytest.raises(RuntimeError, match=reason):
        run(Job(str(model), steps=()))


@pytest.mark.parametrize("missing", ["pop.version", "pop.schedule"])
def test_missing_keys_are_refused(missing: str, llama: Path, tmp_path: Path) -> None:
    keys = {name: value for name, value in OWN.items() if name != missing}
    with pytest.raises(RuntimeError, match=missing):
        run(Job(str(add_to(llama, tmp_path / "wrong.gguf", keys)), steps=()))


def test_missing_projection_key_means_own(llama: Path, tmp_path: Path) -> None:
    keys = {name: value for name, value in OWN.items() if name != "pop.projection"}
    want = run(Job(str(add_to(llama, tmp_path / "own.gguf", OWN)), (LAST,)))
    steps = (LAST, Step("counters", "counters"))
    got = run(Job(str(add_to(llama, tmp_path / "missing.gguf", keys)), steps))
    np.testing.assert_array_equal(got["counters"], [299, 1])
    np.testing.assert_array_equal(got["last"], want["last"])


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma3"])
def test_own_projections_stored_as_fitted_change_nothing(arch: str, tmp_path: Path) -> None:
    base = make_gguf(tmp_path / "base.gguf", arch, type=Type.Q8_0)
    own = add_to(base, tmp_path / "own.gguf", OWN)
    fitted = add_to(base, tmp_path / "fitted.gguf", FITTED, own_as_fitted(base, 5, 8))
    steps = (LAST, Step("counters", "counters"))
    want, got = run(Job(str(own), steps)), run(Job(str(fitted), steps))
    np.testing.assert_array_equal(got["counters"], [299, 1])
    np.testing.assert_array_equal(got["last"], want["last"])


def test_fitted_tensors_change_the_logits(llama: Path, tmp_path: Path) -> None:
    tensors = own_as_fitted(llama, 5, 8)
    bias, kind = tensors["blk.7.pop_attn_v.bias"]
    tensors["blk.7.pop_attn_v.bias"] = (bias + 1, kind)
    own = run(Job(str(add_to(llama, tmp_path / "own.gguf", OWN)), (LAST,)))
    moved = run(Job(str(add_to(llama, tmp_path / "fitted.gguf", FITTED, tensors)), (LAST,)))
    assert not np.array_equal(own["last"], moved["last"])


WRONG_TENSORS: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray], str]] = {
    "shape": ("blk.6.pop_attn_k.weight", lambda values: values[:-1], "wrong shape"),
    "not finite": (
        "blk.7.pop_attn_k.bias",
        lambda values: np.full_like(values, np.nan),
        "not finite",
    ),
    "type": ("blk.7.pop_attn_k.bias", lambda values: values.astype(np.float16), "type f16"),
}


@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_wrong_fitted_tensors_are_refused(case: str, llama: Path, tmp_path: Path) -> None:
    name, change, reason = WRONG_TENSORS[case]
    tensors = own_as_fitted(llama, 5, 8)
    values, kind = tensors[name]
    tensors[name] = (change(values), Type.F16 if case == "type" else kind)
    model = add_to(llama, tmp_path / "wrong.gguf", FITTED, tensors)
    with pytest.raises(RuntimeError, match=f"{re.escape(name)}.*{reason}"):
        run(Job(str(model), steps=()))


def test_non_finite_weights_are_refused_although_repacked(tmp_path: Path) -> None:
    """Most processors repack Q4_0, some also Q8_0, and repacked buffers cannot be read."""
    base = make_gguf(tmp_path / "base.gguf", "llama", type=Type.Q4_0)
    tensors = own_as_fitted(base, 5, 8)
    want = run(Job(str(add_to(base, tmp_path / "own.gguf", OWN)), (LAST,)))
    got = run(Job(str(add_to(base, tmp_path / "fitted.gguf", FITTED, tensors)), (LAST,)))
    np.testing.assert_array_equal(got["last"], want["last"])
    weight, _ = tensors["blk.6.pop_attn_v.weight"]
    weight.view(np.float16)[0, 0] = np.nan  # scale of the first block
    wrong = add_to(base, tmp_path / "wrong.gguf", FITTED, tensors)
    with pytest.raises(RuntimeError, match=r"blk\.6\.pop_attn_v\.weight.*not finite"):
        run(Job(str(wrong), steps=()))


@pytest.mark.parametrize("keys", [OWN, {**FITTED, "pop.schedule": "FFFFFFSS"}, {}])
def test_tensors_of_another_schedule_are_refused(keys: Keys, llama: Path, tmp_path: Path) -> None:
    model = add_to(llama, tmp_path / "wrong.gguf", keys, own_as_fitted(llama, 5, 8))
    with pytest.raises(RuntimeError, match="does not belong to the schedule"):
        run(Job(str(model), steps=()))


REFUSED_CALLS = {
    "unknown mode": (Step("mode", value=3), OWN),
    "mode without a boundary": (Step("mode", value=1), {}),
    "boundary beyond the layers": (Step("boundary", value=8), OWN),
    "boundary below the layers": (Step("boundary", value=-1), OWN),
    "sequence below zero": (Step("full_from", seq=-1), OWN),
}


@pytest.mark.parametrize("step, keys", REFUSED_CALLS.values(), ids=REFUSED_CALLS)
def test_invalid_calls_are_refused(step: Step, keys: Keys, llama: Path, tmp_path: Path) -> None:
    model = add_to(llama, tmp_path / "model.gguf", keys)
    with pytest.raises(RuntimeError, match="was refused"):
        run(Job(str(model), (step,)))


def test_fitted_projections_fix_the_boundary(llama: Path, tmp_path: Path) -> None:
    model = add_to(llama, tmp_path / "fitted.gguf", FITTED, own_as_fitted(llama, 5, 8))
    run(Job(str(model), (Step("boundary", value=5),)))
    with pytest.raises(RuntimeError, match="was refused"):
        run(Job(str(model), (Step("boundary", value=4),)))


def test_model_without_keys_accepts_a_boundary(llama: Path, tmp_path: Path) -> None:
    """Searches over depths need no file for each depth."""
    own = add_to(llama, tmp_path / "own.gguf", {**OWN, "pop.sink_tokens": 1})
    want = run(Job(str(own), (LAST,)))
    got = run(Job(str(llama), (Step("boundary", value=5), Step("mode", value=1), LAST)))
    np.testing.assert_array_equal(got["last"], want["last"])


def test_sink_can_be_changed(llama: Path, tmp_path: Path) -> None:
    none = run(Job(str(add_to(llama, tmp_path / "none.gguf", OWN)), (LAST,)))
    one = add_to(llama, tmp_path / "one.gguf", {**OWN, "pop.sink_tokens": 1})
    again = (Step("remove"), Step("sink", value=-1), replace(LAST, name="one"))
    got = run(Job(str(one), (Step("sink", value=0), LAST, *again)))
    np.testing.assert_array_equal(got["last"], none["last"])
    np.testing.assert_array_equal(got["one"], run(Job(str(one), (LAST,)))["last"])
    assert not np.array_equal(got["last"], got["one"])
