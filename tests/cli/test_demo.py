"""`pop-local demo`: on the real SmolLM2 as `make demo` runs it, and on a random model."""

import json
import re
import sys

import pytest

from pop_local.measure.speed import Spread
from pop_local.ui.views.demonstration import show_demonstration
from pop_local.workflows import demonstrate as workflow
from pop_local.workflows.demonstrate import Demonstration, TimedAnswer
from support.converted import converted
from support.program import Done, called, run
from support.synthetic import make_gguf

pytestmark = pytest.mark.slow

WIDE = ("--ctx", "16384")


def demo(*arguments: object) -> Done:
    return called("demo", "--threads", 1, *arguments)


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory):
    # A prompt of this length is slow to read with more layers.
    folder = tmp_path_factory.mktemp("demo")
    source = make_gguf(
        folder / "m.gguf", "llama", n_layer=3, n_embd=64, n_head=2, n_ff=64, n_ctx_train=16384
    )
    return converted(source, folder, boundary=2)


def test_the_real_model_answers_twice_and_the_program_leaves(smollm2):
    """The run of `make demo`, with the shipped sidecar."""
    done = run("demo", "--threads", 1, smollm2, "--pairs", 1)
    assert done.returncode == 0, done.stderr
    [said] = [line for line in done.stderr.splitlines() if not line.endswith(" left")]
    assert "pop-sidecar.gguf (shipped with pop-local)" in said
    assert done.stdout.count("first token after") == 2
    assert "What rule was painted above the lamp-room door?" in done.stdout
    assert done.stdout.count("The light is never late") == 2, "both know it from the document"
    assert "(1.36 times fewer multiply-accumulates)" in done.stdout
    assert "they skipped 10 of 30 layers" in done.stdout


@pytest.fixture
def short(monkeypatch):
    """A part of the document, of which a byte-level vocabulary needs about 9,000 tokens."""
    monkeypatch.setattr(workflow, "_text", lambda name, real=workflow._text: real(name)[:1000])


@pytest.mark.parametrize(("least", "is_above"), [(1.42, False), (1.43, True)])
def test_a_speedup_above_the_count_is_explained(capsys, least, is_above):
    answer = TimedAnswer("Yes.", 1.0, 10, 7)
    speedup = Spread(1.5, least, 1.6)
    show_demonstration(
        Demonstration("m.gguf", 4, 8, "Why?", 17, answer, answer, 3, speedup, limit=1.425)
    )
    assert ("exceeds the count" in capsys.readouterr().out) == is_above


def test_json_has_all_figures_and_the_counters_add_up(tiny_file, short):
    found = json.loads(demo(tiny_file, *WIDE, "--pairs", 1, "--json").stdout)
    full, pop = found["full"], found["pop"]
    assert (full["n_pruned"], full["n_full"]) == (0, found["n_prompt"])
    assert (pop["n_pruned"], pop["n_full"]) == (found["n_prompt"] - 17, 17)
    assert found["speedup"]["median"] == pytest.approx(full["ttft_s"] / pop["ttft_s"])
    assert found["limit"] > 1
    assert full["text"] and pop["text"]


def test_the_speed_up_is_of_several_pairs(tiny_file, short):
    done = demo(tiny_file, *WIDE, "--pairs", 2)
    said = re.search(r"Speed-up: (.+)x, (.+)-(.+) in 2 pairs \(1\.", done.stdout)
    assert said is not None, done.stdout
    middle, least, most = map(float, said.groups())
    assert least <= middle <= most


def test_in_a_terminal_a_chat_with_the_settings_follows(tiny_file, monkeypatch):
    pexpect = pytest.importorskip("pexpect", reason="a pseudo-terminal is needed")
    monkeypatch.setenv("POP_LOCAL_TEMPERATURE", "0.5")
    monkeypatch.setenv("POP_LOCAL_SYSTEM", "Be brief.")
    arguments = ["-m", "pop_local", "demo", str(tiny_file), *WIDE, "--threads", "1", "--seed", "3"]
    arguments += ["--pairs", "1"]
    child = pexpect.spawn(sys.executable, arguments, encoding="utf-8", timeout=120)
    child.expect("Tokens pruned")
    child.expect("/exit to quit")
    child.sendline("/full")
    child.expect("Fast reading is on")
    child.sendline("/set")
    child.expect("temperature is 0.5")
    child.expect("seed is 3")
    child.sendline("/system")
    child.expect("System prompt: Be brief")
    child.sendline("/exit")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_settings_are_checked_first(tiny_file, monkeypatch):
    monkeypatch.setenv("POP_LOCAL_THEME", "darc")
    done = demo(tiny_file, *WIDE)
    assert (done.returncode, done.stdout) == (1, "")
    assert "unknown theme darc" in done.stderr


def test_an_unconverted_model_is_refused(tmp_path):
    done = demo(make_gguf(tmp_path / "plain.gguf", "llama"))
    assert done.returncode == 1
    assert "pop-local convert" in done.stderr


def test_a_context_too_small_for_the_document_is_reported(tiny_file):
    done = demo(tiny_file, "--ctx", 512)
    assert done.returncode == 1
    assert "the context holds 512" in done.stderr
    assert "Traceback" not in done.stderr
