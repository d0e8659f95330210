"""Run the chat on a real terminal with a model that describes its input (see test_typing.py)."""

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from pop_local.engine.chat_messages import Chunk
from pop_local.engine.turn_options import TurnOptions
from pop_local.ui.chat.line import line_reader
from pop_local.ui.chat.repl import converse
from pop_local.ui.chat.screen import Screen
from pop_local.ui.chat.slash import COMMANDS
from support.scripted_chat import STATS, ScriptedModel, ScriptedPrompt, figures, scripted_chat


class EchoModel(ScriptedModel):
    """Answers "LENGTH characters in LINES lines, beginning with ..."; "slowly" delays an answer."""

    def _answer(
        self, render: Callable[[], ScriptedPrompt], options: TurnOptions
    ) -> Iterator[Chunk]:
        text = render().messages[-1].content
        assert options.on_prefill is not None and options.should_stop is not None
        if "read slowly" in text:
            for n_read in range(0, 100_000, 100):
                options.on_prefill(n_read, 100_000)
                if options.should_stop():
                    yield Chunk("", figures(n_decoded=0, finish_reason="interrupted"))
                    return
                time.sleep(0.01)
        if "speak slowly" in text:
            for n_said in range(50 if "briefly" in text else 1000):
                yield Chunk(f"word{n_said} ")
                if options.should_stop():
                    yield Chunk("", figures(finish_reason="interrupted"))
                    return
                time.sleep(0.01)
        lines = text.split("\n")
        yield Chunk(f"{len(text)} characters in {len(lines)} lines: {lines[0][:20]}")
        yield Chunk("", STATS)


def main(history: str) -> None:
    chat = scripted_chat(EchoModel(n_ctx=1_000_000), Screen())
    words = {name: command.words for name, command in COMMANDS.items()}
    converse(chat, line_reader(Path(history), words))


if __name__ == "__main__":
    main(sys.argv[1])
