"""Children with less time, so that tests of their limits take less."""

from collections.abc import Iterator
from contextlib import contextmanager

from pop_local.engine.limited.process import KeptProcess


@contextmanager
def hurried(kept: KeptProcess) -> Iterator[None]:
    """Give the child one second for each call."""
    before, kept.limit_s = kept.limit_s, 1.0
    kept.close()
    try:
        yield
    finally:
        kept.limit_s = before
        kept.close()
