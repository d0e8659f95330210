"""Every sampling option of the list works in requests, on the command line, and in `/set`."""

import pytest

from pop_local.config.sampler_options import SAMPLER_OPTIONS
from pop_local.engine.turn_options import TurnOptions
from pop_local.server.apis.messages import MessagesBody
from pop_local.server.apis.ollama import OllamaBody
from pop_local.server.apis.responses import ResponsesBody
from pop_local.server.request_bodies import ChatBody
from pop_local.server.task_factory import TaskFactory
from support.program import called
from support.scripted_chat import ScriptedModel, talk
from support.server_requests import chat

LIMITED = [option for name, option in SAMPLER_OPTIONS.items() if name != "seed"]
HELLO = {"messages": [{"role": "user", "content": "hello"}]}


def names(option) -> str:
    return option.name


def options_of(model, /, **fields) -> TurnOptions:
    return TaskFactory(model).chat(ChatBody.model_validate(HELLO | fields))[0].options


@pytest.mark.parametrize("option", SAMPLER_OPTIONS.values(), ids=names)
def test_request_sets_option(full, option):
    for name in (option.name, *option.aliases):
        assert getattr(options_of(full, **{name: 1}), option.name) == 1
    unset = getattr(TurnOptions(), option.name)
    assert getattr(options_of(full, **{option.name: None}), option.name) == unset
    ollama = OllamaBody(options={option.name: 1})
    assert getattr(options_of(full, **ollama.common_fields), option.name) == 1
    anthropic = MessagesBody.model_validate(HELLO | {"max_tokens": 8, option.name: 1})
    assert getattr(anthropic.chat(), option.name) == 1
    response = ResponsesBody.model_validate({"input": "hello", option.name: 1})
    assert getattr(response.chat(()), option.name) == 1
    if option.off is not None:
        assert getattr(options_of(full, **{option.name: option.off}), option.name) == 0


@pytest.mark.parametrize("option", LIMITED, ids=names)
def test_values_out_of_range_are_refused(client, option):
    for name in (option.name, *option.aliases):
        response = chat(client, **{name: option.most + 1})
        assert response.status_code == 400
        assert name in response.json()["error"]["message"]
    flag = f"--{option.name.replace('_', '-')}"
    done = called("run", "m.gguf", "hi", flag, option.most + 1, COLUMNS="200")
    assert done.returncode == 2
    assert f"Invalid value for '{flag}'" in done.stderr
    refused = talk(ScriptedModel(), f"/set {option.name} {option.most + 1}")[-1]
    assert refused.endswith(f"to {option.most:,} or 'default'.")


@pytest.mark.parametrize("option", SAMPLER_OPTIONS.values(), ids=names)
def test_set_accepts_option(option):
    assert talk(ScriptedModel(), f"/set {option.name} 1")[-1] == f"# {option.name} is 1."


def test_props_report_every_option(client):
    settings = client.get("/props").json()["default_generation_settings"]["params"]
    assert settings.keys() >= SAMPLER_OPTIONS.keys()
