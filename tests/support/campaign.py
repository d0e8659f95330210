"""Random attempts, one after the other, each of which is refused or harmless.

Each campaign takes FUZZ_SECONDS, or FUZZ_FILES however long they take: `make fuzz SECONDS=3600`
goes on for an hour with each, with all at once where WORKERS=11 is given. FUZZ_SEED begins
elsewhere.
"""

import os
import random
import time
from collections.abc import Callable

from pop_converter.base.errors import PopError

SECONDS = float(os.environ.get("FUZZ_SECONDS", "1"))
N_FILES = int(os.environ.get("FUZZ_FILES", "0"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
FEWEST = 50  # on a machine that is too busy for more
# Limits for one file: processor time here, a child's on a busy machine. A reader that never ends is
# to be ended from outside.
PATIENCE_S, CHILD_PATIENCE_S = 5.0, 60.0

# Makes a damaged file from a source of chance, and reads it.
Attempt = Callable[[random.Random], None]


def campaign(attempt: Attempt) -> None:
    """Raises what is no PopError, naming the seed that gives it again."""
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
    finally:  # with -s, Ctrl-C tells how far it came
        print(f"{n_attempts:,} files, {n_refused:,} refused")
    assert 0 < n_refused < n_attempts
