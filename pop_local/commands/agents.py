"""Coding agents that `pop-local launch` can start, and the settings that connect them to a server.

The settings are passed as arguments and environment variables. Settings files stay unchanged.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from string import Template


@dataclass(frozen=True)
class Agent:
    """A coding agent.

    `install`: the command that installs `program`. `n_ctx`: context length in tokens, enough for
    the first prompt and several turns. `variables`: environment variables (NAME=VALUE). `variables`
    and `arguments` may contain $url (the server's URL with /v1), $key (the server's API key),
    $model (a name), and $n_ctx.
    """

    program: str
    install: str
    n_ctx: int
    variables: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()

    def command(self, added: Sequence[str], **values: object) -> list[str]:
        """Return a command line. `added`: user arguments. `values`: url, key, model, and n_ctx."""
        words = ("env", *self.variables, self.program, *self.arguments)
        return [*(Template(word).substitute(values) for word in words), *added]


# The agents refuse to start without a key. While the server reads a long prompt, it sends no event,
# so the idle limits are raised to an hour.
AGENTS = {
    "opencode": Agent(
        program="opencode",
        install="npm install -g opencode-ai",
        n_ctx=16384,
        variables=(
            'OPENCODE_CONFIG_CONTENT={"model": "pop-local/$model",'
            ' "small_model": "pop-local/$model",'
            ' "provider": {"pop-local": {"npm": "@ai-sdk/openai-compatible",'
            ' "options": {"baseURL": "$url", "apiKey": "$key"},'
            ' "models": {"$model": {"limit": {"context": $n_ctx, "output": 4096}}}}}}',
        ),
    ),
    "codex": Agent(
        program="codex",
        install="npm install -g @openai/codex",
        n_ctx=16384,
        variables=("CODEX_POP_LOCAL_KEY=$key",),
        arguments=(
            *("-c", "model_provider=pop-local", "-c", "model=$model"),
            *("-c", "model_context_window=$n_ctx"),
            "-c",
            'model_providers.pop-local={name="pop-local", base_url="$url", wire_api="responses",'
            ' env_key="CODEX_POP_LOCAL_KEY",'
            " stream_idle_timeout_ms=3600000}",
        ),
    ),
    "aider": Agent(
        program="aider",
        install="python -m pip install aider-install && aider-install",
        n_ctx=8192,
        variables=("OPENAI_API_BASE=$url", "OPENAI_API_KEY=$key"),
        arguments=("--model", "openai/$model", "--no-show-model-warnings", "--timeout", "3600"),
    ),
    "qwen-code": Agent(
        program="qwen",
        install="npm install -g @qwen-code/qwen-code",
        n_ctx=32768,
        variables=("QWEN_STREAM_IDLE_TIMEOUT_MS=3600000",),
        arguments=(
            *("--auth-type", "openai", "--model", "$model"),
            *("--openai-base-url", "$url", "--openai-api-key", "$key"),
        ),
    ),
}
