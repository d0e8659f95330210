"""Requests with several answers, and infilling."""

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from starlette.datastructures import State

from pop_local.engine.chat_messages import Chunk
from pop_local.engine.prompt.prompt import Prompt
from pop_local.engine.turn_options import TurnOptions
from pop_local.server.job_responses import streamed_answer
from pop_local.server.replies import Reply
from pop_local.server.worker import Job, Task
from support.filling import by_hand
from support.server_requests import NAME, chat, complete, events, text_of

PROMPTS = ["one and two", "three and four", "one and two"]


def texts(response) -> list[str]:
    assert response.status_code == 200, response.text
    choices = response.json()["choices"]
    assert [choice["index"] for choice in choices] == list(range(len(choices)))
    return [choice["text"] for choice in choices]


def test_each_prompt_of_a_list_is_answered(client):
    alone = [complete(client, prompt) for prompt in PROMPTS]
    together = complete(client, PROMPTS)
    assert texts(together) == [answer.json()["choices"][0]["text"] for answer in alone]
    usage = together.json()["usage"]
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert usage[name] == sum(answer.json()["usage"][name] for answer in alone)
    assert usage["pop"]["reason"] is None


def test_each_of_n_answers_has_its_own_seed(client):
    warm = {"temperature": 1.5, "max_tokens": 12}
    several = texts(complete(client, PROMPTS[:2], n=2, seed=5, **warm))
    alone = [
        texts(complete(client, prompt, seed=seed, **warm))[0]
        for prompt in PROMPTS[:2]
        for seed in (5, 6)
    ]
    assert several == alone
    assert several[0] != several[1]


def test_chat_returns_several_answers(client):
    warm = {"temperature": 1.5, "seed": 5}
    choices = chat(client, n=2, **warm).json()["choices"]
    contents = [choice["message"]["content"] for choice in choices]
    assert contents == [text_of(chat(client, **warm | {"seed": seed})) for seed in (5, 6)]


def test_several_answers_are_streamed(client):
    fields = {"stream": True, "stream_options": {"include_usage": True}}
    *pieces, figures = events(complete(client, PROMPTS, **fields))
    streamed = ["", "", ""]
    for piece in pieces:
        (choice,) = piece["choices"]
        streamed[choice["index"]] += choice["text"]
    assert streamed == texts(complete(client, PROMPTS))
    reasons = [piece["choices"][0]["finish_reason"] for piece in pieces]
    assert [reason for reason in reasons if reason] == ["length"] * 3
    assert figures["usage"]["completion_tokens"] == 24
    assert len({piece["id"] for piece in pieces}) == 1


def test_disconnect_skips_remaining_answers():
    begun: list[Job] = []

    def jobs() -> Iterator[Job]:
        for _ in range(3):
            begun.append(Job(Task(Prompt([1], ()), TurnOptions(), reason="test")))
            begun[-1].put(Chunk("a"))
            yield begun[-1]

    async def hang_up() -> None:
        state = State()
        served: Any = SimpleNamespace(name=NAME)
        stream = streamed_answer(state, jobs(), Reply(served))
        while b'"a"' not in await anext(stream):
            pass
        await stream.aclose()  # Starlette does this at a disconnect
        assert state.client_gone
        assert [job.cancelled.is_set() for job in begun] == [True]

    asyncio.run(asyncio.wait_for(hang_up(), timeout=20))


def test_suffix_requests_infill(filler):
    model, client = filler
    before, after = "def f(", "): <|fim_middle|>"  # plain text here
    tokens = by_hand(model, before, after)
    expected = texts(complete(client, tokens))
    answer = complete(client, before, suffix=after)
    assert texts(answer) == expected
    assert answer.json()["usage"]["prompt_tokens"] == len(tokens)
    assert (
        texts(complete(client, model.engine.context.vocabulary.tokenize(before), suffix=after))
        == expected
    )
    assert texts(complete(client, before, suffix="")) == texts(complete(client, before))
