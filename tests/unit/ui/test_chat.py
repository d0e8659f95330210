"""Test the chat loop by whole transcripts of scripted lines and a scripted model."""

from contextlib import nullcontext

import pytest

from pop_base.errors import PopError
from pop_local.engine.chat_messages import Message, TurnStats
from pop_local.engine.llama.backend import Mode
from pop_local.ui.chat import dialogue
from pop_local.ui.chat.repl import LEAVE_HINT, converse
from pop_local.ui.chat.slash import COMMANDS, HELP_NOTES, run_command
from pop_local.ui.ctrl_c import CtrlC
from pop_local.ui.views.stats import stats_line
from support.scripted_chat import (
    STATS,
    STATS_LINE,
    ScriptedModel,
    Transcript,
    figures,
    scripted_chat,
    talk,
)

DROPPED = "# The question and its attachments were dropped. To ask again, type /retry."
FAST = (
    "# Fast reading is on: it skips 10 of 30 layers with a small quality loss."
    " To read prompts in full, type /full on."
)


def test_two_turns_keep_the_conversation():
    model = ScriptedModel(["Hel", "lo.", STATS], ["Bye.", STATS])
    assert talk(model, "hi", "", "  and now?  ") == [
        "> hi",
        "# reading 512 of 1000",
        "Hello.",
        STATS_LINE,
        "> ",
        ">   and now?  ",
        "# reading 512 of 1000",
        "Bye.",
        STATS_LINE,
    ]
    assert model.asked[1] == [
        Message("user", "hi"),
        Message("assistant", "Hello."),
        Message("user", "and now?"),
    ]
    assert model.options.seed == 123456789


def test_pop_command_switches_pruning():
    model = ScriptedModel()
    assert talk(model, "/full", "/full on", "/FULL OFF", "/full maybe") == [
        "> /full",
        FAST,
        "> /full on",
        "# Fast reading is off: no layers are skipped. To use fast reading, type /full off.",
        "> /FULL OFF",
        FAST,
        "> /full maybe",
        "# /full accepts on or off, not maybe.",
    ]
    assert model.settings.mode is Mode.CONTEXT


def test_full_is_refused_without_a_conversion():
    model = ScriptedModel()
    model.convert(boundary=0)
    assert talk(model, "/full", "/full off") == [
        "> /full",
        "# Fast reading is not available because this model has not been converted.",
        "> /full off",
        "! model.gguf has no pruning keys; convert it first",
    ]


def test_clear_keeps_the_system_prompt():
    model = ScriptedModel(["One.", STATS], ["Two.", STATS])
    transcript = talk(model, "a", "/clear", "/stats", "b", system="Be brief.")
    assert "# Conversation cleared." in transcript
    assert "# No answers yet." in transcript
    assert model.asked[1] == [Message("system", "Be brief."), Message("user", "b")]


def test_system_command_sets_system_prompt():
    model = ScriptedModel(["Aye.", STATS])
    transcript = talk(model, "/system", "/system Talk like a sailor.", "/system", "hi")
    assert transcript[:6] == [
        "> /system",
        "# No system prompt.",
        "> /system Talk like a sailor.",
        "# System prompt set.",
        "> /system",
        "# System prompt: Talk like a sailor.",
    ]
    assert model.asked[0][0] == Message("system", "Talk like a sailor.")


def test_stats_sum_all_turns():
    model = ScriptedModel(["One.", STATS], ["Two.", STATS])
    assert talk(model, "a", "b", "/stats")[-5:] == [
        FAST,
        "# Last answer: " + STATS_LINE.removeprefix("# "),
        "# Answers: 2 (22 tokens).",
        "# Prompt tokens: pop-local read 1,966 with fast reading, read 34 in full, and reused"
        " 400 from the cache.",
        "# Context: 1,211 of 4,096 tokens used.",
    ]


def test_help_lists_every_command():
    transcript = talk(ScriptedModel(), "/help")
    assert talk(ScriptedModel(), "?")[1:] == talk(ScriptedModel(), "/?")[1:] == transcript[1:]
    assert [line.split()[1] for line in transcript[1 : 1 + len(COMMANDS)]] == list(COMMANDS)
    assert transcript[1 + len(COMMANDS) :] == [f"# {line}" for line in HELP_NOTES]


@pytest.mark.parametrize("word", ["/exit", "/bye", "/quit", "exit", "Quit "])
def test_exit_commands_end_the_chat(word):
    assert talk(ScriptedModel(), word, "never read") == [f"> {word}"]


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("/clera", "Unknown command /clera: did you mean /clear?"),
        ("/exitt", "Unknown command /exitt: did you mean /exit?"),
        ("/zzz", "Unknown command /zzz: /help lists the commands."),
    ],
)
def test_unknown_command_suggests_the_nearest(line, answer):
    assert talk(ScriptedModel(), line) == [f"> {line}", f"# {answer}"]


@pytest.mark.parametrize("line", ["/etc/hosts, what is it?", "exit"])
def test_leading_space_sends_command_as_question(line):
    model = ScriptedModel(["Fine.", STATS])
    talk(model, f" {line}")
    assert model.asked[0] == [Message("user", line)]


@pytest.mark.parametrize(
    ("answer", "lines", "n_messages"),
    [
        (["Once upon", KeyboardInterrupt()], ["Once upon", "# Stopped."], 3),
        ([KeyboardInterrupt()], ["# Stopped.", DROPPED], 1),
        ([PopError("too long", "/clear")], ["! too long; /clear", DROPPED], 1),
    ],
    ids=["in the answer", "before the answer", "failure"],
)
def test_turn_without_answer_is_dropped(answer, lines, n_messages):
    model = ScriptedModel(answer, ["Yes.", STATS])
    assert talk(model, "tell", "again")[2:5] == [*lines, "> again"]
    assert len(model.asked[1]) == n_messages


def test_stopped_answer_shows_statistics():
    stopped = TurnStats(100, 0, 83, 17, 0.5, 0.25, 3, 0.5, "interrupted")
    transcript = talk(ScriptedModel(["Once", stopped]), "tell")
    assert transcript[-2:] == ["Once", f"# {stats_line(stopped)}"]
    assert transcript[-1].endswith("· stopped")


def test_stop_during_the_prefill_drops_the_question():
    unread = TurnStats(1000, 100, 412, 0, 0.5, 0.25, 0, 0.0, "interrupted")
    assert talk(ScriptedModel([unread]), "tell", "/stats")[2:] == [
        "# Reading stopped after 512 of 1,000 prompt tokens.",
        DROPPED,
        "> /stats",
        FAST,
        "# No answers yet.",
    ]


class Piped(Transcript):
    """A screen without a terminal."""

    is_typed = False


@pytest.mark.parametrize(
    "answer",
    [
        ["Once", KeyboardInterrupt()],
        ["Once", figures(finish_reason="interrupted")],
        [PopError("something went wrong", "try again")],
    ],
    ids=["in a step", "after one", "with another failure"],
)
def test_interrupt_ends_piped_lines(answer, monkeypatch):
    pressed = CtrlC()
    pressed.asked = True
    monkeypatch.setattr(dialogue, "deferred_interrupt", lambda: nullcontext(pressed))
    model, lines = ScriptedModel(answer, ["a time.", STATS]), Piped("tell", "go on")
    with pytest.raises(KeyboardInterrupt):
        converse(scripted_chat(model, lines), lines.read_line)
    assert lines.lines == ["go on"]


@pytest.mark.parametrize(
    "line",
    [
        *("/retry", "/undo", "/save", "/nonsense"),
        *("/full maybe", "/set top_p 2", "/set nothing"),
    ],
)
def test_refused_line_counts_as_a_failure(line):
    begun = scripted_chat(ScriptedModel(), Transcript())
    run_command(begun, line)
    assert begun.has_failed


def test_interrupt_at_prompt_explains_how_to_quit():
    assert talk(ScriptedModel(), KeyboardInterrupt(), "/exit") == [f"# {LEAVE_HINT}", "> /exit"]
