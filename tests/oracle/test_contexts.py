"""Changing settings in a context, and sequences that share its tokens."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from support.converted import converted, tiny
from support.oracle import random_tokens
from support.raw import Job, Step, run
from support.synthetic import make_gguf

TOKENS = random_tokens(64, 380)
# Mode, boundary, sink, full_from. Equal numbers of full rows at other places may reuse a graph.
SETTINGS = [
    (0, 3, 1, -1),
    (1, 3, 1, 60),
    (1, 5, 1, 60),
    (1, 5, 0, 59),
    (1, 5, 4, 63),
    (2, 5, 1, 60),
    (1, 5, 1, 40),
    (2, 3, 1, 60),
]


@pytest.mark.parametrize("decodes", [False, True], ids=["prefills", "prefills and decodes"])
@pytest.mark.parametrize("swa", [{}, {"swa_pattern": [True, False] * 4}], ids=["period", "flags"])
def test_alternating_settings_never_reuse_a_wrong_graph(
    swa: dict, decodes: bool, tmp_path: Path
) -> None:
    """Each prefill, and the decode after it, equals that of a fresh context bit for bit.

    llama.cpp reuses a graph only directly after one of its shape, so a case without decodes exists.
    """
    model = str(tiny(tmp_path, "gemma3", **swa))
    order = [*range(len(SETTINGS)), *reversed(range(len(SETTINGS))), 0, 4, 2, 4, 0, 6, 0]
    mixed: list[Step] = []
    for turn, number in enumerate(order):
        prefill, decode = _turn(SETTINGS[number], f"{turn}.")
        mixed += [*prefill, decode] if decodes else prefill
    got = run(Job(model, tuple(mixed)))
    fresh = []
    for setting in SETTINGS:
        prefill, decode = _turn(setting, "")
        fresh.append(run(Job(model, (*prefill, decode))))
    for turn, number in enumerate(order):
        for name in ("prefill", "decode") if decodes else ("prefill",):
            np.testing.assert_array_equal(got[f"{turn}.{name}"], fresh[number][name])
    for number, one in enumerate(fresh):
        for other in fresh[:number]:
            assert not np.array_equal(one["prefill"], other["prefill"])
            assert not np.array_equal(one["decode"], other["decode"])


def _turn(setting: tuple[int, int, int, int], prefix: str) -> tuple[list[Step], Step]:
    """Return the prefill of an empty cache, and the decode of the next token."""
    mode, boundary, sink, full_from = setting
    prefill = [
        Step("boundary", value=boundary),
        Step("mode", value=mode),
        Step("sink", value=sink),
        Step("full_from", value=full_from),
        Step("remove"),
        Step("decode", prefix + "prefill", tokens=TOKENS),
    ]
    return prefill, Step("decode", prefix + "decode", tokens=TOKENS[:1], pos=len(TOKENS))


@pytest.mark.parametrize("before", [Step("embed"), Step("causal", value=0)], ids=["embed", "all"])
def test_embeddings_and_non_causal_masks_run_all_rows_full(
    before: Step, tmp_path: Path, unpatched_lib: Path
) -> None:
    """Embeddings may be pooled over all rows; without a causal mask, rows depend on later ones."""
    model = str(tiny(tmp_path))
    last = Step("decode", "last", tokens=TOKENS)
    want = run(Job(model, (before, last), lib=str(unpatched_lib)))
    got = run(Job(model, (before, last, Step("counters", "counters"))))
    np.testing.assert_array_equal(got["counters"], [0, len(TOKENS)])
    np.testing.assert_array_equal(got["last"], want["last"])


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_tokens_of_two_sequences_in_separate_streams_are_an_error(
    arch: str, tmp_path: Path, unpatched_lib: Path
) -> None:
    model = str(tiny(tmp_path, arch))
    both = Step("decode", tokens=TOKENS, coupled=(1,))
    steps = (Step("full_from", value=60), Step("full_from", seq=1, value=60), both)
    unpatched = Job(model, (both,), lib=str(unpatched_lib), n_seq_max=2)
    for job in (unpatched, replace(unpatched, steps=steps, lib=None)):
        with pytest.raises(RuntimeError, match=r"llama_decode returned 1\n"):
            run(job)


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_tokens_of_two_sequences_in_one_stream_are_pruned(arch: str, tmp_path: Path) -> None:
    """A row is full as soon as it is full for one of its sequences."""
    job = Job(str(tiny(tmp_path, arch)), (), n_seq_max=2, kv_unified=True)
    alone = (
        Step("full_from", value=50),
        Step("decode", "0", tokens=TOKENS),
        Step("decode", "next", tokens=TOKENS[:1], pos=64),
    )
    shared = (
        Step("full_from", value=60),
        Step("full_from", seq=1, value=50),
        Step("decode", "0", tokens=TOKENS, coupled=(1,)),
        Step("counters", "counters"),
        Step("decode", "next", tokens=TOKENS[:1], pos=64, seq=1),
    )
    want, got = run(replace(job, steps=alone)), run(replace(job, steps=shared))
    np.testing.assert_array_equal(got["counters"], [49, 15])
    np.testing.assert_array_equal(got["0"], want["0"])
    np.testing.assert_array_equal(got["next"], want["next"])


@pytest.mark.parametrize("n_seq", [1, 3])
@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_sequences_without_a_sink_are_pruned(arch: str, n_seq: int, tmp_path: Path) -> None:
    """The batch that reserves memory, with all rows at position 0, must not count as a prompt."""
    source = make_gguf(tmp_path / "model.gguf", arch)
    model = converted(source, tmp_path, boundary=4, sink_tokens=0)
    more = tuple((seq, 0, TOKENS) for seq in range(1, n_seq))
    steps = (
        *(Step("full_from", seq=seq, value=48) for seq in range(n_seq)),
        Step("decode", "logits", tokens=TOKENS, more=more),
        Step("counters", "counters"),
    )
    counters = run(Job(str(model), steps, n_seq_max=n_seq, n_ubatch=64))["counters"]
    np.testing.assert_array_equal(counters, [48 * n_seq, 16 * n_seq])
