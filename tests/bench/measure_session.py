"""How long a saved session takes to load, against reading it.

python tests/bench/measure_session.py MODEL [--tokens N] [--rounds N]: one JSON object on stdout.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median

from pop_local.engine.model import PopModel
from pop_local.engine.sessions.conversation import Conversation, Turn
from pop_local.engine.sessions.session_file import Sessions

SENTENCE = "The ferry to the island leaves the stone pier at half past six, and nobody waits. "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    model = PopModel(arguments.model, n_ctx=arguments.tokens + 1024)
    n_each = len(model.tokenize(SENTENCE.encode(), add_bos=False))
    asked = Conversation(turns=(Turn(SENTENCE * (arguments.tokens // n_each)),))
    with tempfile.TemporaryDirectory() as folder:
        sessions = Sessions(Path(folder))
        read_s, load_s, save_s, n_bytes, n_tokens = [], [], [], 0, 0
        for _ in range(arguments.rounds):
            model.clear()
            *_, last = model.chat_turn(asked.messages, max_tokens=1)
            assert last.stats is not None
            read_s.append(last.stats.prefill_s)
            started_s = time.perf_counter()
            n_bytes = sessions.save("measured", model, asked)
            save_s.append(time.perf_counter() - started_s)
            n_tokens = model.n_tokens
            model.clear()
            started_s = time.perf_counter()
            assert sessions.load("measured", model).reread == ""
            load_s.append(time.perf_counter() - started_s)
    print(
        json.dumps(
            {
                "n_tokens": n_tokens,
                "size_bytes": n_bytes,
                "read_s": read_s,
                "save_s": save_s,
                "load_s": load_s,
                "load_over_read": median(load_s) / median(read_s),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
