"""Wide fits in the patched library: the previous row, and refused files."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from pop_converter.fit.least_squares import KvType
from pop_converter.gguf.header import read_header
from pop_converter.popfile.pruning_plan import make_plan
from pop_converter.popfile.rewrite import Fitted, convert
from pop_converter.projection import Projection
from support.converted import made_up
from support.kv_reference import (
    F16,
    Expected,
    Reference,
    Stored,
    fit_at_random,
    normalised_states,
    parse_state,
)
from support.oracle import Q8_0, Tokens, Trio, make_trio, random_tokens
from support.pop_files import add_to
from support.raw import Job, Step, run
from support.raw_jobs import GPU_LAYERS
from support.shapes import read_shape
from support.synthetic import make_gguf

OWN, FITTED, WIDE = Projection

N_VOCAB, N_UBATCH, BOUNDARY = 380, 32, 3
# For values around 1: sums of F32 products, and ggml's GELU table in F16. On GPUs, products and
# attention in F16 below the boundary also change the state. An actual error is larger than WRONG.
ROUNDED, WRONG = 0.06, 0.3
CLOSE = ROUNDED if GPU_LAYERS else 4e-3
Parts = Sequence[tuple[int, int, Tokens]]

FIRST, SECOND = random_tokens(70, N_VOCAB, seed=1), random_tokens(58, N_VOCAB, seed=2)
# All ubatches have equal numbers of rows, so graphs are reused and only their inputs differ.
IN_TURN: Parts = [
    (0, 0, FIRST[:20]),
    (1, 0, SECOND[:30]),
    (0, 20, FIRST[20:]),
    (1, 30, SECOND[30:]),
]


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def wide(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trio:
    folder = tmp_path_factory.mktemp(request.param)
    model = make_gguf(folder / "model.gguf", request.param, type=Type.F32, swa_window=128)
    trio = make_trio(model, folder, BOUNDARY)
    return replace(trio, pruned=fit_at_random(trio, folder / "wide.gguf", KvType.F32, WIDE))


@pytest.fixture
def job(job: Job) -> Job:
    return replace(job, n_ctx=512, n_batch=256)


def edges(parts: Parts, seq: int) -> list[int]:
    """Return a sequence's positions that start a ubatch, if ubatches are cut in order."""
    rows = [(s, pos + i) for s, pos, tokens in parts for i in range(len(tokens))]
    ubatches = [rows[i : i + N_UBATCH] for i in range(0, len(rows), N_UBATCH)]
    first = (next((pos for s, pos in ubatch if s == seq), None) for ubatch in ubatches)
    return [pos for pos in first if pos is not None]


def stored_kv(trio: Trio, parts: Parts, folder: Path, job: Job) -> list[dict[int, Stored]]:
    """Return the K/V of two sequences after a batch of context rows."""
    (seq, pos, tokens), *more = parts
    steps = (
        Step("decode", seq=seq, pos=pos, tokens=tokens, more=tuple(more), logits="none"),
        Step("counters", "counters"),
        *(Step("save", seq=seq, path=str(folder / f"state{seq}")) for seq in (0, 1)),
    )
    job = replace(job, model=str(trio.pruned), steps=steps, lib=None, n_seq_max=2)
    counters = run(replace(job, n_ubatch=N_UBATCH))["counters"]
    np.testing.assert_array_equal(counters, [len(FIRST) + len(SECOND), 0])
    windows = read_shape(trio.original).windows
    return [parse_state((folder / f"state{seq}").read_bytes(), windows) for seq in (0, 1)]


def off(stored: Stored, expected: Expected) -> np.ndarray:
    """Return the largest distance of K and V from the reference, by position."""
    distance = np.zeros(len(stored.pos))
    pairs = ((stored.k, expected.k[stored.pos]), (stored.v, expected.v[stored.pos]))
    for ours, theirs in pairs:
        step = np.maximum(np.abs(ours - theirs) - np.abs(theirs) * 2.0**-11, 0).max(-1)
        distance = np.maximum(distance, step)
    by_pos = np.zeros(len(stored.pos))
    by_pos[stored.pos] = distance
    return by_pos


@pytest.mark.parametrize(
    "options",
    [{"kv_unified": True}, {"kv_unified": True, "flash_attn": True}, {}],
    ids=["unified", "flash", "streams"],
)
def test_previous_row_is_of_the_same_sequence_and_ubatch(
    options: dict[str, bool], wide: Trio, tmp_path: Path, job: Job
) -> None:
    stored = stored_kv(wide, IN_TURN, tmp_path, replace(job, **options))  # type: ignore[arg-type]
    close = ROUNDED if "flash_attn" in options else CLOSE
    # With separate streams, each ubatch has one sequence.
    alone = [[part for part in IN_TURN if part[0] == seq] for seq in (0, 1)]
    for seq, tokens in enumerate((FIRST, SECOND)):
        states = normalised_states(wide, tokens, job)
        cut = edges(IN_TURN if options else alone[seq], seq)
        assert len(cut) > 1
        reference = Reference(wide.pruned, states, cut)
        uncut = Reference(wide.pruned, states)
        itself = Reference(wide.pruned, states, range(len(tokens)))
        for layer in range(BOUNDARY + 1, 8):
            swa = read_shape(wide.original).windows[layer] > 0
            assert (off(stored[seq][layer], reference.layer(layer, swa=swa)) < close).all()
            # The reference must be sensitive to the previous row.
            assert (off(stored[seq][layer], uncut.layer(layer, swa=swa))[cut[1:]] > WRONG).all()
            wrong = off(stored[seq][layer], itself.layer(layer, swa=swa))
            assert (np.delete(wrong, cut) > WRONG).all()


def test_quantised_cache_equals_the_reference(wide: Trio, tmp_path: Path, job: Job) -> None:
    """The cache rotates K before rounding, but not V."""
    job = replace(job, kv_unified=True, type_k=Q8_0, type_v=F16)
    stored = stored_kv(wide, IN_TURN, tmp_path, job)
    windows = read_shape(wide.original).windows
    reference = Reference(wide.pruned, normalised_states(wide, FIRST, job), edges(IN_TURN, 0))
    for layer in range(BOUNDARY + 1, 8):
        expected, got = reference.layer(layer, swa=windows[layer] > 0), stored[0][layer]
        v = np.abs(got.v - expected.v[got.pos]) - np.abs(expected.v[got.pos]) * 2.0**-11
        assert (v < ROUNDED).all()
        ours, theirs = (np.linalg.norm(k, axis=-1) for k in (got.k, expected.k[got.pos]))
        np.testing.assert_allclose(ours, theirs, rtol=0.02)


def test_shared_row_is_the_previous_one_of_both_sequences(
    wide: Trio, tmp_path: Path, job: Job
) -> None:
    """A ubatch has a shared prefix, then rows of each sequence."""
    shared, own = FIRST[:12], (FIRST[12:20], SECOND[:8])
    steps = (
        Step("decode", tokens=shared, coupled=(1,), logits="none"),
        Step("decode", tokens=own[0], pos=12, more=((1, 12, own[1]),), logits="none"),
        *(Step("save", seq=seq, path=str(tmp_path / f"state{seq}")) for seq in (0, 1)),
    )
    run(replace(job, model=str(wide.pruned), steps=steps, lib=None, n_seq_max=2, kv_unified=True))
    windows = read_shape(wide.original).windows
    for seq in (0, 1):
        stored = parse_state((tmp_path / f"state{seq}").read_bytes(), windows)
        states = normalised_states(wide, (*shared, *own[seq]), job)
        reference = Reference(wide.pruned, states, (0, 12))
        for layer in range(BOUNDARY + 1, 8):
            expected = reference.layer(layer, swa=windows[layer] > 0)
            assert (off(stored[layer], expected) < CLOSE).all()


def test_image_rows_have_previous_rows(tmp_path: Path) -> None:
    """A batch of the tokens' embeddings stores the same K/V as the tokens, bit for bit."""
    n, base = 40, make_gguf(tmp_path / "base.gguf", "llama", type=Type.F32)
    states = np.random.default_rng(0).standard_normal((n, 128), np.float32)  # equals Step's images
    header = read_header(base)
    [table] = [tensor for tensor in header.tensors if tensor.name == "token_embd.weight"]
    with base.open("r+b") as file:
        file.seek(header.data_start + table.offset)
        file.write(states.tobytes())
    plan = make_plan(read_shape(base), boundary=BOUNDARY, sink_tokens=0, projection=WIDE)
    seen: dict[int, list[bytes]] = {}
    convert(plan, base, tmp_path / "text.gguf", fitted=made_up(plan))
    # Older files have this key if their fit includes pictures.
    add_to(tmp_path / "text.gguf", tmp_path / "both.gguf", {"pop.image_rows": 1})
    for image_rows, name in enumerate(("text.gguf", "both.gguf")):
        state = tmp_path / "state"
        job = Job(str(tmp_path / name), (), n_ubatch=16)
        for step in (
            Step("decode", tokens=tuple(range(n)), logits="none"),
            Step("image", value=n, causal=True),
        ):
            run(replace(job, steps=(step, Step("save", path=str(state)))))
            seen.setdefault(image_rows, []).append(state.read_bytes())
    assert seen[1][0] == seen[1][1] == seen[0][0]
    # A fit on text alone does not apply to images.
    assert seen[0][1] != seen[0][0]


# --- Refused files


def damaged(
    folder: Path, changed: dict[str, np.ndarray | None], projection: Projection = WIDE
) -> Job:
    """Return a job on a wide fit with changed or omitted F32 tensors."""
    base = make_gguf(folder / "base.gguf", "llama")
    plan = make_plan(read_shape(base), boundary=4, sink_tokens=0, projection=WIDE)
    fit = made_up(plan, kind=KvType.F32)
    tensors = []
    for tensor in fit.tensors:
        if tensor.name not in changed:
            tensors.append(tensor)
        elif (values := changed[tensor.name]) is not None:
            values = np.ascontiguousarray(values, np.float32)
            tensors.append(replace(tensor, dims=values.shape[::-1], data=values.tobytes()))
    result = Fitted(fit.calibration, tuple(tensors), projection=projection)
    convert(plan, base, folder / "damaged.gguf", fitted=result)
    return Job(str(folder / "damaged.gguf"), steps=())


NAN = np.ones((96, 64), np.float32).T.copy()
NAN[3, 5] = np.nan
DAMAGED: dict[str, tuple[dict[str, np.ndarray | None], str]] = {
    "no previous state": ({"blk.4.pop_prev.weight": None}, r"blk\.4\.pop_prev\.weight"),
    "its width": ({"blk.4.pop_prev.weight": np.ones((32, 64))}, r"pop_prev.*wrong shape"),
    "its size": ({"blk.4.pop_prev.weight": np.ones((64, 128))}, r"pop_attn_k_wide.*wrong shape"),
    "a gate without up": ({"blk.4.pop_ffn_up.weight": None}, r"blk\.4\.pop_ffn_up\.weight"),
    "up without a gate": ({"blk.4.pop_ffn_gate.weight": None}, "wrong shape|wrong number"),
    "fewer neurons": ({"blk.4.pop_ffn_up.weight": np.ones((32, 128))}, r"pop_ffn_up.*wrong shape"),
    "no wide K": ({"blk.6.pop_attn_k_wide.weight": None}, r"blk\.6\.pop_attn_k_wide\.weight"),
    "not finite": ({"blk.7.pop_attn_v_wide.weight": NAN}, r"pop_attn_v_wide.*not finite"),
    "neurons not finite": (
        {"blk.4.pop_ffn_gate.weight": np.full((64, 128), np.inf)},
        r"pop_ffn_gate.*not finite",
    ),
}


@pytest.mark.parametrize(("changed", "reason"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_wide_tensors_are_refused(
    changed: dict[str, np.ndarray | None], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(RuntimeError, match=reason):
        run(damaged(tmp_path, changed))


def test_undamaged_wide_tensors_load(tmp_path: Path) -> None:
    run(damaged(tmp_path, {}))


def test_plain_fit_with_wide_tensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="does not belong to the schedule and projection"):
        run(damaged(tmp_path, {}, projection=Projection.FITTED))
