"""Record the transcript of docs/usage.md, with a real model on a terminal. Not a test.

    python tests/bench/record_transcript.py MODEL.pop.gguf [--write docs/usage.md]

Types the lines of SCENES and prints the screen, after the prefill bars have disappeared.
`--write` puts it between the marks in that file instead.
"""

import argparse
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from shared import Terminal

DOCUMENT = "pop_local/data/document.md"
BEGIN, END = "<!-- transcript -->\n", "<!-- end of the transcript -->\n"
WIDTH, HEIGHT = 110, 200
# A long document on a slow machine.
TIMEOUT_S = 300


@dataclass(frozen=True)
class Scene:
    """A run of the program, with the typed lines and its end."""

    options: tuple[str, ...]
    lines: tuple[str, ...]


# Greedy, so that the two answers can be compared.
OPTIONS = ("--temperature", "0")
SCENES = (
    Scene(
        OPTIONS,
        (
            f"/file {DOCUMENT}",
            "What rule was painted above the lamp-room door?",
            "/full on",
            "/retry",
            "/full off",
            "/stats",
            "/save lighthouse",
            "/bye",
        ),
    ),
    Scene(OPTIONS, ("/load lighthouse", "When was the lamp lit for the first time?", "/bye")),
)


def recorded(scene: Scene, model: Path) -> str:
    """Return the command, and the screen at its end."""
    arguments = ("chat", str(model), *scene.options)
    chat = Terminal("-m", "pop_local", *arguments, width=WIDTH, height=HEIGHT)
    for line in scene.lines:
        chat.expect_prompt(TIMEOUT_S)
        chat.line(line)
    if chat.expect_end() != 0:
        raise SystemExit(chat.text)
    return f"$ pop-local {' '.join(arguments)}\n{chat.text}\n"


def write(file: Path, transcript: str) -> None:
    """Put the transcript between the only pair of marks."""
    head, begin, rest = file.read_text(encoding="utf-8").partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not end:
        raise SystemExit(f"{file} has no {BEGIN.strip()} and {END.strip()}")
    block = f"{begin}\n```text\n{transcript}```\n\n{end}"
    file.write_text(f"{head}{block}{tail}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--write", type=Path, metavar="FILE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["POP_LOCAL_STATE_DIR"] = folder
        os.environ["POP_LOCAL_CONFIG"] = str(Path(folder) / "none.toml")
        transcript = "\n".join(recorded(scene, options.model) for scene in SCENES)
    if options.write:
        write(options.write, transcript)
    else:
        print(transcript, end="")


if __name__ == "__main__":
    main()
