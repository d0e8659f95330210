"""Shorten the time limits of child processes, so that tests of the limits are fast."""

from collections.abc import Iterator
from contextlib import contextmanager

from pop_local.engine.limited.process import KeptProcess


@contextmanager
def one_second_limit(kept: KeptProcess) -> Iterator[None]:
    """Limit each call of the child to one second."""
    before, kept.limit_s = kept.limit_s, 1.0
    kept.close()
    try:
        yield
    finally:
        kept.limit_s = before
        kept.close()
