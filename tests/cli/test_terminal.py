"""Test the program on a terminal and in pipes, with tiny models of random weights."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pop_converter.popfile.pruning_plan import make_plan
from pop_converter.popfile.rewrite import convert
from pop_local.models.model_names import MODELS_VARIABLE
from support.hub_server import Hub, Repo, serving
from support.program import called, run
from support.shapes import read_shape
from support.synthetic import TEMPLATE, make_gguf

if sys.platform == "win32":
    pytest.skip("a pseudo-terminal is needed", allow_module_level=True)
from support.terminal import Terminal

pytestmark = pytest.mark.slow

ANSWER_OPTIONS = ("--temperature", "0", "--threads", "1")
STATS = (
    r"prompt ([\d,]+) tokens \((?:([\d,]+) cached, )?(?:([\d,]+) with fast reading, )?"
    r"[\d,]+ in full(?:, too short for fast reading)?\)"
)
COLOURS = re.compile(r"\x1b\[[1-9][0-9;]*m")
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a converted model with random weights and a chat template."""
    folder = tmp_path_factory.mktemp("terminal")
    plain = make_gguf(folder / "tiny.gguf", "llama", chat_template=TEMPLATE)
    target = folder / "tiny.pop.gguf"
    convert(make_plan(read_shape(plain), boundary=5), plain, target)
    return target


def terminal(*arguments: str, width: int = 200, **environment: str) -> Terminal:
    return Terminal("-m", "pop_local", *arguments, width=width, environment=environment)


@pytest.fixture
def hub(model, tmp_path) -> Iterator[dict[str, str]]:
    """Return an environment with a hub and an empty models folder."""
    files = {"tiny-Q4_0.gguf": model.with_name("tiny.gguf").read_bytes()}
    with serving(Hub(repos={"acme/tiny-GGUF": Repo(files)})) as hub:
        yield hub.environment() | {MODELS_VARIABLE: str(tmp_path), "HF_HOME": str(tmp_path / "hf")}


def test_fetches_hub_model_after_confirmation(hub):
    words = ("run", "hf:acme/tiny-GGUF", "hello", "--max-tokens", "3", *ANSWER_OPTIONS)
    asked = terminal(*words, **hub)
    asked.expect(r"Fetch .* MB from acme/tiny-GGUF\? \[Y/n\]")
    asked.line("n")
    asked.expect("must be fetched first")
    assert asked.expect_end() == 1
    asked = terminal(*words, **hub)
    asked.expect(r"\[Y/n\]")
    asked.line("")
    assert asked.expect_end() == 0, asked.text


def test_ctrl_c_cancels_confirmation(hub):
    asked = terminal("bench", "hf:acme/tiny-GGUF", **hub)
    asked.expect(r"\[Y/n\]")
    asked.interrupt_question()
    assert asked.expect_end() == 130
    assert "Stopped" in asked.text


def test_second_turn_reuses_the_first(model):
    """Turn refilling off, because a refilled cache stays valid when pruning is turned off."""
    options = ("--max-tokens", "5", "--refill", "off")
    chat = terminal("chat", str(model), *options, *ANSWER_OPTIONS)
    chat.expect("Fast reading is on: it skips 3 of 8 layers")
    chat.expect_prompt()
    chat.line("hello there, " * 20)
    chat.expect(STATS)
    n_first = chat.group(1)
    assert chat.group(3) > 0
    chat.line("and now?")
    chat.expect(STATS)
    assert chat.group(2) >= n_first - 20
    chat.line("/full on")
    chat.expect("Fast reading is off")
    chat.line("and now?")
    chat.expect(STATS)
    assert (chat.group(2), chat.group(3)) == (0, 0)
    chat.expect_prompt()
    chat.line("/stats")
    chat.expect(r"Answers: 3 \(15 tokens\)")
    chat.expect_prompt()
    chat.end_of_input()
    assert chat.expect_end() == 0
    assert COLOURS.search(chat.raw)


def test_ctrl_c_in_run_exits_with_130(model):
    run = terminal("run", str(model), "hello there", *ANSWER_OPTIONS)
    run.expect(r"\S{3}")
    run.interrupt()
    run.expect("Stopped.")
    assert run.expect_end() == 130


def test_oversized_prompt_offers_choices(model, tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("a word " * 1000)
    chat = terminal("chat", str(model), "--ctx", "256", "--max-tokens", "3", *ANSWER_OPTIONS)
    chat.expect_prompt()
    chat.line(f"/file {book}")
    chat.expect("Your next question will include the attachment")
    chat.expect_prompt()
    chat.line("Why?")
    chat.expect(r"The context is [\d,]+ tokens too small")
    chat.line("x")
    chat.expect("The question and its attachments were dropped")
    chat.expect_prompt()
    chat.line("long " * 150)
    chat.expect(r"The context is [\d,]+ tokens too small")
    chat.expect(r"l  use a larger context \(--ctx (\d+)\)")
    n_ctx = chat.group(1)
    chat.line("l")
    chat.expect(f"The context length is now {n_ctx:,} tokens")
    chat.expect(STATS)
    assert chat.group(1) > 256
    chat.line("/exit")
    assert chat.expect_end() == 0


def test_piped_chat_prints_only_answers(model):
    done = run("chat", str(model), "--max-tokens", "5", *ANSWER_OPTIONS, text="hi\n/full on\nho\n")
    assert done.returncode == 0
    assert "> " not in done.stdout
    assert "TTFT" not in done.stdout
    assert len(re.findall(STATS, done.stderr)) == 2
    assert "\x1b" not in done.stdout + done.stderr


def test_run_reads_files_and_pipes_before_the_question(model, tmp_path):
    file = tmp_path / "doc.txt"
    file.write_text("A document about nothing. " * 10)
    arguments = ("run", str(model), "What is it about?", "--max-tokens", "4", *ANSWER_OPTIONS)
    alone = json.loads(run(*arguments, "--json").stdout)
    both = json.loads(called(*arguments, "--json", "--file", str(file), text="More. " * 30).stdout)
    assert both["stats"]["n_prompt"] > alone["stats"]["n_prompt"] + 60
    assert both["stats"]["n_pruned"] > 0
    assert both["boundary"] == 5
    assert both["stats"]["n_decoded"] == 4
    full = json.loads(called(*arguments, "--json", "--file", str(file), "--full").stdout)
    assert (full["full"], full["stats"]["n_pruned"]) == (True, 0)


def test_run_warns_about_base_model(model, tmp_path):
    base = make_gguf(tmp_path / "base.gguf", "llama")
    shown = [
        called("run", file, "Once upon", "--max-tokens", "2", *ANSWER_OPTIONS).stderr
        for file in (base, model)
    ]
    assert ["This base model has no chat template" in warning for warning in shown] == [True, False]


def test_run_prints_the_same_answer_with_and_without_json(model):
    arguments = ("run", str(model), "--max-tokens", "6", *ANSWER_OPTIONS)
    plain = called(*arguments, text="piped question")
    in_json = json.loads(called(*arguments, "--json", text="piped question").stdout)
    assert plain.stdout.rstrip("\n") == in_json["text"].rstrip("\n")
    assert re.search(STATS, plain.stderr)


def test_warns_about_context_beyond_training(model):
    arguments = ("run", model, "hi", "--max-tokens", 2, *ANSWER_OPTIONS)
    warned = called(*arguments, "--ctx", 5000)
    assert warned.returncode == 0
    assert "Warning: the model was trained on contexts of 4,096 tokens" in warned.stderr
    assert "Warning" not in called(*arguments, "--ctx", 4096).stderr


def test_run_without_a_template_continues_the_text(tmp_path):
    base = make_gguf(tmp_path / "base.gguf", "llama")
    done = json.loads(
        called("run", str(base), "abc", "--json", "--max-tokens", "4", *ANSWER_OPTIONS).stdout
    )
    assert done["stats"]["n_prompt"] < 8
    assert done["full"]
    options = ("--system", "Be brief.", "--json", "--max-tokens", "4", *ANSWER_OPTIONS)
    after = json.loads(called("run", base, "abc", *options).stdout)
    assert after["stats"]["n_prompt"] > done["stats"]["n_prompt"]


def test_run_refuses_binary_input(model, tmp_path):
    image = tmp_path / "image.png"
    image.write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe")
    done = called("run", str(model), "What is it?", "--file", str(image))
    assert done.returncode == 1
    assert "is not UTF-8 text" in done.stderr
    absent = called("run", str(model), "What is it?", "--file", str(tmp_path / "absent.txt"))
    assert absent.returncode == 1
    assert "absent.txt: No such file" in absent.stderr


def test_run_reports_oversized_text_in_one_error(model, tmp_path):
    file = tmp_path / "book.txt"
    file.write_text("a word " * 100)
    arguments = ("run", str(model), "Why?", "--file", str(file), *ANSWER_OPTIONS)
    done = called(*arguments, "--ctx", "512", "--json")
    assert (done.returncode, done.stdout) == (1, "")
    counted, error, hint = done.stderr.splitlines()
    assert re.fullmatch(r".*/book\.txt: 501 tokens, 98% of the context\.", counted)
    found = re.fullmatch(
        r"error: the prompt has (\d+) tokens, which is (\d+) too many"
        r" \(the context holds 512 tokens, and the answer needs 64\)",
        error,
    )
    assert found and int(found[2]) == int(found[1]) + 64 - 512
    larger = re.fullmatch(r"hint: use a larger context \(--ctx (\d+)\) or shorten the prompt", hint)
    assert larger
    assert called(*arguments, "--max-tokens", "2", "--ctx", larger[1]).returncode == 0
    file.write_text("a word " * 1000)
    assert re.fullmatch(
        r"hint: shorten the prompt, or use a model with a longer context: this model was trained on"
        r" contexts of [\d,]+ tokens and is unreliable on longer prompts",
        called(*arguments).stderr.splitlines()[-1],
    )


def test_second_turn_reads_few_tokens(smollm2_pop):
    """Check that the second turn reads little more than its question, and that `run` agrees."""
    question = "Name three animals that live in the sea, and say one thing about each of them."
    options = ("--max-tokens", "24", "--temperature", "0")
    chat = run("chat", smollm2_pop, *options, text=f"{question}\nWhich is the largest?\n")
    assert chat.returncode == 0, chat.stderr
    first, second = re.finditer(STATS, chat.stderr)
    assert int(first[3]) > 0
    assert int(second[2]) >= int(first[1])
    alone = json.loads(called("run", smollm2_pop, question, *options, "--json").stdout)
    assert alone["boundary"] == 20
    assert alone["stats"]["n_pruned"] == int(first[3])
    assert chat.stdout.startswith(alone["text"])
