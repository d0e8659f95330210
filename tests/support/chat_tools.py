"""Tools of requests, and llama.cpp's chat templates."""

from typing import Any

from support.paths import ROOT

TEMPLATES = {
    path.stem: path
    for path in sorted(
        ROOT.glob("patches/llama-cpp-python/build/*/src/vendor/llama.cpp/models/templates/*.jinja")
    )
}
QWEN = "Qwen-Qwen2.5-7B-Instruct"


def function(name: str, **properties: Any) -> dict[str, Any]:
    """Return a tool in the clients' format, with all arguments required."""
    schema = {"type": "object", "properties": properties, "required": [*properties]}
    described = {"name": name, "description": f"It is {name}.", "parameters": schema}
    return {"type": "function", "function": described}


# A random model soon completes one of these.
WEATHER = function("get_weather", city={"enum": ["Paris", "Rome"]})
DOUBLE = function("double", n={"type": "integer", "minimum": 0, "maximum": 9})
