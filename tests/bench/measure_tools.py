"""Measure a real model's tool calls, through the server. Not a test.

    python tests/bench/measure_tools.py MODEL.gguf [--turns] [--json]

Forty requests have four tools: with a required call, a named call, and the model's choice (twenty
need a tool and twenty need none). A call is valid if its arguments are JSON that matches the tool's
schema; since llguidance produced them, a separate check validates them. --turns runs only an
agent's two turns: a long system prompt with a call, and its result, ten seconds later. Temperature
is 0, with one thread.
"""

import argparse
import json
import time
from collections import Counter
from typing import Any

import openai

from shared import served

CITIES = ["Paris", "Rome", "Oslo", "Lima", "Cairo", "Tokyo", "Delhi", "Quito", "Riga", "Bonn"]
FILES = [
    "notes.txt",
    "main.py",
    "README.md",
    "a.csv",
    "log.txt",
    "b.py",
    "data.json",
    "c.toml",
    "todo.md",
    "run.sh",
]
MAILS = ["Ann", "Bob", "Eve", "Tom", "Max", "Lea", "Jon", "Ida", "Sam", "Zoe"]
PAIRS = [(3, 4), (12, 30), (7, 9), (100, 1), (5, 5), (8, 13), (21, 2), (60, 6), (11, 14), (2, 90)]


def tool(name: str, description: str, **properties: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "required": [*properties]}
    function = {"name": name, "description": description, "parameters": schema}
    return {"type": "function", "function": function}


TOOLS = [
    tool("get_weather", "Get the weather in a city", city={"type": "string"}),
    tool("add", "Add two numbers", a={"type": "number"}, b={"type": "number"}),
    tool("read_file", "Read a file of the project", path={"type": "string"}),
    tool("send_mail", "Send a mail", to={"type": "string"}, text={"type": "string"}),
]
NEEDED = [
    *((f"What is the weather like in {city} today?", "get_weather") for city in CITIES),
    *((f"Use the tool to add {a} and {b}.", "add") for a, b in PAIRS),
    *((f"Show me what is in the file {name}.", "read_file") for name in FILES),
    *((f"Send {name} a mail that says hello.", "send_mail") for name in MAILS),
]
RULE = "Before you change a file, read it, and say in one sentence what you are about to do."
TOOL_S = 10.0
NOT_NEEDED = [
    *("Who wrote Hamlet?", "What is a noun?", "Say hello in French.", "Name three colours."),
    *("What is the capital of Spain?", "Explain recursion in one sentence.", "Tell me a joke."),
    *("What does HTTP stand for?", "Translate 'cat' into German.", "How many legs has a spider?"),
    *("What is a prime number?", "Who was Ada Lovelace?", "Give me a synonym of big."),
    *("Is the earth flat?", "What is photosynthesis?", "Write a haiku about rain."),
    *("What is the past tense of go?", "Which planet is the largest?", "What is a GPU?"),
    "How do you spell necessary?",
]


def is_valid(call: Any) -> bool:
    schema = next(one for one in TOOLS if one["function"]["name"] == call.function.name)
    properties = schema["function"]["parameters"]["properties"]
    arguments = json.loads(call.function.arguments)
    kinds: dict[str, Any] = {"string": str, "number": (int, float)}
    return arguments.keys() == properties.keys() and all(
        isinstance(arguments[name], kinds[one["type"]]) for name, one in properties.items()
    )


def measured(client: openai.OpenAI, asked: list[tuple[str, str]], mode: str) -> Counter[str]:
    found: Counter[str] = Counter()
    for question, wanted in asked:
        named = {"type": "function", "function": {"name": wanted}}
        answer = client.chat.completions.create(
            model="any",
            messages=[{"role": "user", "content": question}],
            tools=TOOLS,
            tool_choice=named if mode == "named" else mode,
            temperature=0,
            max_tokens=200,
        )
        calls = answer.choices[0].message.tool_calls or []
        found["requests"] += 1
        found["called"] += bool(calls)
        found["valid"] += bool(calls) and all(is_valid(call) for call in calls)
        found["right tool"] += [call.function.name for call in calls] == [wanted]
        found["tokens"] += answer.usage.completion_tokens if answer.usage else 0
    return found


def turns(client: openai.OpenAI) -> dict[str, Any]:
    """Return the figures of an agent's first and second request."""
    rules = "\n".join(f"Rule {n}: {RULE}" for n in range(100))
    messages: list[Any] = [{"role": "system", "content": rules}]
    messages.append({"role": "user", "content": NEEDED[0][0]})
    found: dict[str, Any] = {}
    for name in ("first", "second"):
        answer = client.chat.completions.create(
            model="any",
            messages=messages,
            tools=TOOLS,
            tool_choice="required" if name == "first" else "auto",
            temperature=0,
            max_tokens=60,
        )
        usage: Any = answer.usage
        found[name] = usage.model_dump()
        message = answer.choices[0].message
        messages.append(message.model_dump(exclude_none=True))
        for call in message.tool_calls or []:
            time.sleep(TOOL_S)
            content = "It is raining, 14 degrees."
            messages.append({"role": "tool", "tool_call_id": call.id, "content": content})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--turns", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with served(options.model, "--name", "any") as server:
        client = openai.OpenAI(base_url=server.api, api_key="none", max_retries=0)
        if options.turns:
            print(json.dumps(turns(client), indent=None if options.json else 1))
            return
        rows = {
            "required": measured(client, NEEDED, "required"),
            "named": measured(client, NEEDED, "named"),
            "auto, needed": measured(client, NEEDED[::2], "auto"),
            "auto, not needed": measured(client, [(text, "") for text in NOT_NEEDED], "auto"),
        }
    if options.json:
        print(json.dumps(rows))
        return
    names = ("requests", "called", "valid", "right tool", "tokens")
    print(f"{'':18}" + "".join(f"{name:>12}" for name in names))
    for mode, found in rows.items():
        print(f"{mode:18}" + "".join(f"{found[name]:12,}" for name in names))


if __name__ == "__main__":
    main()
