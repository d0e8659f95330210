"""The Python API, and the example in docs/python-api.md."""

import re
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

import pop_local
from pop_local import ContextFullError, Document, PopError, PopModel, TurnStats
from pop_local.config.sampler_options import SAMPLER_OPTIONS, SamplerOptions
from pop_local.engine.chat_messages import SessionStats
from pop_local.engine.engine_options import EngineOptions
from pop_local.engine.turn_options import AnswerOptions, TurnOptions, turn_options
from support.calls import first_of
from support.converted import paired
from support.import_blocker import BLOCKER
from support.paths import ROOT
from support.programs import GREEDY, QUESTION, opened
from support.synthetic import TEMPLATE, make_gguf

REPORT = (
    "The council met on Monday. The old bridge over the mill stream was inspected in May, and its "
    "planks are rotten. After a long debate the council decided to build a new bridge of oak. Anna "
    "Berg, the carpenter, will begin in June, and the school gives the money of its summer fair. "
) * 2


# --- the example


def documented() -> str:
    text = (ROOT / "docs" / "python-api.md").read_text(encoding="utf-8")
    blocks: list[str] = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 5
    return "\n".join(blocks)


EXAMINES_LITTLE = """
from pop_local.measure import probes
from pop_local.workflows.conversion import convert_model
convert_model.N_WINDOWS = convert_model.N_DOCUMENTS = probes.N_DRAWS = 1
"""


def test_documented_example_runs(chat_model, tmp_path):
    (tmp_path / "model.pop.gguf").hardlink_to(chat_model)
    make_gguf(tmp_path / "model.gguf", "llama")
    (tmp_path / "report.txt").write_text(REPORT)
    (tmp_path / "example.py").write_text(EXAMINES_LITTLE + documented())
    done = subprocess.run(
        [sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    (pruned,) = (line.split() for line in lines if line.endswith("prompt tokens pruned"))
    assert int(pruned[2]) - int(pruned[0]) == 17
    (cached,) = (line.split() for line in lines if line.endswith("still in the KV cache"))
    assert int(cached[0]) > int(pruned[2])
    assert any(re.fullmatch(r"2 answers: \d+ tokens pruned, \d+ read in full", x) for x in lines)
    assert any(re.fullmatch(r"\d+ tokens too long", line) for line in lines)
    assert "full" in lines
    assert "Fitting, in tokens" in lines and "Writing and verifying, in bytes" in lines
    assert any(line.startswith("FFFFFFSS, ") and "Measured(kl_mean=" in line for line in lines)
    assert any(re.fullmatch(r"KL \d\.\d+ ± \d\S+, on pop-local's held-out text", x) for x in lines)
    assert (tmp_path / "talk.popsession").is_file()


@pytest.mark.slow
def test_documented_example_passes_mypy(tmp_path):
    """Use the settings of `make lint`, and its cache for speed."""
    assert Path(pop_local.__file__).with_name("py.typed").is_file()
    example = tmp_path / "example.py"
    example.write_text(documented() + "\npop_local.PopModel.open('x').chat('x', stop='y')\n")
    strict = "# mypy: disallow-untyped-calls, disallow-any-generics, warn-return-any\n"
    example.write_text(strict + "import pop_local\n" + example.read_text() + "pop_local.Popmodel\n")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", example], cwd=ROOT, capture_output=True, text=True
    )
    mistakes = [line for line in done.stdout.splitlines() if ": error: " in line]
    assert len(mistakes) == 2, done.stdout
    assert 'Unexpected keyword argument "stop"' in mistakes[0]
    assert 'Module has no attribute "Popmodel"' in mistakes[1]


# --- exports


def test_import_loads_no_heavy_package():
    code = BLOCKER + (
        "import pop_local\n"
        "print(set(pop_local.__all__) <= set(dir(pop_local)), hasattr(pop_local, 'PopModell'))\n"
        "print(pop_local.TurnStats.__name__, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["True", "False", "TurnStats", "False"], done.stderr


@pytest.mark.parametrize("name", vars(pop_local)["__all__"])
def test_every_exported_name_exists(name):
    assert getattr(pop_local, name) is not None


def test_answers_have_the_options_of_a_turn():
    arguments = get_type_hints(AnswerOptions)
    assert arguments.pop("sampling") is SamplerOptions
    fields = get_type_hints(TurnOptions)
    # Answer has no fields for log probabilities and calls.
    assert fields.keys() - SAMPLER_OPTIONS.keys() - arguments.keys() == {
        *("n_top_logprobs", "has_end_logprob", "calls", "logit_bias")
    }
    assert arguments == {name: fields[name] for name in arguments}


def test_sampling_replaces_recommended_options():
    sampling = SamplerOptions(top_k=5, seed=3)
    options = turn_options({"top_p": 0.5}, {"sampling": sampling, "seed": 4, "max_tokens": 8})
    assert options == TurnOptions(top_k=5, seed=4, max_tokens=8)
    assert turn_options({"top_p": 0.5}, {"top_k": 5}) == TurnOptions(top_p=0.5, top_k=5)


def test_session_accepts_sampling(chat_model):
    with PopModel.open(chat_model, n_ctx=512, n_threads=1) as model:
        greedy = model.chat("hello", max_tokens=8, temperature=0.0).text
        likeliest = SamplerOptions(temperature=10.0, top_k=1)
        assert model.chat("hello", max_tokens=8, sampling=likeliest).text == greedy


# --- opening


def test_model_is_opened_by_name_with_its_sidecar(tmp_path, monkeypatch):
    monkeypatch.setenv("POP_LOCAL_MODELS_DIR", str(tmp_path))
    base = make_gguf(tmp_path / "tiny.gguf", "llama", chat_template=TEMPLATE)
    pair = paired(base, tmp_path, "fitted", boundary=4)
    with opened("tiny") as model:
        assert (first_of(model).settings.boundary, model.pruning) == (4, True)
        assert model.engine.context.files.sidecar == pair.sidecar
    with opened(pair.single) as model:
        assert (first_of(model).settings.boundary, model.engine.context.files.sidecar) == (4, None)
    elsewhere = pair.sidecar.rename(tmp_path / "moved.gguf")
    with opened(base) as model:
        assert (first_of(model).settings.boundary, model.pruning) == (0, False)
        with pytest.raises(PopError, match="no pruning keys"):
            model.pruning = True
    with opened(base, sidecar=elsewhere) as model:
        assert first_of(model).settings.boundary == 4
    with pytest.raises(PopError, match=r"missing\.gguf"):
        opened(base, sidecar=tmp_path / "missing.gguf")
    with pytest.raises(PopError) as caught:
        opened("tinny")
    assert "did you mean tiny?" in caught.value.hint


def test_constructor_accepts_path(chat_model):
    with PopModel(EngineOptions.of(str(chat_model), n_ctx=256)) as model:
        assert model.engine.context.n_ctx == 256
        assert (first_of(model).settings.boundary, model.pruning) == (5, True)


def test_closed_model_is_an_error(chat_model):
    model = opened(chat_model)
    session = model.session()
    session.chat(QUESTION, **GREEDY)
    model.close()
    model.close()
    for use in (lambda: model.chat("a"), lambda: session.chat("a"), first_of(model).cache.clear):
        with pytest.raises(PopError, match="is closed"):
            use()


# --- answers


def test_chat_and_stream_agree_and_keep_no_history(model):
    answer = model.chat(QUESTION, documents=["i j k " * 20], system="Be brief.", **GREEDY)
    stats = answer.stats
    assert (stats.n_pruned, stats.n_cached) == (stats.n_prompt - 17, 0)
    assert stats.n_decoded == 8
    first_of(model).cache.clear()
    document = Document("notes.txt", "i j k " * 20)
    stream = model.stream(QUESTION, documents=[document], system="Be brief.", **GREEDY)
    pieces = list(stream)
    assert "".join(pieces) == stream.text == str(answer)
    assert stream.stats is not None and stream.stats.n_pruned == stats.n_pruned
    assert all(pieces)
    assert model.chat(QUESTION, **GREEDY).stats.n_prompt < stats.n_prompt


def test_session_stores_history_and_totals(model):
    session = model.session(system="Be brief.")
    first = session.chat(QUESTION, **GREEDY)
    second = session.chat("and now?", **GREEDY)
    assert second.stats.n_prompt > first.stats.n_prompt + first.stats.n_decoded
    assert second.stats.n_cached >= first.stats.n_prompt
    questions = [turn.question for turn in session.conversation.turns]
    assert (session.conversation.system, questions) == ("Be brief.", [QUESTION, "and now?"])
    assert session.conversation.turns[0].answer == first.text
    total = session.stats
    both = (first.stats, second.stats)
    assert (total.n_answers, total.n_decoded) == (2, 16)
    assert total.n_pruned == sum(stats.n_pruned for stats in both) > 0
    assert total.n_prompt == total.n_cached + total.n_pruned + total.n_full


def test_session_adds_up_times():
    turn = TurnStats(100, 10, 70, 20, 2.0, 1.5, 11, 2.0, "stop")
    unanswered = TurnStats(100, 10, 30, 0, 0.5, 0.5, 0, 0.0, "interrupted")
    total = SessionStats.of([turn, unanswered, turn])
    assert (total.n_answers, total.prefill_s, total.decode_s) == (2, 3.5, 4.0)


def test_pruning_off_reads_in_full(model):
    model.pruning = False
    answer = model.chat(QUESTION, **GREEDY)
    assert (answer.stats.reading, answer.stats.n_full) == ("full", answer.stats.n_prompt)
    n_tokens = first_of(model).cache.n_tokens
    model.pruning = False
    assert first_of(model).cache.n_tokens == n_tokens, "the mode did not change"
    model.pruning = True
    assert model.chat(QUESTION, **GREEDY).stats.reading == "pruned"


def test_rejects_invalid_questions(model):
    session = model.session()
    with pytest.raises(PopError, match="empty"):
        session.chat(" ")
    with pytest.raises(PopError, match="documents must be a list"):
        session.chat(QUESTION, documents="not a list")
    with pytest.raises(PopError, match="stops must be a tuple"):
        session.chat(QUESTION, stops="END")
    with pytest.raises(PopError, match="the minimum is 1"):
        session.chat(QUESTION, max_tokens=0)
    with pytest.raises(ContextFullError) as caught:
        session.chat(QUESTION * 20)
    assert caught.value.n_short > 0
    with pytest.raises(ContextFullError) as caught:
        session.chat(QUESTION, min_answer=5000)
    larger = caught.value.n_prompt + 5000
    assert f"(n_ctx={larger})" in caught.value.hint
    assert session.conversation.turns == ()
