"""Shorten the time limits of child processes, so that tests of the limits are fast."""

from collections.abc import Iterator
from contextlib import contextmanager

from pop_local.engine.limited.process import KeptProcess


@contextmanager
def one_second_limit(*children: KeptProcess) -> Iterator[None]:
    """Limit each call of the children to one second."""
    before = [each.limit_s for each in children]
    for each in children:
        each.limit_s = 1.0
        each.close()
    try:
        yield
    finally:
        for each, limit_s in zip(children, before, strict=True):
            each.limit_s = limit_s
            each.close()
