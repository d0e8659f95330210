"""Send requests to the server application and read its responses."""

import json
from typing import Any

LONG = "the quick brown fox jumps over the lazy dog, " * 6
NAME = "tiny"
N_CTX = 1024
# Each of 32 rules has twice as many empty derivations as the next one.
BOMB = "".join(f"a{n} ::= a{n + 1} a{n + 1}\n" for n in range(32)) + 'a32 ::= ""'


def chat(client, content=LONG, **body):
    fixed = {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 8}
    return client.post("/v1/chat/completions", json=fixed | body)


def complete(client, prompt=LONG, **body):
    fixed = {"prompt": prompt, "temperature": 0, "max_tokens": 8}
    return client.post("/v1/completions", json=fixed | body)


def text_of(response) -> str:
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    return choice["message"]["content"] if "message" in choice else choice["text"]


def message_of(response) -> tuple[dict, str]:
    """Return a chat response's message and finish reason."""
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    return choice["message"], choice["finish_reason"]


def events(response) -> list:
    lines = [line for line in response.text.split("\n\n") if line and not line.startswith(":")]
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def body_for(route: str, text: str = "a") -> dict[str, Any]:
    """Return a request that all routes accept, because they ignore other routes' fields."""
    fields = {
        "messages": [{"role": "user", "content": text}],
        **dict.fromkeys(("prompt", "input", "content", "input_prefix", "input_suffix"), text),
        "tokens": [5],
        **dict.fromkeys(("max_tokens", "n_predict", "max_output_tokens"), 2),
        "options": {"num_predict": 2},
        "stream": False,
    }
    if route.endswith("/responses"):
        del fields["prompt"]  # a stored prompt in this API
    return fields


def error_of(response: Any) -> str:
    """Return an error's message after checking that its shape is the API's."""
    answer, path = response.json(), response.request.url.path
    error = answer["error"]
    assert isinstance(error, str) == path.startswith("/api/")
    assert (answer.get("type") == "error") == path.removeprefix("/v1").startswith("/messages")
    return error if isinstance(error, str) else error["message"]
