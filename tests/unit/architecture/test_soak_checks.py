"""Test the checks of tests/bench/measure_soak.py, which detect wrong answers and growing memory."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from support.paths import TESTS

sys.path.append(str(TESTS / "bench"))
from measure_soak import BLOCK_S, Seen, slope_of
from soak_agents import Replayed
from soak_clients import Inputs, Tally

SERVER: Any = SimpleNamespace(root="")
MARK = "agent 1 session 2 request 0"
CALL = '{ "agent": "key-1", "command": "ls'


@pytest.mark.parametrize(
    ("texts", "n_prompt", "found"),
    [
        ([f'"{MARK}"'], 100, MARK),
        ([CALL], 100, MARK),
        ([CALL, f'"{MARK}"'], 100, MARK),
        ([f'"{MARK}0"'], 100, "another answer"),
        ([CALL.replace("key-1", "key-2")], 100, "another answer"),
        ([CALL, "</tool_"], 100, "another answer"),
        ([], 100, "no answer"),
        ([f'"{MARK}"'], 101, "101 prompt tokens instead of 100"),
    ],
)
def test_an_agents_answer_must_have_its_mark_and_its_prompt_length(
    monkeypatch, texts, n_prompt, found
):
    agent = Replayed(SERVER, 1, Inputs(()), Tally())
    answers = [([f'"{MARK}"'], {"prompt_tokens": 100}), (texts, {"prompt_tokens": n_prompt})]
    monkeypatch.setattr(agent, "_texts", lambda *_: answers.pop(0))
    assert agent._answer("/", {}, MARK, ("aider", 100, 0)) == MARK
    assert agent._answer("/", {}, MARK, ("aider", 100, 0)).startswith(found)


def seen(mb_per_h: float, n_blocks: int) -> list[Seen]:
    times_s = range(0, n_blocks * BLOCK_S, 5)
    noise = [(-1) ** (at // BLOCK_S) for at in times_s]
    return [
        Seen(at, 900 + mb_per_h * at / 3600 + extra, 0, 9, 0)
        for at, extra in zip(times_s, noise, strict=True)
    ]


@pytest.mark.parametrize("mb_per_h", [0, 50])
def test_the_slope_of_the_memory_has_an_error(mb_per_h):
    found = slope_of(seen(mb_per_h, 12))
    assert found is not None
    slope, error = found
    assert 0 < error < 5 and abs(slope - mb_per_h) < 2 * error


def test_a_short_run_has_no_slope():
    assert slope_of(seen(0, 2)) is None
