"""The cost of the chat over the engine: time to first token, and decoding. Not a test.

    python tests/bench/measure_chat.py MODEL [--prompt 2048] [--decode 256] [--rounds 9] [--cpu N]
                                       [--clock wall|cpu] [--json]

A child process is the chat: the REPL with its line editor, on a pseudo-terminal that this process
reads and forgets. In each round the chat and the engine alone take the same prompt, in an order
that alternates, from an empty KV cache, with one thread at temperature 0. Both must say the same
and prune the same rows.

Timed in the chat until the first token: from a pasted line and Enter (both wait, so the line editor
draws its prompt, takes them and returns the line) over template, tokenising and the prefill with
its bar to the first piece drawn. Its decoding: from there until all is drawn as Markdown.
Timed in the engine: reading the tokens and sampling the first one; sampling the others.
Not timed: opening the model, reading the document. `--clock cpu` is the child's CPU time.
"""

import argparse
import os
import sys
import tempfile
from bisect import bisect_right
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import PipeInput, create_pipe_input

from measure_speed import CLOCKS, Clock
from overhead import Answered, Overhead, on_a_terminal, overhead, parser, report
from pop_local.engine.decode.text import Pieces
from pop_local.engine.model import PopModel
from pop_local.engine.prompt.prompt import Prompt
from pop_local.engine.sessions.conversation import Document, Turn
from pop_local.engine.turn import TurnOptions
from pop_local.measure.speed import require_rows
from pop_local.ui.chat.dialogue import Dialogue
from pop_local.ui.chat.line import line_reader
from pop_local.ui.chat.repl import converse
from pop_local.ui.chat.screen import Screen
from pop_local.ui.theme import look

QUESTION = "Write a long guide to this place in Markdown, with headings, lists and **bold** words."

# With a text at hand it writes Markdown, and long enough.
N_WRITING_PROMPT = 400
# A terminal sends these around pasted text.
PASTE, PASTED = "\x1b[200~", "\x1b[201~"


@dataclass(frozen=True)
class Timed:
    """One answer; `decode_s` is of all tokens but the first."""

    ttft_s: float
    decode_s: float
    answered: Answered


class TimedScreen(Screen):
    """Remembers when the first piece of an answer was drawn, and when all of it was."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(look("terminal"))
        self._clock = clock
        self.first_s = self.end_s = 0.0

    def text(self, piece: str) -> None:
        super().text(piece)
        self.first_s = self.first_s or self._clock()

    def end_answer(self) -> None:
        super().end_answer()
        self.end_s = self._clock()


class Child:
    """The chat, and beside it the engine on the same weights."""

    def __init__(self, model: PopModel, keys: PipeInput, clock: Clock) -> None:
        self._model = model
        self._keys = keys
        self._clock = clock
        self._screen = TimedScreen(clock)
        self._chat = Dialogue(model, lambda *_: model, self._screen, sampling={"temperature": 0.0})
        self._read_line = line_reader(Path(os.environ["POP_LOCAL_STATE_DIR"]) / "history", {}, str)
        self._has_line = False

    def _one_line(self, default: str = "") -> str:
        self._has_line = not self._has_line
        if not self._has_line:
            raise EOFError
        return self._read_line(default)

    def chat(self, document: Document, n_decode: int) -> Timed:
        self._chat.forget()
        self._model.cache.clear()
        self._chat.documents.append(document)
        self._chat.sampling["max_tokens"] = n_decode
        self._screen.first_s = 0.0
        self._keys.send_text(f"{PASTE}{QUESTION}{PASTED}\r")
        started_s = self._clock()
        converse(self._chat, self._one_line)
        first_s, end_s = self._screen.first_s, self._screen.end_s
        (turn,), (stats,) = self._chat.session.conversation.turns, self._chat.session.answer_stats
        answered = Answered(
            turn.answer, stats.n_prompt, stats.n_cached, stats.n_pruned, stats.n_decoded
        )
        return Timed(first_s - started_s, end_s - first_s, answered)

    def engine(self, prompt: Prompt, n_decode: int) -> Timed:
        self._model.cache.clear()
        started_s = self._clock()
        counters = self._model.read(prompt).counters
        sampled = self._model.sampled(TurnOptions(temperature=0.0))
        found = [next(sampled)]
        first_s = self._clock()
        found += [next(sampled) for _ in range(n_decode - 1)]
        end_s = self._clock()
        sampled.close()
        require_rows(self._model, self._model.mode, len(prompt), counters)
        pieces = Pieces(self._model.context)
        text = b"".join(pieces[token] for token in found).decode(errors="replace")
        answered = Answered(text, len(prompt), 0, counters.n_context, n_decode)
        return Timed(first_s - started_s, end_s - first_s, answered)

    def measure(self, n_prompt: int, n_decode: int, rounds: int) -> tuple[Overhead, Overhead]:
        """The ratios of the time to first token, and of decoding."""
        document = self._document(n_prompt)
        prompt = self._model.chat_prompt(Turn(QUESTION, (document,)).messages)
        answered = self.chat(document, n_decode).answered  # the model may end earlier
        runs: dict[bool, list[Timed]] = {False: [], True: []}
        for number in range(rounds):
            for is_chat in (number % 2 == 0, number % 2 == 1):
                n = answered.n_decoded
                run = self.chat(document, n) if is_chat else self.engine(prompt, n)
                assert run.answered == answered
                runs[is_chat].append(run)
        ttft_s = [[run.ttft_s for run in runs[is_chat]] for is_chat in (False, True)]
        decode_s = [[run.decode_s for run in runs[is_chat]] for is_chat in (False, True)]
        return (
            overhead("first token", answered, len(prompt), *ttft_s),
            overhead("decoding", answered, answered.n_decoded - 1, *decode_s),
        )

    def _document(self, n_prompt: int) -> Document:
        """As many words as make a prompt of that length."""
        text = (files("pop_local") / "data" / "document.md").read_text(encoding="utf-8")
        words = (text * (1 + n_prompt // 1000)).split(" ")

        def made(n_words: int) -> Document:
            return Document("document.md", " ".join(words[:n_words]))

        def count(n_words: int) -> int:
            return self._model.count_prompt(Turn(QUESTION, (made(n_words),)).messages)

        return made(max(0, bisect_right(range(len(words)), n_prompt, key=count) - 1))


def child(options: argparse.Namespace) -> str:
    n_ctx = max(options.prompt, N_WRITING_PROMPT) + options.decode + 256
    model = PopModel(options.model, n_ctx=n_ctx, n_threads=1, n_gpu_layers=0)
    with create_pipe_input() as keys, create_app_session(input=keys):
        chat = Child(model, keys, CLOCKS[options.clock])
        reading, _ = chat.measure(options.prompt, 2, options.rounds)
        _, writing = chat.measure(N_WRITING_PROMPT, options.decode, options.rounds)
    return report(options, [reading, writing])


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--prompt", type=int, default=2048)
    options.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parsed = options.parse_args()
    if parsed.child:
        parsed.child.write_text(child(parsed))
        return
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result"
        command = [sys.executable, *sys.argv, "--child", str(result)]
        on_a_terminal(command, parsed.cpu, POP_LOCAL_STATE_DIR=folder)
        print(result.read_text())


if __name__ == "__main__":
    main()
