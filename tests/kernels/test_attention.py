"""Compare FLASH_ATTN_EXT with float64, and check what a row's result depends on."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from support.ggml import Attention, Rows, Stored, compute, is_covered
from support.kernels import (
    attention,
    causal,
    expected_attention,
    first_rows,
    narrowed,
    require_covered,
    rms,
    visible_mask,
)

pytestmark = pytest.mark.usefixtures("kernels")

Make = Callable[[np.random.Generator], Attention]
# Maximum error relative to the ideal's.
MARGIN = 2
SINKS = np.array([-1, 0, 3, 9], np.float32)


def check(op: Attention, actual: np.ndarray) -> None:
    """Compare a covered result with float64 and its ideal; others must equal upstream's."""
    expected = expected_attention(op)
    error, ideal = rms(actual - expected), rms(expected_attention(op, ideal=True) - expected)
    if is_covered(op):
        assert error <= MARGIN * ideal, f"{error / ideal} of the ideal's error"
    else:
        np.testing.assert_array_equal(actual, compute(op, Rows.NONE))
        assert error <= 0.02 * rms(expected)


def with_heads(n_heads: int, n_kv_heads: int) -> Make:
    return lambda rng: attention(rng, n_heads=n_heads, n_kv_heads=n_kv_heads)


def several_sequences(rng: np.random.Generator) -> Attention:
    """Return attention with cells and rows of three sequences in any order."""
    n_rows, n_kv = 40, 150
    of_cell, of_row = rng.integers(0, 3, n_kv), rng.integers(0, 3, n_rows)
    position, now = rng.permutation(n_kv), rng.integers(0, n_kv, n_rows)
    cells = (of_row[:, None] == of_cell) & (position <= now[:, None])
    cells[:, 0] = True
    return attention(rng, n_kv=n_kv, mask=visible_mask(cells))


def streams(rng: np.random.Generator) -> Attention:
    op = attention(rng, n_streams=3, n_kv=130)
    masks = [causal(40, 130), causal(40, 130, window=20), visible_mask(rng.random((40, 130)) < 0.5)]
    return replace(op, mask=np.concatenate(masks))


def blind_rows(rng: np.random.Generator) -> Attention:
    op = attention(rng)
    assert op.mask is not None
    op.mask[:, :, 3:9] = -np.inf
    op.mask[:, :, 39] = -np.inf
    return op


def biased_keys(rng: np.random.Generator) -> Attention:
    """Return attention with Qwen2.5's keys: some dimensions of K are large in every cell."""
    op = attention(rng, n_kv=200)
    k = op.k.values
    k[..., [3, 40, 41]] += [100.0, -60.0, 30.0]
    data = narrowed(k.astype(np.float32), Type.F16).data
    data[:, op.n_kv :] = 0xFF
    return replace(op, k=Stored(Type.F16, data))


def alibi(rng: np.random.Generator, n_heads: int = 6) -> Attention:
    distance = np.arange(60, 100)[:, None] - np.arange(100)
    mask = np.where(distance >= 0, -distance, -np.inf).astype(np.float16)[None, None]
    return replace(attention(rng, n_heads=n_heads, mask=mask), max_bias=8.0)


def uneven_mask(rng: np.random.Generator) -> Attention:
    """Return attention with finite mask values that differ by head."""
    mask = rng.standard_normal((1, 4, 40, 100)).astype(np.float16)
    return attention(rng, mask=mask)


COVERED: dict[str, Make] = {
    "causal": attention,
    "one row": lambda rng: attention(rng, n_rows=1, n_kv=77),
    "whole tiles": lambda rng: attention(rng, n_rows=128, n_kv=128),
    "rows that fill no tile": lambda rng: attention(rng, n_rows=70, n_kv=333),
    "many rows and heads": lambda rng: attention(rng, 150, n_kv=170, n_heads=12),
    "a sliding window": lambda rng: attention(rng, n_kv=300, mask=causal(40, 300, window=33)),
    "no causal mask": lambda rng: attention(rng, mask=visible_mask(np.ones((40, 100), bool))),
    "several sequences": several_sequences,
    "streams": streams,
    "streams with one mask": lambda rng: attention(rng, n_streams=2),
    "rows that see nothing": blind_rows,
    "as many K/V heads": with_heads(3, 3),
    "two heads share": with_heads(4, 2),
    "six heads share": with_heads(12, 2),
    "seven heads share": with_heads(14, 2),
    "heads of 128": lambda rng: attention(rng, n_dims=128),
    "heads of 256": lambda rng: attention(rng, n_dims=256, n_heads=2, n_kv_heads=1),
    "biased keys": biased_keys,
    "q8_0": lambda rng: attention(rng, type_=Type.Q8_0),
    "q8_0, heads of 128": lambda rng: attention(rng, type_=Type.Q8_0, n_dims=128, n_kv=77),
    "no mask": lambda rng: replace(attention(rng), mask=None),
    "soft cap": lambda rng: replace(attention(rng), softcap=2.0),
    "sinks": lambda rng: replace(attention(rng), sinks=SINKS),
    "sinks of rows that see nothing": lambda rng: replace(blind_rows(rng), sinks=SINKS),
    "ALiBi": alibi,
    "ALiBi, heads no power of two": lambda rng: alibi(rng, 12),
    "a mask with values": uneven_mask,
    "heads of 32": lambda rng: attention(rng, n_dims=32),
    "heads of 80": lambda rng: attention(rng, n_dims=80),
    "heads of 96": lambda rng: attention(rng, n_dims=96),
    "heads of 192 and 128": lambda rng: attention(rng, n_dims=192, n_dims_v=128),
    "f32": lambda rng: attention(rng, type_=Type.F32),
    "bf16": lambda rng: attention(rng, type_=Type.BF16),
}
# Operations that are left to upstream's kernels.
OTHER: dict[str, Make] = {
    "q4_0": lambda rng: attention(rng, type_=Type.Q4_0),
}


@pytest.mark.parametrize("name", COVERED | OTHER)
def test_errors_match_16_bit_precision(name: str, rng: np.random.Generator) -> None:
    op = (COVERED | OTHER)[name](rng)
    assert is_covered(op) == (name in COVERED)
    actual = compute(op)
    check(op, actual)
    if op.mask is not None:
        blind = np.broadcast_to((op.mask == -np.inf).all(-1)[:, 0], op.q.shape[:2])
        assert not actual[blind].any()


@pytest.mark.parametrize("make", COVERED.values(), ids=COVERED.keys())
def test_result_of_a_row_depends_only_on_visible_cells(
    make: Make, rng: np.random.Generator
) -> None:
    op = make(rng)
    expected = compute(op)
    for n_threads in (2, 3):
        np.testing.assert_array_equal(compute(op, n_threads=n_threads), expected)
    for n_rows in {1, 5, 17, 39} - {*range(op.q.shape[1], 40)}:
        np.testing.assert_array_equal(compute(first_rows(op, n_rows)), expected[..., :n_rows, :, :])
    if op.mask is not None:
        last = replace(op, q=op.q[:, -1:], mask=np.ascontiguousarray(op.mask[:, :, -1:]))
        np.testing.assert_array_equal(compute(last), expected[..., -1:, :, :])


def test_nan_row_changes_no_other_row(rng: np.random.Generator) -> None:
    op = attention(rng)
    expected = compute(op)
    q = op.q.copy()
    q[:, 5] = np.nan
    others = np.arange(40) != 5
    actual = compute(replace(op, q=q))
    np.testing.assert_array_equal(actual[:, others], expected[:, others])
    assert np.isnan(actual[:, 5]).all()


def test_invisible_cells_change_nothing(rng: np.random.Generator) -> None:
    """Large values may be anywhere between the cells that rows see, or before or after them.

    The first two cells stay unchanged, because they set K's bias.
    """
    op = attention(rng, n_kv=333, mask=visible_mask(rng.random((40, 333)) < 0.3))
    require_covered(op)
    assert op.mask is not None
    op.mask[..., :70] = op.mask[..., 190:196] = op.mask[..., 200:] = -np.inf
    expected = compute(op)
    hidden = (op.mask == -np.inf).all((0, 1, 2)) & (np.arange(333) > 1)
    k, v = op.k.data.copy(), op.v.data.copy()
    # The largest float16 value.
    k.view("<f2")[:, :333][:, hidden] = v.view("<f2")[:, :333][:, hidden] = 65504
    np.testing.assert_array_equal(
        compute(replace(op, k=Stored(Type.F16, k), v=Stored(Type.F16, v))), expected
    )
    for n_kv in (200, 256):
        shorter = replace(op, n_kv=n_kv, mask=np.ascontiguousarray(op.mask[..., :n_kv]))
        np.testing.assert_array_equal(compute(shorter), expected)


def poisoned(op: Attention, name: str, cell: int, value: float) -> Attention:
    """Replace a value of K or V in the last K/V head of a cell."""
    stored: Stored = getattr(op, name)
    data = stored.data.copy()
    # The last value, or the scale of the last block.
    size = {Type.F32: 4, Type.Q8_0: 34}.get(stored.type, 2)
    kind = {Type.F32: "<f4", Type.BF16: "<u2"}.get(stored.type, "<f2")
    bits = np.float32(value).view(np.uint32) >> 16 if stored.type == Type.BF16 else value
    n_bytes = 4 if stored.type == Type.F32 else 2
    start = data.shape[-1] - size
    data[:, cell, -1, start : start + n_bytes] = np.array(bits).astype(kind).reshape(1).view("u1")
    broken = Stored(stored.type, data)
    return replace(op, k=broken) if name == "k" else replace(op, v=broken)


BROKEN: dict[str, Make] = {
    "f16": attention,
    "bf16": COVERED["bf16"],
    "f32": COVERED["f32"],
    "q8_0": COVERED["q8_0"],
    "heads of 80": COVERED["heads of 80"],
    "soft cap": COVERED["soft cap"],
    "sinks": COVERED["sinks"],
    "ALiBi": lambda rng: alibi(rng, 4),
    "several chunks": lambda rng: attention(rng, 5, n_kv=2100),
}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["k", "v"])
@pytest.mark.parametrize("make", BROKEN.values(), ids=BROKEN.keys())
def test_nan_cells_affect_only_rows_that_attend_to_them(
    make: Make, name: str, value: float, rng: np.random.Generator
) -> None:
    """Also where upstream's result happens to be finite, because a score is infinite."""
    op = make(rng)
    assert op.mask is not None and is_covered(op)
    expected = compute(op)
    for cell in (2, 7, op.n_kv - 2):
        broken = poisoned(op, name, cell, value)
        sees = np.broadcast_to(op.mask[0, 0, :, cell] != -np.inf, op.q.shape[1])
        hit = np.zeros(expected.shape[:3], bool)
        hit[:, sees, expected.shape[2] // 2 :] = True
        for n_threads in (1, 3):
            actual = compute(broken, n_threads=n_threads)
            assert np.isnan(actual[hit]).all()
            np.testing.assert_array_equal(actual[~hit], expected[~hit])
        upstream = compute(broken, Rows.NONE)
        assert np.isnan(actual[~np.isfinite(upstream).all(-1)]).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_nan_first_cells_change_no_other_sequence(
    softcap: float, value: float, rng: np.random.Generator
) -> None:
    """The bias of K is read from the first two cells."""
    cells = np.ones((40, 100), bool)
    cells[:, :2] = False
    op = replace(biased_keys(rng), n_kv=100, mask=visible_mask(cells), softcap=softcap)
    broken = op
    for cell in (0, 1):
        broken = poisoned(broken, "k", cell, value)
    actual, expected = compute(broken), compute(op)
    assert rms(actual - expected) <= 1e-3 * rms(expected)


def test_streams_equal_separate_computations(rng: np.random.Generator) -> None:
    op = streams(rng)
    require_covered(op)
    assert op.mask is not None
    expected = compute(op)
    for stream in range(3):
        part = slice(stream, stream + 1)
        alone = replace(
            op,
            q=op.q[part],
            k=Stored(op.k.type, op.k.data[part]),
            v=Stored(op.v.type, op.v.data[part]),
            mask=op.mask[part],
        )
        np.testing.assert_array_equal(compute(alone), expected[part])


@pytest.mark.parametrize("large", [30.0, 3e4])
def test_large_scores_stay_finite(large: float, rng: np.random.Generator) -> None:
    """A single cell receives the whole probability."""
    op = attention(rng)
    op = replace(op, q=(large * op.q).astype(np.float32))
    actual = compute(op)
    assert np.isfinite(actual).all()
    if large == 30:
        check(op, actual)
