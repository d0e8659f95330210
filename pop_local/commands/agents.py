"""Coding agents that `pop-local launch` can start, and the settings that connect them to a server.

The settings are arguments and environment variables, so the agents' own files stay unchanged.
"""

from dataclasses import dataclass
from string import Template


@dataclass(frozen=True)
class Agent:
    """A coding agent.

    `program`: the executable. `install`: the command that installs it. `n_ctx`: context length in
    tokens, for the first prompt and a few turns. In `arguments` and in the values of `variables`,
    $url, $model and $n_ctx stand for a server's URL with /v1, a model's name and its context
    length.
    """

    program: str
    install: str
    n_ctx: int
    arguments: tuple[str, ...] = ()
    variables: tuple[tuple[str, str], ...] = ()

    def settings(self, url: str, model: str, n_ctx: int) -> tuple[list[str], dict[str, str]]:
        """Return the arguments and the environment variables for a server."""

        def filled(text: str) -> str:
            return Template(text).substitute(url=url, model=model, n_ctx=n_ctx)

        return [*map(filled, self.arguments)], {name: filled(v) for name, v in self.variables}


# The agents refuse to start without a key, which the server ignores.
AGENTS = {
    "opencode": Agent(
        program="opencode",
        install="npm install -g opencode-ai",
        n_ctx=16384,
        variables=(
            (
                "OPENCODE_CONFIG_CONTENT",
                '{"model": "pop-local/$model", "small_model": "pop-local/$model",'
                ' "provider": {"pop-local": {"npm": "@ai-sdk/openai-compatible",'
                ' "options": {"baseURL": "$url", "apiKey": "none"},'
                ' "models": {"$model": {"limit": {"context": $n_ctx, "output": 4096}}}}}}',
            ),
        ),
    ),
    "codex": Agent(
        program="codex",
        install="npm install -g @openai/codex",
        n_ctx=16384,
        arguments=(
            *("-c", "model_provider=pop-local", "-c", "model=$model"),
            *("-c", "model_context_window=$n_ctx"),
            *("-c", "model_providers.pop-local.name=pop-local"),
            *("-c", "model_providers.pop-local.base_url=$url"),
            *("-c", "model_providers.pop-local.wire_api=responses"),
            # While a long prompt is read, no event arrives.
            *("-c", "model_providers.pop-local.stream_idle_timeout_ms=3600000"),
        ),
    ),
    "aider": Agent(
        program="aider",
        install="python -m pip install aider-install && aider-install",
        n_ctx=8192,
        arguments=("--model", "openai/$model", "--no-show-model-warnings", "--timeout", "3600"),
        variables=(("OPENAI_API_BASE", "$url"), ("OPENAI_API_KEY", "none")),
    ),
    "qwen-code": Agent(
        program="qwen",
        install="npm install -g @qwen-code/qwen-code",
        n_ctx=32768,
        arguments=(
            *("--auth-type", "openai", "--model", "$model"),
            *("--openai-base-url", "$url", "--openai-api-key", "none"),
        ),
    ),
}
