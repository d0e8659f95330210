"""Measure TTFT in an agent's session whose prompts change in the middle. Not a test.

    python tests/bench/measure_agent.py MODEL.gguf [--tokens 6000] [--repeat 3] [--threads 1]

The session is synthetic: a system prompt with a header line and a clock, a tool list, files, and
turns. Each request changes one part. It is replayed with --reuse off, exact and edited, in turns.
Prints rows as JSON: per request, the decoded and stale rows and the median TTFT in seconds.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

from pop_local.engine.chat_messages import Message
from pop_local.engine.model import PopModel
from pop_local.engine.prefill.plan import Reuse
from pop_local.measure.heldout import shipped_text

N_FILES, N_TURNS = 4, 6


def cut(model: PopModel, text: str, n_tokens: int) -> str:
    return model.engine.context.vocabulary.detokenize(
        model.engine.context.vocabulary.tokenize(text)[:n_tokens]
    )


class Session:
    """An agent's conversation; each method changes one part of the next request."""

    def __init__(self, model: PopModel, n_tokens: int) -> None:
        text = "".join(shipped_text().parts) * 4
        size = n_tokens // (N_FILES + N_TURNS + 2)
        pieces = [cut(model, text[at * 3000 :], size) for at in range(N_FILES + N_TURNS + 2)]
        self.header, self.clock = "x-session: 1", "2026-11-30 08:00:00"
        self.tools = "Tools:\n" + pieces[0]
        self.files = pieces[1 : 1 + N_FILES]
        self.turns = [(f"Question {at}?", piece) for at, piece in enumerate(pieces[-N_TURNS - 1 :])]

    @property
    def messages(self) -> list[Message]:
        system = f"{self.header}\nThe time is {self.clock}.\n{self.tools}"
        files = "\n".join(f"# file {at}\n{each}" for at, each in enumerate(self.files))
        found = [Message("system", system), Message("user", files)]
        for question, answer in self.turns:
            found += [Message("assistant", answer), Message("user", question)]
        return found

    def next_turn(self) -> None:
        self.turns.append(("What is next?", "The tool returned: done. " * 10))

    def next_header(self) -> None:
        self.header = "x-session: 2"
        self.next_turn()

    def next_clock(self) -> None:
        self.clock = "2026-11-30 08:04:37"
        self.next_turn()

    def edit_file(self) -> None:
        self.files[1] = self.files[1][:300] + " (edited here) " + self.files[1][340:]
        self.next_turn()

    def drop_oldest(self) -> None:
        del self.turns[:2]
        self.next_turn()


def replay(model: PopModel, n_tokens: int, reuse: Reuse) -> dict[str, tuple[int, int, int, float]]:
    """Return each request's prompt, decoded and stale rows, and its seconds."""
    engine = model.engine
    sequence = engine.sequences[0]
    sequence = replace(sequence, rule=replace(sequence.rule, reuse=reuse))
    sequence.cache.clear()
    session = Session(model, n_tokens)
    requests = {
        "first": lambda: None,
        "next turn": session.next_turn,
        "header line changed": session.next_header,
        "clock changed": session.next_clock,
        "file edited": session.edit_file,
        "oldest turns dropped": session.drop_oldest,
    }
    found = {}
    for name, change in requests.items():
        change()
        prompt = engine.prompter.conversation(session.messages)
        started_s = time.perf_counter()
        read = sequence.read(prompt)
        seconds = time.perf_counter() - started_s
        found[name] = (len(prompt), read.counters.n_rows, read.n_stale, seconds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=6000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    with PopModel.open(options.model, n_ctx=options.tokens * 2, n_threads=options.threads) as model:
        rounds = [
            {reuse: replay(model, options.tokens, reuse) for reuse in Reuse}
            for _ in range(options.repeat)
        ]
    for name in rounds[0][Reuse.OFF]:
        row: dict[str, object] = {"request": name, "n_prompt": rounds[0][Reuse.OFF][name][0]}
        for reuse in Reuse:
            times = [each[reuse][name][3] for each in rounds]
            _, n_rows, n_stale, _ = rounds[0][reuse][name]
            row[reuse.value] = {
                "rows": n_rows,
                "stale": n_stale,
                "seconds": round(statistics.median(times), 3),
                "range": [round(min(times), 3), round(max(times), 3)],
            }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
