"""Run random attempts in turn; each must be refused or be harmless.

A campaign takes FUZZ_SECONDS, or runs FUZZ_FILES attempts. `make fuzz SECONDS=3600` runs each
campaign for an hour, and WORKERS=11 runs them in parallel. FUZZ_SEED changes the first seed.
"""

import os
import random
import time
from collections.abc import Callable

from pop_base.errors import PopError

SECONDS = float(os.environ.get("FUZZ_SECONDS", "0.4"))
N_FILES = int(os.environ.get("FUZZ_FILES", "0"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
FEWEST = 20  # if the machine is too busy for more
# Limits for one file in seconds: processor time in this process, elapsed time of a child on a busy
# machine. An endless reader needs a signal from outside.
PATIENCE_S, CHILD_PATIENCE_S = 5.0, 60.0

# Build a damaged file from a random source, and read it.
Attempt = Callable[[random.Random], None]


def campaign(attempt: Attempt) -> None:
    """Raise any exception other than PopError, with the seed that reproduces it."""
    deadline_s = time.monotonic() + SECONDS
    n_attempts = n_refused = 0
    try:
        while n_attempts < (N_FILES or FEWEST) or (not N_FILES and time.monotonic() < deadline_s):
            seed = SEED + n_attempts
            began_s = time.process_time()
            try:
                attempt(random.Random(seed))
            except PopError:
                n_refused += 1
            except Exception as error:
                raise AssertionError(f"FUZZ_SEED={seed} escapes") from error
            assert time.process_time() - began_s < PATIENCE_S, f"FUZZ_SEED={seed} takes too long"
            n_attempts += 1
    finally:  # Ctrl-C shows the progress under `pytest -s`.
        print(f"{n_attempts:,} files, {n_refused:,} refused")
    assert 0 < n_refused < n_attempts
