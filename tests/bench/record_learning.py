"""Record a chat that reads a text in pieces until it prunes by a learned fit. Not a test.

    python tests/bench/record_learning.py MODEL TEXT --threads 1

MODEL has no sidecar. Each piece is attached to a question, in a new conversation. While the user
types nothing, the chat learns; /stats shows the progress. The chat reads the last piece at the end.
Prints the transcript.
"""

import argparse
import re
import tempfile
import time
from pathlib import Path

from shared import Terminal

QUESTION = "Which names stand in it? Name three."
OPTIONS = ("--temperature", "0", "--max-tokens", "12")
WIDTH, HEIGHT = 150, 60
# A long piece on a slow machine.
TIMEOUT_S = 1800


def ask(chat: Terminal, path: Path) -> None:
    for line in ("/clear", f"/file {path}", QUESTION):
        chat.line(line)
        chat.expect_prompt(TIMEOUT_S)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--threads", default="1")
    parser.add_argument("--piece", type=int, default=14_000, help="characters of a piece")
    parser.add_argument("--pause", type=float, default=20.0, help="seconds between two questions")
    options = parser.parse_args()
    text = options.text.read_text("utf-8")
    *pieces, new = (text[at : at + options.piece] for at in range(0, len(text), options.piece))
    arguments = ("chat", options.model, "--threads", options.threads, *OPTIONS)
    began_s = time.monotonic()
    chat = Terminal("-m", "pop_local", *arguments, width=WIDTH, height=HEIGHT)
    chat.expect_prompt(TIMEOUT_S)
    with tempfile.TemporaryDirectory() as folder:
        for number, piece in enumerate(pieces):
            path = Path(folder) / f"piece{number:02}.txt"
            path.write_text(piece, "utf-8")
            ask(chat, path)
            time.sleep(options.pause)
            chat.line("/stats")
            chat.expect_prompt(TIMEOUT_S)
            print(f"{time.monotonic() - began_s:.0f} s", flush=True)
            if "Learned from" in chat.text:
                break
        while "Learned from" not in chat.text and time.monotonic() - began_s < 2 * TIMEOUT_S:
            time.sleep(options.pause)
            chat.line("/stats")
            chat.expect_prompt(TIMEOUT_S)
        path.write_text(new, "utf-8")
        ask(chat, path)
        chat.line("/stats")
        chat.expect_prompt(TIMEOUT_S)
        chat.line("/exit")
        chat.expect_end()
        print(re.sub(re.escape(folder) + "/", "", chat.text))
    print(f"({time.monotonic() - began_s:.0f} s in all)")


if __name__ == "__main__":
    main()
