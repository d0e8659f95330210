"""Chat templates, rendered in a child process with time and memory limits."""

from collections.abc import Sequence
from typing import Any

from pop_base.errors import PopError
from pop_local.engine.limited.process import KeptProcess
from pop_local.engine.llama import backend
from pop_local.engine.prompt import template_child

LIMIT_S = 5.0
LIMIT_BYTES = 512 * 2**20
# Templates of public models have tens of thousands of characters.
MAX_TEMPLATE_CHARACTERS = 1 << 20
_HINT = "download the model from a different publisher"

renderer = KeptProcess(
    template_child.TemplateRenderer,
    limit_s=LIMIT_S,
    limit_bytes=LIMIT_BYTES,
    task="rendering the chat template",
    hint=_HINT,
)


class Template:
    """A chat template and the vocabulary's BOS and EOS strings ("" if missing).

    Raises PopError if the template is invalid or exceeds the limits.
    """

    def __init__(self, source: str, vocab: Any) -> None:
        self.source = source
        api = backend.bindings()
        self.eos, self.bos = (
            api.llama_vocab_get_text(vocab, token).decode() if token >= 0 else ""
            for token in (api.llama_vocab_eos(vocab), api.llama_vocab_bos(vocab))
        )
        if len(source) > MAX_TEMPLATE_CHARACTERS:
            raise PopError(f"the chat template is too long: {len(source):,} characters", _HINT)
        try:
            renderer.call("rendered", source, None)
        except ValueError as error:
            raise PopError(f"the chat template is broken: {error}", _HINT) from error

    def render(self, messages: Sequence[Any]) -> str:
        """Render the messages up to the start of the answer.

        Raises ValueError if the template rejects the messages, or PopError if it exceeds a limit.
        """
        arguments = {
            **dict.fromkeys(("functions", "function_call", "tools", "tool_choice")),
            "messages": list(messages),
            "eos_token": self.eos,
            "bos_token": self.bos,
            "add_generation_prompt": True,
        }
        return str(renderer.call("rendered", self.source, arguments))
