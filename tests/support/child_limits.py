"""Shorten the time limits of child processes, so that tests of the limits are fast."""

from collections.abc import Iterator
from contextlib import contextmanager

from pop_local.engine.limited.process import KeptProcess


@contextmanager
def call_limit(limit_s: float, *children: KeptProcess) -> Iterator[None]:
    """Limit each call of the children to `limit_s` seconds."""
    before = [each.limit_s for each in children]
    for each in children:
        each.limit_s = limit_s
        each.close()
    try:
        yield
    finally:
        for each, previous_s in zip(children, before, strict=True):
            each.limit_s = previous_s
            each.close()
