"""Test the slash commands by whole transcripts with a scripted model."""

import os
import re

import pytest

from pop_local.config.sampler_options import SAMPLER_OPTIONS
from pop_local.engine.chat_messages import Message
from pop_local.engine.llama.backend import Mode
from pop_local.engine.turn_options import TurnOptions
from support.scripted_chat import (
    STATS,
    STATS_LINE,
    ScriptedModel,
    talk,
)

ASKED = ["# reading 512 of 1000"]


def test_retry_repeats_the_last_question():
    model = ScriptedModel(["One.", STATS], ["Two.", STATS], ["Three.", STATS])
    assert talk(model, "/retry", "hi", "/retry", "and?")[:9] == [
        "> /retry",
        "# No question yet.",
        "> hi",
        *ASKED,
        "One.",
        STATS_LINE,
        "> /retry",
        *ASKED,
        "Two.",
    ]
    assert [message.content for message in model.asked[2]] == ["hi", "Two.", "and?"]


def test_question_survives_an_unexpected_error():
    model = ScriptedModel(["One.", STATS], [RuntimeError("lost the GPU")], ["Two.", STATS])
    transcript = talk(model, "hi", "/retry", "/retry")
    assert any("lost the GPU" in line for line in transcript)
    assert model.asked[2] == model.asked[1]
    assert "Two." in transcript


def test_undo_drops_one_turn_after_the_other():
    model = ScriptedModel(["One.", STATS], ["Two.", STATS], ["Three.", STATS])
    transcript = talk(model, "a", "b", "/undo", "c", "/undo", "/undo", "/undo")
    assert [line for line in transcript if line.startswith(("# Dropped", "# There are no"))] == [
        "# Dropped: b",
        "# Dropped: c",
        "# Dropped: a",
        "# There are no turns to remove.",
    ]
    assert [message.content for message in model.asked[2]] == ["a", "One.", "c"]


def test_set_shows_and_changes_sampling():
    model = ScriptedModel(["Hm.", STATS])
    model.engine.recommended = {"top_k": 20}
    lines = ("/set top_p 0.5", "/set temperature 0.2", "/set top_p default", "/set", "hi")
    screen = talk(model, *lines)
    assert screen[:7] == [
        "> /set top_p 0.5",
        "# top_p is 0.5.",
        "> /set temperature 0.2",
        "# temperature is 0.2.",
        "> /set top_p default",
        "# top_p is 0.95 (default).",
        "> /set",
    ]
    parameters = screen[7 : screen.index("> hi")]
    assert [line.split()[1] for line in parameters] == [*SAMPLER_OPTIONS, "max_tokens"]
    assert set(parameters) > {
        "# temperature is 0.2.",
        "# top_k is 20 (recommended for this model).",
        "# repeat_penalty is 1 (default).",
        "# seed is 123456789.",
        "# max_tokens is unlimited (default).",
    }
    assert (model.options.temperature, model.options.seed) == (0.2, 123456789)
    assert model.options.top_p == TurnOptions.top_p


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("/set top_p 2", "top_p: 2.0 is not a number from 0 to 1 or 'default'."),
        ("/set seed x", "seed: 'x' is not a whole number from 0 to 4,294,967,294 or 'default'."),
        (
            "/set max_tokens 0",
            "max_tokens: 0 is not a whole number from 1 to 2,147,483,647 or 'default'.",
        ),
        ("/set temperature nan", "temperature: nan is not a number from 0 to 10 or 'default'."),
        (
            "/set temprature 1",
            "Unknown parameter temprature: did you mean temperature? (/set lists all parameters.)",
        ),
    ],
)
def test_set_refuses_invalid_values(line, answer):
    assert talk(ScriptedModel(), line) == [f"> {line}", f"# {answer}"]


def test_model_can_be_changed_during_conversation():
    model, other = ScriptedModel(["One.", STATS]), ScriptedModel(["Two.", STATS], n_ctx=2048)
    other.engine.context.files.path = "other.gguf"
    transcript = talk(model, "hi", "/full on", "/model other", "go on", others={"other": other})
    assert transcript[6:10] == [
        "> /model other",
        "# other.gguf (Scripted, llama)",
        "# Context: 2,048 tokens.",
        "# Fast reading is off: no layers are skipped. To use fast reading, type /full off.",
    ]
    assert model.is_closed and not other.is_closed
    assert [message.content for message in other.asked[0]] == ["hi", "One.", "go on"]


def test_model_accepts_quoted_paths_and_home(tmp_path, monkeypatch):
    for home in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(home, str(tmp_path))
    file = tmp_path / "my model.gguf"
    file.touch()
    for given in ("~/my model.gguf", f"'{file}'"):
        transcript = talk(ScriptedModel(), f"/model {given}", others={str(file): ScriptedModel()})
        assert transcript[1] == "# model.gguf (Scripted, llama)"


def test_unprunable_model_keeps_pruning_enabled():
    plain, other = ScriptedModel(), ScriptedModel()
    plain.convert(boundary=0)
    talk(plain, "/model other", others={"other": other})
    assert other.settings.mode is Mode.CONTEXT


def test_missing_model_keeps_the_open_model():
    model = ScriptedModel(["One.", STATS])
    transcript = talk(model, "/model nowhere", "hi")
    assert transcript[1] == "! there is no model nowhere; "
    assert not model.is_closed and len(model.asked) == 1


# --- files


@pytest.fixture
def report(tmp_path):
    path = tmp_path / "the report.txt"
    path.write_text(" ".join(f"w{n}" for n in range(50)))
    return path


def test_file_is_attached_to_next_question_only(report):
    model = ScriptedModel(["A report.", STATS], ["Yes.", STATS])
    transcript = talk(model, f"/file '{report}'", "/file", "what is it?", "sure?")
    assert transcript[1:5] == [
        f"# {report}: 50 tokens, 1% of the context.",
        "# Your next question will include the attachment.",
        "> /file",
        "# /file needs a path.",
    ]
    (message,) = model.asked[0]
    assert message.content == f"{report.read_text()}\n\nwhat is it?"
    assert model.asked[1][-1] == Message("user", "sure?")


def test_file_that_is_too_large_is_dropped_with_its_question(report):
    model = ScriptedModel(["Hm.", STATS], n_ctx=40)
    model.engine.context.files.n_ctx_train = 40
    transcript = talk(model, f"/file {report}", "what is it?", "x", "and you?", sampling={})
    assert transcript[4].startswith("? The context is 18 tokens too small: the prompt has 53")
    assert model.asked[0][0].content == "and you?"


def test_larger_context_makes_room_for_a_file(report):
    model, larger = ScriptedModel(n_ctx=40), ScriptedModel(["Hm.", STATS])
    transcript = talk(model, f"/file {report}", "what?", "l", sampling={}, others={1024: larger})
    assert "?   l  use a larger context (--ctx 1024)" in transcript
    assert "# The context length is now 4,096 tokens." in transcript
    assert len(larger.asked[0][0].content.split()) == 51


@pytest.mark.skipif(os.sep != "/", reason="there a backslash is between folders")
@pytest.mark.parametrize("name", ["my report.txt", "what's (new).txt", "a\\ b.txt"])
def test_file_may_be_dropped_on_the_terminal(tmp_path, name):
    (tmp_path / name).write_text("Words.")
    plain, escaped = f"{tmp_path}/{name}", f"{tmp_path}/" + re.sub(r"([\\ '()])", r"\\\1", name)
    for given in (plain, f"'{plain}'", escaped):
        assert f"# {plain}: 1 tokens, 0% of the context." in talk(ScriptedModel(), f"/file {given}")


# --- a full context


def conversation(*keys: str, n_ctx: int = 40) -> tuple[ScriptedModel, list[str]]:
    """Chat for two turns of 12 tokens each, and then send a question of 13 tokens."""
    model = ScriptedModel(["x " * 6, STATS], ["y " * 6, STATS], ["z", STATS], n_ctx=n_ctx)
    model.engine.context.files.n_ctx_train = 40
    questions = ["a " * 6, "b " * 6, "c " * 13]
    return model, talk(model, *questions, *keys, sampling={})


def test_oversized_question_offers_choices():
    model, transcript = conversation()
    assert len(model.asked) == 2
    at = next(i for i, line in enumerate(transcript) if line.startswith("? "))
    assert transcript[at:] == [
        "? The context is 2 tokens too small: the prompt has 37 tokens, an answer needs 5 or more,"
        " and the context has 40.",
        "?   d  drop the oldest turn",
        "?   x  drop this question",
        "# The question and its attachments were dropped. To ask again, type /retry.",
    ]


@pytest.mark.parametrize(
    ("key", "n_ctx", "n_messages"), [("d", 40, 3), ("d", 34, 3), ("d", 20, 1), ("x", 40, 0)]
)
def test_dropping_turns_makes_room(key, n_ctx, n_messages):
    model, _ = conversation(key, n_ctx=n_ctx)
    assert [len(messages) for messages in model.asked[2:]] == [n_messages] * bool(n_messages)


@pytest.mark.parametrize(("switch", "mode"), [("on", Mode.OFF), ("off", Mode.CONTEXT)])
def test_larger_context_keeps_pruning_switch(switch, mode):
    """Open the larger context in the other mode, as --full does, and keep the mode."""
    model, larger = ScriptedModel(n_ctx=8), ScriptedModel(["z", STATS])
    larger.settings.mode = Mode.OFF if mode is Mode.CONTEXT else Mode.CONTEXT
    transcript = talk(model, f"/full {switch}", "a " * 13, "l", sampling={}, others={1024: larger})
    assert larger.settings.mode is mode
    assert transcript[-2:] == ["z", STATS_LINE]
