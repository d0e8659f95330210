"""Ctrl-C while a step is not to be cut off."""

import signal

import pytest

from pop_local.ui.ctrl_c import deferred_interrupt


def test_the_first_one_is_remembered_and_a_second_one_raises():
    with deferred_interrupt() as interrupt:
        signal.raise_signal(signal.SIGINT)
        assert interrupt.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_where_it_is_ignored_it_stays_so():
    """As in the background jobs of a script."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with deferred_interrupt() as interrupt:
            signal.raise_signal(signal.SIGINT)
        assert not interrupt.asked
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
