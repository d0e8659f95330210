"""Several threads on one model: they take turns, and closing the model waits for the others.

Each test runs in a child process, because an error in llama.cpp kills the process.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.converted import tiny
from support.synthetic import TEMPLATE

START = """
import sys, threading, time
from pop_local import PopError, PopModel
from support.calls import first_of, prompt
from pop_local.engine.prompt.prompt import Prompt

OPTIONS = {"temperature": 0.0, "max_tokens": 12}
model = PopModel.open(sys.argv[1], n_ctx=4096, n_threads=1, n_batch=64, n_ubatch=64,
    keep_states=True)
QUESTIONS = [f"{letter} b c d e f g h " * 20 for letter in "mnop"]
ended = []

def start(work, *given):
    def run():
        try:
            ended.append(work(*given))
        except PopError as error:
            ended.append(error)
    thread = threading.Thread(target=run)
    thread.start()
    return thread

def join(threads):
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()

def read_long():
    model.read(Prompt(prompt(4000)), lambda done, total: is_running.set())

is_running = threading.Event()
"""

CHATS = """
alone = [model.chat(each, **OPTIONS).text for each in QUESTIONS]
join([start(lambda text: model.chat(text, **OPTIONS).text, each) for each in QUESTIONS * 2])
assert sorted(ended) == sorted(alone * 2), (ended, alone)
"""

# An answer that another thread's question displaces ends with a PopError.
STREAMS = """
def stream(question):
    return "".join(model.stream(question, **OPTIONS))

for _ in range(4):
    join([start(stream, each) for each in QUESTIONS])
assert len(ended) == 16
for each in ended:
    assert isinstance(each, str) or "another answer started" in each.message, each
assert model.chat(QUESTIONS[0], **OPTIONS).text
"""

OTHER_CALLS = """
def chat(question):
    return model.chat(question, **OPTIONS).text

def refill():
    return [first_of(model).refiller.refill() for _ in range(8)] and "refilled"

def save():
    return [first_of(model).states.save() for _ in range(8)] and "saved"

def clear():
    return [first_of(model).cache.clear() for _ in range(8)] and "cleared"

def switch():
    for number in range(8):
        model.pruning = number % 2
    return "switched"

for work in (refill, save, clear, switch):
    join([start(chat, QUESTIONS[0]), start(work), start(chat, QUESTIONS[1])])
assert not [each for each in ended if isinstance(each, PopError)], ended
"""

CLOSE_IN_PREFILL = """
reading = start(read_long)
assert is_running.wait(60)
model.close()
assert model.engine.context.is_closed
join([reading])
[error] = ended
assert "is closed" in error.message, error
"""

CLOSE_IN_DECODE = """
def stream():
    for _ in model.stream(QUESTIONS[0], temperature=0.0, max_tokens=2000):
        is_running.set()

answering = start(stream)
assert is_running.wait(60)
time.sleep(float(sys.argv[2]))
model.close()
assert model.engine.context.is_closed
join([answering])
[error] = ended
assert "is closed" in error.message, error
"""

CLOSE_IN_CHAT = """
chatting = start(lambda: model.chat(QUESTIONS[0], temperature=0.0, max_tokens=3000))
while not first_of(model).cache.n_tokens:
    time.sleep(0.01)
started = time.monotonic()
model.close()
assert model.engine.context.is_closed and time.monotonic() - started < 5
join([chatting])
[error] = ended
assert "is closed" in error.message, error
"""

CLOSE_SEVERAL = """
model.close()
model = PopModel.open(sys.argv[1], n_ctx=4096, n_threads=1, n_batch=64, n_ubatch=64, n_parallel=3)
def read(index):
    with model.engine.sequences[index].cache.slot.working():
        model.engine.sequences[index].read(Prompt(prompt(4000, index)),
            lambda done, total: is_running.set())

reading = [start(read, index) for index in range(3)]
assert is_running.wait(60)
model.close()
assert model.engine.context.is_closed
join(reading)
assert len(ended) == 3
"""


@pytest.fixture(scope="module")
def chat_file(tmp_path_factory) -> Path:
    return tiny(tmp_path_factory.mktemp("threads"), boundary=5, chat_template=TEMPLATE)


def run(program: str, *arguments: object) -> None:
    command = [sys.executable, "-c", START + program, *map(str, arguments)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr[-2000:]}"


@pytest.mark.parametrize("program", [CHATS, STREAMS, OTHER_CALLS], ids=["chat", "stream", "others"])
def test_threads_take_turns(program, chat_file):
    run(program, chat_file)


@pytest.mark.parametrize("program", [CLOSE_IN_PREFILL, CLOSE_IN_CHAT], ids=["prefill", "chat"])
def test_closing_a_model_stops_another_threads_answer(program, chat_file):
    run(program, chat_file)


@pytest.mark.parametrize("wait_s", [0, 0.003, 0.01, 0.05])
def test_closing_a_model_while_another_thread_decodes(wait_s, chat_file):
    run(CLOSE_IN_DECODE, chat_file, wait_s)


def test_closing_a_model_of_several_sequences(chat_file):
    run(CLOSE_SEVERAL, chat_file)
