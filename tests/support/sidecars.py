"""Compare a single file with its base and sidecar, bit for bit."""

import hashlib
from pathlib import Path

import numpy as np

from support.converted import Pair
from support.raw import Job, Step, run


def outcome(model: Path, state: Path, tokens: tuple[int, ...], *further: Path, mmap: bool = True):
    """Return logits, counters and the saved state after a pruned prompt."""
    steps = (
        Step("full_from", value=len(tokens) - 16),
        Step("decode", "last", tokens=tokens),
        Step("counters", "counters"),
        Step("save", path=str(state)),
    )
    got = run(Job(str(model), steps, further=tuple(map(str, further)), mmap=mmap))
    return got["last"], got["counters"], state.read_bytes()


def require_same(pair: Pair, folder: Path, tokens: tuple[int, ...], *, mmap: bool = True) -> None:
    before = hashlib.sha256(pair.base.read_bytes()).digest()
    want = outcome(pair.single, folder / "want", tokens, mmap=mmap)
    got = outcome(pair.base, folder / "got", tokens, pair.sidecar, mmap=mmap)
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_array_equal(got[1], want[1])
    assert got[1][0] == len(tokens) - 17
    assert got[2] == want[2]
    assert hashlib.sha256(pair.base.read_bytes()).digest() == before
